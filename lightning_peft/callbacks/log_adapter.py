"""What was trained, into the loggers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers import WandbLogger

from lightning_peft.callbacks.best import best_adapter
from lightning_peft.files import write_adapter
from lightning_peft.summary import summarize


class LogAdapter(L.Callback):
    """Log method, counts, targets and the base's fingerprint into every logger's config, and the adapter to W&B.

    The counts are those of `summarize`, under the key ``peft``. The W&B artifact (type ``adapter``) holds the best
    adapter of the run, or the last one when no checkpoint monitors a metric.

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

    state, info, monitored = best_adapter(trainer, pl_module)
    run = logger.experiment
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "adapter.safetensors")
        write_adapter(file, state, info)
        artifact = wandb.Artifact(f"adapter-{run.id}", type="adapter", metadata=record(pl_module))
        artifact.add_file(str(file))
        run.log_artifact(artifact, aliases=["latest", "best" if monitored else "last"])
