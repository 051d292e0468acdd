"""Several rows of tokens end to end in one, so that nearly nothing is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft.data.collate import IGNORED
from lightning_peft.errors import ConfigError
from lightning_peft.lightning_packages import rank_zero_info

if TYPE_CHECKING:
    from datasets import Dataset


def fill(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which rows go together: longest first, each where the least room is left (best fit).

    >>> fill([3, 5, 2, 4, 1], size=6)
    [[1, 4], [3, 2], [0]]
    """
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room left in a pack and its number, smallest first
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, (lengths[row], -1))
        room, number = rooms.pop(place) if place < len(rooms) else (size, len(packs))
        if number == len(packs):
            packs.append([])
        packs[number].append(row)
        insort(rooms, (room - lengths[row], number))
    return packs


def pack(rows: Dataset, size: int, split: str) -> Dataset:
    """Rows of at most ``size`` tokens made of whole ones: ``input_ids``, ``labels``, ``position_ids``, ``length``.

    Positions start again at 0 with each row, which is how transformers' masks know that it must not see the one
    before. The first token of a row is not learnt: it would be predicted from the row before.
    """
    from datasets import Dataset

    ids, labels = rows["input_ids"][:], rows["labels"][:]
    packs = fill(rows["length"][:], size)
    columns = {
        "input_ids": [[token for row in members for token in ids[row]] for members in packs],
        "labels": [[x for row in members for x in (IGNORED, *labels[row][1:])] for members in packs],
        "position_ids": [[x for row in members for x in range(len(ids[row]))] for members in packs],
    }
    columns["length"] = [len(row) for row in columns["input_ids"]]
    full = sum(columns["length"]) / (len(packs) * size)
    rank_zero_info(f"Packed {len(rows):,} {split} rows into {len(packs):,} of {size} tokens, {full:.0%} full.")
    return Dataset.from_dict(columns)


def refuse_virtual_tokens(callbacks: Sequence[Any]) -> None:
    """Raise a `ConfigError` for methods that lengthen sequences: a packed row holds many."""
    for method in (m for c in callbacks for m in getattr(c, "methods", None) or []):
        if hasattr(method, "num_virtual_tokens"):
            raise ConfigError(
                f"packing=True: {type(method).__name__} puts vectors in front of a row, and a packed row holds many."
                " Set packing=False, or choose a method that leaves sequences alone (LoRA, adapters)."
            )
