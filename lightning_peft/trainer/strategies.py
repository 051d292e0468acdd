"""Which strategies are supported, what each needs set, and what must hold under it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_peft.adapted import Adapted, Delta
from lightning_peft.errors import TrainingError
from lightning_peft.lightning_packages import every, rank_zero_warn
from lightning_peft.method import Method
from lightning_peft.model.adapters import Adapters, adapted_modules, state_names, trainable_names
from lightning_peft.sharding import named_parameters, sharded
from lightning_peft.trainer.best import best_path

if TYPE_CHECKING:
    import lightning.pytorch as L

KNOWN = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy", "FSDPStrategy", "DeepSpeedStrategy")
_BEFORE = (
    "build the network in `__init__`, where PEFT adapts it before `configure_model` shards it, or call"
    " lightning_peft.inject_now(self) in `configure_model` between building and `fully_shard`."
)


def runs_under(trainer: L.Trainer, *names: str) -> bool:
    """Whether the Trainer's strategy is one of these classes of Lightning, or derives from one."""
    return any(isinstance(trainer.strategy, every(f"strategies.{name}")) for name in names)


def check_strategy(trainer: L.Trainer, allow_untested: bool) -> None:
    """Unknown strategies are better refused than wrong on some rank."""
    strategy = trainer.strategy
    name = type(strategy).__name__
    if not runs_under(trainer, *KNOWN) and not allow_untested:
        raise TrainingError(
            f"{name} is not among the strategies that PEFT is tested with ({', '.join(KNOWN)})."
            " Use one of them, or try it with PEFT(..., allow_untested=True) and compare with a run on one device."
        )
    if runs_under(trainer, "FSDPStrategy"):
        if strategy._state_dict_type != "full":
            raise TrainingError(
                f"{name}(state_dict_type={strategy._state_dict_type!r}) cannot load checkpoints that hold only the"
                " adapter. Use FSDPStrategy(state_dict_type='full'), or ModelParallelStrategy, which writes shards."
            )
        if not strategy.kwargs.get("use_orig_params", True):
            raise TrainingError(
                f"{name}(use_orig_params=False) flattens frozen and trained parameters into one. Leave it at True."
            )


def settings(trainer: L.Trainer) -> dict[str, Any]:
    """Attributes of a strategy that keep its own checkpoints small."""
    if runs_under(trainer, "DeepSpeedStrategy"):
        return {"exclude_frozen_parameters": True}  # it writes the weights itself, past the module's hooks
    return {}


def filters_itself(trainer: L.Trainer) -> bool:
    """Whether a state dict must be left whole until it is saved: FSDP counts the entries."""
    return runs_under(trainer, "FSDPStrategy")


def loads_late(trainer: L.Trainer) -> bool:
    """Whether checkpoints are loaded into the sharded model, weights and optimizer at once."""
    return runs_under(trainer, "ModelParallelStrategy", "FSDPStrategy")


def flattens(trainer: L.Trainer) -> bool:
    """Whether optimizers hold other parameters than the module."""
    return runs_under(trainer, "DeepSpeedStrategy")


def has_optimizers(trainer: L.Trainer) -> bool:
    """Whether the module has optimizers; in the place of none Lightning puts one that does nothing."""
    stand_in = every("core.optimizer._MockOptimizer")
    return any(not isinstance(optimizer, stand_in) for optimizer in trainer.optimizers)


def check_methods(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Methods that look at adapters between steps need to see them whole."""
    parts = ("regularizer", "transform_grads", "after_step")
    for method in Adapters.of(pl_module).methods if not readable(trainer) else ():
        own = [p for p in parts if getattr(type(method), p) is not getattr(Method, p)]
        if own:
            raise TrainingError(
                f"{type(method).__name__} works on whole adapters between steps ({', '.join(own)}), and"
                f" {type(trainer.strategy).__name__} keeps flattened parts of them. Use ModelParallelStrategy or 'ddp'."
            )
    if runs_under(trainer, "DeepSpeedStrategy"):
        parameters = dict(pl_module.named_parameters())
        frozen = [n for n in state_names(pl_module) if n in parameters]
        if frozen:
            raise TrainingError(
                f"The adapter has frozen tensors ({frozen[0]}, …), and DeepSpeed leaves those out of its checkpoints."
                " Use ModelParallelStrategy or 'ddp'."
            )


def readable(trainer: L.Trainer) -> bool:
    """Whether each parameter of the module can be read, whole or as a DTensor, during and after a fit."""
    return not runs_under(trainer, "FSDPStrategy", "DeepSpeedStrategy")


def stays_in_children(trainer: L.Trainer) -> bool:
    """Whether training goes on in child processes, and what is trained exists there alone.

    When they end, Lightning loads the state dict of their module into that of the parent. Under full fine-tuning this
    brings all weights back, while tensors of adapters find no place in the parent's module.
    """
    if not isinstance(trainer.strategy.launcher, every("strategies.launchers._MultiProcessingLauncher")):
        return False
    return not Adapters.of(trainer.lightning_module).complete


def check_sharding(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Under `ModelParallelStrategy` everything that trains is sharded."""
    strategy = trainer.strategy
    if not runs_under(trainer, "ModelParallelStrategy"):
        return
    _check_tensor_parallel(strategy, pl_module)
    wanted = set(trainable_names(pl_module))
    plain = [n for n, p in named_parameters(pl_module) if n in wanted and not sharded(p)]
    if plain and strategy.device_mesh["data_parallel"].size() > 1:
        raise TrainingError(
            f"{len(plain)} of {len(wanted)} trained tensors are not sharded ({', '.join(plain[:3])}, …), so their"
            f" gradients would not be averaged. Shard after the injection: {_BEFORE}"
        )


def _check_tensor_parallel(strategy: L.strategies.ModelParallelStrategy, pl_module: L.LightningModule) -> None:
    for name, module in adapted_modules(pl_module):
        for parameter in module.parameters(recurse=False):
            mesh = parameter.device_mesh if sharded(parameter) else None
            if mesh is not None and "tensor_parallel" in (mesh.mesh_dim_names or ()):
                raise TrainingError(
                    f"{name} is split by tensor parallelism, and its adapter is not. Use"
                    f" ModelParallelStrategy(data_parallel_size={strategy.world_size}, tensor_parallel_size=1), or"
                    " leave the split layers out with exclude_modules."
                )


@contextmanager
def explained(pl_module: L.LightningModule) -> Iterator[None]:
    """Say what it means if sharding in ``configure_model`` fails over the tensors of adapters."""
    try:
        yield
    except KeyError as error:
        if "parameter name can't contain" not in str(error.args[0]):
            raise
        # torch's styles of tensor parallelism split every parameter in a layer, and stumble over those in `delta`
        raise TrainingError(
            "`configure_model` split an adapted layer by tensor parallelism, and its adapter cannot be split with it."
            " Leave the split layers out with exclude_modules, or use tensor_parallel_size=1."
        ) from error
    except (RuntimeError, ValueError) as error:
        names = [n for n, m in pl_module.named_modules(remove_duplicate=False) if isinstance(m, Delta)]
        owners = {n: id(pl_module.get_submodule(n)) for n in names}
        shared = [n for n in names if list(owners.values()).count(owners[n]) > 1]
        if not shared:
            raise
        raise TrainingError(
            f"`configure_model` failed ({error}). The adapters of several layers share {shared[0]}, which cannot be"
            " sharded with one layer and used in another: call `fully_shard` on the network alone, not on its layers."
        ) from error


def warn_of_children(trainer: L.Trainer, fresh: bool) -> None:
    """Say where the result is: the module in the parent process has no adapters."""
    if not (fresh and stays_in_children(trainer)) or trainer.fast_dev_run:
        return
    saved = [c.last_model_path or c.best_model_path for c in trainer.checkpoint_callbacks if _saves(c)]
    path = best_path(trainer) or next((p for p in saved if p), None)
    where = "the module in the parent process has no adapters"
    if path:
        rank_zero_warn(f"Trained in child processes: {where}. Load them: lightning_peft.load_adapter(module, {path!r})")
    else:
        rank_zero_warn(
            f"Trained in child processes: {where}, and no checkpoint was written, so the result is lost. Add"
            " ModelCheckpoint() to the callbacks, or use strategy='ddp'."
        )


def check_trained(trainer: L.Trainer, fresh: bool) -> None:
    """Fresh adapters in child processes, after a fit in others, are not those that were trained."""
    already_fit = getattr(trainer.strategy.launcher, "_already_fit", False)
    if fresh and already_fit and not trainer.ckpt_path and stays_in_children(trainer):
        raise TrainingError(
            "The fit went on in child processes, so the adapters here are fresh ones, not those that were trained."
            " Give the checkpoint: ckpt_path='best' or its path; or load_adapter(module, path) first."
        )


def _saves(callback: object) -> bool:
    return isinstance(callback, every("callbacks.ModelCheckpoint"))


def may_stand_apart(layer: Adapted) -> bool:
    """Whether FSDP may wrap an adapter's tensors by themselves: its code calls ``delta`` and reads nothing in it."""
    from lightning_peft.bottleneck.layers import Bottleneck
    from lightning_peft.lowrank import LowRank, LowRankConv

    if isinstance(layer, LowRankConv):
        return False  # its factors are handed to the base's own convolution
    return type(layer.delta) in (LowRank, Bottleneck)


class FSDPWrapPolicy:
    """A wrap policy for `FSDPStrategy` that keeps frozen blocks and adapters in units of their own.

    One flat parameter with a frozen block and its adapters in it takes the gradient memory of the whole block. Adapters
    whose tensors are read from outside (attention prefixes, convolutions) stay with their block.

    Args:
        blocks: classes to wrap, the layers of the network: ``{BertLayer}``.

    >>> from torch import nn
    >>> from lightning.pytorch.strategies import FSDPStrategy
    >>> from lightning_peft import FSDPWrapPolicy
    >>> strategy = FSDPStrategy(auto_wrap_policy=FSDPWrapPolicy({nn.TransformerEncoderLayer}), state_dict_type="full")
    """

    def __init__(self, blocks: set[type]) -> None:
        self.blocks = tuple(blocks)
        self._apart: set[int] = set()

    def __call__(self, module: object, recurse: bool, nonwrapped_numel: int) -> bool:
        """As torch asks: whether to look inside ``module``, or to wrap it."""
        if recurse:
            if isinstance(module, Adapted) and "delta" in module._modules and may_stand_apart(module):
                self._apart.add(id(module.delta))
            return True
        return isinstance(module, self.blocks) or id(module) in self._apart
