"""LightningModules back from adapter checkpoints."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as L
import torch
from torch import Tensor

from lightning_peft.callbacks.hooks import install
from lightning_peft.checkpoint import adapter_state_dict, fitting_whole, inject_from, load_adapter, make_way
from lightning_peft.errors import PEFTError
from lightning_peft.files import load_checkpoint, locate, read
from lightning_peft.folders import as_file
from lightning_peft.trainable import find

Module = TypeVar("Module", bound=L.LightningModule)


def load_from_checkpoint(cls_or_module: type[Module] | Module, path: str | os.PathLike, **kwargs: Any) -> Module:
    """A module with its trained adapter, from a checkpoint that holds only the adapter.

    Args:
        cls_or_module: a LightningModule class, built from the hyper-parameters in the checkpoint, or an instance,
            which is adapted in place.
        path: a checkpoint written with the `PEFT` callback, a file or a folder of shards.
        kwargs: constructor arguments that replace or complete the stored ones (for a class).

    Returns:
        The module: built by itself (the base weights come from its constructor or ``configure_model``), adapted as
        the checkpoint describes, loaded strictly.

    Raises:
        CheckpointError: the checkpoint does not fit; nothing is half-loaded silently.
    """
    with as_file(locate(path)) as file:
        return _load(cls_or_module, file, kwargs)


def _load(cls_or_module: type[Module] | Module, file: Path, kwargs: dict[str, Any]) -> Module:
    state, info = read(file)  # one clear error for a plain, broken or unsafe file before anything is built
    if isinstance(cls_or_module, L.LightningModule):
        if kwargs:
            raise PEFTError(f"Constructor arguments ({', '.join(kwargs)}) go with a class, not with an instance.")
        module = cls_or_module
        type(module).on_load_checkpoint(module, load_checkpoint(file))
    else:
        module = _build(cls_or_module, file, kwargs)
    if info.get("save") == "full":
        _load_whole(module, state, info, str(file))
    elif find(module) is None or not _is_loaded(module, state):
        load_adapter(module, file)
    install(module, "trainable")
    return module


def _load_whole(module: L.LightningModule, state: Mapping[str, Tensor], info: Mapping[str, Any], where: str) -> None:
    """All weights of a file that holds the base as well; the module's own may be random."""
    if find(module) is None:
        inject_from(module, info, where, values=False)
    state = fitting_whole(module, state, info, where)
    make_way(module, state)
    install(module, "full")
    module.load_state_dict(state)


def _build(kind: type[Module], file: Path, kwargs: dict[str, Any]) -> Module:
    if not (isinstance(kind, type) and issubclass(kind, L.LightningModule)):
        raise PEFTError(
            f"{kind!r} is no lightning.pytorch.LightningModule. A class made for `pytorch_lightning` fits after"
            " `import lightning.pytorch as pl`."
        )
    if kwargs.pop("strict", True) is not True:
        raise PEFTError("strict=False would hide missing adapter tensors; the frozen weights may be missing anyway.")
    kwargs.setdefault("map_location", "cpu")
    try:
        with warnings.catch_warnings():  # strict=False warns of the frozen weights; the strict load follows
            warnings.filterwarnings("ignore", message="Found keys that are", category=UserWarning)
            return kind.load_from_checkpoint(file, strict=False, **kwargs)
    except TypeError as error:
        if "__init__() missing" not in str(error):
            raise
        raise PEFTError(
            f"{error}. The checkpoint does not hold it; give it: load_from_checkpoint(…, NAME=…)."
        ) from error


def _is_loaded(module: L.LightningModule, state: Mapping[str, Tensor]) -> bool:
    """Whether a module that adapts itself has taken the values already."""
    ours = adapter_state_dict(module)
    return all(
        n in ours and t.shape == ours[n].shape and torch.equal(ours[n].cpu(), t.to(ours[n].dtype))
        for n, t in state.items()
    )
