"""What of a batch goes into the network, and what its labels may be."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError
from lightning_peft.task.losses import IGNORE


def is_note(key: str, value: Any) -> bool:
    """Whether a field of a batch is for the reader and not for the model: no tensor, or an id."""
    return not isinstance(value, Tensor) or key in ("id", "idx", "index")


def notes_of(batch: Any) -> dict[str, Any]:
    """The fields of a batch for the reader, by name; those in a dict called ``meta`` as well.

    >>> notes_of({"x": torch.ones(2), "meta": {"text": ["a", "b"]}})
    {'text': ['a', 'b']}
    """
    if not isinstance(batch, Mapping):
        return {}
    notes = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in batch.items() if is_note(k, v)}
    meta = notes.pop("meta", {})
    return {**meta, **notes} if isinstance(meta, Mapping) else notes


def inputs_of(network: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors that the network's ``forward`` names, without labels."""
    if not isinstance(batch, Mapping):
        raise ConfigError(f"A batch must be a dict of tensors here, not a {type(batch).__name__}.")
    tensors = {k: v for k, v in batch.items() if k not in ("labels", "answer_at") and not is_note(k, v)}
    accepted = inspect.signature(network.forward).parameters
    if "position_ids" in tensors and "position_ids" not in accepted:
        raise ConfigError(
            f"The batch is packed, but {type(network).__name__}.forward takes no position_ids, so its rows would see"
            " each other. Set packing=False."
        )
    named = {k: v for k, v in tensors.items() if k in accepted}
    return named or tensors  # a forward of **kwargs names nothing


def class_logits(network: nn.Module, batch: Mapping[str, Any], words: list[list[int]] | None) -> Tensor:
    """What the network says of a batch; with ``words``, of the words of each class at ``answer_at``: (rows, classes).

    The output head of a causal model runs only at the positions that answer.
    """
    inputs = inputs_of(network, batch)
    if words is None:
        return network(**inputs).logits
    if "answer_at" not in batch:
        raise ConfigError(f"A cloze batch needs 'answer_at', the position of the word; it has: {', '.join(batch)}.")
    at = batch["answer_at"]
    if "logits_to_keep" in inspect.signature(network.forward).parameters:
        kept, at = at.unique(return_inverse=True)
        inputs["logits_to_keep"] = kept
    scores = network(**inputs).logits[torch.arange(len(at), device=at.device), at]
    return torch.stack([scores[:, ids].mean(-1) for ids in words], dim=-1)


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """The labels of a batch; none is an error."""
    if "labels" not in batch:
        raise ConfigError(f"The batch has no 'labels', only: {', '.join(map(str, batch))}.")
    return batch["labels"]


def call(network: nn.Module, batch: Any) -> Any:
    """Call a custom network: the fields of a dict that ``forward`` names, all but the last of a tuple, or the batch.

    >>> import torch
    >>> call(nn.Identity(), (torch.ones(1), "target"))
    tensor([1.])
    """
    if isinstance(batch, Mapping):
        accepted = inspect.signature(network.forward).parameters
        if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            return network(**{k: v for k, v in batch.items() if k in accepted or not is_note(k, v)})
        return network(**{k: v for k, v in batch.items() if k in accepted})
    if isinstance(batch, (tuple, list)):
        return network(*(batch[:-1] if len(batch) > 1 else batch))
    return network(batch)


def rows_in(batch: Any) -> int:
    """The number of examples: the length of the first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    return next((len(v) for v in values if isinstance(v, Tensor) and v.ndim), 1)


def check_labels(batch: Any, names: Sequence[str]) -> None:
    """Refuse labels outside the label set."""
    if not isinstance(batch, Mapping) or "labels" not in batch:
        return
    labels = torch.as_tensor(batch["labels"])
    wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= len(names)))]
    if wrong.numel():
        raise ConfigError(
            f"A batch has the label {wrong[0].item():g}, but the labels go from 0 to {len(names) - 1}"
            f" ({', '.join(names[:8])}). Give all label_names, or correct the data."
        )
