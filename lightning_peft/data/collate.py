"""Rows to tensors, padded to the longest row of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_peft.data.loaders import Step
from lightning_peft.data.template import VIRTUAL

IGNORED = -100


def pad(rows: Sequence[Sequence[int]], value: int, multiple: int | None = None, left: bool = False) -> Tensor:
    """Rows of numbers as one (rows, longest) tensor.

    >>> pad([[1, 2], [3]], value=0, left=True).tolist()
    [[1, 2], [0, 3]]
    """
    width = max(len(row) for row in rows)
    if multiple:
        width += -width % multiple
    fill = [[value] * (width - len(row)) for row in rows]
    whole = [[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, fill, strict=True)]
    return torch.tensor(whole, dtype=torch.long)


@dataclass(frozen=True)
class TextCollator:
    """Token rows to ``input_ids``, ``attention_mask``, ``token_type_ids`` and ``labels``, each (rows, longest).

    Labels of whole rows stay (rows,): long for classes, float for numbers. Packed rows come with ``position_ids`` in
    place of the mask.

    Args:
        pad_token_id: what fills ``input_ids``.
        pad_to_multiple_of: round the width up.
        left: put the padding on the left, where generation needs it.
        meta: give names and texts of the rows beside the tensors.
        masking: how to mask tokens for masked language modelling.
        virtual: the id of places for virtual tokens.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    left: bool = False
    meta: bool = False
    masking: Masking | None = None
    virtual: int | None = None

    def __call__(self, item: tuple[Step, dict[str, list]]) -> dict[str, Any]:
        step, columns = item
        ids = columns["input_ids"]
        batch: dict[str, Any] = {"input_ids": self._pad(ids, self.pad_token_id)}
        if self.virtual is not None:
            batch["input_ids"].masked_fill_(batch["input_ids"] == VIRTUAL, self.virtual)
        if "answer_at" in columns:
            batch["answer_at"] = torch.tensor(columns["answer_at"])
        if "position_ids" in columns:  # packed: with a mask given, transformers would not look for rows in positions
            batch["position_ids"] = self._pad(columns["position_ids"], 0)
        else:
            batch["attention_mask"] = self._pad([[1] * len(row) for row in ids], 0)
        if "token_type_ids" in columns:
            batch["token_type_ids"] = self._pad(columns["token_type_ids"], 0)
        if self.masking is not None:
            batch["input_ids"], batch["labels"] = self.masking(batch["input_ids"], batch["attention_mask"], step)
        elif "labels" in columns:
            labels = columns["labels"]
            batch["labels"] = self._pad(labels, IGNORED) if isinstance(labels[0], list) else torch.tensor(labels)
        if self.meta:
            names = {"id": "_id", "text": "_text", "word_ids": "word_ids"}
            batch["meta"] = {name: columns[column] for name, column in names.items() if column in columns}
        return batch

    def _pad(self, rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return pad(rows, value, self.pad_to_multiple_of, self.left)


@dataclass(frozen=True)
class Masking:
    """Masks as BERT's: of the tokens chosen, 80 % become the mask, 10 % a random token, 10 % stay (1810.04805).

    The choice depends on seed, epoch and row, not on the process or worker that makes it, so a resumed run and
    every validation of fixed rows see the same masks. Each batch has at least one masked token.
    """

    mask_token_id: int
    vocab_size: int
    special_ids: tuple[int, ...]
    probability: float = 0.15
    seed: int = 0

    def __call__(self, ids: Tensor, attention_mask: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """(input_ids, labels): labels are -100 where nothing was masked."""
        number = ((self.seed * 1_000_003 + step.epoch) * 1_000_003 + step.rows[0]) * 31 + len(step.rows)
        generator = torch.Generator().manual_seed(number % 2**63)
        draw, kind = (torch.rand(ids.shape, generator=generator) for _ in range(2))
        words = torch.randint(self.vocab_size, ids.shape, generator=generator)
        draw[torch.isin(ids, torch.tensor(self.special_ids)) | (attention_mask == 0)] = 2.0
        chosen = (draw < self.probability) | (draw == draw.min().clamp(max=1.0))
        labels = torch.where(chosen, ids, IGNORED)
        masked = torch.where(chosen & (kind < 0.8), self.mask_token_id, ids)
        return torch.where(chosen & (kind >= 0.9), words, masked), labels
