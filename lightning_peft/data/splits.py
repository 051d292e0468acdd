"""Choosing rows: exact duplicates out, then a seeded, stratified split."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset


def take(rows: Dataset, indices: Sequence[int]) -> Dataset:
    """Rows as a table of their own (``Dataset.select`` keeps a list of indices, which later steps copy out noisily)."""
    table = rows.with_format("arrow")[list(indices)]
    return type(rows)(table.combine_chunks(), info=rows.info)  # datasets 3.0 to 5.0 give a piece a row: sources._load


def first_of_each(rows: Sequence[Hashable]) -> list[int]:
    """Indices of rows that did not occur before.

    >>> first_of_each(["a", "b", "a", "c"])
    [0, 1, 3]
    """
    seen: set[Hashable] = set()
    return [i for i, row in enumerate(rows) if not (row in seen or seen.add(row))]


def choose(candidates: Sequence[int], count: int, seed: int, labels: Sequence[Hashable] | None = None) -> list[int]:
    """``count`` of the candidates, at random; with labels every class gets its share, rounded by at most one.

    The candidates are shuffled, sorted by class and then taken at regular distances, so the total is exact.

    >>> picked = choose(range(100), 10, seed=0, labels=["a"] * 80 + ["b"] * 20)
    >>> len(picked), sum(i < 80 for i in picked)
    (10, 8)
    """
    order = list(candidates)
    random.Random(seed).shuffle(order)
    if labels is not None:
        order.sort(key=lambda i: str(labels[i]))
    total = len(order)
    return sorted(row for i, row in enumerate(order) if (i + 1) * count // total > i * count // total)


def size_of(size: int | float, rows: int, field: str) -> int:
    """Rows asked for: a fraction below 1, or a count.

    Raises:
        ConfigError: negative, or not less than the rows there are.
    """
    count = round(size * rows) if isinstance(size, float) else size
    if size < 0 or count >= rows:
        raise ConfigError(
            f"{field}={size} of {rows:,} rows leaves nothing to train on; give a fraction or a smaller count."
        )
    return count


def carve(
    rows: int, sizes: dict[str, int], seed: int, labels: Sequence[Hashable] | None = None
) -> dict[str, list[int]]:
    """Row numbers for ``train`` and for each of ``sizes``, disjoint and complete.

    With labels, every class keeps at least one row in ``train``, and each part gets its share of each class.

    >>> {name: len(part) for name, part in carve(10, {"validation": 2, "test": 3}, seed=0).items()}
    {'train': 5, 'validation': 2, 'test': 3}
    """
    reserved = set(first_of_each(_shuffled(labels, seed))) if labels is not None else set()
    order = _order(rows, seed)
    free = [row for position, row in enumerate(order) if position not in reserved]
    parts: dict[str, list[int]] = {}
    for offset, (name, count) in enumerate(sizes.items()):
        if count > len(free):
            raise ConfigError(f"{name}: {count} rows asked for, but only {len(free)} can be spared of {rows}.")
        parts[name] = choose(sorted(free), count, seed + offset + 1, labels) if count else []
        taken = set(parts[name])
        free = [row for row in free if row not in taken]
    used = {row for part in parts.values() for row in part}
    return {"train": [row for row in range(rows) if row not in used], **parts}


def _order(rows: int, seed: int) -> list[int]:
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    return order


def _shuffled(labels: Sequence[Hashable], seed: int) -> list[Hashable]:
    """Labels in the order of `_order`, so that the row kept for training is a random one of its class."""
    return [str(labels[row]) for row in _order(len(labels), seed)]
