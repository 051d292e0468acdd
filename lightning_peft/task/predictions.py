"""Model outputs to rows a person can read: one dict for each example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError
from lightning_peft.task.batches import call, class_logits, inputs_of, notes_of
from lightning_peft.task.kinds import Task
from lightning_peft.task.losses import IGNORE

Row = dict[str, Any]


def predict(
    task: Task,
    network: nn.Module,
    batch: Any,
    names: Sequence[str] | None,
    tokenizer: Callable[[bool], Any],
    generate: Mapping[str, Any],
    words: list[list[int]] | None = None,
) -> list[Row]:
    """Rows for a batch.

    Args:
        task: decides what a row says.
        network: the model.
        batch: as in training; labels may be missing. For ``causal-lm`` prompts only, padded on the left.
        names: of the classes.
        tokenizer: gives the tokenizer; called with whether it is indispensable.
        generate: options of ``generate`` for language models.
        words: token ids of each class's words, where classes are words.
    """
    if task.target == "custom":
        return echoed(batch, plain_rows(call(network, batch)))
    inputs = inputs_of(network, batch)
    if task.target == "text" and task.name != "masked-lm":
        return echoed(batch, text_rows(network, inputs, tokenizer(True), generate))
    logits = class_logits(network, batch, words)
    if task.name == "masked-lm":
        rows = mask_rows(logits, inputs["input_ids"], tokenizer(True))
    elif task.target == "number":
        rows = number_rows(logits)
    elif task.target == "token":
        rows = token_rows(logits, batch, names or [], tokenizer(False))
    else:
        rows = class_rows(logits, names or [])
    return echoed(batch, rows)


def class_rows(logits: Tensor, names: Sequence[str]) -> list[Row]:
    """``label``, its ``score`` and all ``scores``. logits: (batch, classes).

    >>> import torch
    >>> class_rows(torch.tensor([[0.0, 20.0]]), ["no", "yes"])[0]["label"]
    'yes'
    """
    shares = logits.float().softmax(-1).tolist()
    best = logits.argmax(-1).tolist()
    return [
        {"label": names[i], "score": row[i], "scores": dict(zip(names, row, strict=True))}
        for i, row in zip(best, shares, strict=True)
    ]


def number_rows(logits: Tensor) -> list[Row]:
    """``value``. logits: (batch, 1)."""
    return [{"value": v} for v in logits.float().flatten().tolist()]


def token_rows(logits: Tensor, batch: Mapping[str, Any], names: Sequence[str], tokenizer: Any = None) -> list[Row]:
    """``labels`` and ``scores`` of the real tokens, and with a tokenizer the ``tokens``.

    Real are the positions with a label (the first piece of each word), where the batch has labels; else the first
    piece of each word, where it has ``word_ids`` (a list for each row); else all that is neither padding nor special.
    logits: (batch, length, classes).
    """
    real = real_tokens(logits, batch, tokenizer)
    shares, best = logits.float().softmax(-1).max(-1)
    rows = []
    for i in range(len(logits)):
        at = real[i].nonzero().flatten().tolist()
        row: Row = {"labels": [names[int(best[i, j])] for j in at], "scores": [float(shares[i, j]) for j in at]}
        if tokenizer is not None and "input_ids" in batch:
            row = {"tokens": tokenizer.convert_ids_to_tokens([int(batch["input_ids"][i, j]) for j in at]), **row}
        rows.append(row)
    return rows


def real_tokens(logits: Tensor, batch: Mapping[str, Any], tokenizer: Any) -> Tensor:
    """Which positions to report (batch, length)."""
    if "labels" in batch:
        return batch["labels"] != IGNORE
    pieces = notes_of(batch).get("word_ids")
    if pieces is not None:
        real = torch.zeros(logits.shape[:2], dtype=torch.bool)
        for i, words in enumerate(pieces):
            for j, word in enumerate(words):
                real[i, j] = word is not None and (j == 0 or word != words[j - 1])
        return real
    ones = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    real = batch["attention_mask"].bool() if "attention_mask" in batch else ones
    if tokenizer is not None and "input_ids" in batch:
        special = torch.tensor(tokenizer.all_special_ids, device=logits.device)
        real = real & ~torch.isin(batch["input_ids"], special)
    return real


def mask_rows(logits: Tensor, input_ids: Tensor, tokenizer: Any) -> list[Row]:
    """``text`` with every mask filled in, and the ``tokens`` and ``scores`` that filled it."""
    rows = []
    for scores, ids in zip(logits.float().softmax(-1), input_ids, strict=True):
        at = ids == tokenizer.mask_token_id
        value, best = scores[at].max(-1)
        filled = ids.clone()
        filled[at] = best.to(ids.dtype)
        text = tokenizer.decode(filled, skip_special_tokens=True)
        rows.append({"text": text, "tokens": tokenizer.convert_ids_to_tokens(best.tolist()), "scores": value.tolist()})
    return rows


def text_rows(network: nn.Module, inputs: Mapping[str, Any], tokenizer: Any, options: Mapping[str, Any]) -> list[Row]:
    """``generated``: the continuation of each prompt (left-padded), or the output of an encoder-decoder."""
    mask = inputs.get("attention_mask")
    decoder_only = not getattr(network.config, "is_encoder_decoder", False)
    if decoder_only and mask is not None and not bool(mask[:, -1].all()):
        raise ConfigError(
            "Prompts are padded on the right, so a decoder would continue the padding. Pad on the left:"
            " tokenizer.padding_side = 'left'."
        )
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    defaults = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": pad}
    output = network.generate(**inputs, **{**defaults, **options})
    start = inputs["input_ids"].shape[1] if decoder_only else 0
    texts = tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)
    return [{"generated": text.strip()} for text in texts]


def plain_rows(outputs: Any) -> list[Row]:
    """``output``: the numbers of each row of a tensor, or of ``outputs.logits``, or of the first output."""
    if not isinstance(outputs, Tensor):
        fields = outputs if isinstance(outputs, Mapping) else dict(enumerate(outputs))
        outputs = fields["logits"] if "logits" in fields else next(iter(fields.values()))
    return [{"output": row} for row in outputs.float().tolist()]


def echoed(batch: Any, rows: list[Row]) -> list[Row]:
    """Put what identifies an example (fields of the batch that are no tensors, and ``id``) before its prediction."""
    known = {k: v for k, v in notes_of(batch).items() if isinstance(v, (list, tuple)) and len(v) == len(rows)}
    known.pop("word_ids", None)
    return [{**{k: v[i] for k, v in known.items()}, **row} for i, row in enumerate(rows)]
