"""When a layer takes the short way of `products`, and which layers share one input.

Layers that share one are one node of the graph, so their gradients come in one backward pass: a loss of each that runs
backward on its own needs ``retain_graph=True``.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any
from weakref import WeakMethod

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
    """Layers of one parent that read one input, and what the first of them left for the others in this pass."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.waiting: Waiting | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "waiting": None}  # tensors inside a graph can be neither copied nor pickled

    def end(self) -> None:
        """Let go of what waits: its pass is over."""
        self.waiting = None

    def leave(self, layer: Any) -> None:
        """Forget a layer that reads another input."""
        self.layers = [other for other in self.layers if other is not layer]
        layer.siblings = None


class Waiting:
    """What the layers that have not been called yet will find, and what must be as it was for that."""

    def __init__(self, x: Tensor, rows: Tensor, lows: dict[int, tuple[Tensor, Tensor, int]]) -> None:
        self.x, self.rows, self.lows = x, rows, lows
        self.state = _state(x)

    def has(self, layer: Any, x: Tensor, A: Tensor) -> bool:
        """Whether the product of a layer's A with x waits, made in this thread under the same hooks."""
        _, made_of, version = self.lows.get(id(layer), (None, None, 0))
        return self.x is x and A is made_of and A._version == version and self.state == _state(x)


def _state(x: Tensor) -> tuple:
    return x._version, x.requires_grad, threading.get_ident(), top_hooks()


def usual() -> bool:
    """Whether this is plain eager execution: no tracing, no function transforms, no hooks on everything."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
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
    if not usual() or type(x) is not Tensor or x.dtype not in _DTYPES or x.is_nested or x.layout is not torch.strided:
        return None
    if x.is_meta or x.is_inference() or torch.is_autocast_enabled(x.device.type) or not fits(layer, x):
        return None
    base, delta, group = layer._modules["base"], layer._modules["delta"], layer.siblings
    weight, bias, scaling = base._parameters["weight"], base._parameters["bias"], delta.scaling
    A, B = delta._parameters["lora_A"], delta._parameters["lora_B"]
    if group is None or not torch.is_grad_enabled():
        return products.run(x, weight, bias, scaling, B, [A])
    waiting = group.waiting
    if waiting is not None and waiting.has(layer, x, A):
        return _follow(group, waiting, id(layer), (x.shape, weight, bias), B)
    if waiting is not None and id(layer) in waiting.lows and waiting.x is not x:
        group.leave(layer)
        return products.run(x, weight, bias, scaling, B, [A])
    others = _others(group, layer, x, scaling)
    As = [o.delta.lora_A for o in others]
    result = products.run(x, weight, bias, scaling, B, [A, *As], WeakMethod(group.end) if others else None)
    if not others:
        return result
    y, rows, *lows = result
    parts = {id(o): (low, A, A._version) for o, low, A in zip(others, lows, As, strict=True)}
    group.waiting = Waiting(x, rows, parts)
    return y


def _follow(group: Siblings, waiting: Waiting, key: int, fixed: tuple, B: Tensor) -> Tensor:
    low = waiting.lows.pop(key)[0]
    last = not waiting.lows
    result = products.Next.apply(waiting.rows, low, fixed, B, last)
    if last:
        group.waiting = None
        return result
    y, waiting.rows = result
    return y


def _others(group: Siblings, layer: Any, x: Tensor, scaling: float) -> list[Any]:
    if not any(layer is member for member in group.layers):
        return []  # a replica of DataParallel: the others are not on its device
    return [m for m in group.layers if m is not layer and m._modules["delta"].scaling == scaling and fits(m, x)]


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
