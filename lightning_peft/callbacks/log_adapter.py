"""What was trained, into the loggers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from lightning_peft.callbacks.best import best_adapter
from lightning_peft.files import ADAPTER, write_adapter
from lightning_peft.formats.card import card
from lightning_peft.replacing import replacing
from lightning_peft.summary import summarize


class LogAdapter(L.Callback):
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
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _log_artifact(logger, trainer, pl_module)


def record(pl_module: L.LightningModule) -> dict[str, Any]:
    """The summary as a logger takes it: plain values, a single method not in a list."""
    summary = summarize(pl_module)
    methods = summary.pop("methods")
    summary["method"] = methods[0]["name"] if len(methods) == 1 else [m["name"] for m in methods]
    summary["config"] = methods[0] if len(methods) == 1 else methods
    return summary


def _log_artifact(logger: WandbLogger, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    import wandb

    run = logger.experiment
    with tempfile.TemporaryDirectory() as folder:
        monitored = write_folder(Path(folder), trainer, pl_module)
        artifact = wandb.Artifact(f"adapter-{run.id}", type="adapter", metadata=record(pl_module))
        artifact.add_dir(folder)
        run.log_artifact(artifact, aliases=["latest", "best" if monitored else "last"])


def write_folder(folder: Path, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
    """The adapter and its card. Returns whether it comes from a checkpoint that monitors a metric."""
    state, info, monitored = best_adapter(trainer, pl_module)
    write_adapter(folder / ADAPTER, state, info)
    data = getattr(getattr(trainer.datamodule, "hparams", None), "data", None)
    text = card(
        pl_module, library="lightning_peft", data=None if data is None else str(data), metrics=_metrics(trainer)
    )
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(text)
    return monitored


def _metrics(trainer: L.Trainer) -> dict[str, float]:
    """What the best checkpoint was chosen by; without one, the last values of the run."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_score is not None:
            return {callback.monitor: float(callback.best_model_score)}
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
