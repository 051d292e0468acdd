"""Proof, early in a run, that everything which should train does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import TrainingError
from lightning_peft.lightning_packages import Callback, rank_zero_warn
from lightning_peft.match import candidates, matcher
from lightning_peft.model.adapters import Adapters, adapted_modules, trainable_names
from lightning_peft.sharding import named_parameters, plain_name, whole
from lightning_peft.trainer.strategies import readable

if TYPE_CHECKING:
    import lightning.pytorch as L

_GRADIENT_STEPS = 3  # LoRA's A has no gradient while B is zero: one step is not enough, two are
_MOVEMENT_STEPS = 50  # small steps of a healthy run may vanish in rounding at first: too early to tell after three


@dataclass
class _Progress:
    """What is known of one trainable tensor."""

    parameter: nn.Parameter
    start: list[float]
    #: the best gradient so far: "none", "zero" or "finite"; "broken" if one held NaN or infinity
    gradient: str = "none"
    #: optimizer steps that were taken with a learning rate above zero
    steps: int = 0
    #: those among them whose learning rate was not still rising
    settled_steps: int = 0


class TrainabilityCheck(Callback):
    """Raise unless every trainable tensor got a finite, non-zero gradient within three optimizer steps.

    After 50 steps it also warns of tensors that have never moved, and raises if none has. Steps that a GradScaler
    skipped, steps with a learning rate of 0 and adapters switched off do not count; for the 50, neither do steps in
    which the learning rate still rises.

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
        self._watched: dict[str, _Progress] = {}
        self._total = 0
        self._something_moved = False
        self._rates: dict[int, float] = {}  # id of a parameter group -> its learning rate in the last step
        #: tensor -> kind of its gradient and whether the rate was rising, until the step is known to be taken
        self._pending: dict[str, tuple[str, bool]] = {}
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
                self._watched[name] = _Progress(parameter, _sums(parameter))
        self._total = len(self._watched)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Look at the gradients this step will use."""
        if not self._watched:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._scale = scaler.get_scale() if scaler is not None else None
        rising_of = self._stepping(optimizer)
        for _, module in adapted_modules(pl_module):
            if not module._adapter.active:  # switched off in this step, by AdapterDrop for one
                for parameter in module.delta.parameters():
                    rising_of.pop(id(parameter), None)
        for name, progress in self._watched.items():
            rising = rising_of.get(id(progress.parameter))
            if rising is not None:
                judged = progress.steps >= _GRADIENT_STEPS  # looking once more would cost a wait for the device
                kind = progress.gradient if judged else _kind(progress.parameter.grad)
                self._pending[name] = kind, rising

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step if it was taken; judge gradients after the third, movement after the fiftieth."""
        pending, self._pending = self._pending, {}
        if not pending or self._skipped(trainer):
            return
        lacking: dict[str, str] = {}
        still: list[str] = []
        for name, (kind, rising) in pending.items():
            progress = self._watched[name]
            progress.gradient = max(progress.gradient, kind, key=_ORDER.index)
            progress.steps += 1
            progress.settled_steps += not rising
            if progress.steps == _GRADIENT_STEPS and progress.gradient != "finite":
                lacking[name] = progress.gradient
            elif progress.steps == _GRADIENT_STEPS or progress.settled_steps >= _MOVEMENT_STEPS:
                if _sums(progress.parameter) != progress.start:
                    self._something_moved = True
                    del self._watched[name]
                elif progress.settled_steps >= _MOVEMENT_STEPS:
                    still.append(name)
                    del self._watched[name]
        if lacking:
            raise TrainingError(_gradient_message(lacking, self._total, pl_module))
        if still:
            self._report(still)

    def _stepping(self, optimizer: Any) -> dict[int, bool]:
        """Parameters with a learning rate above zero, by id, and whether that rate is still rising."""
        found: dict[int, bool] = {}
        for group in optimizer.param_groups:
            rate = float(group["lr"])
            rising = rate > self._rates.get(id(group), rate)
            self._rates[id(group)] = rate
            if rate > 0:
                found |= {id(p): rising for p in group["params"]}
        return found

    def _report(self, still: list[str]) -> None:
        """Say which tensors have not moved: an error where that is all of them."""
        message = (
            f"{len(still)} of {self._total} trainable tensors have not moved in {_MOVEMENT_STEPS} optimizer steps,"
            f" though they have gradients: {_listed(still)}. The learning rate is too small for their dtype, or the"
            " steps are not taken."
        )
        if not self._something_moved and not self._watched:
            raise TrainingError(message)
        rank_zero_warn(message)

    def _skipped(self, trainer: L.Trainer) -> bool:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return self._scale is not None and scaler is not None and scaler.get_scale() < self._scale


def _hits(test: Any, name: str) -> bool:
    """A pattern may name a tensor or any module above it."""
    parts = name.split(".")
    return any(test(".".join(parts[:i])) for i in range(1, len(parts) + 1))


#: kinds of gradients: of two, the later one is remembered
_ORDER = ("none", "zero", "finite", "broken")


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


def _listed(rows: list[str]) -> str:
    more = f" and {len(rows) - 6} more" if len(rows) > 6 else ""
    return ", ".join(rows[:6]) + more


def _gradient_message(lacking: dict[str, str], total: int, model: nn.Module) -> str:
    """Which tensors lack what, and the way out of the gravest case among them."""
    words = {"broken": "no finite gradient", "none": "no gradient", "zero": "no non-zero gradient"}
    rows = [f"{name} ({words[kind]})" for name, kind in lacking.items()]
    kinds = set(lacking.values())
    blocking = _frozen_zero_layers(model) if "zero" in kinds else []
    if "broken" in kinds:
        reason = "The loss is NaN or infinite: lower the learning rate, or look at the data."
    elif blocking:
        adapters = Adapters.find(model)
        method = type(adapters.methods[0]).__name__ if adapters else "the method"
        names = ", ".join(blocking[:3])
        reason = (
            f"The weights of {names} are all zero and frozen, so no gradient passes through. If that is a new head,"
            f" train it too: {method}(modules_to_save={blocking[:3]!r})."
        )
    else:
        reason = (
            "Their module may not be used in the loss, or is cut off by detach() or no_grad; leave it out with"
            " exclude_modules, or name it in TrainabilityCheck(ignore=[...])."
        )
    return (
        f"{len(rows)} of {total} trainable tensors did not train in the first {_GRADIENT_STEPS} optimizer steps:"
        f" {_listed(rows)}. {reason}"
    )


def _frozen_zero_layers(model: nn.Module) -> list[str]:
    """Names of the frozen linear and convolution layers, without adapters, whose weights are all zero."""
    adapters = Adapters.find(model)
    names = []
    for name, module in candidates(adapters.network if adapters else model).items():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim < 2 or weight.requires_grad or isinstance(module, nn.Embedding):
            continue
        if not bool(whole(weight.detach()).any()):
            names.append(plain_name(name))
    return names
