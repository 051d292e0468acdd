"""What a training step costs: bytes kept for backward, peak memory, and time beside full fine-tuning."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.model.adapters import Adapters
from lightning_peft.task.optimization import build_optimizer

if TYPE_CHECKING:
    import lightning.pytorch as L


class Step:
    """A training step without a Trainer: forward, backward, the method's own parts, optimizer.

    Args:
        module: a `TaskModule` with an injected method.
        batch: on the module's device.
        lr: learning rate; 0 keeps the weights where they are and costs the same.
    """

    def __init__(self, module: L.LightningModule, batch: Any, lr: float = 0.0) -> None:
        self.module, self.batch, self.count = module, batch, 0
        self.methods = Adapters.of(module).methods
        self.optimizer = build_optimizer(module, lr, 0.0, mixed_precision=False)

    def loss(self) -> Tensor:
        """Forward, with the method's own loss terms."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning notes that nobody takes what is logged here
            loss: Any = self.module.training_step(self.batch, 0)
        terms = [term for m in self.methods if (term := m.regularizer(self.module)) is not None]
        return loss + sum(terms) if terms else loss

    def __call__(self) -> None:
        """One step; returns when the device is done."""
        self.count += 1
        self.loss().backward()
        for method in self.methods:
            method.transform_grads(self.module)
        self.optimizer.step()
        for method in self.methods:
            method.after_step(self.module, self.count, None)
        self.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def kept_bytes(network: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the storages that autograd keeps between forward and backward, each once, parameters not counted.

    Args:
        network: whose parameters and buffers are not counted.
        forward: gives the loss; its backward pass is run as well.

    >>> net = nn.Linear(4, 4)
    >>> x = torch.ones(2, 4)
    >>> kept_bytes(net, lambda: net(x).square().sum())  # x and the output, each 2 × 4 × 4 bytes
    64
    """
    own = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]}
    sizes: dict[int, int] = {}
    held: list[Tensor] = []  # a storage that is freed in between would give its address to another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    loss.backward()
    return sum(sizes.values())


def peak_bytes(step: Step) -> int:
    """The most memory that tensors take during a step: weights, optimizer states, and what is allocated on top.

    On CUDA from the allocator's own count; on the CPU from torch's profiler, which sees every tensor but not the
    private buffers of the math libraries. The second step is looked at, because the first makes the optimizer states.
    """
    step()
    if next(step.module.parameters()).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    states = [t for state in step.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    standing = sum(_size(t) for t in [*step.module.parameters(), *step.module.buffers(), *states])
    return standing + _allocated(step)


def _allocated(step: Callable[[], None]) -> int:
    """The highest running sum of the CPU allocator's events."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler talks on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in results.events() if event.name() == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def time_beside(step: Step, reference: Step, seconds: float = 6.0) -> tuple[float, float]:
    """Median seconds of a step, and the median of its ratios to a reference step taken right after it.

    Taken in turns, so that what else the machine does slows both; at least three turns, at most fifteen.
    """
    pairs: list[tuple[float, float]] = []
    step()
    reference()
    start = time.perf_counter()
    while len(pairs) < 3 or (len(pairs) < 15 and time.perf_counter() - start < seconds):
        pairs.append((_timed(step), _timed(reference)))
    return statistics.median(a for a, _ in pairs), statistics.median(a / b for a, b in pairs)


def _timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
