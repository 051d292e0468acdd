"""Samples of frozen weights, which tell whether a module has moved them itself.

The teachers of BYOL, MoCo, DINO and mean teachers are frozen, and follow the student by code of the module. Such
weights belong to a checkpoint, or a resumed run would start with the teacher of the beginning. Nothing in torch tells
of it: ``teacher.data = …`` leaves the version of a tensor as it was, and a second copy of the base to compare with
would take as much memory as the base.

So a few values of every frozen weight are remembered, spread evenly over it, and compared bit by bit: a weight has
moved if one of them has. Averages move all values of a tensor, so a sample is enough for them. What writes into a few
places of a large frozen tensor (single rows of an embedding) can be overlooked.

Weight averaging is another matter: Lightning's callback averages frozen weights with themselves, ``0.9 w + 0.1 w``, and
what is rounded there is no reason to save the base. Where it takes part, changes within `ROUNDING` do not count.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

#: values of each weight; all of a smaller one
COUNT = 64
#: what averaging a value with itself may change in it over a run, relative to the value
ROUNDING = 1e-3


class Samples:
    """Some values of each of some weights, as they were.

    >>> net = nn.Linear(2, 2)
    >>> samples = Samples(dict(net.named_parameters()))
    >>> net.bias.data = net.bias.data + 1
    >>> samples.moved(dict(net.named_parameters()))
    ['bias']
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.ignore_rounding = False
        self._values = _sampled({name: weight for name, weight in weights.items() if is_readable(weight)})

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Remember these values from now on."""
        self._values |= Samples(weights)._values

    def moved(self, weights: Mapping[str, Tensor]) -> list[str]:
        """The names of those weights that have other values now.

        A weight that cannot be read (a part of it is in another process, or it has no values) counts as unmoved.
        """
        known = {name: weights[name] for name in self._values if name in weights and is_readable(weights[name])}
        equal = _are_close if self.ignore_rounding else _are_equal
        return [name for name, now in _sampled(known).items() if not equal(self._values[name], now)]


def _sampled(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A few values of each, on the CPU; one transfer for all of a device and type."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, weight in weights.items():
        groups.setdefault((weight.device, weight.dtype), []).append(name)
    found: dict[str, Tensor] = {}
    for names in groups.values():
        picked = [evenly_spread(weights[name], COUNT) for name in names]
        together = torch.cat(picked).cpu()
        for name, values in zip(names, together.split([len(p) for p in picked]), strict=True):
            found[name] = values.clone()
    return {name: found[name] for name in weights}


def evenly_spread(weight: Tensor, count: int) -> Tensor:
    """So many values of a weight, spread evenly over it; all of a smaller one."""
    flat = weight.detach().reshape(-1)
    step = max(1, flat.numel() // count)
    return flat[step // 2 :: step][:count]


def is_readable(weight: Tensor) -> bool:
    """Whether this is a plain tensor with numbers in it: not split over processes, packed into few bits, or empty."""
    plain = type(weight) in (Tensor, nn.Parameter)
    return plain and weight.is_floating_point() and not weight.is_meta and weight.numel() > 0


def _are_equal(start: Tensor, now: Tensor) -> bool:
    """Bit by bit, so that NaN equals itself. What a Trainer has cast to another type has not moved."""
    start = start.to(now.dtype)
    return start.shape == now.shape and torch.equal(start.view(torch.uint8), now.view(torch.uint8))


def _are_close(start: Tensor, now: Tensor) -> bool:
    start, now = start.double(), now.double()
    return start.shape == now.shape and torch.allclose(now, start, rtol=ROUNDING, atol=0.0, equal_nan=True)
