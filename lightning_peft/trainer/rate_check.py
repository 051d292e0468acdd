"""A learning rate far from the method's default is said at the start of a fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_peft.lightning_packages import rank_zero_warn
from lightning_peft.model.adapters import Adapters
from lightning_peft.rates import short_rate, suggest_lr

if TYPE_CHECKING:
    import lightning.pytorch as L

#: how many times off a rate may be without a word
FAR = 10


def warn_of_rate(trainer: L.Trainer, pl_module: L.LightningModule, steps: int | None) -> None:
    """Warn where every rate of the optimizers is more than ten times above, or below, `suggest_lr`.

    Optimizers other than Adam and its relatives have rates of another size and are left alone.

    Args:
        trainer: with its optimizers.
        pl_module: with its methods.
        steps: optimizer steps of the run, None if there is no end.
    """
    groups = [g for o in trainer.optimizers if "adam" in type(o).__name__.lower() for g in o.param_groups]
    rates = [rate for group in groups if (rate := _peak(group)) > 0]
    if not rates:
        return
    suggested = suggest_lr(pl_module, Adapters.of(pl_module).methods, steps)
    if min(rates) > FAR * suggested.lr:
        rate, words = min(rates), f"{min(rates) / suggested.lr:.0f} times"
    elif max(rates) < suggested.lr / FAR:
        rate, words = max(rates), f"1/{suggested.lr / max(rates):.0f} of"
    else:
        return
    rank_zero_warn(
        f"The optimizer's learning rate {short_rate(rate)} is {words} the default for this method, network and length"
        f" of run ({suggested}). lightning_peft.suggest_lr(model, method, steps).lr gives that default."
    )


def _peak(group: dict[str, Any]) -> float:
    """The highest rate that a schedule of torch leads a group to, as far as the group says."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))
