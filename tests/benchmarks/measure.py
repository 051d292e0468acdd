"""How a step is measured: products, bytes, dispatches and peak without regard to the machine; times in pairs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
#: torch counts these as nothing; they take the arguments of others that it counts
_COUNTED_AS = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm, aten.addbmm: aten.baddbmm}


class Count(TorchDispatchMode):
    """Counts operators and FLOPs, and knows which of the storages made under it are still alive.

    A storage counts once, whoever holds it: autograd's saved tensors, a function's ``ctx``, closures and modules alike.
    """

    def __init__(self, follow: bool = True) -> None:
        super().__init__()
        self.dispatches = self.flops = self.peak = self._most = 0
        self._follow, self._storages = follow, dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.dispatches += 1
        packet = func._overloadpacket
        formula = flop_registry.get(_COUNTED_AS.get(packet, packet))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        if self._follow:
            self._take(out)
        return out

    def _take(self, out: Any) -> None:
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._storages:
                    self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self._most += storage.nbytes()
        if self._most > self.peak * 1.005:  # nothing was taken off since the last look: look again
            self.peak = max(self.peak, self.alive())

    def ignore(self, tensors: Any) -> None:
        """Storages that were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = (StorageWeakRef(storage), 0)

    def alive(self) -> int:
        """Bytes of the storages that someone still holds."""
        for key in [k for k, (ref, _) in self._storages.items() if ref.expired()]:
            del self._storages[key]
        self._most = sum(size for _, size in self._storages.values())
        return self._most


def counts(net: nn.Module, step: Callable[[nn.Module], torch.Tensor]) -> dict[str, float]:
    """FLOPs and dispatches of a step, bytes kept between forward and backward, peak bytes of activations, gradients.

    Args:
        net: the network; its parameters and buffers do not count.
        step: gives the loss.
    """
    net.zero_grad(set_to_none=True)
    step(net).backward()  # what is made once is not counted
    net.zero_grad(set_to_none=True)
    with Count() as count:
        count.ignore([*net.parameters(), *net.buffers()])
        loss = step(net)
        kept = count.alive()
        loss.backward()
    net.zero_grad(set_to_none=True)
    return {"flops": count.flops, "dispatches": count.dispatches, "kept": kept, "peak": count.peak}


def times(
    steps: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu", clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds of each step, round by round, one after the other in a turning order; the first round is left out.

    ``clock="cpu"`` counts the process's own time, for one thread on a machine that others use too.
    """
    found: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = _now(device, clock)
            steps[name]()
            if number:
                found[name].append(_now(device, clock) - start)
    return found


def ratio(times: Mapping[str, list[float]], name: str, floor: str) -> float:
    """The median of the ratios of each round."""
    return statistics.median(a / b for a, b in zip(times[name], times[floor], strict=True))


def _now(device: str, clock: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.process_time() if clock == "cpu" else time.perf_counter()
