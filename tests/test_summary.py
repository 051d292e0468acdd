"""What `summarize` says of a model, and what it costs to find out."""

import sys
from collections.abc import Callable

import pytest
from torch import nn

from lightning_peft import DoRA, LoRA, inject, summarize


def calls(function: Callable[[], object]) -> int:
    """How many calls of functions, built-in ones and steps of generators included, a function makes."""
    count = 0

    def notice(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(notice)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def blocks(count: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(count)))


@pytest.mark.parametrize("method", [LoRA(r=1), DoRA(r=1)], ids=["LoRA", "DoRA"])
def test_the_work_grows_with_the_number_of_layers_and_no_faster(method):
    work = []
    for count in (100, 200):
        net = blocks(count)
        inject(net, method)
        summarize(net)  # whatever is done only once
        work.append(calls(lambda net=net: summarize(net)))
    assert work[1] < 2.1 * work[0]


def test_frozen_parts_are_the_largest_in_which_nothing_trains():
    net = nn.ModuleDict({"body": blocks(2), "body2": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    inject(net, LoRA(r=1, target_modules=["body.0.0", "head"]))
    frozen = {row["name"]: row["parameters"] for row in summarize(net)["frozen"]}
    assert frozen == {"body.0.1": 8, "body.1": 28, "body2": 20}
