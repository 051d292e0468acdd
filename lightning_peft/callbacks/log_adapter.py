"""What was trained, into the loggers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.files import ADAPTER
from lightning_peft.formats.card import card
from lightning_peft.lightning_packages import Callback, every, rank_zero_warn
from lightning_peft.model.summary import summarize
from lightning_peft.replacing import replacing
from lightning_peft.saving.saved_adapter import SavedAdapter
from lightning_peft.trainer.best import best_adapter, best_path
from lightning_peft.trainer.strategies import readable

if TYPE_CHECKING:
    import lightning.pytorch as L


class LogAdapter(Callback):
    """Log method, counts, targets and the base's fingerprint into every logger's config, and the adapter to W&B.

    The counts are those of `summarize`, under the key ``peft``. The W&B artifact (type ``adapter``) is a folder with
    the best adapter of the run, or the last one when no checkpoint monitors a metric, and a model card;
    `load_adapter`, ``PEFT(init_from=…)`` and ``lightning-peft export`` take it as they take a checkpoint.

    >>> from lightning_peft import LogAdapter, LoRA, PEFT
    >>> callbacks = [PEFT(LoRA()), LogAdapter()]
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Into the config, filterable beside the other hyper-parameters."""
        config = {"peft": record(pl_module)}
        for logger in trainer.loggers:
            logger.log_hyperparams(config)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The adapter as an artifact."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, every("loggers.WandbLogger"))]
        if trainer.fast_dev_run or not loggers:
            return
        if not readable(trainer) and not Path(best_path(trainer) or "").is_file():
            name = type(trainer.strategy).__name__
            rank_zero_warn(f"LogAdapter logs no artifact: under {name} it takes the file of a monitored checkpoint.")
            return
        best = best_adapter(trainer, pl_module)  # a sharded model takes all processes
        for logger in loggers if trainer.is_global_zero else ():
            _log_artifact(logger, trainer, pl_module, *best)


def record(pl_module: L.LightningModule) -> dict[str, Any]:
    """The summary as a logger takes it: plain values, a single method not in a list."""
    summary = summarize(pl_module)
    methods = summary.pop("methods")
    summary["method"] = methods[0]["name"] if len(methods) == 1 else [m["name"] for m in methods]
    summary["config"] = methods[0] if len(methods) == 1 else methods
    return summary


def _log_artifact(
    logger: L.loggers.WandbLogger,
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    saved: SavedAdapter,
    monitored: bool,
) -> None:
    import wandb

    run = logger.experiment
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), trainer, pl_module, saved)
        artifact = wandb.Artifact(f"adapter-{run.id}", type="adapter", metadata=record(pl_module))
        artifact.add_dir(folder)
        run.log_artifact(artifact, aliases=["latest", "best" if monitored else "last"])


def write_folder(folder: Path, trainer: L.Trainer, pl_module: L.LightningModule, saved: SavedAdapter) -> None:
    """The adapter and its card."""
    saved.write(folder / ADAPTER)
    data = getattr(getattr(trainer.datamodule, "hparams", None), "data", None)
    text = card(
        pl_module, library="lightning_peft", data=None if data is None else str(data), metrics=_metrics(trainer)
    )
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(text)


def _metrics(trainer: L.Trainer) -> dict[str, float]:
    """What the best checkpoint was chosen by; without one, the last values of the run."""
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, every("callbacks.ModelCheckpoint")):
            continue
        if callback.monitor and callback.best_model_score is not None:
            return {callback.monitor: float(callback.best_model_score)}
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
