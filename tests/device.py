"""A device that this machine does not have: tensors that live there, and an error for whoever waits for them.

Its tensors hold their values in the main memory and say that they are elsewhere. Operations run as on the CPU, and
those for which a program waits for a real device raise: reading a number, shapes that depend on values, copies to the
CPU that are not ``non_blocking``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

aten = torch.ops.aten
#: what torch calls a device without memory: the one other device that every build of torch knows
DEVICE = torch.device("meta")
#: they give a number to the program, or a tensor whose size depends on values
WAITING = {
    aten._local_scalar_dense,
    aten.item,
    aten.equal,
    aten.is_nonzero,
    aten.allclose,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten._linalg_check_errors,
    aten.linalg_pinv,
    aten.linalg_eigh,
    aten.linalg_svd,
}


class WaitError(AssertionError):
    """Something waited for the device."""


class Remote(Tensor):
    """A tensor on `DEVICE`."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor, requires_grad: bool = False) -> Remote:
        out = Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=DEVICE, requires_grad=requires_grad
        )
        out.value = value.detach()
        return out

    def __repr__(self) -> str:
        return f"Remote({self.value})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {}, strict=False)


class Machine(TorchDispatchMode):
    """While it is on, tensors can be made on `DEVICE`, and with ``strict`` nothing may wait for those that are there.

    What transformers itself waits for is let through.
    """

    def __init__(self, strict: bool = True) -> None:
        super().__init__()
        self.strict = strict

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {}, self.strict)


def run(function: Any, args: tuple, kwargs: dict[str, Any], strict: bool) -> Any:
    """One operation of torch."""
    remote = [False]

    def inside(value: Any) -> Any:
        if isinstance(value, Remote):
            remote[0] = True
            return value.value
        return value

    plain_args, plain_kwargs = tree_map(inside, args), tree_map(inside, kwargs)
    target = kwargs.get("device")
    if target is not None and torch.device(target) == DEVICE:
        plain_kwargs["device"] = "cpu"
    to_device = target is not None and torch.device(target) == DEVICE
    to_cpu = remote[0] and target is not None and torch.device(target) != DEVICE
    if function.overloadpacket is aten.copy_ and not isinstance(args[0], Remote) and isinstance(args[1], Remote):
        to_cpu = True
    blocking = not (kwargs.get("non_blocking") or (function.overloadpacket is aten.copy_ and args[2:] == (True,)))
    indices = args[1] if function.overloadpacket in (aten.index, aten.index_put, aten.index_put_) else ()
    by_mask = any(isinstance(i, Remote) and i.dtype in (torch.bool, torch.uint8) for i in indices)
    waits = remote[0] and (function.overloadpacket in WAITING or by_mask or (to_cpu and blocking))
    if strict and waits and "transformers" not in caller().parts:
        raise WaitError(f"{function} waits for the device")
    out = function(*plain_args, **plain_kwargs)
    if not (remote[0] or to_device) or to_cpu:
        return out
    out = tree_map(lambda value: Remote(value) if isinstance(value, Tensor) else value, out)
    return return_and_correct_aliasing(function, args, kwargs, out) if remote[0] else out


def caller() -> Path:
    """The file whose code, outside torch, called the operation."""
    frame: Any = sys._getframe(1)
    while "torch" in Path(frame.f_code.co_filename).parts or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return Path(frame.f_code.co_filename)


def move(model: nn.Module) -> nn.Module:
    """Put a model on `DEVICE`, in place."""
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in new:
                    new[id(parameter)] = nn.Parameter(Remote(parameter.data), requires_grad=parameter.requires_grad)
                module._parameters[name] = new[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = Remote(buffer)
    return model
