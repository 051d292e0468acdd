"""P-tuning: virtual tokens at chosen places inside the input, from a prompt encoder (Liu et al. 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapted import Delta, adapt
from lightning_peft.errors import ConfigError
from lightning_peft.match import candidates, select
from lightning_peft.method import Method, check_number
from lightning_peft.methods.prompt_tuning import input_embeddings, is_table, spread
from lightning_peft.model.adapters import Adapters, adapted_modules
from lightning_peft.prompting.backbone import backbones
from lightning_peft.prompting.prefix import normal_
from lightning_peft.prompting.prompt import Prompt, PromptEncoder
from lightning_peft.prompting.virtual import PromptedEmbedding, VirtualTokens, connect, disconnect

#: attribute of an id tensor on a device: its placeholders in each row, counted before it went there
NOTE = "_lightning_peft_placeholders"


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

    def before_transfer(self, model: nn.Module, batch: Any) -> Any:
        """Count the placeholders while the ids are on the CPU."""
        return note_counts(model, batch)

    def after_transfer(self, model: nn.Module, batch: Any, seen: Any) -> None:
        """Write the counts beside the ids on the device."""
        for place, ids in id_tensors(batch):
            if place in seen:
                setattr(ids, NOTE, (version_of(ids), seen[place]))

    def fold(self, model: nn.Module) -> None:
        """Replace the prompt encoder by the vectors it gives, for inference and export.

        In place; the model then holds, saves and loads as the same method with ``encoder="none"``.

        >>> from torch import nn
        >>> from lightning_peft import PTuning, inject, trainable_names
        >>> net, method = nn.Sequential(nn.Embedding(10, 4)), PTuning(target_modules="0")
        >>> inject(net, method); method.fold(net); trainable_names(net)
        ['0.delta.prompt']
        """
        adapters = Adapters.of(model)
        for module in adapters.modules_of(self):
            if isinstance(module.delta, PromptEncoder):
                module.delta = module.delta.folded()
        adapters.replace_method(self, dataclasses.replace(self, encoder="none", lstm_hidden=None))


class Placeholders(VirtualTokens):
    """Virtual tokens for which placeholders stand: the i-th placeholder of a row for vector i.

    Whether a batch has placeholders decides about the length of the sequence, so the program must know it, and reading
    it from ids on a device makes it wait. Ids on the CPU are counted there, also those that the `PEFT` callback sees
    before they leave for the device (`note_counts`). Where a training loop of the user's own brings its ids on the
    device, the first batch is counted; later ones are taken to be alike, and their counts are looked at when they have
    arrived by themselves.
    """

    def __init__(self, embedding: nn.Module, n: int, placeholder: int) -> None:
        super().__init__(embedding, n)
        self.placeholder = placeholder
        self.hooked = False
        self.used = False  # placeholders were seen at all, which an export must know
        #: the ids that were looked up last: ahead of the backbone in models of several modalities
        self.looked_up: Tensor | None = None
        #: whether the first batch that came on the device had placeholders; None before it, and outside training
        self.first_had: bool | None = None
        self.arriving: list[ArrivingCounts] = []

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Number the placeholders on their way into the backbone: inside, rows may be transposed, and some models look
        for their largest id."""
        bound = dict(zip(self.names, args, strict=False)) | kwargs
        ids = bound.get("input_ids")
        if self.active and ids is not None and self.has_placeholders(ids):
            self.places = None
            return (), bound | {"input_ids": self.numbered(ids)}
        return super().before(module, args, kwargs)

    def fill(self, ids: Tensor) -> Tensor:
        """Embeddings of ids with placeholders."""
        if self.hooked:
            self.looked_up = ids  # counted only if the backbone is given embeddings and no ids
        elif not self.has_placeholders(ids):
            raise ConfigError(
                f"The batch has no placeholder ({self.placeholder}) for the {self.n} virtual tokens of PTuning; only"
                " transformers backbones get them put in front."
            )
        return super().fill(self.numbered(ids))

    def numbered(self, ids: Tensor) -> Tensor:
        """The ids, the i-th placeholder of each row as ``-1 - i``."""
        found = ids == self.placeholder
        return torch.where(found, -found.cumsum(dim=-1), ids)

    def wanted(self, states: Tensor) -> bool:
        """A batch with placeholders needs nothing put in front."""
        ids, self.looked_up = self.looked_up, None
        if states.is_floating_point():
            return ids is None or not self.has_placeholders(ids, exactly=True)
        return True

    # ---- counting --------------------------------------------------------------------------------------------------
    def has_placeholders(self, ids: Tensor, exactly: bool = False) -> bool:
        """Whether there are placeholders; raises unless there are n in every row.

        Args:
            ids: rows of ids.
            exactly: whether these very ids must be counted, whatever the first batch had.
        """
        noted = note_on(ids).get(self.placeholder)
        if noted is not None:
            return self.judged(noted)
        if ids.device.type == "cpu":
            return self.judged(self.counts(ids).tolist())
        self.check_arrived()
        remembers = self.embedding.training and torch.is_grad_enabled() and not exactly
        if remembers and self.first_had is not None:
            self.arriving.append(ArrivingCounts(self.counts(ids)))
            return self.first_had
        had = self.judged(self.counts(ids).cpu().tolist())
        self.first_had = had if remembers else None
        return had

    def counts(self, ids: Tensor) -> Tensor:
        """Placeholders in each row."""
        return (ids == self.placeholder).sum(dim=-1).flatten()

    def judged(self, counts: list[int]) -> bool:
        """Whether there are placeholders, by their numbers in the rows of a batch; raises for a wrong number."""
        if not any(counts):
            return False
        for row, count in enumerate(counts):
            if count != self.n:
                raise ConfigError(
                    f"Row {row} of the batch has {count} placeholders (id {self.placeholder}), but"
                    f" PTuning(num_virtual_tokens={self.n}) needs {self.n} in every row, or none in the whole batch."
                )
        self.used = True
        return True

    def check_arrived(self) -> None:
        """Raise if the counts of an earlier batch have arrived from the device and are not as expected."""
        while self.arriving and (counts := self.arriving[0].values()) is not None:
            self.arriving.pop(0)
            wanted = self.n if self.first_had else 0
            for row, count in enumerate(counts):
                if count != wanted:
                    raise ConfigError(
                        f"Row {row} of an earlier batch has {count} placeholders (id {self.placeholder}); PTuning"
                        f" (num_virtual_tokens={self.n}) took it to have {wanted}, as the first batch had. In a loop"
                        " that brings its ids on the device all batches of a training run must be alike."
                    )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"looked_up": None, "first_had": None, "arriving": []}


class ArrivingCounts:
    """Numbers on their way from a device to the CPU; nothing waits for them."""

    def __init__(self, counts: Tensor) -> None:
        # pages that the device can write to by itself; no count is negative, so these numbers show what is missing
        self._host = torch.full(counts.shape, -1, dtype=counts.dtype, pin_memory=counts.is_cuda)
        self._host.copy_(counts, non_blocking=True)

    def values(self) -> list[int] | None:
        """The numbers, or None while some are on their way."""
        values = self._host.tolist()
        return None if -1 in values else values


def note_counts(model: nn.Module, batch: Any) -> dict[tuple, dict[int, list[int]]]:
    """The placeholders in each row of the id tensors of a batch that is still on the CPU, by their places in it."""
    tables = [layer._adapter for _, layer in adapted_modules(model) if isinstance(layer._adapter, Placeholders)]
    notes: dict[tuple, dict[int, list[int]]] = {}
    for place, ids in id_tensors(batch):
        if ids.device.type == "cpu":
            notes[place] = {table.placeholder: table.counts(ids).tolist() for table in tables}
    return notes


def note_on(ids: Tensor) -> dict[int, list[int]]:
    """What `note_counts` found in these ids, if they are still as they were."""
    version, counts = getattr(ids, NOTE, (None, {}))
    return counts if version == version_of(ids) else {}


def version_of(tensor: Tensor) -> int | None:
    """A number that grows with each change in place; tensors made in inference mode have none."""
    return None if tensor.is_inference() else tensor._version


def id_tensors(batch: Any, place: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    """The tensors of whole numbers in a batch of mappings, lists and tuples, each with its place in it."""
    if isinstance(batch, Tensor):
        if batch.ndim and batch.dtype in (torch.int32, torch.int64):
            yield place, batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for key, part in batch.items() if isinstance(batch, Mapping) else enumerate(batch):
            yield from id_tensors(part, (*place, key))
