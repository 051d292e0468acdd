"""P-tuning: virtual tokens at chosen places inside the input, from a prompt encoder (Liu et al. 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapted import Delta, adapt
from lightning_peft.errors import ConfigError
from lightning_peft.match import candidates, select
from lightning_peft.method import Method, check_number
from lightning_peft.methods.prompt_tuning import input_embeddings, is_table, spread
from lightning_peft.prompting.backbone import backbones
from lightning_peft.prompting.prefix import normal_
from lightning_peft.prompting.prompt import Prompt, PromptEncoder
from lightning_peft.prompting.virtual import PromptedEmbedding, VirtualTokens, connect, disconnect
from lightning_peft.trainable import require


@dataclass(frozen=True)
class PTuning(Method):
    """Train ``n`` input vectors through a small network, ``MLP(BiLSTM(E))``, at places given in the batch.

    The i-th placeholder id of a row is replaced by vector i; length, mask, labels and positions stay as they are.
    A batch without any placeholder gets the vectors in front of its first real token, as `PromptTuning` does
    (transformers backbones only). The LSTM has two layers with ``dim // 2`` numbers in each direction.

    Args:
        num_virtual_tokens: number n of vectors, and of placeholders in each row.
        encoder: ``lstm`` or ``mlp`` as in the paper, ``none`` for the vectors alone (what `fold` leaves).
        lstm_hidden: numbers in each direction of the LSTM; ``dim // 2`` by default.
        placeholder_id: the id that marks a place; ``config.vocab_size`` by default, the first id outside the
            vocabulary.
        target_modules: the `nn.Embedding` that looks the ids up; found by itself in transformers models.
        modules_to_save: further modules, trained and saved in full (heads).
        init_seed: seed of the start values.

    Raises:
        NoMatchError: no input embedding was found.
        ConfigError: a value that cannot work; a row with too few or too many placeholders (at the call).

    >>> import torch
    >>> from torch import nn
    >>> from lightning_peft import PTuning, inject
    >>> net = nn.Sequential(nn.Embedding(10, 4))
    >>> inject(net, PTuning(num_virtual_tokens=2, target_modules="0"))
    >>> net(torch.tensor([[10, 3, 10, 5]])).shape  # 10 = size of the vocabulary: a placeholder
    torch.Size([1, 4, 4])
    """

    paper: ClassVar[str] = "GPT Understands, Too, Liu et al. 2021, arXiv:2103.10385"
    mergeable: ClassVar[bool] = False
    why_not_mergeable: ClassVar[str] = "its vectors are inputs of the model, not a change of weights."
    identity_at_init: ClassVar[bool] = False
    default_lr: ClassVar[float] = 5e-3
    lr_range: ClassVar[tuple[float, float]] = (1e-5, 2e-2)
    lr_source: ClassVar[str] = (
        "ours: MiniLM, BBC headlines, 150 steps (1e-3 of peft's guide was too slow there); the authors' few-shot code,"
        " which trains the model too: 1e-4"
    )
    free_fields: ClassVar[frozenset[str]] = Method.free_fields | {"placeholder_id"}

    num_virtual_tokens: int = 20
    encoder: Literal["lstm", "mlp", "none"] = "lstm"
    lstm_hidden: int | None = None
    placeholder_id: int | None = None
    target_modules: str | list[str] | None = None
    modules_to_save: str | list[str] | None = None
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_number("PTuning", "num_virtual_tokens", self.num_virtual_tokens, 1)
        if self.encoder not in ("lstm", "mlp", "none"):
            raise ConfigError(f"PTuning(encoder={self.encoder!r}): choose one of lstm, mlp, none.")
        if self.lstm_hidden is not None:
            check_number("PTuning", "lstm_hidden", self.lstm_hidden, 1)
            if self.encoder != "lstm":
                raise ConfigError(f"PTuning(encoder={self.encoder!r}, lstm_hidden=…): there is no LSTM to size.")

    def adapts(self, module: nn.Module) -> bool:
        """Embeddings."""
        return is_table(module)

    def targets(self, model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
        """The embedding that looks the ids up."""
        if self.target_modules is None:
            return input_embeddings(self, model, prefix, {})
        options = {"prefix": prefix, "method": "PTuning"}
        return select(candidates(model), self.target_modules, self.adapts, self.is_linear, **options)

    def adapt(self, module: nn.Module, name: str) -> None:
        """Give the embedding its prompt encoder."""
        n, dim, generator = self.num_virtual_tokens, module.embedding_dim, self.generator(name)
        if self.encoder == "none":
            delta: Delta = Prompt(module.weight, n, dim)
            normal_(delta.prompt, generator, spread(module))
        else:
            hidden = (self.lstm_hidden or max(1, dim // 2)) if self.encoder == "lstm" else None
            delta = PromptEncoder(module.weight, n, dim, hidden)
            delta.fill(generator)
        placeholder = module.num_embeddings if self.placeholder_id is None else self.placeholder_id
        adapt(module, PromptedEmbedding, delta, Placeholders(module, n, placeholder), name)

    def connect(self, model: nn.Module, adapted: Mapping[str, nn.Module]) -> None:
        """Hook the embedding to its backbone, for batches without placeholders."""
        homes = {id(table): backbone for backbone, table in backbones(model)}
        for embedding in adapted.values():
            backbone = homes.get(id(embedding))
            if backbone is None:
                continue
            tokens = embedding._adapter
            tokens.hooked = True
            connect(model, tokens, backbone)
            if self.placeholder_id is None:
                tokens.placeholder = backbone.config.vocab_size

    def detach(self, model: nn.Module, names: list[str]) -> None:
        """Take the vectors and the hooks out again."""
        for name in names:
            disconnect(model, model.get_submodule(name)._adapter)
        super().detach(model, names)

    def fold(self, model: nn.Module) -> None:
        """Replace the prompt encoder by the vectors it gives, for inference and export.

        In place; the model then holds, saves and loads as the same method with ``encoder="none"``.

        >>> from torch import nn
        >>> from lightning_peft import PTuning, inject, trainable_names
        >>> net, method = nn.Sequential(nn.Embedding(10, 4)), PTuning(target_modules="0")
        >>> inject(net, method); method.fold(net); trainable_names(net)
        ['0.delta.prompt']
        """
        injection, _, root = require(model)
        place = injection.methods.index(self)
        for name in injection.targets[place]:
            module = root.get_submodule(name)
            if isinstance(module.delta, PromptEncoder):
                module.delta = module.delta.folded()
        injection.methods[place] = dataclasses.replace(self, encoder="none", lstm_hidden=None)
        injection.trained = [n for n, p in root.named_parameters() if p.requires_grad]


class Placeholders(VirtualTokens):
    """Virtual tokens for which placeholders stand: the i-th placeholder of a row for vector i."""

    def __init__(self, embedding: nn.Module, n: int, placeholder: int) -> None:
        super().__init__(embedding, n)
        self.placeholder = placeholder
        self.hooked = False
        self.met = False  # placeholders were looked up ahead of the backbone (models of several modalities)
        self.used = False  # placeholders were seen at all, which an export must know

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Number the placeholders on their way into the backbone: inside, rows may be transposed, and some models look
        for their largest id."""
        bound = dict(zip(self.names, args, strict=False)) | kwargs
        ids = bound.get("input_ids")
        if self.active and ids is not None and self.count(found := ids == self.placeholder):
            self.places = None
            return (), bound | {"input_ids": self.numbered(ids, found)}
        return super().before(module, args, kwargs)

    def fill(self, ids: Tensor) -> Tensor:
        """Embeddings of ids with placeholders."""
        found = ids == self.placeholder
        self.met = self.count(found)
        if not self.hooked and not self.met:
            raise ConfigError(
                f"The batch has no placeholder ({self.placeholder}) for the {self.n} virtual tokens of PTuning; only"
                " transformers backbones get them put in front."
            )
        return super().fill(self.numbered(ids, found))

    def numbered(self, ids: Tensor, found: Tensor) -> Tensor:
        """The ids, the i-th placeholder of each row as ``-1 - i``."""
        return torch.where(found, -found.cumsum(dim=-1), ids)

    def count(self, found: Tensor) -> bool:
        """Whether there are placeholders; raises unless there are n in every row."""
        counts = found.sum(dim=-1).flatten()
        wrong = (counts != self.n).nonzero().flatten().tolist()
        if len(wrong) == len(counts) and not counts.any():
            return False
        if wrong:
            raise ConfigError(
                f"Row {wrong[0]} of the batch has {int(counts[wrong[0]])} placeholders (id {self.placeholder}), but"
                f" PTuning(num_virtual_tokens={self.n}) needs {self.n} in every row, or none in the whole batch."
            )
        self.used = True
        return True

    def wanted(self, states: Tensor) -> bool:
        """A batch with placeholders needs nothing put in front."""
        if states.is_floating_point():
            met, self.met = self.met, False
            return not met
        return True
