"""torch's `nn.TransformerEncoder` without gradients: a fused call that reads weights and runs no submodule.

A layer takes it unless one of its modules has a hook, and the encoder hands its layers nested tensors, which only the
fused call understands. While an adapter in them is on, both must stay closed; while all are off, the base model keeps
its speed and its very numbers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_peft.bottleneck.wrappers import AdapterWrapper


class NestedTensors:
    """A forward pre-hook of an encoder: nested tensors only while no adapter in it is on."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted

    def __call__(self, encoder: nn.Module, args: tuple[Any, ...]) -> None:
        encoder.use_nested_tensor = self.wanted and not any(a.active for a in _adapters(encoder))


def keep_open(model: nn.Module) -> None:
    """Let the adapters in torch's encoders be seen, from now until `release`."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for adapter in _adapters(module):
                adapter.seen = True
        if isinstance(module, nn.TransformerEncoder) and _adapters(module) and not _hooks(module):
            module.register_forward_pre_hook(NestedTensors(module.use_nested_tensor))


def release(model: nn.Module) -> None:
    """Take the hooks out of encoders that have no adapters any more."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and not _adapters(module):
            for key in _hooks(module):
                module.use_nested_tensor = module._forward_pre_hooks.pop(key).wanted


def _adapters(module: nn.Module) -> list[AdapterWrapper]:
    return [m for m in module.modules() if isinstance(m, AdapterWrapper)]


def _hooks(module: nn.Module) -> list[int]:
    return [k for k, hook in module._forward_pre_hooks.items() if isinstance(hook, NestedTensors)]
