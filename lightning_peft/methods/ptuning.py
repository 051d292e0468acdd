"""P-tuning: virtual tokens at chosen places inside the input, from a prompt encoder (Liu et al. 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapted import adapt
from lightning_peft.errors import ConfigError
from lightning_peft.match import candidates, select
from lightning_peft.method import Method, check_number
from lightning_peft.methods.prompt_tuning import detach_tokens, input_embeddings, is_table, spread
from lightning_peft.model.adapters import Adapters, adapted_modules
from lightning_peft.prompting.backbone import backbones, embedding_of
from lightning_peft.prompting.call import Call
from lightning_peft.prompting.prefix import normal_
from lightning_peft.prompting.prompt import Prompt, PromptEncoder
from lightning_peft.prompting.virtual import PromptedEmbedding, VirtualTokens, connect

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
    reference_lr: ClassVar[float] = 5e-3
    lr_width_exponent: ClassVar[float] = 0.0
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
            return input_embeddings(self, model, prefix)
        options = {"prefix": prefix, "method": "PTuning"}
        return select(candidates(model), self.target_modules, self.adapts, self.is_linear, **options)

    def adapt(self, module: nn.Module, name: str) -> None:
        """Give the embedding its prompt encoder."""
        table: Any = module
        count, dim, generator = self.num_virtual_tokens, table.embedding_dim, self.generator(name)
        delta: Prompt | PromptEncoder
        if self.encoder == "none":
            delta = Prompt(table.weight, count, dim)
            normal_(delta.prompt, generator, spread(table))
        else:
            hidden = None
            if self.encoder == "lstm":
                hidden = self.lstm_hidden or max(1, dim // 2)
            delta = PromptEncoder(table.weight, count, dim, hidden)
            delta.fill(generator)
        placeholder = table.num_embeddings if self.placeholder_id is None else self.placeholder_id
        adapt(table, PromptedEmbedding, delta, Placeholders(count, placeholder), name)

    def connect(self, model: nn.Module, adapted: Mapping[str, nn.Module]) -> None:
        """Hook the embedding to its backbone, for batches without placeholders."""
        backbone_of = {id(table): backbone for backbone, table in backbones(model)}
        for embedding in adapted.values():
            backbone = backbone_of.get(id(embedding))
            if backbone is None:  # an embedding that the user named, outside of transformers
                continue
            tokens = embedding._adapter
            assert isinstance(tokens, Placeholders)
            connect(model, tokens, backbone)
            if self.placeholder_id is None:
                tokens.placeholder = backbone.config.vocab_size

    def detach(self, model: nn.Module, names: list[str]) -> None:
        """Take the vectors and the hooks out again."""
        detach_tokens(model, names)
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

    Args:
        num_virtual_tokens: how many placeholders each row must have.
        placeholder: the id that marks a place.
    """

    def __init__(self, num_virtual_tokens: int, placeholder: int) -> None:
        super().__init__(num_virtual_tokens)
        self.placeholder = placeholder
        #: whether placeholders were seen at all, which an export must know
        self.used = False
        # What a run of training remembers from batch to batch, where its ids come on the device:
        #: whether the first batch had placeholders; None before it, and outside training
        self.first_had: bool | None = None
        #: counts of later batches that are on their way to the CPU
        self.arriving: list[ArrivingCounts] = []

    def marked_ids(self, backbone: nn.Module, call: Call) -> Tensor | None:
        """The ids with their placeholders numbered, or None where there are none.

        Inside the backbone rows may be transposed, and some models look for the largest id, which a placeholder is.
        """
        ids = call.input_ids
        if ids is None or not self.has_placeholders(ids, embedding_of(backbone).training):
            return None
        return self._numbered(ids)

    def number(self, embedding: nn.Module, ids: Tensor) -> Tensor:
        """The ids that the embedding is given: (…, tokens), the i-th placeholder of each row as ``-1 - i``."""
        if self.argument_names:
            # Counted only if the backbone is then given embeddings and no ids.
            self.calls.current_or_next().embedded_ids = ids
        elif not self.has_placeholders(ids, embedding.training):
            raise ConfigError(
                f"The batch has no placeholder ({self.placeholder}) for the {self.num_virtual_tokens} virtual tokens of"
                " PTuning; only transformers backbones get them put in front."
            )
        return self._numbered(ids)

    def _numbered(self, ids: Tensor) -> Tensor:
        is_placeholder = ids == self.placeholder
        return torch.where(is_placeholder, -is_placeholder.cumsum(dim=-1), ids)

    def wanted(self, backbone: nn.Module, call: Call) -> bool:
        """Whether vectors are put in front: not where the embeddings hold them already, in place of placeholders."""
        if call.input_ids is not None or call.embedded_ids is None:
            return True
        # What came before the first batch says nothing here: other inputs may be embedded from elsewhere.
        return not self.has_placeholders(call.embedded_ids, training=False)

    # ---- counting --------------------------------------------------------------------------------------------------
    def has_placeholders(self, ids: Tensor, training: bool) -> bool:
        """Whether there are placeholders; raises unless there are n in every row.

        Args:
            ids: (…, tokens).
            training: whether a batch may be taken to be like the first one, if gradients are on as well. Otherwise
                these very ids are counted.
        """
        noted = note_on(ids).get(self.placeholder)
        if noted is not None:
            return self.judge(noted)
        if ids.device.type == "cpu":
            return self.judge(self.counts(ids).tolist())
        self.check_arrived()
        like_the_first = training and torch.is_grad_enabled()
        if like_the_first and self.first_had is not None:
            self.arriving.append(ArrivingCounts(self.counts(ids)))
            return self.first_had
        had = self.judge(self.counts(ids).cpu().tolist())
        self.first_had = had if like_the_first else None
        return had

    def counts(self, ids: Tensor) -> Tensor:
        """Placeholders in each row."""
        return (ids == self.placeholder).sum(dim=-1).flatten()

    def judge(self, counts: list[int]) -> bool:
        """Whether there are placeholders, by their numbers in the rows of a batch; raises for a wrong number."""
        if not any(counts):
            return False
        for row, count in enumerate(counts):
            if count != self.num_virtual_tokens:
                raise ConfigError(
                    f"Row {row} of the batch has {count} placeholders (id {self.placeholder}), but"
                    f" PTuning(num_virtual_tokens={self.num_virtual_tokens}) needs {self.num_virtual_tokens} in every"
                    " row, or none in the whole batch."
                )
        self.used = True
        return True

    def check_arrived(self) -> None:
        """Raise if the counts of an earlier batch have arrived from the device and are not as expected."""
        while self.arriving and (counts := self.arriving[0].values()) is not None:
            self.arriving.pop(0)
            wanted = self.num_virtual_tokens if self.first_had else 0
            for row, count in enumerate(counts):
                if count != wanted:
                    raise ConfigError(
                        f"Row {row} of an earlier batch has {count} placeholders (id {self.placeholder}); PTuning"
                        f" (num_virtual_tokens={self.num_virtual_tokens}) took it to have {wanted}, as the first batch"
                        " had. In a loop that brings its ids on the device all batches of a training run must be"
                        " alike."
                    )

    def __getstate__(self) -> dict[str, Any]:
        """Copies have seen no batch."""
        return self.__dict__ | {"first_had": None, "arriving": []}


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
