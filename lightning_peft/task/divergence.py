"""A fit that diverges is said: its weights are of no use, and a table of results does not show why."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from lightning_peft.errors import TrainingError
from lightning_peft.lightning_packages import rank_zero_warn

#: a mean loss this many times the first one is no fluctuation
_RISE = 3.0


def check_finite(metrics: Mapping[str, Tensor], name: str, rate: float) -> None:
    """Raise if a logged loss is NaN or infinite.

    Raises:
        TrainingError: says what to change.

    >>> check_finite({"val_loss": Tensor([float("nan")])}, "val_loss", 2.0)
    Traceback (most recent call last):
    lightning_peft.errors.TrainingError: val_loss is nan: this run has diverged, and its weights are of no use. ...
    """
    if name in metrics and not math.isfinite(float(metrics[name])):
        raise TrainingError(f"{name} is {float(metrics[name])}: {_advice(rate)}")


def warn_of_rise(first: Tensor | None, last: Tensor | None, rate: float) -> None:
    """Warn if the mean loss of the last epoch is far above that of the first step."""
    if first is None or last is None or float(last) <= _RISE * abs(float(first)):
        return
    rank_zero_warn(f"The training loss rose from {float(first):.3g} to {float(last):.3g}: {_advice(rate)}")


def _advice(rate: float) -> str:
    return (
        f"this run has diverged, and its weights are of no use. Take a lower learning rate than {rate:g}, or leave lr"
        " out for the method's own."
    )
