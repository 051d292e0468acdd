"""Optimizer states by the names of their tensors, whatever order a strategy numbers them in.

An optimizer's state dict holds what it keeps of each tensor (moments, steps) under a number. What the number counts
depends on who wrote it:

=============================================  =========================================================
one device, DDP                                tensors of the optimizer, group after group
FSDP, ModelParallel                            parameters of the whole model
a folder of shards                             nothing: there are names in place of numbers
=============================================  =========================================================

`NamedStates` is the form in between. Files written here always number the tensors of the optimizer, with their names
beside them, so a run can go on under another strategy, and with another order of the same parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_peft.errors import CheckpointError
from lightning_peft.files import SECTION
from lightning_peft.format1 import upgraded_section
from lightning_peft.model.adapters import Adapters
from lightning_peft.saving.section import Section
from lightning_peft.sharding import plain_name
from lightning_peft.trainer.strategies import flattens, has_optimizers, loads_late

if TYPE_CHECKING:
    import lightning.pytorch as L

#: for each group of an optimizer the names of the tensors in it
Names = list[list[str]]
#: the way out where optimizer states cannot be used
START_ANEW = "Start a new fit from its weights instead: PEFT(init_from=PATH)."


@dataclass(frozen=True)
class NamedStates:
    """The state of one optimizer.

    >>> state = {"state": {0: "m", 1: "n"}, "param_groups": [{"lr": 1, "params": [0]}, {"lr": 2, "params": [1]}]}
    >>> named = NamedStates.from_optimizer_order(state, [["a"], ["b"]])
    >>> named.tensors
    {'a': 'm', 'b': 'n'}
    >>> named.to_optimizer_order() == state
    True
    """

    #: what the optimizer keeps of a tensor, by the tensor's name; nothing before its first step
    tensors: dict[str, Any]
    #: learning rate and the like of each group
    groups: list[dict[str, Any]]
    names: Names

    @classmethod
    def from_optimizer_order(cls, state: Mapping[str, Any], names: Names) -> NamedStates:
        """From numbers that count the tensors of the optimizer."""
        return cls._from_numbers(state, _flat(names), names)

    @classmethod
    def from_model_order(cls, state: Mapping[str, Any], model: nn.Module, names: Names) -> NamedStates:
        """From numbers that count the parameters of the model."""
        return cls._from_numbers(state, [plain_name(n) for n, _ in model.named_parameters()], names)

    @classmethod
    def from_names(cls, state: Mapping[str, Any], names: Names) -> NamedStates:
        """From a state that has names in place of numbers."""
        return cls(dict(state["state"]), state["param_groups"], names)

    @classmethod
    def _from_numbers(cls, state: Mapping[str, Any], numbered: Sequence[str], names: Names) -> NamedStates:
        tensors = {numbered[number]: kept for number, kept in state["state"].items()}
        return cls(tensors, state["param_groups"], names)

    def to_optimizer_order(self) -> dict[str, Any]:
        """As ``optimizer.load_state_dict`` takes it, and as files hold it."""
        number = {name: i for i, name in enumerate(_flat(self.names))}
        groups = [
            {**group, "params": [number[name] for name in names]}
            for group, names in zip(self.groups, self.names, strict=True)
        ]
        return {"state": {number[name]: kept for name, kept in self.tensors.items()}, "param_groups": groups}

    def to_names(self) -> dict[str, Any]:
        """With names in place of numbers."""
        groups = [{**group, "params": names} for group, names in zip(self.groups, self.names, strict=True)]
        return {"state": self.tensors, "param_groups": groups}

    def arranged_as(self, names: Names, where: str) -> NamedStates:
        """The same in the order of another optimizer that holds the same tensors in the same groups.

        Raises:
            CheckpointError: it holds other tensors, or other groups.
        """
        if [set(group) for group in self.names] != [set(group) for group in names]:
            differing = set(_flat(self.names)) ^ set(_flat(names))
            reason = "they are grouped in another way"
            if differing:
                reason = f"they differ in {', '.join(sorted(differing)[:3])}"
            raise CheckpointError(
                f"{where}: its optimizer does not hold the tensors that the one of this run holds: {reason}. Resume"
                f" with the same configure_optimizers. {START_ANEW}"
            )
        return NamedStates(self.tensors, self.groups, names)


def _flat(names: Names) -> list[str]:
    return [name for group in names for name in group]


def optimizer_names(trainer: L.Trainer, module: nn.Module) -> list[Names]:
    """The names of the tensors in each of a Trainer's optimizers."""
    if flattens(trainer) or not has_optimizers(trainer):
        return []
    name_of = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
    return [
        [[name_of.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]


def states_for_file(trainer: L.Trainer, module: nn.Module, states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Optimizer states as a file holds them, from what the strategy has gathered."""
    if not loads_late(trainer):
        return states
    for_file = []
    for state, names in zip(states, optimizer_names(trainer, module), strict=True):
        is_named = bool(state) and any(isinstance(key, str) for key in state["state"])  # it goes into shards
        if state and not is_named:  # an empty one is that of another rank, which writes nothing
            state = NamedStates.from_model_order(state, module, names).to_optimizer_order()
        for_file.append(state)
    return for_file


def arrange_states(trainer: L.Trainer, module: nn.Module, checkpoint: dict[str, Any], where: str) -> None:
    """Bring a checkpoint's optimizer states, in place, into the order of this run's optimizers.

    Raises:
        CheckpointError: the optimizers of this run are other ones.
    """
    section = Section.parse(upgraded_section(checkpoint[SECTION]), where)
    all_saved_names = section.optimizer_names
    all_names = optimizer_names(trainer, module)
    states = checkpoint.get("optimizer_states")
    if not states or not all_names:
        return
    if all_saved_names is None:
        if loads_late(trainer):
            raise CheckpointError(f"{where} does not name the tensors of its optimizer states. {START_ANEW}")
        return
    if len(all_saved_names) != len(all_names):
        raise CheckpointError(
            f"{where} holds {len(all_saved_names)} optimizers, this run has {len(all_names)}. {START_ANEW}"
        )
    arranged = []
    for state, saved_names, names in zip(states, all_saved_names, all_names, strict=True):
        named = NamedStates.from_optimizer_order(state, [_names_in(group, section, module) for group in saved_names])
        arranged.append(named.arranged_as(names, where).to_optimizer_order())
    checkpoint["optimizer_states"] = arranged


def _names_in(saved_names: list[str], section: Section, module: nn.Module) -> list[str]:
    """Names in a file as the tensors are called in this module, where the network may stand at another place."""
    path = Adapters.of(module).path
    return [plain_name(section.name_under(path, name)) for name in saved_names]
