"""Positions of a model's tokens, moved on by the length of a prefix."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapted import Adapted, AdapterState
from lightning_peft.errors import ConfigError

#: names that transformers gives to tables of learned positions
TABLES = ("position_embeddings", "position_embedding", "wpe", "embed_positions")
#: arguments that say how many tokens stand before; the first since transformers 5.24
COUNTERS = ("cache_length", "past_key_values_length")


class ShiftState(AdapterState):
    """How far positions are shifted, and the names of the arguments of the module's forward.

    Args:
        n: by how many positions.
        kind: class of the module.
    """

    def __init__(self, n: int, kind: type[nn.Module]) -> None:
        super().__init__()
        self.n = n
        self.argument_names = tuple(inspect.signature(kind.forward).parameters)[1:]


class ShiftedPositions(Adapted):
    """A rotary embedding or a table of positions that sees every position ``n`` further on. It trains nothing.

    Padded tokens keep the position that the model gives them, as they do beside a key-value cache of length ``n``:
    the table's ``padding_idx`` in RoBERTa and its relatives, -1 in OPT.
    """

    _adapter: ShiftState

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base, for later positions."""
        if not self._adapter.active:
            return self._base_forward(*args, **kwargs)
        names = self._adapter.argument_names
        bound = dict(zip(names, args, strict=False)) | kwargs
        if bound.get("position_ids") is not None:
            bound["position_ids"] = self._later(bound["position_ids"])
        elif counter := next((name for name in COUNTERS if name in names), None):
            past = bound.get(counter, 0)
            bound[counter] = past + self._adapter.n
            tokens = bound.get(names[0])  # ids, a mask, or just their shape
            tokens = bound["inputs_embeds"] if tokens is None else tokens
            self._check_room(getattr(tokens, "shape", tokens)[1] + past)
        else:
            bound[names[0]] = self._later(bound[names[0]], padding=getattr(self, "padding_idx", None))
        return self._base_forward(**bound)

    def _later(self, positions: Tensor, padding: int | None = None) -> Tensor:
        """The positions, moved on; those of padded tokens (below zero, or equal to ``padding``) stay."""
        known = positions.device.type == "cpu" and positions.numel() and not torch.compiler.is_compiling()
        self._check_room(int(positions.max()) + 1 if known else positions.shape[-1])  # looking costs a wait elsewhere
        padded = positions < 0
        if padding is not None:
            padded = padded | (positions == padding)
        return torch.where(padded, positions, positions + self._adapter.n)

    def _check_room(self, length: Any) -> None:
        """Raise where a table has no row for the last position."""
        n, rows = self._adapter.n, getattr(self, "num_embeddings", None)
        if rows is None or isinstance(length, Tensor):
            return
        most = rows - getattr(self, "offset", 0)
        if length + n > most:
            raise ConfigError(
                f"{length} positions and {n} virtual tokens make {length + n}, the model has {most}. Shorten the input,"
                " lower num_virtual_tokens, or use PrefixTuning(positions='keep'), which takes none."
            )


def shiftable(module: nn.Module, name: str, parent: nn.Module | None) -> bool:
    """Whether a module turns token positions into embeddings. Tables of image patches have no room to shift."""
    if type(module).__name__.endswith("RotaryEmbedding"):
        return "position_ids" in inspect.signature(type(module).forward).parameters
    counts = set(COUNTERS) & set(inspect.signature(type(module).forward).parameters)  # sinusoids without a table
    table = (isinstance(module, nn.Embedding) or counts) and name.rpartition(".")[2] in TABLES
    siblings = parent.children() if parent is not None else ()
    return bool(table) and any(
        isinstance(m, nn.Embedding) and m is not module and m.num_embeddings > 2 for m in siblings
    )
