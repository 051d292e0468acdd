"""The weights a run is judged by: the best checkpoint where a metric is monitored, else the last ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.checkpoint import adapter_state_dict, section
from lightning_peft.files import read
from lightning_peft.lightning_packages import every

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


def best_adapter(trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
    """Tensors and section of the best adapter, and whether it comes from a monitored checkpoint."""
    path = best_path(trainer)
    state, info = read(path) if path else (adapter_state_dict(pl_module), section(pl_module))
    if info.get("save") == "full":
        state, info = {k: v for k, v in state.items() if k in set(info["keys"])}, info | {"save": "trainable"}
    info.pop("resume", None)
    return state, info, path is not None
