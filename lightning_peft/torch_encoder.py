"""torch's `nn.TransformerEncoder` without gradients: a fused call that reads weights and runs no submodule.

A layer takes it unless one of its modules has a hook, and the encoder hands its layers nested tensors, which only the
fused call understands. While an adapter in them that must be called is on, both must stay closed; while all are off,
the base model keeps its speed and its very numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_peft.adapted import Adapted


class NestedTensors:
    """A forward pre-hook of an encoder: nested tensors only while no adapter in it must be called."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted

    def __call__(self, encoder: nn.Module, args: tuple[Any, ...]) -> None:
        encoder.use_nested_tensor = self.wanted and not any(layer._adapter.active for layer in _called_layers(encoder))


def keep_open(model: nn.Module, adapted: Iterable[nn.Module]) -> None:
    """See to it that these adapted layers are called where they stand in torch's encoders, until `restore`."""
    wanted = {id(layer) for layer in adapted}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for layer in module.modules():
                if isinstance(layer, Adapted) and id(layer) in wanted:
                    layer._adapter.must_be_called = True
                    layer._adapter.switch(layer, layer._adapter.active)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and _called_layers(module) and not _hooks(module):
            module.register_forward_pre_hook(NestedTensors(module.use_nested_tensor))


def restore(model: nn.Module) -> None:
    """Take the hooks out of encoders that have no adapters any more."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and not _called_layers(module):
            for key in _hooks(module):
                module.use_nested_tensor = module._forward_pre_hooks.pop(key).wanted


def _called_layers(module: nn.Module) -> list[Adapted]:
    return [part for part in module.modules() if isinstance(part, Adapted) and part._adapter.must_be_called]


def _hooks(module: nn.Module) -> list[int]:
    return [k for k, hook in module._forward_pre_hooks.items() if isinstance(hook, NestedTensors)]
