"""The methods' optional parts, called at their moments; sharded adapters are whole meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.adapted import Delta
from lightning_peft.method import Method
from lightning_peft.model.adapters import Adapters
from lightning_peft.sharding import gathered

if TYPE_CHECKING:
    import lightning.pytorch as L


def add_loss_terms(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Add the gradients of loss terms to those of the loss."""
    for method in _with(pl_module, "regularizer"):
        with _whole(pl_module):
            term = method.regularizer(pl_module)
            if term is not None:
                _backward(_scaled(term, trainer, pl_module), pl_module)


def change_gradients(pl_module: L.LightningModule) -> None:
    """Before an optimizer step."""
    for method in _with(pl_module, "transform_grads"):
        with _whole(pl_module):
            method.transform_grads(pl_module)


def step_taken(pl_module: L.LightningModule, step: int, total_steps: int | None) -> None:
    """After an optimizer step."""
    for method in _with(pl_module, "after_step"):
        with _whole(pl_module):
            method.after_step(pl_module, step, total_steps)


class Transfer:
    """Stands before a strategy's ``batch_to_device`` while a module has adapters: methods see the batch before."""

    def __init__(self, module: L.LightningModule, original: Callable[..., Any]) -> None:
        self.module, self.original = module, original

    def __call__(self, batch: Any, *arguments: Any, **options: Any) -> Any:
        methods = list(_with(self.module, "before_transfer")) if Adapters.find(self.module) else []
        seen = [method.before_transfer(self.module, batch) for method in methods]
        batch = self.original(batch, *arguments, **options)
        for method, notes in zip(methods, seen, strict=True):
            method.after_transfer(self.module, batch, notes)
        return batch


def _with(pl_module: L.LightningModule, part: str) -> Iterator[Method]:
    return (m for m in Adapters.of(pl_module).methods if getattr(type(m), part) is not getattr(Method, part))


def _whole(pl_module: L.LightningModule) -> AbstractContextManager[None]:
    return gathered(m for m in pl_module.modules() if isinstance(m, Delta))


def _backward(term: Tensor, pl_module: L.LightningModule) -> None:
    parameters = [p for p in pl_module.parameters() if p.requires_grad]
    for parameter, grad in zip(parameters, torch.autograd.grad(term, parameters, allow_unused=True), strict=True):
        if grad is None:
            continue
        if parameter.grad is None:
            parameter.grad = grad.to(parameter.dtype)
        else:
            parameter.grad.add_(grad)


def _scaled(term: Tensor, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor:
    """A loss term, multiplied as Lightning has multiplied the loss."""
    if pl_module.automatic_optimization:
        term = term / trainer.accumulate_grad_batches
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return term if scaler is None else scaler.scale(term)  # reading the factor would wait for the device
