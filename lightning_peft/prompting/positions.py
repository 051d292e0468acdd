"""Positions of a model's tokens, moved on by the length of a prefix."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapted import Adapted, AdapterState
from lightning_peft.errors import ConfigError

#: names that transformers gives to tables of learned positions
POSITION_TABLES = ("position_embeddings", "position_embedding", "wpe", "embed_positions")
#: arguments that say how many tokens stand before; the first since transformers 5.24
PAST_LENGTHS = ("cache_length", "past_key_values_length")


class ShiftState(AdapterState):
    """What a module with shifted positions remembers.

    Args:
        shift: by how many positions.
        kind: class of the module, for the arguments of its forward.
    """

    def __init__(self, shift: int, kind: type[nn.Module]) -> None:
        super().__init__()
        self.shift = shift
        self.argument_names = tuple(inspect.signature(kind.forward).parameters)[1:]


class ShiftedPositions(Adapted):
    """A rotary embedding or a table of positions that sees every position further on. It trains nothing.

    Padded tokens keep the position that the model gives them, as they do beside a key-value cache of that length: the
    table's ``padding_idx`` in RoBERTa and its relatives, -1 in OPT.
    """

    _adapter: ShiftState

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base, for later positions."""
        if not self._adapter.active:
            return self._base_forward(*args, **kwargs)
        names = self._adapter.argument_names
        arguments = dict(zip(names, args, strict=False))
        arguments.update(kwargs)
        past_length_name = next((name for name in PAST_LENGTHS if name in names), None)
        # What tells the positions is either there as ids, or counted from a past length, or the one argument there is.
        if arguments.get("position_ids") is not None:
            arguments["position_ids"] = self._later(arguments["position_ids"])
        elif past_length_name is not None:
            past_length = arguments.get(past_length_name, 0)
            arguments[past_length_name] = past_length + self._adapter.shift
            tokens = arguments.get(names[0])
            if tokens is None:
                tokens = arguments["inputs_embeds"]
            shape = getattr(tokens, "shape", tokens)  # ids, a mask, or just their shape
            self._check_room(shape[1] + past_length)
        else:
            padding = getattr(self, "padding_idx", None)
            arguments[names[0]] = self._later(arguments[names[0]], padding)
        return self._base_forward(**arguments)

    def _later(self, positions: Tensor, padding: int | None = None) -> Tensor:
        """Move positions on. Those of padded tokens stay: they are below zero, or equal to ``padding``."""
        # Only on the CPU does looking at the largest position cost nothing; elsewhere it waits for the device.
        can_look = positions.device.type == "cpu" and positions.numel() > 0 and not torch.compiler.is_compiling()
        self._check_room(int(positions.max()) + 1 if can_look else positions.shape[-1])
        padded = positions < 0
        if padding is not None:
            padded = padded | (positions == padding)
        return torch.where(padded, positions, positions + self._adapter.shift)

    def _check_room(self, length: Any) -> None:
        """Raise where a table has no row for the last position."""
        shift = self._adapter.shift
        num_rows: Any = getattr(self, "num_embeddings", None)
        # A static cache counts in a tensor, and reading that would wait for the device.
        if num_rows is None or isinstance(length, Tensor):
            return
        most: int = num_rows - getattr(self, "offset", 0)
        if length + shift > most:
            raise ConfigError(
                f"{length} positions and {shift} virtual tokens make {length + shift}, the model has {most}. Shorten"
                " the input, lower num_virtual_tokens, or use PrefixTuning(positions='keep'), which takes none."
            )


def shiftable(module: nn.Module, name: str, parent: nn.Module | None) -> bool:
    """Whether a module turns token positions into embeddings. Tables of image patches have no room to shift."""
    arguments = inspect.signature(type(module).forward).parameters
    if type(module).__name__.endswith("RotaryEmbedding"):
        return "position_ids" in arguments
    is_sinusoid = any(past_length in arguments for past_length in PAST_LENGTHS)  # computed, without a table
    if not isinstance(module, nn.Embedding) and not is_sinusoid:
        return False
    if name.rpartition(".")[2] not in POSITION_TABLES or parent is None:
        return False
    # Beside the positions of tokens stands a vocabulary; two rows or fewer are token types.
    for sibling in parent.children():
        if isinstance(sibling, nn.Embedding) and sibling is not module and sibling.num_embeddings > 2:
            return True
    return False
