"""The classes of a task, as the user, the data module and the network name them: they must agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_peft.errors import ConfigError
from lightning_peft.files import load_checkpoint, locate
from lightning_peft.heads import listed_labels
from lightning_peft.task.kinds import Task
from lightning_peft.task.loading import label_names as names_in


def ask_data(data: Any, task: Task, names: list[str] | None) -> list[str] | None:
    """Take label names from the data module where none are given, and make sure that it prepares this task."""
    its_task, known = getattr(data, "task", None), getattr(data, "label_names", None)
    if isinstance(its_task, str) and its_task != task.name:
        raise ConfigError(f"The model has task={task.name!r}, the data module task={its_task!r}; make them equal.")
    if not known or task.target not in ("class", "token"):
        return names
    if names is not None and len(names) < len(known):
        raise ConfigError(
            f"The model has {listed_labels(names)}, the data {listed_labels(known)}. Give data with the labels of the"
            " model, or train a new one with those of the data: without num_labels, label_names and a checkpoint."
        )
    return [str(n) for n in known] if names is None else names


def ask_checkpoint(path: str) -> dict[str, Any]:
    """The classes that a `TaskModule` left in a checkpoint: its arguments ``label_names`` and ``label_words``.

    Rows that are only to be predicted have no labels, so nothing else can say what the classes are.
    """
    found = load_checkpoint(locate(path)).get("hyper_parameters")
    if not isinstance(found, Mapping) or not isinstance(found.get("label_names"), list):
        return {}
    classes: dict[str, Any] = {"label_names": [str(name) for name in found["label_names"]]}
    if isinstance(found.get("label_words"), list):
        classes["label_words"] = found["label_words"]
    return classes


def check_words(task: Task, names: list[str] | None, words: list[list[int]] | None) -> None:
    """Each class of a cloze task needs words."""
    if names is None or len(words or []) != len(names):
        raise ConfigError(
            f"{task.name} needs label_names and the words of each: train with TextDataModule(verbalizer=…), or"
            " give label_words=[[token id, …], …]."
        )


def fit_network(network: nn.Module, names: list[str] | None) -> list[str]:
    """The names, or those in the network's own config; as many as it puts out."""
    known = names_in(network)
    names = names or known
    if names is None or (known and len(known) != len(names)):
        raise ConfigError(
            f"{type(network).__name__} puts out {len(known) if known else 'an unknown number of'} labels,"
            f" {len(names or [])} are named. Give it a head for them, and label_names=[...]."
        )
    return names
