"""The optimizer and schedule that a method wants when the user names none."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.methods.full import FullFineTuning
from lightning_peft.model.adapters import Adapters
from lightning_peft.rates import SuggestedRate, suggest_lr


def default_rate(model: nn.Module, steps: float) -> SuggestedRate:
    """The rate where the user gives none: that of the injected methods, else that of full fine-tuning."""
    adapters = Adapters.find(model)
    return suggest_lr(model, adapters.methods if adapters is not None else FullFineTuning(), steps)


def build_optimizer(model: nn.Module, lr: float, weight_decay: float, *, mixed_precision: bool) -> torch.optim.AdamW:
    """AdamW over what trains, in the groups that the methods ask for.

    Args:
        model: with or without an injected method.
        lr: learning rate.
        weight_decay: for matrices; the method decides which.
        mixed_precision: the Trainer trains in mixed precision. Lightning then refuses to clip the gradients of a fused
            optimizer, which would unscale them by itself; in bfloat16 too, where nothing is scaled.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject
    >>> net = nn.Sequential(nn.Linear(4, 4))
    >>> inject(net, LoRA()); build_optimizer(net, 1e-3, 0.0, mixed_precision=False).param_groups[0]["lr"]
    0.001
    """
    adapters = Adapters.find(model)
    methods: Sequence[Method] = adapters.methods if adapters is not None else []
    grouping = [m for m in methods if type(m).param_groups is not Method.param_groups] or [_Plain()]
    groups = max((m.param_groups(model, lr, weight_decay) for m in grouping), key=len)
    fused = not mixed_precision and all(_can_fuse(p) for g in groups for p in g["params"])
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=fused or None)


class _Plain(Method):
    """Stands for no method, or for one with nothing to say on groups."""


def _can_fuse(parameter: nn.Parameter) -> bool:
    return (
        type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda")
    )


def linear_schedule(
    optimizer: torch.optim.Optimizer, warmup: int | float, total: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then linear decay to zero; without a known end the rate stays up after the warm-up.

    Args:
        optimizer: whose rates are the peaks.
        warmup: steps (int), or the share of all steps (float below 1).
        total: optimizer steps of the whole run, or infinity.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> schedule = linear_schedule(optimizer, 2, 4)
    >>> [round(factor(s, 2, 4), 2) for s in range(5)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    endless = total == float("inf")
    steps = warmup if isinstance(warmup, int) else 0 if endless else round(warmup * total)
    # a partial keeps no state of its own, so a resumed run that was made longer follows its new length
    end = None if endless else int(total)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(factor, warmup=min(steps, end or steps), total=end))


def factor(step: int, warmup: int, total: int | None) -> float:
    """Share of the peak rate in optimizer step number ``step`` (from 0); no step has rate 0 before the end."""
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if total is None else max(0.0, (total - step) / max(1, total - warmup))


def check_warmup(warmup: float | None) -> None:
    """Raise a `ConfigError` unless it is a number of steps or a share below 1."""
    if warmup is None:
        return
    if warmup < 0 or (isinstance(warmup, float) and warmup >= 1):
        raise ConfigError(
            f"warmup={warmup!r}: give a number of steps (int, at least 0) or a share of all steps (float below 1)."
        )
