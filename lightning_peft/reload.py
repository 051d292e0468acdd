"""LightningModules back from adapter checkpoints."""

from __future__ import annotations

import os
import warnings
from typing import Any, TypeVar

import lightning.pytorch as L

from lightning_peft.callbacks.hooks import install
from lightning_peft.checkpoint import load_adapter
from lightning_peft.errors import PEFTError
from lightning_peft.files import locate, read

Module = TypeVar("Module", bound=L.LightningModule)


def load_from_checkpoint(cls_or_module: type[Module] | Module, path: str | os.PathLike, **kwargs: Any) -> Module:
    """A module with its trained adapter, from a checkpoint that holds only the adapter.

    Args:
        cls_or_module: a LightningModule class, built from the hyper-parameters in the checkpoint, or an instance,
            which is adapted in place.
        path: a checkpoint written with the `PEFT` callback.
        kwargs: constructor arguments that replace or complete the stored ones (for a class).

    Returns:
        The module: built by itself (the base weights come from its constructor or ``configure_model``), adapted as
        the checkpoint describes, loaded strictly.

    Raises:
        CheckpointError: the checkpoint does not fit; nothing is half-loaded silently.
    """
    file = locate(path)
    read(file)  # one clear error for a plain, broken or unsafe file before anything is built
    if isinstance(cls_or_module, L.LightningModule):
        if kwargs:
            raise PEFTError(f"Constructor arguments ({', '.join(kwargs)}) go with a class, not with an instance.")
        module = cls_or_module
    else:
        with warnings.catch_warnings():  # strict=False warns of the frozen weights; the strict load follows below
            warnings.filterwarnings("ignore", message="Found keys that are", category=UserWarning)
            module = cls_or_module.load_from_checkpoint(file, map_location="cpu", strict=False, **kwargs)
    load_adapter(module, file)
    install(module, "trainable")
    return module
