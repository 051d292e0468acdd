"""Linear layers and their corrections as one step of autograd: in place, few products, little kept.

``y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ`` for frozen W and b. Layers that read the same input are one step: it is multiplied by all
their A at once, and its gradient is one tensor that every product adds to. The correction is written first and the
large product added to it, which costs less than the reverse. Low-rank products lie as (batch, r, length): BLAS
multiplies (r, rows) several times faster than (rows, r), and batches that fit its caches half as fast again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
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
        count = len(weights)
        As, Bs = factors[:count], factors[count:]
        low, rows = _low(x, As, scaling), x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(low, *weights, *factors, *[part for kind in found for part in kind])
        ctx.fixed = count, scaling, x.shape, found.sizes, over
        ctx.set_materialize_grads(False)
        if count == 1:
            return _corrected(rows, x.shape, weights[0], biases[0], low.mT, Bs[0])
        each = zip(weights, biases, _parts(low.mT, As, 2), Bs, strict=True)
        return tuple([_corrected(rows, x.shape, *one) for one in each])

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
        again = torch.is_grad_enabled()
        x = _connected(found, weights[0].dtype) if again and (needs_A or needs_B) else None
        if x is not None:
            low = _low(x, As, scaling)
        there, lows = [i for i, dy in enumerate(dys) if dy is not None], _parts(low, As)
        if len(there) < count:
            weights, As, Bs, lows = ([kind[i] for i in there] for kind in (weights, As, Bs, lows))
        batch, _, length = low.shape
        batched = [_batched(dy, batch, length) for dy in dys if dy is not None]
        dx = dAs = dBs = None
        if needs_B:
            dBs = [_summed(torch.bmm(low, dy)).t() for low, dy in zip(lows, batched, strict=True)]
        if there and (needs_x or needs_A):
            dlow = [torch.bmm(_transposed(B, dy), dy.mT) for B, dy in zip(Bs, batched, strict=True)]
            dlow = torch.cat(dlow, 1) if len(dlow) > 1 else dlow[0]
            dlow = dlow * scaling if again else dlow.mul_(scaling)
            if needs_A:
                dA = found.gradient(dlow) if x is None else _summed(torch.bmm(dlow, _batched(x, batch, length)))
                dAs = _parts(dA, As, 0)
            if needs_x:
                A = _stack(As, dlow.dtype).expand(batch, -1, -1)
                dx = _before(batched, weights, dlow, A).view(shape)
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
        low, rows = _low(x, As[:1], scaling), x.reshape(-1, x.shape[-1])
        return _corrected(rows, x.shape, weights[0], biases[0], low.mT, Bs[0])
    found = source(x) if any(A.requires_grad for A in As) else _NOTHING
    return Corrected.apply(x, found, (weights, biases, scaling, over), *As, *Bs)


def _low(x: Tensor, As: Sequence[Tensor], scaling: float) -> Tensor:
    """``s·A·xᵀ``, (batch, r, length), in one batch where more do not pay or would make the gradients of B large."""
    A = _stack(As, x.dtype)
    if x.ndim != 3 or x.shape[1] < 4 * A.shape[0] or x.dtype is torch.bfloat16 or not x.is_cpu:
        x = x.reshape(1, -1, x.shape[-1])
    low = torch.bmm(A.expand(len(x), -1, -1), x.mT)
    return low * scaling if torch.is_grad_enabled() else low.mul_(scaling)


def _corrected(rows: Tensor, shape: torch.Size, weight: Tensor, bias: Tensor | None, low: Tensor, B: Tensor) -> Tensor:
    """``rows·Wᵀ + b + low·Bᵀ`` in the shape of the layer's output; low: (batch, length, r)."""
    B = _transposed(B, low)
    y = torch.bmm(low, B) if bias is None else torch.baddbmm(bias, low, B)
    y.view(-1, y.shape[2]).addmm_(rows, weight.t())
    # a view could not be written into by its user
    return y if len(shape) == 3 and len(y) == shape[0] else _unsafe_view(y, (*shape[:-1], y.shape[2]))


def _batched(x: Tensor, batch: int, length: int) -> Tensor:
    """(…, n) -> (batch, length, n)."""
    return x if x.ndim == 3 and len(x) == batch else x.reshape(batch, length, x.shape[-1])


def _transposed(B: Tensor, like: Tensor) -> Tensor:
    """(out, r) -> (batch, r, out)."""
    B = _as(B, like.dtype)
    return B.as_strided((len(like), *B.shape[::-1]), (0, *B.stride()[::-1]))


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)  # `to` is a call into torch even for nothing


def _stack(As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return _as(torch.cat(As) if len(As) > 1 else As[0], dtype)


def _parts(stacked: Tensor, As: Sequence[Tensor], dim: int = 1) -> Sequence[Tensor]:
    """Each layer's share."""
    return torch.split_with_sizes(stacked, [len(A) for A in As], dim) if len(As) > 1 else (stacked,)


def _summed(products: Tensor) -> Tensor:
    """Over the batch."""
    return products[0] if len(products) == 1 else products.sum(0)


def _before(dys: Sequence[Tensor], weights: Sequence[Tensor], dlow: Tensor, A: Tensor) -> Tensor:
    """Gradient of the input, (batch, length, in); all add to one tensor unless this is to be differentiated again."""
    dx = torch.bmm(dlow.mT, A)
    rows = dx.view(-1, dx.shape[2])
    for dy, weight in zip(dys, weights, strict=True):
        dy = dy.flatten(0, 1)
        rows = torch.addmm(rows, dy, weight) if torch.is_grad_enabled() else rows.addmm_(dy, weight)
    return rows


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
