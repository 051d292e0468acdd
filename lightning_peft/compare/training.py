"""One run: train for the budget, validate on the way and at the end, test where it is asked for."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning_peft
from lightning_peft.callbacks import PEFT
from lightning_peft.callbacks.log_adapter import record as counts
from lightning_peft.compare.plan import Candidate
from lightning_peft.compare.task import ComparedTask
from lightning_peft.lightning_packages import Callback
from lightning_peft.rates import short_rate
from lightning_peft.saving.checkpoint import save_adapter

if TYPE_CHECKING:
    import lightning.pytorch as L

_PACKAGE = str(Path(lightning_peft.__file__).parent)


class Curve(Callback):
    """Collects the training loss of every step and the validation metrics; reports each step."""

    def __init__(self, tick: Callable[[int], None]) -> None:
        self.losses: list[Any] = []
        self.points: list[dict[str, float]] = []
        self._tick, self._steps = tick, 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Method and counts into the loggers."""
        for logger in trainer.loggers:
            logger.log_hyperparams({"peft": counts(pl_module)})

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: the loss of its last batch."""
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self.losses.append(outputs["loss"].detach())
            self._tick(self._steps)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A point of the learning curve."""
        values = _named({k: float(v) for k, v in trainer.callback_metrics.items()}, "val_")
        self.points = [p for p in self.points if p["step"] != self._steps] + [{"step": self._steps, **values}]


def train(
    task: ComparedTask,
    candidate: Candidate,
    rate: float,
    seed: int,
    steps: int,
    validations: int,
    *,
    test: bool,
    keep: Path | None,
    tick: Callable[[int], None],
) -> dict[str, Any]:
    """Train one method with one rate and one seed.

    Args:
        task: what to train on.
        candidate: the method.
        rate: learning rate.
        seed: of head, method, dropout and the order of batches.
        steps: optimizer steps.
        validations: how often to validate, the end included.
        test: measure on the test data at the end.
        keep: where to write the trained adapter, for a test later.
        tick: told the number of steps done.

    Returns:
        Plain values: ``val`` and ``test`` metrics by name, ``curve``, ``losses``, ``seconds``, ``notes``.
    """
    start = time.perf_counter()
    name = f"{candidate.label} lr={short_rate(rate)} seed={seed}"
    settings = {"method": candidate.label, "lr": rate, "seed": seed, "steps": steps}
    curve, method = Curve(tick), candidate.seeded(seed)
    with warnings.catch_warnings(record=True) as caught, task.loggers(name, "train", settings) as loggers:
        module = task.module(method, rate, seed)
        trainer = task.trainer(steps, validations, [PEFT(method), curve], loggers)
        trainer.fit(module, datamodule=task.data)
        if not curve.points or curve.points[-1]["step"] != trainer.global_step:
            trainer.validate(module, datamodule=task.data, verbose=False)
        result: dict[str, Any] = {"val": {k: v for k, v in curve.points[-1].items() if k != "step"}}
        if test:
            result["test"] = _tested(trainer, module, task)
        if keep is not None:
            save_adapter(module, keep)
    losses = [float(loss) for loss in curve.losses]
    result |= {"curve": curve.points, "losses": losses, "seconds": time.perf_counter() - start}
    return result | {"notes": sorted({str(w.message) for w in caught if w.filename.startswith(_PACKAGE)})}


def test(task: ComparedTask, candidate: Candidate, rate: float, seed: int, adapter: Path) -> dict[str, float]:
    """Test metrics of an adapter that `train` kept."""
    name, method = f"{candidate.label} lr={short_rate(rate)} seed={seed} test", candidate.seeded(seed)
    settings = {"method": candidate.label, "lr": rate, "seed": seed}
    with warnings.catch_warnings(record=True), task.loggers(name, "test", settings) as loggers:
        module = task.module(method, rate, seed)
        trainer = task.trainer(1, 1, [PEFT(method, init_from=str(adapter))], loggers)
        return _tested(trainer, module, task)


def _tested(trainer: L.Trainer, module: L.LightningModule, task: ComparedTask) -> dict[str, float]:
    rows = trainer.test(module, datamodule=task.data, verbose=False)
    return _named({k: v for row in rows for k, v in row.items()}, "test_")


def _named(values: dict[str, float], prefix: str) -> dict[str, float]:
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
