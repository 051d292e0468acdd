"""What must hold before a run starts, each with the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lightning_peft.adapted import Adapted, is_bypassed
from lightning_peft.errors import TrainingError
from lightning_peft.lightning_packages import every, rank_zero_warn
from lightning_peft.method import Method
from lightning_peft.model.adapters import Adapters, adapted_modules, is_complete, trainable_names
from lightning_peft.quantized import packed
from lightning_peft.sharding import named_parameters, unwrapped
from lightning_peft.trainer.strategies import flattens, has_optimizers

if TYPE_CHECKING:
    import lightning.pytorch as L

_TOO_LATE = (
    "Build the network in `__init__` or `configure_model`, not in `setup` (callbacks are set up before the module)."
)


def check_present(pl_module: L.LightningModule) -> None:
    """A network rebuilt, or layers replaced, after the injection have no adapters."""
    adapters = Adapters.find(pl_module)
    if adapters is None:
        raise TrainingError(f"The network was replaced after the adapters were injected. {_TOO_LATE}")
    modules = adapters.network.named_modules(remove_duplicate=False)
    adapted_names = {unwrapped(n) for n, m in modules if isinstance(m, Adapted)}
    lost = [adapters.path + n for names in adapters.record.targets for n in names if n not in adapted_names]
    if lost:
        raise TrainingError(
            f"{lost[0]!r} is no longer the layer that was adapted, and its adapter is gone with the old one"
            f" ({len(lost)} layers were replaced after the injection). Convert or replace layers first, then inject;"
            " a precision plugin that converts layers goes into the Trainer together with PEFT."
        )

    for name, layer in adapters.layers():
        if is_bypassed(layer):
            raise TrainingError(
                f"{adapters.path}{name} has the `forward` of its base on the instance, so its adapter would never act"
                " (accelerate leaves one when its hooks are removed). Delete it: del module.forward."
            )


def check_not_adapted(pl_module: L.LightningModule) -> None:
    """A precision plugin that converts layers would replace adapted ones, and their adapters with them."""
    converted = any(packed(module) is not None for module in pl_module.modules())  # then it leaves all as they are
    layers = [layer for _, layer in adapted_modules(pl_module) if isinstance(layer, torch.nn.Linear)]
    if layers and not converted:
        raise TrainingError(
            "The module was adapted before BitsandbytesPrecision converts its layers, and the adapters would be gone:"
            " their layers are replaced. Leave the injection to PEFT(...), which converts first, or call"
            " precision.convert_module(module) before inject."
        )


def check_nothing_new(pl_module: L.LightningModule) -> None:
    """Parameters that appeared after the injection are neither frozen nor saved as meant."""
    check_present(pl_module)
    adapters = Adapters.of(pl_module)
    if adapters.complete:
        return  # everything trains and is saved, whenever it appeared
    known = {*adapters.record.trained, *adapters.record.frozen}
    late = sorted({n for n, _ in named_parameters(adapters.network)} - known)
    if late:
        names = ", ".join(adapters.path + n for n in late[:4])
        raise TrainingError(f"Parameters appeared after the adapters were injected: {names}. {_TOO_LATE}")


def check_pruning(trainer: L.Trainer, methods: Sequence[Method]) -> None:
    """`ModelPruning` changes base weights, and its masks become part of them in the file alone."""
    if is_complete(methods) or not any(isinstance(c, every("callbacks.ModelPruning")) for c in trainer.callbacks):
        return
    names = " + ".join(type(method).__name__ for method in methods)
    raise TrainingError(
        f"ModelPruning changes the frozen weights, which checkpoints of {names} do not hold, so what it prunes would be"
        " lost. Prune while everything trains, PEFT(FullFineTuning()), and adapt the pruned model afterwards; or merge"
        " the adapters first."
    )


def check_optimizers(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Everything that trains must be in some optimizer.

    FullFineTuning accepts what Lightning does without it: parameters that no optimizer holds stay as they are.
    """
    if flattens(trainer):
        return
    if not has_optimizers(trainer):
        rank_zero_warn("configure_optimizers returned no optimizer: the adapters will not train.")
        return
    held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    wanted = set(trainable_names(pl_module))
    outside = [(n, p) for n, p in named_parameters(pl_module) if n in wanted and id(p) not in held]
    if Adapters.of(pl_module).complete:
        # What is frozen at the moment may join the optimizer later: BackboneFinetuning adds it then.
        idle = [n for n, p in outside if p.requires_grad]
        if idle:
            rank_zero_warn(
                f"{len(idle)} of {len(wanted)} trainable tensors are in no optimizer ({', '.join(idle[:3])}, …): they"
                " stay as they are."
            )
        return
    if outside:
        names = ", ".join(n for n, _ in outside[:3])
        rebuilding = [c for c in trainer.callbacks if isinstance(c, every("callbacks.BaseFinetuning"))]
        if rebuilding and not any(p.requires_grad for _, p in outside):
            name = type(rebuilding[0]).__name__
            raise TrainingError(
                f"{name} has frozen {len(outside)} of {len(wanted)} trainable tensors ({names}, …), and will train the"
                f" base in full when it unfreezes it. Leave {name} out, or put it before PEFT: then the adapters train"
                " from the start, and the base from the epoch on in which it is unfrozen."
            )
        raise TrainingError(
            f"{len(outside)} of {len(wanted)} trainable tensors are in no optimizer ({names}, …) and would never move."
            " Build the optimizer in `configure_optimizers` from [p for p in self.parameters() if p.requires_grad];"
            " with LightningCLI set auto_configure_optimizers=False, because it collects the parameters before the"
            " adapters exist."
        )


def check_loss(pl_module: L.LightningModule, loss: object) -> None:
    """Something that trains must take part in the loss; torch would speak of "element 0 of tensors"."""
    if not isinstance(loss, torch.Tensor) or loss.requires_grad:
        return
    names = trainable_names(pl_module)
    raise TrainingError(
        f"The loss does not depend on any of the {len(names)} trained tensors ({', '.join(names[:3])}, …): their layers"
        " take no part in it, or are cut off by detach() or no_grad. Adapt layers that the loss comes from, with"
        " target_modules, or train such a layer in full, with modules_to_save."
    )


def check_rates(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """A method whose groups have learning rates in some ratio (LoRA+) must find that ratio in the optimizer."""
    if flattens(trainer):
        return
    rates = {
        id(p): float(group.get("initial_lr", group["lr"]))  # a warm-up may have set lr to 0 already
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for method in Adapters.of(pl_module).methods:
        once, twice = (method.param_groups(pl_module, lr, 0.0) for lr in (1.0, 2.0))
        factors = [b["lr"] - a["lr"] for a, b in zip(once, twice, strict=True)]  # 0 for a rate of its own
        if len(set(factors) - {0.0}) < 2:
            continue
        pairs = zip(once, factors, strict=True)
        bases = [rates[id(p)] / f for group, f in pairs if f for p in group["params"] if id(p) in rates]
        if bases and max(bases) > min(bases) * 1.0001:
            name = type(method).__name__
            raise TrainingError(
                f"{name} asks for learning rates in fixed ratios, and the optimizer has other ones, so they would not"
                " be applied. In configure_optimizers build it from the method's groups, method being that"
                f" {name}(...): torch.optim.AdamW(method.param_groups(self, lr=1e-4, weight_decay=0.0)). Adding groups"
                " later would break learning-rate schedulers."
            )
