"""What a checkpoint of an adapted LightningModule holds: made small and described; compared before it is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_peft.errors import CheckpointError
from lightning_peft.files import SECTION
from lightning_peft.format1 import upgraded_section
from lightning_peft.model.adapters import Adapters, adapted_modules
from lightning_peft.saving.saved_adapter import SavedAdapter, section_of
from lightning_peft.saving.section import Section
from lightning_peft.sharding import unwrapped
from lightning_peft.trainer.checks import check_present
from lightning_peft.trainer.kept_files import settle_kept_files
from lightning_peft.trainer.objects import leave_out_arguments
from lightning_peft.trainer.optimizer_states import optimizer_names, states_for_file
from lightning_peft.trainer.resuming import check_states, take_resume
from lightning_peft.trainer.strategies import flattens, loads_late

if TYPE_CHECKING:
    import lightning.pytorch as L


def filter_state(module: nn.Module, state: dict[str, Any], prefix: str, save: str | None) -> None:
    """Keep only the adapter in the state dict; a full one holds the base as it is without the adapter."""
    if save != "full":
        keep = {prefix + n for n in Adapters.of(module).names}
        for key in [k for k in state if k.startswith(prefix) and k not in keep]:
            del state[key]
    # While merged weights stand in their place the originals are written: reloading merges once, not twice.
    for name, layer in adapted_modules(module):
        for own_name, original in layer._adapter.originals.items():
            key = f"{prefix}{name}.{own_name}"
            if key in state:
                state[key] = original.detach()


def forgive_frozen(module: nn.Module, incompatible: Any) -> None:
    """Frozen weights may be missing, adapter tensors may not.

    A tensor that the module knows under several names is there if it is there under one of them.
    """
    adapters = Adapters.find(module)
    if adapters is None:
        return
    tensors = _tensors_by_every_name(module)
    needed = {id(tensors[name]) for name in adapters.required}
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


def describe(module: L.LightningModule, checkpoint: dict[str, Any], save: str | None, *, first_time: bool) -> None:
    """Leave what is frozen, and hyper-parameters that are objects, out of a checkpoint and put the description in."""
    adapters = Adapters.of(module)
    # inside `disabled` the module holds the base's own head, biases and statistics in place of the trained ones
    adapters.refuse_disabled("save")
    check_present(module)
    if save == "trainable" and checkpoint.get("state_dict"):
        keep = set(adapters.names)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}
    info: dict[str, Any] = dataclasses.replace(section_of(adapters), full=save == "full").as_dict()
    state = checkpoint.get("state_dict")
    if state:
        # It may hold averaged weights. Where averaging has not begun, frozen ones among them have not moved yet.
        required = set(adapters.required)
        info["keys"] = [name for name in info["keys"] if name in state or name in required]
    if "optimizer_states" in checkpoint:
        checkpoint["optimizer_states"] = states_for_file(module.trainer, module, checkpoint["optimizer_states"])
        info["resume"] = _resume(module)
    objects = leave_out_arguments(module, checkpoint, first_time=first_time)
    if objects:
        info["left_out"] = objects
    checkpoint[SECTION] = _with_names_of_pruned(info, checkpoint.get("state_dict") or {})


def _with_names_of_pruned(info: dict[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Call pruned weights as the file does.

    torch keeps a pruned ``weight`` as ``weight_orig`` and a mask; ModelPruning writes their product as ``weight``, so
    that the file loads into a module that is not pruned.
    """

    def in_the_file(names: list[str]) -> list[str]:
        found = []
        for name in names:
            whole = name.removesuffix("_orig").removesuffix("_mask")
            is_folded = name not in state and whole in state
            if not is_folded:
                found.append(name)
            elif name.endswith("_orig"):
                found.append(whole)
        return found

    for key in ("keys", "trainable"):
        info[key] = in_the_file(info[key])
    if "resume" in info:
        info["resume"]["optimizers"] = [[in_the_file(g) for g in groups] for groups in info["resume"]["optimizers"]]
    return info


def _resume(module: L.LightningModule) -> dict[str, Any]:
    trainer = module.trainer
    methods = Adapters.of(module).methods
    return {
        "strategy": type(trainer.strategy).__name__,
        "world_size": trainer.world_size,
        "methods": [m.resume_state(module) for m in methods],
        "optimizers": optimizer_names(trainer, module),
    }


def compare(module: L.LightningModule, checkpoint: dict[str, Any]) -> Section | None:
    """Compare a checkpoint with the module before its values are loaded, and make way for them.

    Returns:
        Its description; None where there is nothing to compare, and Lightning loads it as without adapters.
    """
    trainer = module._trainer
    if trainer is not None:  # what follows for a Trainer are the states of its callbacks
        settle_kept_files(trainer, checkpoint)
        check_states(trainer, checkpoint)
    adapters = Adapters.find(module)
    if adapters is None:  # unloaded or merged for good: an ordinary module again
        return None
    if SECTION not in checkpoint and adapters.complete:
        return None  # a plain checkpoint, which FullFineTuning resumes: Lightning loads it, strictly
    # DeepSpeed has loaded the weights itself
    if trainer is not None and flattens(trainer) and SECTION in checkpoint and "state_dict" not in checkpoint:
        section = Section.parse(upgraded_section(checkpoint[SECTION]), "The checkpoint")
        SavedAdapter(section, {}).check(adapters)
        _take_resume(module, checkpoint, section)
        return section
    hollow = trainer is not None and loads_late(trainer)
    saved = SavedAdapter.from_checkpoint(checkpoint, "The checkpoint", hollow=hollow)
    section = saved.section
    _refuse_weights_only(module, checkpoint)
    fitted = saved.fitted_whole(adapters) if section.full else saved.fitted(adapters)
    _take_resume(module, checkpoint, section)
    checkpoint["state_dict"] = fitted
    adapters.make_way(fitted, whole=section.full)
    return section


def _take_resume(module: L.LightningModule, checkpoint: dict[str, Any], section: Section) -> None:
    if section.resume and "optimizer_states" in checkpoint:
        take_resume(module, checkpoint, section.resume)


def _refuse_weights_only(module: L.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    trainer = module._trainer
    fits = trainer is not None and trainer.state.fn == "fit"
    if fits and not loads_late(trainer) and "optimizer_states" not in checkpoint:
        raise CheckpointError(
            "The checkpoint holds weights only (save_weights_only=True), so training cannot go on from it. Start a new"
            " fit from its values with PEFT(init_from=PATH), without ckpt_path."
        )
