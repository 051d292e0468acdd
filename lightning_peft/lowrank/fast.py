"""Faster ways of computing the output of an adapted `nn.Linear`, taken where they give what the general way gives.

The general way calls the base's forward and then ``delta``. It works everywhere: under compilation and function
transforms, with sharded or quantised weights, with hooks on ``delta``. Two other ways give the same function:

* `small_output` for small inputs, where the time goes into calls and not into products: the plain formula, written with
  as few calls as possible.
* `fast_output` for large ones, where it goes into products and memory: see `products`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks

from lightning_peft.lowrank.products import corrected_linear

#: inputs with at most so many numbers are small: on a CPU both ways take equal time at about twice as many
SMALL = 65_536
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
#: the modes of a checkpoint that keeps results of some operators, which may then not be written into
_SELECTIVE = ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")


def small_output(layer: Any, x: Any) -> Tensor | None:
    """The output for a small input, (…, in) -> (…, out); None where the general way must be taken."""
    if type(x) is not Tensor or not layer._adapter.active:
        return None
    delta = layer._modules["delta"]
    if (delta.dropout and delta.training) or _is_hooked(delta):
        return None
    base, factors = layer._parameters, delta._parameters
    weight = base.get("weight")  # None: computed by weight_norm, pruning, a parametrization
    A = factors.get("lora_A")  # None: a wrapper around delta (FSDP)
    if weight is None or A is None or len(factors) != 2 or x.dtype is not A.dtype:
        return None
    B = factors["lora_B"]
    if len(weight) != len(B):
        return None
    return torch.add(F.linear(x, weight, base["bias"]), F.linear(F.linear(x, A), B), alpha=delta.scaling)


def fast_output(layer: Any, x: Any) -> Tensor | None:
    """The output for a large input, (…, in) -> (…, out); None where the general way must be taken.

    What is computed in place needs plain eager execution on plain tensors.
    """
    if not is_plain_execution() or not _is_plain_input(x) or torch.is_autocast_enabled(x.device.type):
        return None
    if not _fits(layer, x):
        return None
    base, delta = layer._parameters, layer._modules["delta"]
    factors = delta._parameters
    return corrected_linear(x, base["weight"], base["bias"], delta.scaling, factors["lora_A"], factors["lora_B"])


def is_plain_execution() -> bool:
    """Whether nothing traces, transforms or observes what runs. Most of these flags are private to torch."""
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
