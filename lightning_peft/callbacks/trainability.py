"""Proof, early in a run, that everything which should train does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_peft.callbacks.strategies import readable
from lightning_peft.errors import TrainingError
from lightning_peft.match import matcher
from lightning_peft.sharding import named_parameters, whole
from lightning_peft.trainable import adapted_modules, trainable_names

_STEPS = 3  # LoRA's A has no gradient while B is zero: one step is not enough, two are


class TrainabilityCheck(L.Callback):
    """Raise unless every trainable tensor got a finite, non-zero gradient and moved within three optimizer steps.

    Steps that a GradScaler skipped, steps with a learning rate of 0 and adapters switched off do not count.

    Args:
        ignore: patterns of tensors that may stand still (a module used only at times).

    Raises:
        TrainingError: names the tensors and what they lack.

    >>> from lightning_peft import LoRA, PEFT, TrainabilityCheck
    >>> callbacks = [PEFT(LoRA()), TrainabilityCheck(ignore=["pooler.*"])]
    """

    def __init__(self, ignore: Sequence[str] = ()) -> None:
        self.ignore = [ignore] if isinstance(ignore, str) else list(ignore)
        self._reset()

    def _reset(self) -> None:
        self._watched: dict[str, torch.nn.Parameter] = {}
        self._start: dict[str, list[float]] = {}
        self._steps: dict[str, int] = {}
        self._lacks: dict[str, set[str]] = {}
        self._pending: dict[str, str] = {}  # tensor -> kind of its gradient, until the step is known to be taken
        self._scale: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the values."""
        self._reset()
        if not readable(trainer):
            name = type(trainer.strategy).__name__
            rank_zero_warn(f"TrainabilityCheck looks at nothing under {name}: each process holds parts of gradients.")
            return
        wanted, tests = set(trainable_names(pl_module)), [matcher(p) for p in self.ignore]
        for pattern, test in zip(self.ignore, tests, strict=True):
            if not any(_hits(test, name) for name in wanted):
                raise TrainingError(
                    f"TrainabilityCheck(ignore={pattern!r}) matches no trainable tensor, so it does nothing."
                )
        for name, parameter in named_parameters(pl_module):
            if name in wanted and parameter.requires_grad and not any(_hits(t, name) for t in tests):
                self._watched[name] = parameter
                self._start[name] = _sums(parameter)
                self._lacks[name] = {"a gradient", "a non-zero gradient", "movement"}
                self._steps[name] = 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Look at the gradients this step will use."""
        if not self._watched:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._scale = scaler.get_scale() if scaler is not None else None
        moving = {id(p) for g in optimizer.param_groups for p in g["params"] if _can_move(p, g)}
        for _, module in adapted_modules(pl_module):
            if not module._adapter.active:  # switched off in this step, by AdapterDrop for one
                moving -= {id(p) for p in module.delta.parameters()}
        for name, parameter in self._watched.items():
            if id(parameter) in moving:
                self._pending[name] = _kind(parameter.grad)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step if it was taken, and judge after the third."""
        pending, self._pending = self._pending, {}
        if not pending or self._skipped(trainer):
            return
        for name, kind in pending.items():
            self._steps[name] += 1
            self._lacks[name] -= {"finite": {"a gradient", "a non-zero gradient"}, "zero": {"a gradient"}}.get(
                kind, set()
            )
            if kind == "broken":
                self._lacks[name].add("a finite gradient")
            if _sums(self._watched[name]) != self._start[name]:
                self._lacks[name].discard("movement")
        judged = [n for n in pending if self._steps[n] >= _STEPS]
        bad = {n: self._lacks[n] for n in judged if self._lacks[n]}
        for name in judged:
            del self._watched[name]
        if bad:
            raise TrainingError(_message(bad, len(self._start)))

    def _skipped(self, trainer: L.Trainer) -> bool:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return self._scale is not None and scaler is not None and scaler.get_scale() < self._scale


def _hits(test: Any, name: str) -> bool:
    """A pattern may name a tensor or any module above it."""
    parts = name.split(".")
    return any(test(".".join(parts[:i])) for i in range(1, len(parts) + 1))


def _can_move(parameter: Tensor, group: dict[str, Any]) -> bool:
    """Whether the rate is above zero and, while it is still rising, above the rounding of the largest values."""
    rate = float(group["lr"])
    if rate == 0 or rate >= float(group.get("initial_lr", rate)):
        return rate > 0
    return rate > torch.finfo(parameter.dtype).eps * float(parameter.detach().abs().max())


def _kind(grad: Tensor | None) -> str:
    if grad is None:
        return "none"
    grad = whole(grad)
    if not torch.isfinite(grad).all():
        return "broken"
    return "finite" if bool(grad.any()) else "zero"


def _sums(parameter: Tensor) -> list[float]:
    """Two sums stand for the values: a copy of everything would double the memory of full fine-tuning."""
    with torch.no_grad():
        parameter = whole(parameter)
        total, size = parameter.sum(dtype=torch.float64), parameter.norm(dtype=torch.float64)
    return [float(total), float(size)]


def _message(bad: dict[str, set[str]], watched: int) -> str:
    order = ("a finite gradient", "a gradient", "a non-zero gradient", "movement")
    rows = [f"{name} (no {next(o for o in order if o in lacks).removeprefix('a ')})" for name, lacks in bad.items()]
    more = f" and {len(rows) - 6} more" if len(rows) > 6 else ""
    reasons = {
        "a finite gradient": "The loss is NaN or infinite: lower the learning rate, or look at the data.",
        "movement": "They have gradients, but the learning rate is too small for their dtype, or a step was not taken.",
    }
    unused = (
        "Their module may not be used in the loss, or is cut off by detach() or no_grad; leave it out with"
        " exclude_modules, or name it in TrainabilityCheck(ignore=[...])."
    )
    first = next(o for o in order if any(o in lacks for lacks in bad.values()))
    return (
        f"{len(rows)} of {watched} trainable tensors did not train in the first {_STEPS} optimizer steps:"
        f" {', '.join(rows[:6])}{more}. {reasons.get(first, unused)}"
    )
