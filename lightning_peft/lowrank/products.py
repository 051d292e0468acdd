"""The linear layer and its correction as one step of autograd: in place, few products, little kept.

``y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ`` for frozen W and b. Layers that read the same input form a chain: the first multiplies it
by all their A at once and hands each its rows of the product (`First`), the others take theirs (`Next`). The gradient
of the input runs back along the chain, so that every product adds to one tensor in place. Low-rank products lie as
(r, rows), which BLAS multiplies several times faster than (rows, r).
"""

from __future__ import annotations

from typing import Any
from weakref import WeakMethod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from lightning_peft.lowrank.inputs import Source, source

_unsafe_view = torch.ops.aten._unsafe_view.default


class First(Function):
    """The first layer that reads an input, or the only one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: Source | None, fixed: tuple, B: Tensor, *As: Tensor) -> Any:
        """x: (…, in); found: what x is made of; fixed: weight, bias, scaling, a weak reference to what is to be called
        before the backward pass; As: its own A, then the others'.

        Returns y; with others also x for the next of them, (rows, in), and their parts of the product, (r, rows).
        """
        weight, bias, scaling, ctx.over = fixed
        rows = x.reshape(-1, x.shape[-1])
        low = (_stack(As, x.dtype) @ rows.t()).mul_(scaling)
        mine, *others = torch.split_with_sizes(low, [A.shape[0] for A in As]) if len(As) > 1 else [low]
        y = _corrected(rows, x.shape, weight, bias, mine, B)
        found = found or Source(())
        ctx.save_for_backward(weight, B, mine, *As, *(t for kind in found for t in kind))
        ctx.count, ctx.sizes, ctx.scaling, ctx.shape = len(As), found.sizes, scaling, x.shape
        ctx.set_materialize_grads(False)
        if not others:
            return y
        rows = rows.detach()
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(rows)
        return y, rows, *others

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dx: Tensor | None = None, *dlows: Tensor | None) -> Any:
        """Gradients of x, B and every A."""
        if ctx.over is not None and (end := ctx.over()) is not None:
            end()
        weight, B, low, *rest = ctx.saved_tensors
        As, found = rest[: ctx.count], Source.of(rest[ctx.count :], ctx.sizes)
        needs_x, needs_B, needs_A = ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4:]
        again = torch.is_grad_enabled() and (needs_B or any(needs_A))
        x = _connected(found, weight.dtype) if again else None
        if x is not None:
            low = (_as(As[0], x.dtype) @ x.t()) * ctx.scaling
        dlow = dB = None
        if dy is not None:
            dy = dy.reshape(-1, dy.shape[-1])
            dlow, dB = _small(dy, low, B, needs_B)
            dx = _grown(dx, dy, weight) if needs_x else None
        there = [(i, d) for i, d in enumerate((dlow, *dlows)) if d is not None]
        dAs: list[Tensor | None] = [None] * ctx.count
        if there and (needs_x or any(needs_A)):
            g = torch.cat([d for _, d in there]) if len(there) > 1 else there[0][1]
            stack = [As[i] for i, _ in there]
            A = _stack(stack, g.dtype)
            if needs_x:
                dx = _grown(dx, g.t(), A, ctx.scaling)
            if any(needs_A):
                dA = found.gradient(g, A, ctx.scaling) if x is None else (g @ x) * ctx.scaling
                for (i, _), part in zip(there, torch.split_with_sizes(dA, [A.shape[0] for A in stack]), strict=True):
                    dAs[i] = part if needs_A[i] else None
        return (None if dx is None else dx.view(ctx.shape)), None, None, dB, *dAs


class Next(Function):
    """A further layer that reads the same input."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, low: Tensor, fixed: tuple, B: Tensor, last: bool) -> Any:
        """rows: (rows, in); low: (r, rows); fixed: shape of x, weight, bias."""
        shape, weight, bias = fixed
        y = _corrected(rows, shape, weight, bias, low, B)
        ctx.save_for_backward(weight, B, low)
        ctx.set_materialize_grads(False)
        if last:
            return y
        rows = rows.detach()
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(rows)
        return y, rows

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dx: Tensor | None = None) -> Any:
        """Gradients of the input, of the low-rank product and of B."""
        if dy is None:
            return dx, None, None, None, None
        weight, B, low = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        dlow, dB = _small(dy, low, B, ctx.needs_input_grad[3])
        return (_grown(dx, dy, weight) if ctx.needs_input_grad[0] else None), dlow, None, dB, None


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scaling: float,
    B: Tensor,
    As: list[Tensor],
    over: WeakMethod | None = None,
) -> Any:
    """As `First.forward`; without autograd only y."""
    if not torch.is_grad_enabled():
        rows = x.reshape(-1, x.shape[-1])
        low = (_as(As[0], x.dtype) @ rows.t()).mul_(scaling)
        return _corrected(rows, x.shape, weight, bias, low, B)
    found = source(x) if any(A.requires_grad for A in As) else None
    return First.apply(x, found, (weight, bias, scaling, over), B, *As)


def _corrected(rows: Tensor, shape: torch.Size, weight: Tensor, bias: Tensor | None, low: Tensor, B: Tensor) -> Tensor:
    """``rows·Wᵀ + b + lowᵀ·Bᵀ`` in the shape of the layer's output."""
    y = F.linear(rows, weight, bias)  # nobody else holds it, so it may be written into
    y.addmm_(low.t(), _as(B, y.dtype).t())
    return _unsafe_view(y, (*shape[:-1], y.shape[1]))  # a view could not be written into by its user


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)  # `to` is a call into torch even for nothing


def _stack(As: Any, dtype: torch.dtype) -> Tensor:
    return _as(torch.cat(As) if len(As) > 1 else As[0], dtype)


def _small(dy: Tensor, low: Tensor, B: Tensor, needs_B: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``low`` and of B."""
    dlow = _as(B, dy.dtype).t() @ dy.t()
    return dlow, (low @ dy).t() if needs_B else None


def _grown(dx: Tensor | None, a: Tensor, b: Tensor, scaling: float = 1.0) -> Tensor:
    """``dx + s·a·b``, in place unless this is to be differentiated again; dx is nobody else's."""
    if dx is None:
        return a @ b if scaling == 1 else (a @ b) * scaling
    if torch.is_grad_enabled():
        return torch.addmm(dx, a, b, alpha=scaling)
    return dx.addmm_(a, b, alpha=scaling)


def _connected(found: Source, dtype: torch.dtype) -> Tensor:
    if not found.full:
        raise RuntimeError(
            "With A frozen (LoRA-FA) a layer keeps A·x and not x, so its gradients cannot be differentiated again"
            " (create_graph=True); those of LoRA can."
        )
    return found.whole(dtype)
