"""Where Lightning always looks when it saves and loads: hooks on the module, not on a callback.

``Callback.on_save_checkpoint`` is skipped for weights-only files and runs before weight averaging rewrites the state;
the module's own hooks are always called, and last. They hold no closures, so the module still pickles.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_peft.callbacks.moving import by_position, fit_optimizers, optimizer_names
from lightning_peft.callbacks.strategies import filters_itself, loads_late
from lightning_peft.checkpoint import fitting, make_way, reroot, section
from lightning_peft.errors import CheckpointError
from lightning_peft.files import SECTION, split
from lightning_peft.fingerprint import difference
from lightning_peft.hollow import settle_base, waits
from lightning_peft.sharding import unwrapped
from lightning_peft.trainable import adapted_modules, adapter_names, find, require, required_names
from lightning_peft.verify import other_base, verify, verify_section

_SAVE = "_peft_save"
_UNSEEN = "_peft_unseen"  # the section of a checkpoint that was loaded before the base
_WAITING = "_peft_optimizers"  # a checkpoint whose optimizer states wait for the optimizers to be built


def install(pl_module: L.LightningModule, save: str) -> None:
    """Make saving trainable-only and loading strict, once per module."""
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
        (_describe if self.name == "on_save_checkpoint" else _verify)(self.module, checkpoint)
        own = self.earlier or getattr(type(self.module), self.name).__get__(self.module)
        own(checkpoint)


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
    for name, wrapped in adapted_modules(module):
        for key, original in wrapped.originals.items():
            state[f"{prefix}{name}.base.{key}"] = original.detach()


def _forgive_frozen(module: nn.Module, incompatible: Any) -> None:
    """Frozen weights may be missing, adapter tensors may not; weight averaging puts a prefix before the names."""
    if find(module) is None:
        return
    needed = set(required_names(module))
    kept = [k for k in incompatible.missing_keys if _tails(k) & needed]
    incompatible.missing_keys[:] = kept


def _tails(name: str) -> set[str]:
    parts = unwrapped(name).split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _describe(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    if find(module) is None:
        return
    save = module.__dict__[_SAVE]
    if save == "trainable" and checkpoint.get("state_dict"):
        keep = set(adapter_names(module))
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}
    info = section(module) | {"save": save}
    if "optimizer_states" in checkpoint:
        checkpoint["optimizer_states"] = by_position(module.trainer, module, checkpoint["optimizer_states"])
        info["resume"] = _resume(module)
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
    if find(module) is None:  # unloaded or merged for good: an ordinary module again
        return
    if SECTION in checkpoint and "state_dict" not in checkpoint:  # DeepSpeed has loaded the weights itself
        info = checkpoint[SECTION]
        verify_section(info, "The checkpoint")
        verify(module, info, "The checkpoint")
    else:
        state, info = split(checkpoint, "The checkpoint")
        fitted = fitting(module, state, info, "The checkpoint")
        checkpoint["state_dict"] = reroot(state, info, module) if info.get("save") == "full" else fitted
        make_way(module, checkpoint["state_dict"])
        trainer = module._trainer
        fits = trainer is not None and trainer.state.fn == TrainerFn.FITTING and not loads_late(trainer)
        if fits and "optimizer_states" in checkpoint:
            module.__dict__[_WAITING] = checkpoint
    if waits(module):
        module.__dict__[_UNSEEN] = info
    resume = info.get("resume")
    if resume and "optimizer_states" in checkpoint:
        for method, saved in zip(require(module)[0].methods, resume["methods"], strict=True):
            method.load_resume_state(module, saved)


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
    if checkpoint is not None:
        fit_optimizers(trainer, module, checkpoint, "The checkpoint")
