"""When a linear layer takes the short way of `products`: plain eager execution on plain tensors, and nothing hooked in.

Everywhere else (compilation, function transforms, autocast, sharded or quantised weights, hooks on ``delta``) the layer
computes its base's output and calls ``delta``. Both ways give the same function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks

from lightning_peft.lowrank.products import corrected_linear

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
#: the modes of a checkpoint that keeps results of some operators, which may then not be written into
_SELECTIVE = ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")


def fast_output(layer: Any, x: Any) -> Tensor | None:
    """The output of an adapted `nn.Linear` by the short way, (…, in) -> (…, out); None where that does not apply."""
    if not is_plain_execution() or not _is_plain_input(x) or torch.is_autocast_enabled(x.device.type):
        return None
    if not _fits(layer, x):
        return None
    base, delta = layer._parameters, layer._modules["delta"]
    factors = delta._parameters
    return corrected_linear(x, base["weight"], base["bias"], delta.scaling, factors["lora_A"], factors["lora_B"])


def is_plain_execution() -> bool:
    """Whether nothing traces, transforms or observes what runs."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
        or global_hooks._global_forward_hooks
        or global_hooks._global_forward_pre_hooks
        or global_hooks._global_backward_hooks
        or global_hooks._global_backward_pre_hooks
        or (torch._C._len_torch_dispatch_stack() and _in_selective_checkpoint())
    )


def _in_selective_checkpoint() -> bool:
    stack = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return any(type(mode).__name__ in _SELECTIVE for mode in stack)


def _is_plain_input(x: Any) -> bool:
    if type(x) is not Tensor or x.dtype not in _DTYPES:
        return False
    return not (x.is_nested or x.layout is not torch.strided or x.is_meta or x.is_inference())


def _fits(layer: Any, x: Tensor) -> bool:
    """Whether weight and factors are plain tensors of the input's dtype and device, and only the factors train."""
    delta = layer._modules["delta"]
    if not layer._adapter.active or (delta.dropout and delta.training) or _is_hooked(delta):
        return False
    base, factors = layer._parameters, delta._parameters
    weight, bias = base.get("weight"), base.get("bias")  # not there: weight_norm, pruning, a parametrization
    A, B = factors.get("lora_A"), factors.get("lora_B")  # not there: a wrapper around delta (FSDP)
    return (
        type(weight) is nn.Parameter
        and type(A) is type(B) is nn.Parameter
        and x.dtype is weight.dtype
        and x.device == A.device
        and x.shape[-1:] == A.shape[1:]
        and len(weight) == len(B)
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and len(factors) == 2
    )


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
