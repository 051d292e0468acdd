"""Where Lightning always looks when it saves and loads: hooks on the module, not on a callback.

``Callback.on_save_checkpoint`` is skipped for weights-only files and runs before weight averaging rewrites the state;
the module's own hooks are always called, and last. They hold no closures, so the module still pickles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_peft.checkpoint import fitting, fitting_whole, make_way, section
from lightning_peft.errors import CheckpointError
from lightning_peft.files import SECTION, split
from lightning_peft.fingerprint import difference
from lightning_peft.format1 import upgraded_section
from lightning_peft.hollow import settle_base, waits
from lightning_peft.lightning_packages import every
from lightning_peft.sharding import unwrapped
from lightning_peft.switching import is_complete
from lightning_peft.trainable import adapted_modules, adapter_names, find, refuse_disabled, require, required_names
from lightning_peft.trainer.kept_files import settle_kept_files
from lightning_peft.trainer.moving import by_position, fit_optimizers, optimizer_names
from lightning_peft.trainer.objects import (
    call_without_objects,
    check_left_out,
    leave_out_arguments,
    say_what_is_written,
)
from lightning_peft.trainer.resuming import check_states, take_resume
from lightning_peft.trainer.strategies import filters_itself, flattens, loads_late
from lightning_peft.verify import other_base, verify, verify_section

if TYPE_CHECKING:
    import lightning.pytorch as L

_SAVE = "_peft_save"
_UNSEEN = "_peft_unseen"  # the section of a checkpoint that was loaded before the base
_WAITING = "_peft_optimizers"  # a checkpoint whose optimizer states wait for the optimizers to be built


def install(pl_module: L.LightningModule, save: str) -> None:
    """Make saving trainable-only and loading strict, once per module."""
    if is_complete(require(pl_module)[0].methods):
        save = "full"  # the whole state of the module, with all that a plain checkpoint holds
    known = _SAVE in pl_module.__dict__
    pl_module.__dict__[_SAVE] = save
    if known:
        return
    pl_module.register_state_dict_post_hook(_filter)
    pl_module.register_load_state_dict_post_hook(_forgive_frozen)
    for name in ("on_save_checkpoint", "on_load_checkpoint"):
        pl_module.__dict__[name] = _Hook(pl_module, name, pl_module.__dict__.get(name))


class _Hook:
    """Stands before the module's own ``on_save_checkpoint`` or ``on_load_checkpoint``."""

    def __init__(self, module: L.LightningModule, name: str, earlier: Any) -> None:
        self.module, self.name, self.earlier = module, name, earlier

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        own = self.earlier or getattr(type(self.module), self.name).__get__(self.module)
        if self.name == "on_save_checkpoint":
            _describe(self.module, checkpoint)
            own(checkpoint)
            say_what_is_written(self.module, checkpoint)
        else:
            check_left_out(self.module, checkpoint, own)
            _verify(self.module, checkpoint)
            call_without_objects(own, self.module, checkpoint)


def _filter(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Keep only the adapter in the state dict; a full one holds the base as it is without the adapter."""
    trainer = module._trainer
    if find(module) is None or (trainer is not None and filters_itself(trainer)):
        return
    if module.__dict__.get(_SAVE) == "full":
        _unmerged(module, state, prefix)
        return
    keep = {prefix + n for n in adapter_names(module)}
    for key in [k for k in state if k.startswith(prefix) and k not in keep]:
        del state[key]


def _unmerged(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Write the original base weights while merged ones stand in their place: reloading merges once, not twice."""
    for name, layer in adapted_modules(module):
        for key, original in layer._adapter.originals.items():
            state[f"{prefix}{name}.{key}"] = original.detach()


def _forgive_frozen(module: nn.Module, incompatible: Any) -> None:
    """Frozen weights may be missing, adapter tensors may not.

    A tensor that the module knows under several names is there if it is there under one of them.
    """
    if find(module) is None:
        return
    tensors = _tensors_by_every_name(module)
    needed = {id(tensors[name]) for name in required_names(module)}
    missing = {key: _name_in(tensors, key) for key in incompatible.missing_keys}
    missing_names = set(missing.values())
    loaded = {id(tensor) for name, tensor in tensors.items() if name not in missing_names}
    lost = needed - loaded
    incompatible.missing_keys[:] = [key for key, name in missing.items() if name and id(tensors[name]) in lost]


def _tensors_by_every_name(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, those of a module with several names under each of them."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {unwrapped(name): tensor for name, tensor in named}


def _name_in(tensors: Mapping[str, torch.Tensor], key: str) -> str | None:
    """A tensor's name in the module, by its key in a state dict: weight averaging puts a prefix before the names."""
    parts = unwrapped(key).split(".")
    for start in range(len(parts)):
        name = ".".join(parts[start:])
        if name in tensors:
            return name
    return None


def _describe(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    found = find(module)
    if found is None:
        return
    # inside `disabled` the module holds the base's own head, biases and statistics in place of the trained ones
    refuse_disabled(found[0], "save")
    save = module.__dict__[_SAVE]
    if save == "trainable" and checkpoint.get("state_dict"):
        keep = set(adapter_names(module))
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}
    info = section(module) | {"save": save}
    if "optimizer_states" in checkpoint:
        checkpoint["optimizer_states"] = by_position(module.trainer, module, checkpoint["optimizer_states"])
        info["resume"] = _resume(module)
    objects = leave_out_arguments(module, checkpoint)
    if objects:
        info["left_out"] = objects
    checkpoint[SECTION] = info


def _resume(module: L.LightningModule) -> dict[str, Any]:
    trainer = module.trainer
    methods = require(module)[0].methods
    return {
        "strategy": type(trainer.strategy).__name__,
        "world_size": trainer.world_size,
        "methods": [m.resume_state(module) for m in methods],
        "optimizers": optimizer_names(trainer, module),
    }


def _verify(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Compare a checkpoint with the module before its values are loaded, and make way for them."""
    trainer = module._trainer
    if trainer is not None:  # what follows for a Trainer are the states of its callbacks
        settle_kept_files(trainer, checkpoint)
        check_states(trainer, checkpoint)
    if find(module) is None:  # unloaded or merged for good: an ordinary module again
        return
    if SECTION not in checkpoint and is_complete(require(module)[0].methods):
        return  # a plain checkpoint, which FullFineTuning resumes: Lightning loads it, strictly
    late = trainer is not None and loads_late(trainer)
    # DeepSpeed has loaded the weights itself
    loaded = trainer is not None and flattens(trainer) and SECTION in checkpoint and "state_dict" not in checkpoint
    if loaded:
        info, fitted = upgraded_section(checkpoint[SECTION]), {}
        verify_section(info, "The checkpoint")
        verify(module, info, "The checkpoint")
    else:
        state, info = split(checkpoint, "The checkpoint")
        _refuse_weights_only(module, checkpoint)
        if info.get("save") == "full":
            fitted = fitting_whole(module, state, info, "The checkpoint")
        else:
            fitted = fitting(module, state, info, "The checkpoint", hollow=late)
    if info.get("resume") and "optimizer_states" in checkpoint:
        take_resume(module, checkpoint, info["resume"])
    if not loaded:
        checkpoint["state_dict"] = fitted
        make_way(module, fitted)
        fits = trainer is not None and trainer.state.fn == "fit" and not late
        if fits and "optimizer_states" in checkpoint:
            module.__dict__[_WAITING] = checkpoint
    if waits(module):
        module.__dict__[_UNSEEN] = info


def _refuse_weights_only(module: L.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    trainer = module._trainer
    fits = trainer is not None and trainer.state.fn == "fit"
    if fits and not loads_late(trainer) and "optimizer_states" not in checkpoint:
        raise CheckpointError(
            "The checkpoint holds weights only (save_weights_only=True), so training cannot go on from it. Start a new"
            " fit from its values with PEFT(init_from=PATH), without ckpt_path."
        )


def check_base(module: L.LightningModule) -> None:
    """Compare a base that was loaded late with that of the checkpoint."""
    theirs = module.__dict__.pop(_UNSEEN, None)
    if settle_base(module) and theirs is not None:
        ours = require(module)[0].base
        if reason := difference(ours, theirs["base"]):
            raise CheckpointError(other_base("The checkpoint", theirs, ours, reason))


def settle_optimizers(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Bring the optimizer states of a checkpoint into the order of the optimizers that are there by now."""
    checkpoint = module.__dict__.pop(_WAITING, None)
    # BackboneFinetuning and its like rebuild the groups of the saved optimizer in their own on_fit_start.
    rebuilt = any(isinstance(callback, every("callbacks.BaseFinetuning")) for callback in trainer.callbacks)
    if checkpoint is not None and not rebuilt:
        fit_optimizers(trainer, module, checkpoint, "The checkpoint")
