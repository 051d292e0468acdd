"""Linear layers and their corrections as one step of autograd: in place, few products, little kept.

``y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ`` for frozen W and b. Layers that read the same input are one step: it is multiplied by all
their A at once, and its gradient is one tensor that every product adds to in place. Low-rank products lie as (r, rows),
which BLAS multiplies several times faster than (rows, r).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from lightning_peft.lowrank.inputs import Source, source

_unsafe_view = torch.ops.aten._unsafe_view.default
_NOTHING = Source(())


class Corrected(Function):
    """Layers that read one input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: Source, fixed: tuple, *factors: Tensor) -> Any:
        """Each layer's output, (…, out).

        Args:
            ctx: autograd's.
            x: (…, in).
            found: what x is made of; empty if no A trains.
            fixed: their weights, their biases, the scaling, a weak reference to what is to hear that the pass is over.
            factors: every A, then every B.
        """
        weights, biases, scaling, over = fixed
        count, shape = len(weights), x.shape
        As, Bs = factors[:count], factors[count:]
        rows = x.reshape(-1, shape[-1])
        low = (_stack(As, x.dtype) @ rows.t()).mul_(scaling)
        ctx.save_for_backward(low, *weights, *factors, *[part for kind in found for part in kind])
        ctx.fixed = count, scaling, shape, found.sizes, over
        ctx.set_materialize_grads(False)
        if count == 1:
            return _corrected(rows, shape, weights[0], biases[0], low, Bs[0])
        each = zip(weights, biases, _parts(low, As), Bs, strict=True)
        return tuple([_corrected(rows, shape, *one) for one in each])

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        """Gradients of x, of every A and of every B."""
        count, scaling, shape, sizes, over = ctx.fixed
        if over is not None and (waits := over()) is not None:
            waits.end()
        low, *rest = ctx.saved_tensors
        weights, As, Bs = rest[:count], rest[count : 2 * count], rest[2 * count : 3 * count]
        found, needs = Source.of(rest[3 * count :], sizes), ctx.needs_input_grad
        needs_x, needs_A, needs_B = needs[0], any(needs[3 : 3 + count]), any(needs[3 + count :])
        x = _connected(found, weights[0].dtype) if torch.is_grad_enabled() and (needs_A or needs_B) else None
        if x is not None:
            low = (_stack(As, x.dtype) @ x.t()) * scaling
        there, lows = [i for i, dy in enumerate(dys) if dy is not None], _parts(low, As)
        if len(there) < count:
            weights, As, Bs, lows = ([kind[i] for i in there] for kind in (weights, As, Bs, lows))
        rows = [dy.reshape(-1, dy.shape[-1]) for dy in dys if dy is not None]
        dx = dAs = dBs = None
        if needs_B:
            dBs = [(low @ dy).t() for low, dy in zip(lows, rows, strict=True)]
        if there and (needs_x or needs_A):
            dlow = [_as(B, dy.dtype).t() @ dy.t() for B, dy in zip(Bs, rows, strict=True)]
            dlow = torch.cat(dlow) if len(dlow) > 1 else dlow[0]
            A = _stack(As, dlow.dtype)
            if needs_x:
                dx = _before(rows, weights, dlow, A, scaling).view(shape)
            if needs_A:
                dAs = _parts(found.gradient(dlow, A, scaling) if x is None else (dlow @ x) * scaling, As)
        return dx, None, None, *_placed(there, dAs, count), *_placed(there, dBs, count)


def run(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scaling: float,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    over: Any = None,
) -> Any:
    """As `Corrected.forward`; without autograd only the first layer's output."""
    if not torch.is_grad_enabled():
        rows = x.reshape(-1, x.shape[-1])
        low = (_as(As[0], x.dtype) @ rows.t()).mul_(scaling)
        return _corrected(rows, x.shape, weights[0], biases[0], low, Bs[0])
    found = source(x) if any(A.requires_grad for A in As) else _NOTHING
    return Corrected.apply(x, found, (weights, biases, scaling, over), *As, *Bs)


def _corrected(rows: Tensor, shape: torch.Size, weight: Tensor, bias: Tensor | None, low: Tensor, B: Tensor) -> Tensor:
    """``rows·Wᵀ + b + lowᵀ·Bᵀ`` in the shape of the layer's output."""
    y = F.linear(rows, weight, bias)  # nobody else holds it, so it may be written into
    y.addmm_(low.t(), _as(B, y.dtype).t())
    return _unsafe_view(y, (*shape[:-1], y.shape[1]))  # a view could not be written into by its user


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)  # `to` is a call into torch even for nothing


def _stack(As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return _as(torch.cat(As) if len(As) > 1 else As[0], dtype)


def _parts(stacked: Tensor, As: Sequence[Tensor]) -> Sequence[Tensor]:
    """Each layer's rows."""
    return torch.split_with_sizes(stacked, [A.shape[0] for A in As]) if len(As) > 1 else (stacked,)


def _before(dys: Sequence[Tensor], weights: Sequence[Tensor], dlow: Tensor, A: Tensor, scaling: float) -> Tensor:
    """Gradient of the input, (rows, in): one tensor that all add to, unless this is to be differentiated again."""
    dx = dys[0] @ weights[0]
    if torch.is_grad_enabled():
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx = dx + dy @ weight
        return torch.addmm(dx, dlow.t(), A, alpha=scaling)
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight)
    return dx.addmm_(dlow.t(), A, alpha=scaling)


def _placed(there: list[int], grads: Sequence[Tensor] | None, count: int) -> Sequence[Tensor | None]:
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
