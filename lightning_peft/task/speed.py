"""How many tokens a second a run trains on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Speed:
    """Counts tokens (without padding) and seconds, from the end of the first step on, and again after a validation.

    The first step is left out: it holds warm-up, compilation and the start of workers.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Measure anew."""
        self.tokens, self._since, self._waiting = 0, None, 0

    def see(self, batch: Any) -> None:
        """Count a batch while it is still on the CPU, where that costs no wait for the device."""
        self._waiting = tokens_in(batch)

    def step(self) -> float | None:
        """Tokens a second up to the end of this step; None where nothing can be said yet."""
        now = time.perf_counter()
        if self._since is None:
            self._since = now
            return None
        self.tokens += self._waiting
        return self.tokens / (now - self._since) if self.tokens and now > self._since else None


def tokens_in(batch: Any) -> int:
    """Tokens of a batch of text without padding; 0 of anything else.

    >>> import torch
    >>> tokens_in({"input_ids": torch.ones(1, 4), "attention_mask": torch.tensor([[1, 1, 1, 0]])})
    3
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        return 0
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if isinstance(mask, Tensor):
        return int(mask.sum())
    if isinstance(positions, Tensor):  # packed: padding stands at position 0, as the first token of each row does
        return int((positions > 0).sum()) + int(((positions[:, :-1] == 0) & (positions[:, 1:] == 1)).sum())
    return batch["input_ids"].numel()
