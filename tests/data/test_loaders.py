"""Length grouping: complete, disjoint over processes, reproducible, and worth it."""

import itertools
import random

import pytest
import torch

from lightning_peft.data.collate import Masking, pad
from lightning_peft.data.loaders import BatchLoader, LengthGroupedBatches, Step
from lightning_peft.errors import TrainingError


def lengths_of(count, seed=0):
    generator = random.Random(seed)
    return [max(1, int(generator.lognormvariate(3, 0.8))) for _ in range(count)]


def waste(batches, lengths):
    """Share of cells that are padding."""
    cells = sum(len(rows) * max(lengths[r] for r in rows) for rows in batches)
    return 1 - sum(lengths[r] for rows in batches for r in rows) / cells


@pytest.mark.parametrize("count", [1, 2, 7, 8, 63, 200, 1001])
@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("size", "world"), [(1, 1), (8, 1), (4, 2), (3, 4), (5, 7)])
def test_every_row_once_and_as_many_batches_everywhere(count, group, shuffle, size, world):
    lengths = lengths_of(count)

    def parts(repeat, epoch):
        kinds = [
            LengthGroupedBatches(lengths, size, group, shuffle, rank=rank, world_size=world, repeat=repeat)
            for rank in range(world)
        ]
        for kind in kinds:
            kind.set_epoch(epoch)
        steps = [kind.steps() for kind in kinds]
        assert [len(s) for s in steps] == [len(kind) for kind in kinds]
        return steps

    for epoch in range(3):
        equal = parts(True, epoch)
        assert {len(steps) for steps in equal} == {-(-count // (size * world))}
        seen = [row for steps in equal for step in steps for row in step.rows]
        assert set(seen) == set(range(count))
        rest = count % (size * world)
        assert len(seen) == count + (max(0, world - rest) if rest else 0)  # repeats only to fill the last step
        assert all(1 <= len(step.rows) <= size for steps in equal for step in steps)
        once = [row for steps in parts(False, epoch) for step in steps for row in step.rows]
        assert sorted(once) == list(range(count))


def test_order_depends_on_seed_and_epoch_alone():
    lengths = lengths_of(300)
    first = LengthGroupedBatches(lengths, 8, seed=3)
    orders = []
    for epoch in range(3):
        first.set_epoch(epoch)
        again = LengthGroupedBatches(lengths, 8, seed=3)
        again.set_epoch(epoch)
        torch.manual_seed(epoch)
        torch.rand(7)
        assert first.steps() == again.steps()
        orders.append([step.rows for step in first.steps()])
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != [step.rows for step in LengthGroupedBatches(lengths, 8, seed=4).steps()]
    assert {frozenset(b) for b in orders[0]} != {frozenset(b) for b in orders[1]}  # rows meet other rows, too
    fixed = LengthGroupedBatches(lengths, 8, shuffle=False)
    before = [step.rows for step in fixed.steps()]
    fixed.set_epoch(5)
    assert before == [step.rows for step in fixed.steps()]


@pytest.mark.parametrize("world", [1, 4])
def test_grouping_saves_padding_and_keeps_processes_in_step(world):
    lengths = lengths_of(2000)

    def steps(group):
        kinds = [LengthGroupedBatches(lengths, 16, group, rank=r, world_size=world) for r in range(world)]
        return [[step.rows for step in kind.steps()] for kind in kinds]

    grouped, random_order = steps(True), steps(False)
    before = waste(list(itertools.chain(*random_order)), lengths)
    assert waste(list(itertools.chain(*grouped)), lengths) < (0.2 if world == 1 else 0.45) * before
    assert before > 0.5
    assert max(lengths) in [lengths[row] for rows in grouped for row in rows[0]]  # the longest row comes first
    spread = []
    for together in zip(*grouped, strict=True):
        widths = [max(lengths[r] for r in rows) for rows in together]
        spread.append(1 - min(widths) / max(widths))
    assert sum(spread) / len(spread) < 0.1  # nobody waits long for the others


class Table:
    def __init__(self, count):
        self.lengths = lengths_of(count)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, rows):
        return {"row": rows}


def keep(item):
    return item[0].epoch, item[1]["row"]


def loader_of(count=50, size=4, workers=0, **options):
    table = Table(count)
    return BatchLoader(table, LengthGroupedBatches(table.lengths, size, **options), keep, workers)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 5, 12, 13])
def test_loader_continues_where_it_stopped(workers, stop):
    whole = loader_of()
    epochs = []
    for epoch in range(2):
        whole.set_epoch(epoch)
        epochs.append(list(whole))
    first = loader_of(workers=workers)
    iterator = iter(first)
    seen = [next(iterator) for _ in range(stop)]
    state = first.state_dict()
    second = loader_of(workers=workers)
    second.load_state_dict(state)
    rest = list(second)
    if stop < len(whole):
        assert seen + rest == epochs[0]
        second.set_epoch(1)
        assert list(second) == epochs[1]
    else:
        assert rest == epochs[1]


def test_loader_leaves_the_global_random_numbers_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    list(loader_of())
    assert torch.equal(torch.rand(3), expected)


def test_position_in_another_order_is_refused():
    first = loader_of()
    iterator = iter(first)
    next(iterator)
    other = loader_of(size=8)
    with pytest.raises(TrainingError, match="batch_size 4 → 8"):
        other.load_state_dict(first.state_dict())


def test_masks_depend_on_seed_epoch_and_rows():
    masking = Masking(mask_token_id=4, vocab_size=500, special_ids=(0, 1, 2, 3, 4), seed=1)
    ids = pad([[2, *range(10, 210), 3] for _ in range(60)] + [[2, 3]], 1)
    real = (ids != 1).long()
    masked, labels = masking(ids, real, Step(0, [7]))
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen])
    assert not chosen[torch.isin(ids, torch.arange(5))].any()
    assert torch.equal(masked[~chosen], ids[~chosen])
    share = chosen.sum() / (ids > 4).sum()
    assert abs(share - 0.15) < 0.01
    assert abs((masked[chosen] == 4).float().mean() - 0.8) < 0.03
    assert abs((masked[chosen] == ids[chosen]).float().mean() - 0.1) < 0.02
    assert torch.equal(masking(ids, real, Step(0, [7]))[0], masked)
    assert not torch.equal(masking(ids, real, Step(1, [7]))[0], masked)
    assert not torch.equal(masking(ids, real, Step(0, [8]))[0], masked)
    short = torch.tensor([[2, 10, 3]])
    for row in range(20):  # a batch without a masked token would have no loss
        assert (masking(short, torch.ones_like(short), Step(0, [row]))[1] != -100).any()
