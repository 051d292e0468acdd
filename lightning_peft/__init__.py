"""Parameter-efficient fine-tuning for PyTorch Lightning: one callback, any module, small checkpoints.

Names are loaded on first use, so that importing the package costs little and the core runs without Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "lightning_peft.errors": (
        "PEFTError",
        "ConfigError",
        "NoMatchError",
        "CheckpointError",
        "MergeError",
        "TrainingError",
        "WriteError",
        "MissingPackageError",
    ),
    "lightning_peft.adapted": ("Adapted", "Delta"),
    "lightning_peft.method": ("Method",),
    "lightning_peft.rates": ("suggest_lr", "SuggestedRate"),
    "lightning_peft.model.injection": ("inject", "unload"),
    "lightning_peft.model.hollow": ("load_base",),
    "lightning_peft.model.adapters": ("disabled", "trainable_names", "state_names"),
    "lightning_peft.bottleneck.placement": ("drop_layers",),
    "lightning_peft.methods.adapter_fusion": ("fusion_weights",),
    "lightning_peft.model.merging": ("merge", "unmerge", "merge_and_unload"),
    "lightning_peft.saving.checkpoint": ("adapter_state_dict", "save_adapter", "load_adapter"),
    "lightning_peft.model.summary": ("summarize", "describe"),
    "lightning_peft.saving.combining": ("combine",),
    "lightning_peft.saving.export": ("save_merged",),
    "lightning_peft.formats.peft": ("export_peft", "import_peft"),
    "lightning_peft.callbacks": (
        "PEFT",
        "MergeOnFitEnd",
        "TrainabilityCheck",
        "LogAdapter",
        "PredictionWriter",
        "AdapterDrop",
    ),
    "lightning_peft.trainer.session": ("inject_now",),
    "lightning_peft.trainer.strategies": ("FSDPWrapPolicy",),
    "lightning_peft.trainer.reload": ("load_from_checkpoint",),
    "lightning_peft.data": ("TextDataModule", "ImageDataModule", "AudioDataModule"),
    "lightning_peft.module": ("TaskModule",),
}
_NAMES = {name: module for module, names in _HOME.items() for name in names}

if TYPE_CHECKING:
    from lightning_peft.adapted import Adapted, Delta
    from lightning_peft.bottleneck.placement import drop_layers
    from lightning_peft.callbacks import (
        PEFT,
        AdapterDrop,
        LogAdapter,
        MergeOnFitEnd,
        PredictionWriter,
        TrainabilityCheck,
    )
    from lightning_peft.data import AudioDataModule, ImageDataModule, TextDataModule
    from lightning_peft.errors import (
        CheckpointError,
        ConfigError,
        MergeError,
        MissingPackageError,
        NoMatchError,
        PEFTError,
        TrainingError,
        WriteError,
    )
    from lightning_peft.formats.peft import export_peft, import_peft
    from lightning_peft.method import Method
    from lightning_peft.methods import *  # noqa: F403
    from lightning_peft.methods.adapter_fusion import fusion_weights
    from lightning_peft.model.adapters import disabled, state_names, trainable_names
    from lightning_peft.model.hollow import load_base
    from lightning_peft.model.injection import inject, unload
    from lightning_peft.model.merging import merge, merge_and_unload, unmerge
    from lightning_peft.model.summary import describe, summarize
    from lightning_peft.module import TaskModule
    from lightning_peft.rates import SuggestedRate, suggest_lr
    from lightning_peft.saving.checkpoint import adapter_state_dict, load_adapter, save_adapter
    from lightning_peft.saving.combining import combine
    from lightning_peft.saving.export import save_merged
    from lightning_peft.trainer.reload import load_from_checkpoint
    from lightning_peft.trainer.session import inject_now
    from lightning_peft.trainer.strategies import FSDPWrapPolicy


def __getattr__(name: str) -> Any:
    if name == "__all__":  # for `from lightning_peft import *`
        return sorted({*_NAMES, *_methods()})
    if name.startswith("__"):
        raise AttributeError(name)
    home = _NAMES.get(name, "lightning_peft.methods")
    try:
        value = getattr(import_module(home), name)
    except AttributeError:
        near = {n.lower(): n for n in __dir__()}.get(name.lower())
        hint = f". Did you mean {near!r}?" if near else ""
        raise AttributeError(f"module 'lightning_peft' has no attribute {name!r}{hint}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_methods()})


def _methods() -> list[str]:
    return [name for name in vars(import_module("lightning_peft.methods")) if name[0].isupper()]
