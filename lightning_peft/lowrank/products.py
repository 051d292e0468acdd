"""Linear layers and their corrections as one step of autograd: in place, few products, little kept.

``y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ`` for frozen W and b. Layers that read the same input are one step: it is multiplied by all
their A at once, and its gradient is one tensor that every product adds to. The correction is written first and the
large product added to it, which costs less than the reverse. Low-rank products lie as (r, rows), which BLAS multiplies
several times faster than (rows, r); on the CPU (but for bfloat16) as (batch, r, length), half as fast again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_peft.lowrank.inputs import Source, source, summed

_unsafe_view = torch.ops.aten._unsafe_view.default
_NOTHING = Source(())


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Run a backward pass as its forward pass ran, which is never under autocast (see `siblings.run`).

    A backward pass inside autocast, of a forward pass made outside it, would cast some of the products and not the
    tensors they are written into. (`torch.amp.custom_bwd` does the same, at a cost in every pass.)
    """

    @functools.wraps(backward)
    def run(ctx: Any, *dys: Tensor | None) -> Any:
        if not torch.is_autocast_enabled(ctx.device_type):
            return backward(ctx, *dys)
        with torch.autocast(ctx.device_type, enabled=False):
            return backward(ctx, *dys)

    return run


class Corrected(Function):
    """Layers that read one input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: Source, fixed: tuple, *factors: Tensor) -> Any:
        """Each layer's output, (…, out).

        Args:
            ctx: autograd's.
            x: (…, in).
            found: what x is made of; empty if no A trains.
            fixed: their weights, their biases, the scaling, a weak reference to the siblings (None for one layer).
            factors: every A, then every B.
        """
        weights, biases, scaling, over = fixed
        count = len(weights)
        As, Bs = factors[:count], factors[count:]
        low = _low(x, As, scaling)
        ctx.save_for_backward(low, *weights, *factors, *[part for kind in found for part in kind])
        ctx.fixed = count, scaling, x.shape, found.sizes, over
        ctx.device_type = x.device.type
        ctx.set_materialize_grads(False)
        return _outputs(x, low, weights, biases, As, Bs)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        """Gradients of x, of every A and of every B."""
        count, scaling, shape, sizes, over = ctx.fixed
        low, *rest = ctx.saved_tensors
        if over is not None and (siblings := over()) is not None:
            siblings.end()
        weights, As, Bs = rest[:count], rest[count : 2 * count], rest[2 * count : 3 * count]
        found, needs = Source.of(rest[3 * count :], sizes), ctx.needs_input_grad
        needs_x, needs_A, needs_B = needs[0], any(needs[3 : 3 + count]), any(needs[3 + count :])
        x = _connected(found, weights[0].dtype) if torch.is_grad_enabled() and (needs_A or needs_B) else None
        if x is not None:
            low = _low(x, As, scaling)
        there, lows = [i for i, dy in enumerate(dys) if dy is not None], _parts(low, As)
        if len(there) < count:
            weights, As, Bs, lows = ([kind[i] for i in there] for kind in (weights, As, Bs, lows))
        lead, dx, dAs, dBs = (*low.shape[:-2], low.shape[-1]), None, None, None
        grads = [_shaped(dy, lead) for dy in dys if dy is not None]
        if needs_B:
            dBs = [summed(_times(low, dy)).t() for low, dy in zip(lows, grads, strict=True)]
        if there and (needs_x or needs_A):
            dlow = _low_gradient(grads, Bs, scaling)
            if needs_A:
                dA = found.gradient(dlow) if x is None else summed(_times(dlow, _shaped(x, lead)))
                dAs = _parts(dA, As)
            if needs_x:
                dx = _input_gradient(grads, weights, dlow, _stack(As, dlow.dtype)).view(shape)
        return dx, None, None, *_with_gaps(there, dAs, count), *_with_gaps(there, dBs, count)


def outputs(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scaling: float,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    over: Any = None,
) -> tuple[Tensor, ...]:
    """Each layer's output, as `Corrected.forward`."""
    if not torch.is_grad_enabled():
        return _outputs(x, _low(x, As, scaling), weights, biases, As, Bs)
    found = source(x) if any(A.requires_grad for A in As) else _NOTHING
    return Corrected.apply(x, found, (weights, biases, scaling, over), *As, *Bs)


def _low(x: Tensor, As: Sequence[Tensor], scaling: float) -> Tensor:
    """``s·A·xᵀ``, (batch, r, length) or (r, rows)."""
    A = _stack(As, x.dtype)
    x = _shaped(x, _lead(x, len(A)))
    return _scaled(_times(_for_each(A, x), x.mT), scaling)


def _lead(x: Tensor, r: int) -> tuple[int, ...]:
    """(batch, length) or (rows,): batches long enough that the gradient of B in each is small against that of y."""
    rows = x.numel() // x.shape[-1]
    if x.dtype is torch.bfloat16 or not x.is_cpu:
        return (rows,)
    least = max(4 * r, 32)
    if x.ndim == 3 and len(x) > 1 and x.shape[1] >= least:
        return x.shape[0], x.shape[1]
    batch = next((n for n in (8, 4, 2) if rows % n == 0 and rows >= n * least), None)
    return (batch, rows // batch) if batch else (rows,)


def _outputs(x: Tensor, low: Tensor, weights: Any, biases: Any, As: Sequence[Tensor], Bs: Any) -> tuple[Tensor, ...]:
    rows, lows = x.reshape(-1, x.shape[-1]), _parts(low.mT, As, -1)
    each = zip(weights, biases, lows, Bs, strict=True)
    return tuple([_output(rows, x.shape, *one) for one in each])


def _output(rows: Tensor, shape: torch.Size, weight: Tensor, bias: Tensor | None, low: Tensor, B: Tensor) -> Tensor:
    """``rows·Wᵀ + b + low·Bᵀ`` in the shape of the layer's output; low: (batch, length, r) or (rows, r)."""
    B = _transposed(B, low)
    y = _times(low, B) if bias is None else (torch.addmm if low.ndim == 2 else torch.baddbmm)(bias, low, B)
    (y if y.ndim == 2 else y.view(-1, y.shape[2])).addmm_(rows, weight.t())
    # a view could not be written into by its user
    return y if y.shape[:-1] == shape[:-1] else _unsafe_view(y, (*shape[:-1], y.shape[-1]))


def _times(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b) if a.ndim == 2 else torch.bmm(a, b)  # `matmul` is several calls into torch


def _scaled(tensor: Tensor, scaling: float) -> Tensor:
    """In place unless this is to be differentiated again."""
    return tensor * scaling if torch.is_grad_enabled() else tensor.mul_(scaling)


def _shaped(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    """(…, n) -> (batch, length, n) or (rows, n)."""
    return x if x.shape[:-1] == lead else x.reshape(*lead, x.shape[-1])


def _for_each(matrix: Tensor, like: Tensor) -> Tensor:
    """Once for each batch."""
    return matrix if like.ndim == 2 else matrix.expand(len(like), -1, -1)


def _transposed(B: Tensor, like: Tensor) -> Tensor:
    """(out, r) -> (batch, r, out) or (r, out)."""
    B = _as(B, like.dtype)
    return B.t() if like.ndim == 2 else B.as_strided((len(like), *B.shape[::-1]), (0, *B.stride()[::-1]))


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)  # `to` is a call into torch even for nothing


def _stack(As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return _as(torch.cat(As) if len(As) > 1 else As[0], dtype)


def _parts(stacked: Tensor, As: Sequence[Tensor], dim: int = -2) -> Sequence[Tensor]:
    """Each layer's share."""
    return torch.split_with_sizes(stacked, [len(A) for A in As], dim) if len(As) > 1 else (stacked,)


def _low_gradient(dys: Sequence[Tensor], Bs: Sequence[Tensor], scaling: float) -> Tensor:
    """Gradient of ``x·Aᵀ``, of all layers, as `_low` lies."""
    parts = [_times(_transposed(B, dy), dy.mT) for B, dy in zip(Bs, dys, strict=True)]
    return _scaled(torch.cat(parts, -2) if len(parts) > 1 else parts[0], scaling)


def _input_gradient(dys: Sequence[Tensor], weights: Sequence[Tensor], dlow: Tensor, A: Tensor) -> Tensor:
    """Gradient of the input, (rows, in); all add to one tensor unless this is to be differentiated again."""
    dx = _times(dlow.mT, _for_each(A, dlow))
    dx = dx if dx.ndim == 2 else dx.view(-1, dx.shape[2])
    for dy, weight in zip(dys, weights, strict=True):
        dy = dy if dy.ndim == 2 else dy.reshape(-1, dy.shape[2])
        dx = torch.addmm(dx, dy, weight) if torch.is_grad_enabled() else dx.addmm_(dy, weight)
    return dx


def _with_gaps(there: list[int], grads: Sequence[Tensor] | None, count: int) -> Sequence[Tensor | None]:
    """One for each layer; None for those whose output was not used."""
    if grads is None:
        return (None,) * count
    if len(there) == count:
        return grads
    found = dict(zip(there, grads, strict=True))
    return [found.get(i) for i in range(count)]


def _connected(found: Source, dtype: torch.dtype) -> Tensor:
    if not found.full:
        raise RuntimeError(
            "With A frozen (LoRA-FA) a layer keeps A·x and not x, so its gradients cannot be differentiated again"
            " (create_graph=True); those of LoRA can."
        )
    return found.whole(dtype)
