"""Splits: exact, disjoint, complete, stratified, and without duplicates across them."""

from collections import Counter

import pytest

from lightning_peft.data.splits import carve, choose, size_of
from lightning_peft.errors import ConfigError


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shares", [(500, 300, 200), (990, 9, 1), (334, 333, 333)])
def test_every_class_gets_its_share(seed, shares):
    labels = [name for name, count in zip("abc", shares, strict=True) for _ in range(count)]
    parts = carve(1000, {"validation": 100, "test": 150}, seed, labels)
    assert sorted(row for part in parts.values() for row in part) == list(range(1000))
    assert {name: len(part) for name, part in parts.items()} == {"train": 750, "validation": 100, "test": 150}
    for name, total in (("validation", 100), ("test", 150)):
        counts = Counter(labels[row] for row in parts[name])
        for label, count in zip("abc", shares, strict=True):
            assert abs(counts[label] - total * count / 1000) <= 2
    assert {labels[row] for row in parts["train"]} == set("abc")  # also the class of one row
    assert carve(1000, {"validation": 100, "test": 150}, seed, labels) == parts
    assert carve(1000, {"validation": 100, "test": 150}, seed + 1, labels) != parts


def test_choose_is_random_and_exact():
    assert len(choose(range(10), 10, 0)) == 10
    counts = Counter(row for seed in range(400) for row in choose(range(10), 3, seed))
    assert min(counts.values()) > 80  # 120 expected each


def test_sizes():
    assert [size_of(size, 10, "val_size") for size in (0, 0.14, 1, 9)] == [0, 1, 1, 9]
    for size in (10, 1.0, 0.99, -0.1, -1):  # a fraction of 1.0 is all, a count of 1 is not
        with pytest.raises(ConfigError, match=f"val_size={size} of 10 rows leaves nothing to train on"):
            size_of(size, 10, "val_size")
