"""Objects in the checkpoints of a run: what is left out of the files, what is not read, and what is said of it.

Checkpoints should be readable with ``weights_only=True``, because anything else can run code. So hyper-parameters that
are objects stay out of the files, and their names are written down, so that no reload can overlook them. What a
module's own ``on_save_checkpoint`` adds is the module's affair: it is written, and said once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lightning_peft.errors import CheckpointError
from lightning_peft.lightning_packages import LightningDataModule, every, rank_zero_warn
from lightning_peft.model.adapters import Adapters
from lightning_peft.objects import is_picklable, left_out, object_in, objects_in
from lightning_peft.untrusted import PARAMETERS, short

if TYPE_CHECKING:
    import lightning.pytorch as L

#: parts of a checkpoint without which Lightning cannot go on exactly where it stopped
_STATES = ("optimizer_states", "lr_schedulers", "loops", "callbacks")


# ---- writing ---------------------------------------------------------------------------------------------------------
def leave_out_arguments(
    module: L.LightningModule, checkpoint: dict[str, Any], *, first_time: bool
) -> dict[str, dict[str, str]]:
    """Take objects out of the hyper-parameters: a network among them is the whole base once more.

    Under full fine-tuning they stay, as in Lightning's own files, but for those that cannot be pickled. The first time
    it is said.

    Returns:
        The classes of those left out, by their names, for each kind of hyper-parameters.
    """
    as_lightning_does = Adapters.of(module).complete
    lost: dict[str, dict[str, str]] = {}
    for key in (type(module).CHECKPOINT_HYPER_PARAMS_KEY, LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY):
        stored = checkpoint.get(key)
        if not isinstance(stored, Mapping):
            continue
        objects = {}
        for name, value in stored.items():
            kind = object_in(value)
            if kind is not None and not (as_lightning_does and is_picklable(value)):
                objects[str(name)] = kind
        if objects:
            lost[key] = objects
            checkpoint[key] = {name: value for name, value in stored.items() if str(name) not in objects}
    names = [name for objects in lost.values() for name in objects]
    if names and first_time:
        kind = type(module).__name__
        rank_zero_warn(
            f"The hyper-parameters {', '.join(names)} are objects and are left out of the checkpoints: otherwise these"
            f" could not be read with weights_only. Reload into an instance, load_from_checkpoint({kind}(…), path), or"
            f" give them: load_from_checkpoint({kind}, path, {arguments(names)}). To silence this:"
            f" save_hyperparameters(ignore={names!r})."
        )
    return lost


def say_what_is_written(checkpoint: Mapping[str, Any]) -> None:
    """Warn of objects in a checkpoint that is complete: the module's own hook has been called."""
    found = objects_in(checkpoint)
    if found:
        rank_zero_warn(
            f"The checkpoints hold objects, which cannot be read with weights_only: {listed(found)}. Everything else"
            " is read all the same, and none of them is built. A later process that needs them resumes with"
            " trainer.fit(…, weights_only=False)."
        )


# ---- reading ---------------------------------------------------------------------------------------------------------
def check_left_out(module: L.LightningModule, checkpoint: Mapping[str, Any], own: Callable) -> None:
    """Say which parts of a checkpoint were not read, before anything is loaded.

    Args:
        module: what the checkpoint is loaded into.
        checkpoint: what was read.
        own: the module's ``on_load_checkpoint``.

    Raises:
        CheckpointError: Lightning cannot go on without one of them.
    """
    lost = left_out(checkpoint)
    trainer = module._trainer
    if not lost or trainer is None:
        return
    needed = (*_STATES, type(trainer.datamodule).__qualname__, type(trainer.precision_plugin).__qualname__)
    stuck = {place: kind for place, kind in lost.items() if _is_part_of(place, needed)}
    if stuck and trainer.state.fn == "fit":
        raise CheckpointError(
            f"The checkpoint cannot be resumed without what is not read in it: {listed(stuck)}. Objects are not built,"
            f" because a pickle can run code. {_way_out(trainer)}"
        )
    if does_something(own) or any(not _is_part_of(place, PARAMETERS) for place in lost):
        rank_zero_warn(
            f"The checkpoint holds objects, which are not built because a pickle can run code: {listed(lost)}. The"
            f" module's on_load_checkpoint gets it without them. {_way_out(trainer)}"
        )


def does_something(hook: Callable) -> bool:
    """Whether an ``on_load_checkpoint`` is not the one that Lightning itself defines, which does nothing."""
    return getattr(hook, "__func__", hook) not in [kind.on_load_checkpoint for kind in every("LightningModule")]


def call_without_objects(own: Callable, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Call the module's own ``on_load_checkpoint``.

    Raises:
        CheckpointError: it asks for a part that was not read.
    """
    try:
        own(checkpoint)
    except KeyError as error:
        lost = {place: kind for place, kind in left_out(checkpoint).items() if _is_part_of(place, error.args)}
        if not lost or module._trainer is None:
            raise
        raise CheckpointError(
            f"{type(module).__name__}.on_load_checkpoint asks for what is not read in the checkpoint: {listed(lost)}."
            f" Objects are not built, because a pickle can run code. {_way_out(module._trainer)}"
        ) from error


def _way_out(trainer: L.Trainer) -> str:
    return f"If you trust the file, read everything: trainer.{trainer.state.fn.value}(…, weights_only=False)."


def _is_part_of(place: str, keys: tuple[Any, ...]) -> bool:
    return any(place == key or place.startswith(f"{key}.") for key in keys)


def listed(found: Mapping[str, str]) -> str:
    """Places or names, each with the class of what is there."""
    return ", ".join(f"{short(place, 80)} ({short(kind, 80)})" for place, kind in found.items())


def arguments(names: Iterable[str]) -> str:
    """Arguments as they stand in a call: ``net=…, loss=…``."""
    return ", ".join(f"{short(name, 80)}=…" for name in names)
