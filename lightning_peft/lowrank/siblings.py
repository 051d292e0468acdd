"""When a layer takes the short way of `products`, and which layers share one input.

The first of those that is called computes the outputs of all. They are one node of the graph, so their gradients come
in one backward pass: a loss of each that runs backward on its own needs ``retain_graph=True``.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks

from lightning_peft.lowrank import products
from lightning_peft.lowrank.inputs import top_hooks
from lightning_peft.match import role

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
#: roles that read one input, and parts of names that say keys and values come from elsewhere
_TOGETHER = {"q": "qkv", "k": "qkv", "v": "qkv", "up": "up"}
_CROSS = ("cross", "encoder_attn", "encdec", "multi_modal")


class Siblings:
    """Layers of one parent that read one input, and what the first of them left for the others in this pass.

    A layer that reads something else, or is not called, leaves at the next optimizer step: until then a checkpoint may
    run this pass again, and must find the same.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.waiting: Waiting | None = None
        self.leaving: list[tuple[Any, list[int]]] = []

    def __getstate__(self) -> dict[str, Any]:
        # tensors inside a graph can be neither copied nor pickled
        return {"layers": self.layers, "waiting": None, "leaving": []}

    def take(self, layer: Any, x: Tensor) -> Tensor | None:
        """The output that waits for a layer."""
        waiting = self.waiting
        if waiting is None or id(layer) not in waiting.outputs:
            return None
        y = waiting.take(layer, x)
        if y is None and waiting.x is not x:
            self.leaving.append((layer, _versions(layer)))
        elif not waiting.outputs:
            self.waiting = None
        return y

    def end(self) -> None:
        """The pass is over: let go of what nobody came for."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None and not self.leaving:
            self.leaving = [(m, _versions(m)) for m in self.layers if id(m) in waiting.outputs]

    def others(self, layer: Any, x: Tensor, scaling: float) -> list[Any]:
        """The layers whose output can be computed together with that of one of them."""
        if self.leaving:
            self._settle()
        if not any(layer is member for member in self.layers):
            return []  # it has left, or is a replica of DataParallel: the others are not on its device
        return [m for m in self.layers if m is not layer and m._modules["delta"].scaling == scaling and fits(m, x)]

    def _settle(self) -> None:
        gone = {id(layer) for layer, versions in self.leaving if _versions(layer) != versions}
        self.layers = [layer for layer in self.layers if id(layer) not in gone]
        self.leaving = [(layer, versions) for layer, versions in self.leaving if id(layer) not in gone]


class Waiting:
    """Outputs of layers that have not been called yet, and what must be as it was for them to hold."""

    def __init__(self, x: Tensor, layers: list[Any], outputs: list[Tensor]) -> None:
        self.x, self.state = x, _state(x)
        self.outputs = {
            id(m): (y, [(t, t._version) for t in _tensors(m)]) for m, y in zip(layers, outputs, strict=True)
        }

    def take(self, layer: Any, x: Tensor) -> Tensor | None:
        """A layer's output, if it was made of these very tensors, in this thread and under the same hooks."""
        if self.x is not x or self.state != _state(x):
            return None
        y, made_of = self.outputs[id(layer)]
        if any(t is not m or t._version != v for t, (m, v) in zip(_tensors(layer), made_of, strict=True)):
            return None
        del self.outputs[id(layer)]
        return y


def _state(x: Tensor) -> tuple:
    autocast = torch.is_autocast_enabled(x.device.type)
    return x._version, x.requires_grad, torch.is_grad_enabled(), autocast, threading.get_ident(), top_hooks()


def _tensors(layer: Any) -> tuple[Any, ...]:
    base, factors = layer._modules["base"]._parameters, layer._modules["delta"]._parameters
    return base.get("weight"), factors.get("lora_A"), factors.get("lora_B")


def _versions(layer: Any) -> list[int]:
    return [p._version for p in layer.delta.parameters()]


def usual() -> bool:
    """Whether this is plain execution: no tracing, no function transforms, no hooks on everything."""
    return not (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
        or (torch._C._len_torch_dispatch_stack() and _selective())
    )


def _selective() -> bool:
    """Whether a checkpoint keeps the results of some operators, which may then not be written into."""
    stack = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return any(type(mode).__name__ in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode") for mode in stack)


def fits(layer: Any, x: Tensor) -> bool:
    """Whether the layer is an unchanged frozen `nn.Linear` with plain factors, and x a plain tensor of its dtype."""
    base, delta = layer._modules["base"], layer._modules["delta"]
    if not layer.active or type(base) is not nn.Linear or (delta.dropout and delta.training):
        return False
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")  # not there: weight_norm, pruning
    A, B = delta._parameters.get("lora_A"), delta._parameters.get("lora_B")  # not there: a wrapper around it (FSDP)
    return (
        type(weight) is nn.Parameter
        and type(A) is type(B) is nn.Parameter
        and x.dtype is weight.dtype
        and x.device == A.device
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and len(delta._parameters) == 2
        and not _hooked(base)
        and not _hooked(delta)
    )


def run(layer: Any, x: Any) -> Tensor | None:
    """The layer's output by the short way; None where it does not apply."""
    if torch.compiler.is_compiling():
        return None
    group = layer.siblings
    if group is not None and group.waiting is not None and (y := group.take(layer, x)) is not None:
        return y
    if not usual() or type(x) is not Tensor or x.dtype not in _DTYPES or x.is_nested or x.layout is not torch.strided:
        return None
    if x.is_meta or x.is_inference() or torch.is_autocast_enabled(x.device.type) or not fits(layer, x):
        return None
    delta, layers = layer._modules["delta"], [layer]
    scaling = delta.scaling
    if group is not None and torch.is_grad_enabled() and delta._parameters["lora_B"].requires_grad:
        layers += group.others(layer, x, scaling)
    weights, As, Bs = zip(*map(_tensors, layers), strict=True)
    biases = [m._modules["base"]._parameters["bias"] for m in layers]
    if len(layers) == 1:
        return products.run(x, weights, biases, scaling, As, Bs)
    y, *others = products.run(x, weights, biases, scaling, As, Bs, ref(group))
    group.waiting = Waiting(x, layers[1:], others)
    return y


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def link(wrapped: Mapping[str, Any]) -> None:
    """Tell layers that read one input of each other: by their roles, within one parent."""
    groups: dict[tuple[str, str, int], list[Any]] = {}
    for name, layer in wrapped.items():
        if not getattr(layer, "direct", False):
            continue
        parent, kind = name.rpartition(".")[0], role(name)
        together = _TOGETHER.get(kind or "")
        crossed = kind == "q" and any(word in name.lower() for word in _CROSS)
        if together and not crossed:
            groups.setdefault((parent, together, layer.base.in_features), []).append(layer)
    for layers in groups.values():
        if len(layers) > 1:
            group = Siblings(layers)
            for layer in layers:
                layer.siblings = group
