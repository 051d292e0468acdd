"""What a failed or hostile injection must not do: leave half of itself behind, or take memory without end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft.errors import CheckpointError


@contextmanager
def undone_on_error(root: nn.Module) -> Iterator[None]:
    """Bring classes, parts, parameters, hooks and ``requires_grad`` flags below ``root`` back if the block fails."""
    before = []
    for module in root.modules():
        tables = {key: dict(value) for key, value in module.__dict__.items() if isinstance(value, dict)}
        before.append((module, type(module), dict(module.__dict__), tables))
    flags = [(p, p.requires_grad) for p in root.parameters()]
    try:
        yield
    except BaseException:
        for module, kind, attributes, tables in before:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for key, table in tables.items():  # in place: handles of hooks know these very objects
                module.__dict__[key].clear()
                module.__dict__[key].update(table)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


class bounded(TorchDispatchMode):
    """Refuse to make tensors of more than ``limit`` bytes in all, before they are made.

    A file names the sizes of what is injected; a hostile or damaged one may name any.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.left = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type != "meta":
            self.left -= _size(args) * (kwargs.get("dtype") or torch.get_default_dtype()).itemsize
            if self.left < 0:
                raise CheckpointError("its sizes ask for more memory than an adapter of this model can need.")
        return func(*args, **kwargs)


def _size(args: tuple) -> int:
    """Elements that a factory makes: of the shape it is given, or of a range; 0 for what computes with tensors."""
    if any(isinstance(a, Tensor) for a in args):
        return 0
    shape = next((a for a in args if isinstance(a, (list, tuple))), None)
    if shape is not None:
        return math.prod(map(int, shape)) if all(isinstance(n, (int, torch.SymInt)) for n in shape) else 0
    numbers = [abs(float(a)) for a in args if isinstance(a, (int, float)) and not isinstance(a, bool)]
    return math.ceil(max(numbers, default=0))  # arange, eye, linspace
