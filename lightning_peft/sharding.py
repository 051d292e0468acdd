"""Parameters split over processes (DTensor, as ``fully_shard`` leaves them): whole values out, whole values in.

Whole values take part of every process, so all of them must call these functions in the same order. For tensors that
are not split everything here is the plain operation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_FSDP, _COMPILED = "_fsdp_wrapped_module.", "_orig_mod."


def sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of the tensor only."""
    module = sys.modules.get("torch.distributed.tensor")  # not loaded: nothing is split
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every process."""
    return tensor.full_tensor() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def split(value: Tensor, like: Tensor) -> Tensor:
    """A whole value, split as ``like`` is."""
    if not sharded(like) or sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(like.device, like.dtype), mesh, placements)


def write(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor, in place."""
    with torch.no_grad():
        tensor.copy_(split(value.detach(), tensor))


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that the last forward left in place of the split ones."""
    module = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(module, "FSDPModule", None)
    for part in model.modules() if kind is not None else ():
        if isinstance(part, kind):
            part.reshard()


@contextmanager
def gathered(modules: Iterable[nn.Module], keep: bool = True) -> Iterator[None]:
    """Whole parameters with whole gradients in the place of the split ones of ``modules`` themselves.

    Args:
        modules: their own parameters are replaced, not those of modules inside them.
        keep: write values and gradients back at the end.
    """
    places = [(m, n, p) for m in modules for n, p in m._parameters.items() if p is not None and sharded(p)]
    wholes: dict[int, nn.Parameter] = {}
    for _, _, parameter in places:
        if id(parameter) not in wholes:
            value = nn.Parameter(whole(parameter.detach()), requires_grad=parameter.requires_grad)
            value.grad = whole(parameter.grad) if parameter.grad is not None else None
            wholes[id(parameter)] = value
    for module, name, parameter in places:
        module._parameters[name] = wholes[id(parameter)]
    done = False
    try:
        yield
        done = keep
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
    if done:
        for parameter in {id(p): p for _, _, p in places}.values():
            value = wholes[id(parameter)]
            write(parameter, value)
            parameter.grad = split(value.grad, parameter) if value.grad is not None else None


def plain_name(name: str) -> str:
    """A parameter's name without what ``torch.compile`` and `FullyShardedDataParallel` put into it.

    >>> plain_name("net._fsdp_wrapped_module.0.weight")
    'net.0.weight'
    """
    return unwrapped(name).replace(_COMPILED, "")


def unwrapped(name: str) -> str:
    """A name as it was before `FullyShardedDataParallel` put its wrappers in between."""
    return name.replace(_FSDP, "")


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """As the model's own, by the names without those wrappers."""
    return ((unwrapped(n), p) for n, p in model.named_parameters())
