"""Checkpoints from one strategy to another: weights always, optimizer states by the names of their tensors.

Lightning numbers optimizer states by position in the optimizer (one device, DDP) or in the model (FSDP,
ModelParallel). Files written here always hold the former, with the names beside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.checkpoint import fitting, make_way, reroot
from lightning_peft.errors import CheckpointError
from lightning_peft.files import SECTION, load_checkpoint, split
from lightning_peft.folders import is_folder, read_folder, read_index, read_rest, shapes
from lightning_peft.format1 import name_in_format2, upgraded_section
from lightning_peft.hollow import settle_base
from lightning_peft.lightning_packages import fabric_module, package_of
from lightning_peft.paths import missing
from lightning_peft.sharding import plain_name, sharded, write
from lightning_peft.sharding import split as shard
from lightning_peft.switching import is_complete
from lightning_peft.trainable import find, model_tensors, require
from lightning_peft.trainer.strategies import flattens, has_optimizers, loads_late, runs_under

if TYPE_CHECKING:
    import lightning.pytorch as L

Names = list[list[str]]
_ANEW = "Start a new fit from its weights instead: PEFT(init_from=PATH)."


# ---- writing -------------------------------------------------------------------------------------------------------
def optimizer_names(trainer: L.Trainer, module: nn.Module) -> list[Names]:
    """For each optimizer and each of its groups the names of the tensors in it."""
    if flattens(trainer) or not has_optimizers(trainer):
        return []
    names = {id(p): plain_name(n) for n, p in module.named_parameters()}
    return [
        [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]


def by_position(trainer: L.Trainer, module: nn.Module, states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Optimizer states as a file holds them, from what the strategy has gathered."""
    if not loads_late(trainer):
        return states
    all_names = [plain_name(n) for n, _ in module.named_parameters()]
    out = []
    for state, names in zip(states, optimizer_names(trainer, module), strict=True):
        if not state or any(isinstance(k, str) for k in state["state"]):  # another rank; or shards, kept by name
            out.append(state)
            continue
        out.append(_numbered({all_names[i]: s for i, s in state["state"].items()}, state["param_groups"], names))
    return out


def _numbered(states: Mapping[str, Any], groups: list[dict[str, Any]], names: Names) -> dict[str, Any]:
    """States by name to states by position in ``names``."""
    position = {n: i for i, n in enumerate(n for group in names for n in group)}
    starts = [sum(len(g) for g in names[:i]) for i in range(len(names))]
    return {
        "state": {position[n]: s for n, s in states.items()},
        "param_groups": [
            {**old, "params": list(range(start, start + len(new)))}
            for old, new, start in zip(groups, names, starts, strict=True)
        ],
    }


# ---- reading -------------------------------------------------------------------------------------------------------
def fit_to(state: dict[str, Any], there: Names, here: Names, where: str) -> dict[str, Any]:
    """An optimizer state by position in ``there`` to one by position in ``here``.

    Raises:
        CheckpointError: the two optimizers do not hold the same tensors in the same groups.
    """
    if [set(g) for g in there] != [set(g) for g in here]:
        lost = {n for g in there for n in g} ^ {n for g in here for n in g}
        what = f"they differ in {', '.join(sorted(lost)[:3])}" if lost else "they are grouped in another way"
        raise CheckpointError(
            f"{where}: its optimizer does not hold the tensors that the one of this run holds: {what}. Resume with the"
            f" same configure_optimizers. {_ANEW}"
        )
    flat = [n for group in there for n in group]
    return _numbered({flat[i]: s for i, s in state["state"].items()}, state["param_groups"], here)


def fit_optimizers(trainer: L.Trainer, module: nn.Module, checkpoint: dict[str, Any], where: str) -> None:
    """Bring a checkpoint's optimizer states into the order of this run's optimizers."""
    info = upgraded_section(checkpoint[SECTION])
    saved = (info.get("resume") or {}).get("optimizers")
    here = optimizer_names(trainer, module)
    states = checkpoint.get("optimizer_states")
    if not states or not here:
        return
    if saved is None:
        if loads_late(trainer):
            raise CheckpointError(f"{where} does not name the tensors of its optimizer states. {_ANEW}")
        return
    if len(saved) != len(here):
        raise CheckpointError(f"{where} holds {len(saved)} optimizers, this run has {len(here)}. {_ANEW}")
    moved = [[_here(g, info, module) for g in names] for names in saved]
    checkpoint["optimizer_states"] = [
        fit_to(state, there, names, where) for state, there, names in zip(states, moved, here, strict=True)
    ]


def _here(names: list[str], info: Mapping[str, Any], module: nn.Module) -> list[str]:
    """Names in a file as they are in this module."""
    back = {old: new for new, old in reroot({n: n for n in names}, info, module).items()}  # type: ignore[arg-type]
    return [plain_name(back.get(n, n)) for n in names]


class Loader:
    """Stands before a strategy's ``load_checkpoint`` while a module has adapters.

    Sharding strategies load weights and optimizer in there, before any hook: here a file is compared first.
    """

    def __init__(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.trainer, self.module = trainer, module

    def __call__(self, checkpoint_path: str | os.PathLike, weights_only: bool | None = None) -> dict[str, Any]:
        strategy = self.trainer.strategy
        original: Callable[..., dict[str, Any]] = type(strategy).load_checkpoint.__get__(strategy)
        path = Path(strategy.broadcast(checkpoint_path))
        if find(self.module) is None or "://" in str(checkpoint_path):
            return original(checkpoint_path, weights_only)
        if loads_late(self.trainer):
            content = self._content(path)
            if SECTION not in content and is_complete(require(self.module)[0].methods):
                return original(checkpoint_path, weights_only)  # a plain checkpoint, as without adapters
            return self.load(path, content)
        if runs_under(self.trainer, "DeepSpeedStrategy"):
            if is_folder(path) or (path.is_file() and not strategy.load_full_weights):
                raise CheckpointError(f"{path} is not by DeepSpeed, which resumes from folders of its own. {_ANEW}")
        elif is_folder(path):
            return numbered_folder(path, self.trainer.state.fn == "fit")
        return original(checkpoint_path, weights_only)

    def _content(self, path: Path) -> dict[str, Any]:
        """What a file holds, or a folder of shards but for the values of its tensors."""
        if is_folder(path):
            content = read_rest(path)
            content["state_dict"] = shapes(path)
            return content
        if not os.path.exists(path):
            raise missing(path)
        if not path.is_file():
            raise CheckpointError(f"{path} is neither a checkpoint file nor a folder of shards.")
        return load_checkpoint(path)

    def load(self, path: Path, content: dict[str, Any]) -> dict[str, Any]:
        """Compare, then load into shards."""
        where, folder = str(path), is_folder(path)
        state, info = split(content, where)
        if self.trainer.state.fn == "fit":
            settle_base(self.module)  # a base loaded in on_fit_start
        fitted = fitting(self.module, state, info, where, hollow=folder)
        fits = self.trainer.state.fn == "fit"
        if fits and not (info.get("resume") or {}).get("optimizers"):
            raise CheckpointError(f"{where} holds weights and no optimizer state, so it cannot be resumed. {_ANEW}")
        if fits and not folder:
            fit_optimizers(self.trainer, self.module, content, where)
        make_way(self.module, fitted)
        if folder:
            self._weights_from(path, content[SECTION])
            if fits:
                self._optimizers_from(path, info, where)
        else:
            self._weights(fitted)
            if fits:
                self._optimizers(content["optimizer_states"])
        return content

    def _weights(self, state: Mapping[str, Tensor]) -> None:
        if runs_under(self.trainer, "FSDPStrategy"):
            model, size = self.trainer.strategy.model, self.trainer.world_size
            load = fabric_module(package_of(self.trainer), "strategies.model_parallel")._load_raw_module_state
            load(dict(state), model, size, strict=False)  # type: ignore[arg-type]
            return
        tensors = model_tensors(self.module)
        for name, value in state.items():
            write(tensors[name], value)

    def _optimizers(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.trainer.optimizers, states, strict=True):
            if runs_under(self.trainer, "FSDPStrategy"):
                optimizer.load_state_dict(self._flattened(optimizer, state))
                continue
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            parts = {
                i: {k: _shard(v, parameters[i]) for k, v in values.items()} for i, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": parts})

    def _flattened(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """As `FullyShardedDataParallel` wants it."""
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

        model: Any = self.trainer.strategy.model
        names = {id(p): plain_name(n) for n, p in self.module.named_parameters()}
        flat = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        named = {
            "state": {flat[i]: s for i, s in state["state"].items()},
            "param_groups": [{**g, "params": [flat[i] for i in g["params"]]} for g in state["param_groups"]],
        }
        fsdp = fabric_module(package_of(self.trainer), "strategies.fsdp")
        with fsdp._get_full_state_dict_context(model, world_size=self.trainer.world_size, rank0_only=False):
            return FSDP.optim_state_dict_to_load(model, optimizer, named)

    def _weights_from(self, path: Path, info: Mapping[str, Any]) -> None:
        """From shards into shards, each process what it needs."""
        tensors = model_tensors(self.module)
        stored = {name_in_format2(name, info): name for name in info["keys"]}
        names = reroot(stored, info, self.module)  # type: ignore[arg-type]
        _read_into({f"state_dict.{old}": tensors[new].detach() for new, old in names.items()}, path)

    def _optimizers_from(self, path: Path, info: Mapping[str, Any], where: str) -> None:
        """Whole states, compared by name, then split: the folder may come from another number of processes."""
        content = numbered_folder(path, True)
        fit_optimizers(self.trainer, self.module, content, where)
        self._optimizers(content["optimizer_states"])


def numbered_folder(path: Path, optimizers: bool) -> dict[str, Any]:
    """A folder of shards as one file would hold it."""
    content = read_folder(path, optimizers)
    names = ((content.get(SECTION) or {}).get("resume") or {}).get("optimizers")
    if names and "optimizer_states" in content:
        content["optimizer_states"] = [
            _numbered(s["state"], s["param_groups"], n) for s, n in zip(content["optimizer_states"], names, strict=True)
        ]
    return content


def _shard(value: Any, parameter: Tensor) -> Any:
    alike = isinstance(value, Tensor) and value.ndim > 0 and value.shape == parameter.shape
    return shard(value.to(parameter.device), parameter) if alike and sharded(parameter) else value


def _read_into(targets: dict[str, Any], path: Path) -> None:
    """Fill tensors, split or not, from a folder; its index is read by our own reader."""
    import torch.distributed.checkpoint as dcp

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            index = read_index(path)
            index.storage_meta = index.storage_meta or dcp.metadata.StorageMeta()
            return index

    dcp.load(targets, storage_reader=Reader(path))
