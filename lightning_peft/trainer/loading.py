"""What stands before a strategy's ``load_checkpoint`` while a module has adapters, one class for each kind of strategy.

Lightning loads weights and optimizers in three ways, and a file is compared with the module before anything changes:

* One device and DDP read the file there, and load it later through the module's hooks, which compare it (`Loader`).
* Strategies that shard load weights and optimizers right there, before any hook (`ShardingLoader`, `FSDPLoader`).
* DeepSpeed has checkpoints of its own, which nobody else reads (`DeepSpeedLoader`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.checkpoint import fitting, make_way, reroot
from lightning_peft.errors import CheckpointError
from lightning_peft.files import SECTION, load_checkpoint, split
from lightning_peft.folders import is_folder, read_folder, read_index, read_rest, shapes
from lightning_peft.format1 import name_in_format2
from lightning_peft.hollow import settle_base
from lightning_peft.lightning_packages import fabric_module, package_of
from lightning_peft.paths import missing
from lightning_peft.sharding import sharded, write
from lightning_peft.sharding import split as shard
from lightning_peft.switching import is_complete
from lightning_peft.trainable import find, model_tensors, require
from lightning_peft.trainer.optimizer_states import START_ANEW, NamedStates, arrange_states, optimizer_names
from lightning_peft.trainer.strategies import runs_under

if TYPE_CHECKING:
    import lightning.pytorch as L

Original = Callable[..., dict[str, Any]]


def loader_for(trainer: L.Trainer, module: L.LightningModule, original: Original) -> Loader:
    """What to put before ``original``, the ``load_checkpoint`` of the Trainer's strategy."""
    if runs_under(trainer, "FSDPStrategy"):
        return FSDPLoader(trainer, module, original)
    if runs_under(trainer, "ModelParallelStrategy"):
        return ShardingLoader(trainer, module, original)
    if runs_under(trainer, "DeepSpeedStrategy"):
        return DeepSpeedLoader(trainer, module, original)
    return Loader(trainer, module, original)


class Loader:
    """For strategies whose processes hold the whole module: as Lightning does, and folders of shards as well."""

    def __init__(self, trainer: L.Trainer, module: L.LightningModule, original: Original) -> None:
        self.trainer, self.module, self.original = trainer, module, original

    def __call__(self, checkpoint_path: str | os.PathLike, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.trainer.strategy.broadcast(checkpoint_path))
        if find(self.module) is None or "://" in str(checkpoint_path):
            return self.original(checkpoint_path, weights_only)
        return self.load(path, lambda: self.original(checkpoint_path, weights_only))

    def load(self, path: Path, as_lightning: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The content of a checkpoint; ``as_lightning`` does what Lightning would do."""
        return whole_folder(path, self.fits) if is_folder(path) else as_lightning()

    @property
    def fits(self) -> bool:
        """Whether training goes on from the checkpoint."""
        return self.trainer.state.fn == "fit"


class DeepSpeedLoader(Loader):
    """DeepSpeed reads its own folders, which have no sections in them that could be compared before."""

    def load(self, path: Path, as_lightning: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Refuse what DeepSpeed would fail at."""
        is_one_file = path.is_file() and not self.trainer.strategy.load_full_weights
        if is_folder(path) or is_one_file:
            raise CheckpointError(f"{path} is not by DeepSpeed, which resumes from folders of its own. {START_ANEW}")
        return as_lightning()


class ShardingLoader(Loader):
    """Loads a file or a folder of shards into parameters that are DTensors."""

    def load(self, path: Path, as_lightning: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Compare, then load weights, and optimizer states where training goes on."""
        where, folder = str(path), is_folder(path)
        content = self._content(path)
        if SECTION not in content and is_complete(require(self.module)[0].methods):
            return as_lightning()  # a plain checkpoint, which FullFineTuning resumes
        state, info = split(content, where)
        if self.fits:
            settle_base(self.module)  # a base loaded in on_fit_start
        fitted = fitting(self.module, state, info, where, hollow=folder)
        if self.fits and not (info.get("resume") or {}).get("optimizers"):
            raise CheckpointError(
                f"{where} holds weights and no optimizer state, so it cannot be resumed. {START_ANEW}"
            )
        if self.fits and not folder:
            arrange_states(self.trainer, self.module, content, where)
        make_way(self.module, fitted)
        if folder:
            self._read_weights(path, content[SECTION])
        else:
            self._set_weights(fitted)
        if self.fits and folder:
            # Whole states, compared by name, then split: the folder may come from another number of processes.
            states = whole_folder(path, optimizers=True)
            arrange_states(self.trainer, self.module, states, where)
            self._set_optimizers(states["optimizer_states"])
        elif self.fits:
            self._set_optimizers(content["optimizer_states"])
        return content

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

    def _read_weights(self, path: Path, info: Mapping[str, Any]) -> None:
        """From shards into shards, each process what it needs."""
        tensors = model_tensors(self.module)
        stored = {name_in_format2(name, info): name for name in info["keys"]}
        names = reroot(stored, info, self.module)  # type: ignore[arg-type]
        _read_into({f"state_dict.{old}": tensors[new].detach() for new, old in names.items()}, path)

    def _set_weights(self, state: Mapping[str, Tensor]) -> None:
        tensors = model_tensors(self.module)
        for name, value in state.items():
            write(tensors[name], value)

    def _set_optimizers(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.trainer.optimizers, states, strict=True):
            self._set_optimizer(optimizer, state)

    def _set_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        parts = {}
        for number, kept in state["state"].items():
            parts[number] = {key: _part(value, parameters[number]) for key, value in kept.items()}
        optimizer.load_state_dict({**state, "state": parts})


class FSDPLoader(ShardingLoader):
    """Loads into the flat parameters of `FullyShardedDataParallel`, which has functions of its own for that."""

    def _set_weights(self, state: Mapping[str, Tensor]) -> None:
        model, world_size = self.trainer.strategy.model, self.trainer.world_size
        load = fabric_module(package_of(self.trainer), "strategies.model_parallel")._load_raw_module_state
        load(dict(state), model, world_size, strict=False)  # type: ignore[arg-type]

    def _set_optimizers(self, states: list[dict[str, Any]]) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        model: Any = self.trainer.strategy.model
        full_states = fabric_module(package_of(self.trainer), "strategies.fsdp")._get_full_state_dict_context
        all_names = optimizer_names(self.trainer, self.module)
        for optimizer, state, names in zip(self.trainer.optimizers, states, all_names, strict=True):
            named = NamedStates.from_optimizer_order(state, names).to_names()
            with full_states(model, world_size=self.trainer.world_size, rank0_only=False):
                flat = FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, named)
            optimizer.load_state_dict(flat)


def whole_folder(path: Path, optimizers: bool) -> dict[str, Any]:
    """A folder of shards as one file would hold it, with or without its optimizer states."""
    content = read_folder(path, optimizers)
    all_names = ((content.get(SECTION) or {}).get("resume") or {}).get("optimizers")
    if all_names and "optimizer_states" in content:
        pairs = zip(content["optimizer_states"], all_names, strict=True)
        content["optimizer_states"] = [NamedStates.from_names(s, names).to_optimizer_order() for s, names in pairs]
    return content


def _part(value: Any, parameter: Tensor) -> Any:
    """This process's part of what an optimizer keeps of a parameter, where that has the parameter's shape."""
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape != parameter.shape or not sharded(parameter):
        return value
    return shard(value.to(parameter.device), parameter)


def _read_into(targets: dict[str, Any], path: Path) -> None:
    """Fill tensors, split or not, from a folder; its index is read by our own reader."""
    import torch.distributed.checkpoint as dcp

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            index = read_index(path)
            index.storage_meta = index.storage_meta or dcp.metadata.StorageMeta()
            return index

    dcp.load(targets, storage_reader=Reader(path))
