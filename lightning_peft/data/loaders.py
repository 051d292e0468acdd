"""Batches of rows of similar length, and a loader that remembers where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_peft.errors import TrainingError

_GROUPS_SORTED_TOGETHER = 50


class Step(NamedTuple):
    """What a worker needs for one batch: its epoch (random masks depend on it) and its rows."""

    epoch: int
    rows: list[int]


@dataclass
class LengthGroupedBatches:
    """Batches for one process: rows of similar length together, in an order fixed by seed and epoch.

    Rows are shuffled, sorted by length within stretches of at most 50 batches, cut into batches, and the batches
    are shuffled; the batch with the longest row comes first, so that memory runs out at once or never. Every row
    comes once an epoch and every process gets the same number of batches; only where the last batch has fewer rows
    than there are processes are some of its rows given out twice (``repeat=False``: some processes stop earlier).

    Args:
        lengths: length of each row.
        batch_size: rows in a batch of one process.
        group_by_length: sort as above; else batches are cut from the shuffled rows.
        shuffle: a new order each epoch; else one order for all: the rows' own, or one grouped by length.
        seed: seed of the order.
        rank: this process.
        world_size: number of processes.
        repeat: equal number of batches in every process.

    >>> batches = LengthGroupedBatches([5, 1, 4, 2, 3], batch_size=2)
    >>> sorted(row for step in batches for row in step.rows), len(batches)
    ([0, 1, 2, 3, 4], 3)
    """

    lengths: Sequence[int]
    batch_size: int
    group_by_length: bool = True
    shuffle: bool = True
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    repeat: bool = True
    epoch: int = field(default=0, init=False)

    @property
    def sampler(self) -> LengthGroupedBatches:
        """Lightning looks here for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes; without shuffling all epochs are epoch 0."""
        self.epoch = epoch if self.shuffle else 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.batch_size * self.world_size)
        return whole + bool(rest and (self.repeat or rest > self.rank))

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps())

    def steps(self) -> list[Step]:
        """This process's batches of the epoch."""
        mine = []
        for rows in self._together():
            if self.repeat and len(rows) < self.world_size:
                rows = (rows * self.world_size)[: self.world_size]
            mine.append(rows[self.rank :: self.world_size])
        return [Step(self.epoch, rows) for rows in mine if rows]

    def _together(self) -> list[list[int]]:
        """Batches of all processes together."""
        size = self.batch_size * self.world_size
        if not self.shuffle and not self.group_by_length:
            order = list(range(len(self.lengths)))
            return [order[i : i + size] for i in range(0, len(order), size)]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        whole = len(order) // size
        batches, rest = self._cut(order[: whole * size], size), order[whole * size :]
        if self.group_by_length and whole > 1:
            longest = max(range(whole), key=lambda i: max(self.lengths[row] for row in batches[i]))
            first = batches.pop(longest)
            batches = [first] + [batches[i] for i in torch.randperm(whole - 1, generator=generator).tolist()]
        return batches + ([rest] if rest else [])

    def _cut(self, order: list[int], size: int) -> list[list[int]]:
        if self.group_by_length:
            few = min(_GROUPS_SORTED_TOGETHER, max(2, len(order) // size // 2))  # two stretches at least: mixing
            groups = few if self.shuffle else max(1, len(order) // size)  # one order for all epochs: sort all of it
            chunks = [order[i : i + groups * size] for i in range(0, len(order), groups * size)]
            order = [row for chunk in chunks for row in sorted(chunk, key=lambda row: -self.lengths[row])]
        return [order[i : i + size] for i in range(0, len(order), size)]


class _Rows(Dataset):
    """Fetches a whole batch of a table at once."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __getitem__(self, step: Step) -> tuple[Step, dict[str, list]]:
        return step, self.table[step.rows]


class BatchLoader:
    """An iterable of batches whose position is saved in checkpoints.

    It is no `torch.utils.data.DataLoader` (it uses one inside), because Lightning rebuilds those to place its own
    samplers, and warns about missing workers where reading a batch costs less than a millisecond.

    Args:
        table: rows, indexable by a list of row numbers.
        batches: which rows make a batch.
        collate: (step, columns) -> batch.
        num_workers: processes that build batches; 0 builds them in this one.
        completed: batches of this epoch that were trained on. A Trainer knows better than the loader, which only sees
            what was fetched; without a Trainer the loader's own count is used.
    """

    def __init__(
        self,
        table: Any,
        batches: LengthGroupedBatches,
        collate: Callable[[tuple[Step, dict[str, list]]], Any],
        num_workers: int = 0,
        completed: Callable[[], int] | None = None,
    ) -> None:
        self.dataset = table
        self.batch_sampler: Any = batches
        self.collate_fn = collate
        self.num_workers = num_workers
        self._batches = batches
        self._completed = completed
        self._fetched = 0
        self._resume: tuple[int, int] | None = None

    @property
    def batch_size(self) -> int:
        """Rows in a batch."""
        return self._batches.batch_size

    def set_epoch(self, epoch: int) -> None:
        """For loops without a Trainer: call it before each epoch."""
        self._batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        # a generator, so that all this happens at the first batch: Lightning asks for the iterator before set_epoch
        epoch, start = self._resume or (-1, 0)
        self._resume = None
        self._fetched = start if epoch == self._batches.epoch else 0
        generator = torch.Generator().manual_seed(self._batches.seed)  # leaves the global random numbers alone
        loader = DataLoader(
            _Rows(self.dataset),
            batch_size=None,
            sampler=self._batches.steps()[self._fetched :],
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            generator=generator,
        )
        for batch in loader:
            self._fetched += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches done in it, and what the order of batches depends on."""
        done = self._fetched if self._completed is None else self._completed()
        return {"epoch": self._batches.epoch, "batch": done, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue behind the last batch.

        Raises:
            TrainingError: the saved position lies in another order of batches.
        """
        epoch, batch, order = state_dict["epoch"], state_dict["batch"], state_dict["order"]
        if batch >= len(self):
            self.set_epoch(epoch + 1)
            return
        changed = [f"{key} {order[key]} → {value}" for key, value in self._order().items() if order[key] != value]
        if batch and changed:
            raise TrainingError(
                f"The checkpoint stopped inside epoch {epoch}, after batch {batch}, and the data now come in another"
                f" order ({', '.join(changed)}). Set it back, or start a new fit with PEFT(init_from=…)."
            )
        self.set_epoch(epoch)
        self._resume = (epoch, batch)

    def _order(self) -> dict[str, Any]:
        kept = ("batch_size", "group_by_length", "shuffle", "seed", "world_size")
        return {"rows": len(self.dataset), **{key: getattr(self._batches, key) for key in kept}}
