"""The files that a resumed ``ModelCheckpoint`` takes for its own.

It deletes them when better ones come, folders with everything in them, and it takes their names from the checkpoint
that is resumed. So these must lie in the callback's folder, whatever the checkpoint says:

* The folder is the same, perhaps by another name (a link): the state is taken with the paths that hold here.
* The folder is another one, because the run was moved or goes on elsewhere: Lightning takes ``best_model_path`` alone.
  It is looked for in the callback's folder and beside the checkpoint that is resumed, both of which the user has named.
* Anything else was not written by a ``ModelCheckpoint``, and is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.errors import CheckpointError
from lightning_peft.lightning_packages import rank_zero_warn
from lightning_peft.untrusted import short

if TYPE_CHECKING:
    import lightning.pytorch as L

_PATHS = ("best_model_path", "last_model_path", "kth_best_model_path")


def settle_kept_files(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Check the states of all ``ModelCheckpoint`` callbacks in a loaded checkpoint, and bring their paths up to date.

    Raises:
        CheckpointError: a path lies elsewhere than in the folder of its callback, or a state is damaged.
    """
    states = checkpoint.get("callbacks")
    if not isinstance(states, dict):  # refused elsewhere, where anything is resumed
        return
    for callback in trainer.callbacks:
        if not hasattr(callback, "best_k_models"):
            continue
        for key in (callback.state_key, callback._legacy_state_key):
            if states.get(key):
                states[key] = _settled(callback, states[key], trainer.ckpt_path)


def _settled(callback: Any, state: Any, resumed: Any) -> dict[str, Any]:
    """A copy of a state, all of whose paths hold here."""
    _check_form(callback, state)
    old = str(state.get("dirpath") or callback.dirpath)
    new = str(callback.dirpath)
    kept = [state.get(name, "") for name in _PATHS] + list(state.get("best_k_models", {}))
    for path in kept:
        if path and not (is_inside(path, old) and path.endswith(callback.FILE_EXTENSION)):
            raise _refusal(
                callback,
                f"names {short(repr(path), 200)}, which is no checkpoint in its folder {short(repr(old), 200)}",
            )
    state = _with_worst(callback, state)
    if old == new:
        return state
    if not _is_remote(old) and not _is_remote(new) and _resolved(old) == _resolved(new):
        return _renamed(state, old, new)
    best = state["best_model_path"]
    return {**state, "best_model_path": _found(best, old, new, resumed) if best else ""}


def _check_form(callback: Any, state: Any) -> None:
    """Raise unless a state has the parts that Lightning takes from it, of their types."""
    if not isinstance(state, Mapping):
        raise _refusal(callback, f"is a {type(state).__name__}")
    scores = state.get("best_k_models", {})
    broken = [name for name in _PATHS if not isinstance(state.get(name, ""), str)]
    broken += [name for name in ("best_model_score", "kth_value") if not _is_score(state.get(name), or_none=True)]
    broken += [name for name in ("best_model_path", "best_model_score") if name not in state]
    if not isinstance(state.get("dirpath"), (str, type(None))):
        broken.append("dirpath")
    if not isinstance(scores, dict) or not all(isinstance(k, str) and _is_score(v) for k, v in scores.items()):
        broken.append("best_k_models")
    elif not broken and state.get("kth_best_model_path") and state["kth_best_model_path"] not in scores:
        broken.append("kth_best_model_path")
    if broken:
        raise _refusal(callback, f"is damaged ({', '.join(dict.fromkeys(broken))})")


def _with_worst(callback: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state that names the worst of the best checkpoints, which Lightning replaces first.

    A state without it has room for more. A callback that keeps fewer now has no room, and would look for a name.
    """
    scores = state.get("best_k_models", {})
    if state.get("kth_best_model_path") or not scores or not 0 < callback.save_top_k <= len(scores):
        return dict(state)
    worst = (max if callback.mode == "min" else min)(scores, key=lambda path: float(scores[path]))
    return {**state, "kth_best_model_path": worst, "kth_value": scores[worst]}


def _is_score(value: Any, or_none: bool = False) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return (value is None and or_none) or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _refusal(callback: Any, fact: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint's state of {type(callback).__name__} {fact}. The callback deletes such files when better ones"
        " come, so the run does not go on from this checkpoint. Resume from another one, or start a new run from its"
        " weights: PEFT(init_from=PATH)."
    )


def is_inside(path: str, folder: str) -> bool:
    """Whether a file lies in a folder or below it, links followed; addresses of remote files are compared as text.

    >>> is_inside("run/a.ckpt", "run"), is_inside("run/../a.ckpt", "run"), is_inside("run", "run")
    (True, False, False)
    """
    # Lightning opens paths with fsspec, which takes `~` for the home folder and `file:` for a kind of address
    if path.startswith("~") or (":" in path.split("/")[0] and "://" not in path):
        return False
    if _is_remote(path) or _is_remote(folder):
        start = folder.rstrip("/") + "/"
        return path.startswith(start) and not {"", ".", ".."} & set(path[len(start) :].split("/"))
    try:
        return _resolved(folder) in _resolved(path).parents
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or links in a circle
        return False


def _is_remote(path: str) -> bool:
    return "://" in path or "::" in path


def _resolved(path: str) -> Path:
    return Path(path).resolve()


def _relative(path: str, folder: str) -> str:
    """A path from a folder on, both resolved but for the file itself, which may be a link to another checkpoint."""
    place = Path(path)
    return os.path.relpath(place.parent.resolve() / place.name, _resolved(folder))


def _renamed(state: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """A state in which every path begins as the callback's folder is called in this run."""

    def here(path: str) -> str:
        return os.path.join(new, _relative(path, old)) if path else path

    paths = {name: here(state[name]) for name in _PATHS if name in state}
    scores = {here(path): score for path, score in state.get("best_k_models", {}).items()}
    return {**state, **paths, "best_k_models": scores, "dirpath": new}


def _found(best: str, old: str, new: str, resumed: Any) -> str:
    """The best checkpoint of a run that has another folder now, if it lies where the user has named; else ``""``."""
    if not _is_remote(best) and not _is_remote(old):
        relative = _relative(best, old)
        places = [new] if resumed is None else [new, str(Path(resumed).parent)]
        for folder in places:
            place = os.path.join(folder, relative)
            if not _is_remote(folder) and os.path.exists(place) and is_inside(place, folder):
                return place
    rank_zero_warn(
        f"The best checkpoint so far, {short(best, 200)}, is neither in {new} nor beside the checkpoint that is"
        " resumed, so it is forgotten: the best will be one of those to come."
    )
    return ""
