"""When a layer takes the short way of `products`, and which layers share one input.

In training, the first of them that is called computes the outputs of all that can go together. They are one node of the
graph, so their gradients come in one backward pass: a loss of each that runs backward on its own needs
``retain_graph=True``.
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

    A layer whose output was computed in vain in two passes running leaves: it reads something else, or is not called.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.waiting: Waiting | None = None
        #: by id: passes in a row, and the state of the factors at the last of them
        self.missed: dict[int, tuple[int, list[int]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # tensors inside a graph can be neither copied nor pickled
        return {"layers": self.layers, "waiting": None, "missed": {}}

    def output(self, layer: Any, x: Tensor) -> Tensor:
        """A layer's output: what waits for it, or computed now."""
        waiting, where = self.waiting, _where()
        if waiting is None or waiting.where != where:
            return self._lead(layer, x, where)
        y = None  # and stays so if the layer is called again, or is no longer what it was
        if waiting.reads(x):
            y = waiting.take(layer)
        elif waiting.outputs.pop(id(layer), None):  # it reads something else; the others may still come
            self._miss([id(layer)], waiting)
        else:
            return self._lead(layer, x, where)
        if y is not None:
            self.missed.pop(id(layer), None)
        if not waiting.outputs:
            self.waiting = None
        return alone(layer, x) if y is None else y

    def end(self, _: Any = None) -> None:
        """The pass is over, or its input gone: let go of what nobody came for."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            self._miss(list(waiting.outputs), waiting)

    def _lead(self, layer: Any, x: Tensor, where: tuple) -> Tensor:
        self.end()
        if self.missed and not _in_backward():
            self._settle(where)
        scaling, layers = layer._modules["delta"].scaling, [layer]
        if any(layer is member for member in self.layers):  # not a replica of DataParallel: these have other devices
            others = (m for m in self.layers if m is not layer and m._modules["delta"].scaling == scaling)
            layers += [m for m in others if fits(m, x)]
        if len(layers) == 1:
            return alone(layer, x)
        weights, biases, As, Bs = zip(*map(_tensors, layers), strict=True)
        y, *outputs = products.outputs(x, weights, biases, scaling, As, Bs, ref(self))
        self.waiting = Waiting(ref(x, self.end), where, layers[1:], outputs)
        return y

    def _miss(self, ids: list[int], waiting: Waiting) -> None:
        if not waiting.again:  # a checkpoint stops when it has what it needs, and then calls nobody else
            for i in ids:
                self.missed[i] = self.missed.get(i, (0, []))[0] + 1, self._versions()

    def _settle(self, where: tuple) -> None:
        """Let layers leave, but never between a checkpointed pass and its repetition, which must find the same."""
        free, now = where[1] is None, self._versions()
        gone = {i for i, (count, then) in self.missed.items() if count > 1 and (free or then != now)}
        for layer in [m for m in self.layers if id(m) in gone]:
            layer.siblings = None
        self.layers = [m for m in self.layers if id(m) not in gone]
        self.missed = {i: missed for i, missed in self.missed.items() if i not in gone}

    def _versions(self) -> list[int]:
        return [p._version for layer in self.layers for p in layer.delta.parameters()]


class Waiting:
    """Outputs of layers that have not been called yet, and what must be as it was for them to hold."""

    def __init__(self, x: ref[Tensor], where: tuple, layers: list[Any], outputs: list[Tensor]) -> None:
        self.x, self.where, self.again = x, where, _in_backward()
        self.state = _state(x())
        self.outputs = {id(m): (y, *_made_of(m)) for m, y in zip(layers, outputs, strict=True)}

    def reads(self, x: Tensor) -> bool:
        """Whether x is the input, as it was."""
        return self.x() is x and self.state == _state(x)

    def take(self, layer: Any) -> Tensor | None:
        """A layer's output, if it was made of what the layer has now."""
        if id(layer) not in self.outputs:
            return None
        y, tensors, states = self.outputs[id(layer)]
        now, states_now = _made_of(layer)
        if states != states_now or any(a is not b for a, b in zip(tensors, now, strict=True)):
            return None
        del self.outputs[id(layer)]
        return y


def alone(layer: Any, x: Tensor) -> Tensor:
    """The output of one layer."""
    weight, bias, A, B = _tensors(layer)
    return products.outputs(x, [weight], [bias], layer._modules["delta"].scaling, [A], [B])[0]


def _where() -> tuple[int, Any]:
    """What tells a checkpoint from its surroundings, and a thread from others."""
    return threading.get_ident(), top_hooks()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _state(x: Any) -> tuple:
    return x._version, x.requires_grad, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type)


def _tensors(layer: Any) -> tuple[Any, ...]:
    base, factors = layer._modules["base"]._parameters, layer._modules["delta"]._parameters
    return base["weight"], base["bias"], factors["lora_A"], factors["lora_B"]


def _made_of(layer: Any) -> tuple[tuple[Any, ...], list[Any]]:
    """What a layer's output depends on, beside the input and what `fits` looks at: tensors and their states."""
    tensors = _tensors(layer)
    states = [None if t is None else (t._version, t.requires_grad) for t in tensors]
    return tensors, [layer._modules["delta"].scaling, *states]


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
        and x.shape[-1:] == A.shape[1:]
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
    group = layer.siblings
    trains = torch.is_grad_enabled() and layer._modules["delta"]._parameters["lora_B"].requires_grad
    return group.output(layer, x) if group is not None and trains else alone(layer, x)


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
