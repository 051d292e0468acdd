"""A frozen linear layer and its low-rank correction as one step of autograd: in place, few products, little kept.

With frozen W and b, and ``low = s·A·xᵀ``::

    y  = lowᵀ·Bᵀ + b + x·Wᵀ            the correction is written first and the large product added to it
    dB = (low·dy)ᵀ
    dlow = s·Bᵀ·dyᵀ
    dA = dlow·x                         x itself need not be kept where it can be rebuilt (see `inputs`)
    dx = dlowᵀ·A + dy·W                 again both in one tensor

Adding the large product to the small one costs one pass over the output less than the reverse. ``low`` lies as
(r, rows), which BLAS multiplies several times faster than (rows, r); on the CPU, but for bfloat16, as
(batch, r, length), which is half as fast again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_peft.lowrank.inputs import Source, source, summed

_unsafe_view = torch.ops.aten._unsafe_view.default
_NOTHING = Source(())


class CorrectedLinear(Function):
    """``x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ`` for frozen W and b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        origin: Source,
        weight: Tensor,
        bias: Tensor | None,
        scaling: float,
        A: Tensor,
        B: Tensor,
    ) -> Tensor:
        """The output (…, out).

        Args:
            ctx: autograd's.
            x: (…, in).
            origin: what x is made of; empty if A does not train.
            weight, bias, scaling, A, B: of the formula.
        """
        low = _low(x, A, scaling)
        ctx.save_for_backward(low, weight, A, B, *[tensor for kind in origin for tensor in kind])
        ctx.scaling, ctx.input_shape, ctx.origin_sizes = scaling, x.shape, origin.sizes
        return _output(x, low, weight, bias, B)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        """Gradients of x, A and B."""
        device = grad_output.device.type
        if not torch.is_autocast_enabled(device):
            return _gradients(ctx, grad_output)
        # a backward pass inside autocast (manual optimization): the forward was outside it, and its dtypes hold
        with torch.autocast(device, enabled=False):
            return _gradients(ctx, grad_output)


def corrected_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scaling: float, A: Tensor, B: Tensor) -> Tensor:
    """The output of a linear layer with a correction; shapes as in `CorrectedLinear.forward`."""
    if not torch.is_grad_enabled():
        return _output(x, _low(x, A, scaling), weight, bias, B)
    origin = source(x) if A.requires_grad else _NOTHING
    return CorrectedLinear.apply(x, origin, weight, bias, scaling, A, B)


def _gradients(ctx: Any, dy: Tensor) -> Any:
    low, weight, A, B, *kept = ctx.saved_tensors
    origin = Source.of(kept, ctx.origin_sizes)
    needs_x, needs_A, needs_B = ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]
    x = None
    if torch.is_grad_enabled() and (needs_A or needs_B):
        # these gradients will be differentiated again, so they must be computed from tensors that have a history
        x = _input_with_history(origin, weight.dtype)
        low = _low(x, A, ctx.scaling)
    lead = (*low.shape[:-2], low.shape[-1])
    dy = _shaped(dy, lead)
    dx = dA = dB = None
    if needs_B:
        dB = summed(_times(low, dy)).t()
    if needs_x or needs_A:
        dlow = _scaled(_times(_transposed(B, dy), dy.mT), ctx.scaling)
        if needs_A:
            dA = origin.gradient(dlow) if x is None else summed(_times(dlow, _shaped(x, lead)))
        if needs_x:
            dx = _input_gradient(dy, weight, dlow, A).view(ctx.input_shape)
    return dx, None, None, None, None, dA, dB


def _input_with_history(origin: Source, dtype: torch.dtype) -> Tensor:
    if not origin.full:
        raise RuntimeError(
            "With A frozen (LoRA-FA) a layer keeps A·x and not x, so its gradients cannot be differentiated again"
            " (create_graph=True); those of LoRA can."
        )
    return origin.whole(dtype)


def _low(x: Tensor, A: Tensor, scaling: float) -> Tensor:
    """``s·A·xᵀ``, (batch, r, length) or (r, rows)."""
    A = _as(A, x.dtype)
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
    for batch in (8, 4, 2):
        if rows % batch == 0 and rows >= batch * least:
            return batch, rows // batch
    return (rows,)


def _output(x: Tensor, low: Tensor, weight: Tensor, bias: Tensor | None, B: Tensor) -> Tensor:
    """``lowᵀ·Bᵀ + b + x·Wᵀ`` in the shape of the layer's output."""
    low = low.mT
    B = _transposed(B, low)
    if bias is None:
        y = _times(low, B)
    elif low.ndim == 2:
        y = torch.addmm(bias, low, B)
    else:
        y = torch.baddbmm(bias, low, B)
    rows = y if y.ndim == 2 else y.view(-1, y.shape[2])
    rows.addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    if y.shape[:-1] == x.shape[:-1]:
        return y
    return _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))  # a plain view could not be written into by its user


def _input_gradient(dy: Tensor, weight: Tensor, dlow: Tensor, A: Tensor) -> Tensor:
    """``dlowᵀ·A + dy·W``, (rows, in); in place unless it will be differentiated again."""
    dx = _times(dlow.mT, _for_each(_as(A, dlow.dtype), dlow))
    if dx.ndim == 3:
        dx, dy = dx.view(-1, dx.shape[2]), dy.reshape(-1, dy.shape[2])
    return torch.addmm(dx, dy, weight) if torch.is_grad_enabled() else dx.addmm_(dy, weight)


def _times(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b) if a.ndim == 2 else torch.bmm(a, b)  # `matmul` is several calls into torch


def _scaled(tensor: Tensor, scaling: float) -> Tensor:
    """In place unless this is to be differentiated again."""
    return tensor * scaling if torch.is_grad_enabled() else tensor.mul_(scaling)


def _shaped(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    """(…, n) -> (batch, length, n) or (rows, n)."""
    return x if x.shape[:-1] == lead else x.reshape(*lead, x.shape[-1])


def _for_each(matrix: Tensor, like: Tensor) -> Tensor:
    """The matrix once for each batch."""
    return matrix if like.ndim == 2 else matrix.expand(len(like), -1, -1)


def _transposed(B: Tensor, like: Tensor) -> Tensor:
    """(out, r) -> (batch, r, out) or (r, out)."""
    B = _as(B, like.dtype)
    return B.t() if like.ndim == 2 else B.as_strided((len(like), *B.shape[::-1]), (0, *B.stride()[::-1]))


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)  # `to` is a call into torch even for nothing
