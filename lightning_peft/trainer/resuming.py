"""The part of a checkpoint that only a resume needs, looked at before anything is loaded."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.errors import CheckpointError
from lightning_peft.model.adapters import Adapters
from lightning_peft.trainer.strategies import loads_late
from lightning_peft.untrusted import short

if TYPE_CHECKING:
    import lightning.pytorch as L

_KINDS = {"optimizer_states": list, "lr_schedulers": list, "loops": dict, "callbacks": dict, "epoch": int}
_KINDS |= {"global_step": int}
#: states of torch's optimizers that have the shape of their parameter
_ALIKE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")


def check_states(trainer: L.Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Make sure that the states of Lightning's own callbacks are such as these callbacks write.

    Raises:
        CheckpointError: one is damaged; nothing has been loaded yet.
    """
    states = checkpoint.get("callbacks")
    if states is None:
        return
    if not isinstance(states, Mapping):
        raise CheckpointError(_damaged("callbacks"))
    for callback in trainer.callbacks:
        state = states.get(callback.state_key)
        is_lightnings = type(callback).__module__.split(".")[0] in ("lightning", "pytorch_lightning")
        if not state or not is_lightnings or hasattr(callback, "best_k_models"):  # see `settle_kept_files`
            continue
        ours = callback.state_dict()
        if not isinstance(state, Mapping) or not all(_alike(state[k], v) for k, v in ours.items() if k in state):
            raise CheckpointError(_damaged(f"the state of {type(callback).__name__}"))
        try:
            copy.copy(callback).load_state_dict(copy.deepcopy(dict(state)))
        except Exception as error:  # whatever it misses
            raise CheckpointError(_damaged(f"the state of {type(callback).__name__} ({short(error)})")) from error


def _alike(theirs: Any, ours: Any) -> bool:
    """Whether a value in a file can stand where the callback has its own."""
    if ours is None:
        return True
    numbers = (int, float, Tensor)
    if isinstance(ours, numbers):
        return isinstance(theirs, numbers) and (not isinstance(theirs, Tensor) or theirs.numel() == 1)
    return isinstance(theirs, Mapping if isinstance(ours, Mapping) else type(ours))


def take_resume(module: L.LightningModule, checkpoint: Mapping[str, Any], resume: Any) -> None:
    """Check what Lightning will load after the weights, and give the methods back their own part.

    Raises:
        CheckpointError: a part is of another type or shape; nothing has been loaded yet.
    """
    broken = [k for k, kind in _KINDS.items() if k in checkpoint and not isinstance(checkpoint[k], kind)]
    for key in ("optimizer_states", "lr_schedulers"):
        if key not in broken and not all(isinstance(entry, dict) for entry in checkpoint.get(key, [])):
            broken.append(key)
    if isinstance(resume, dict) and not _are_names_of_groups(resume.get("optimizers", [])):
        broken.append("optimizers")
    late = module._trainer is not None and loads_late(module._trainer)  # sharded states are compared as they load
    adapters = Adapters.of(module)
    if not late and "optimizer_states" not in broken:
        # A part that is frozen now may train later, and be in the optimizer of the file already.
        shapes = {parameter.shape for parameter in module.parameters()}
        broken += [] if _fitting(checkpoint["optimizer_states"], shapes) else ["optimizer_states"]
    if broken:
        raise CheckpointError(_damaged(", ".join(broken)))
    try:
        for method, saved in zip(adapters.methods, resume["methods"], strict=True):
            method.load_resume_state(module, saved)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise CheckpointError(_damaged(str(error))) from error


def _are_names_of_groups(optimizers: Any) -> bool:
    """Whether this is a list of optimizers, each a list of groups, each a list of names."""
    groups = [optimizers]
    for _ in ("optimizers", "groups", "names"):
        if not all(isinstance(part, list) for part in groups):
            return False
        groups = [inner for part in groups for inner in part]
    return all(isinstance(name, str) for name in groups)


def _fitting(states: list[dict[str, Any]], shapes: Collection[torch.Size]) -> bool:
    """Whether moments have the shape of something that trains, as far as their kind is known."""
    for state in states:
        entries = state.get("state", {})
        for entry in entries.values() if isinstance(entries, dict) else [None]:
            if not isinstance(entry, dict):
                return False
            moments = [entry[key] for key in _ALIKE if isinstance(entry.get(key), Tensor)]
            if any(m.shape not in shapes or not torch.isfinite(m).all() for m in moments if type(m) is Tensor):
                return False
    return True


def _damaged(what: str) -> str:
    return (
        f"The checkpoint's part for resuming is damaged: {what}. Start a new run from its weights with"
        " PEFT(init_from=PATH), or resume from an earlier checkpoint."
    )
