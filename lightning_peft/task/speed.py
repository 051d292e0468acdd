"""How many tokens a second a run trains on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Speed:
    """Counts tokens (without padding) and seconds, from the end of the first step on, and again after a validation.

    The first step is left out: it holds warm-up, compilation and the start of workers.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Measure anew."""
        self.tokens: Tensor | None = None
        self._since: float | None = None

    def step(self, batch: Any) -> Tensor | None:
        """Count the batch of a step that ends now.

        Returns:
            Tokens a second, on the batch's device, because a number would wait for it; None where nothing can be said
            yet, and where the batch is no text.
        """
        now, last = time.perf_counter(), self._since
        if last is None:
            self._since = now
            return None
        tokens = tokens_in(batch)
        if tokens is None or now <= last:
            return None
        self.tokens = tokens if self.tokens is None else self.tokens + tokens
        return self.tokens / (now - last)


def tokens_in(batch: Any) -> Tensor | None:
    """Tokens of a batch of text without padding, on its device; None of anything else.

    >>> import torch
    >>> tokens_in({"input_ids": torch.ones(1, 4), "attention_mask": torch.tensor([[1, 1, 1, 0]])})
    tensor(3)
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        return None
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if isinstance(mask, Tensor):
        return mask.sum()
    if isinstance(positions, Tensor):  # packed: padding stands at position 0, as the first token of each row does
        return (positions > 0).sum() + ((positions[:, :-1] == 0) & (positions[:, 1:] == 1)).sum()
    return torch.tensor(batch["input_ids"].numel())
