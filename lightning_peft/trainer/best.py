"""The weights a run is judged by: the best checkpoint where a metric is monitored, else the last ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_peft.lightning_packages import every
from lightning_peft.saving.saved_adapter import SavedAdapter

if TYPE_CHECKING:
    import lightning.pytorch as L


def best_path(trainer: L.Trainer) -> str | None:
    """The best checkpoint of the first `ModelCheckpoint` that monitors a metric, if it exists."""
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, every("callbacks.ModelCheckpoint")):
            continue
        if callback.monitor and callback.best_model_path and Path(callback.best_model_path).exists():
            return callback.best_model_path
    return None


def best_adapter(trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[SavedAdapter, bool]:
    """The best adapter, and whether it comes from a monitored checkpoint."""
    path = best_path(trainer)
    saved = SavedAdapter.read(path) if path else SavedAdapter.of(pl_module)
    return saved.without_base(), path is not None
