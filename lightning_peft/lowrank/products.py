"""A frozen linear layer and its low-rank correction, as one function of autograd.

The weight W is (out, in), the factors A (r, in) and B (out, r), and s is the scaling. With x as (rows, in), the layer
computes::

    low = s·A·xᵀ                   (r, rows)
    y   = lowᵀ·Bᵀ + b + x·Wᵀ       (rows, out)

and for the gradient dy of its output::

    dB   = (low·dy)ᵀ
    dlow = s·Bᵀ·dyᵀ                (r, rows)
    dA   = dlow·x
    dx   = dlowᵀ·A + dy·W

Three things make this cheaper than the plain formula:

* x is needed for dA alone, and is not kept where it can be computed again from tensors that autograd keeps for other
  reasons (see `inputs`).
* The small product is written first, and the large one is added to it in place. That is one pass less over a tensor of
  the output's size.
* ``low`` is stored in the layout that BLAS multiplies fastest (see `layouts`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_peft.lowrank.inputs import InputParts, parts_of
from lightning_peft.lowrank.layouts import (
    for_each_batch,
    in_dtype,
    leading_shape,
    product,
    product_over_rows,
    scaled_product,
    transposed,
    with_leading_shape,
)

_unsafe_view = torch.ops.aten._unsafe_view.default
#: for layers whose A does not train, which never need their input
_NO_PARTS = InputParts(())


class CorrectedLinear(Function):
    """``x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ`` for frozen W and b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        parts: InputParts,
        weight: Tensor,
        bias: Tensor | None,
        scaling: float,
        A: Tensor,
        B: Tensor,
    ) -> Tensor:
        """The output (…, out).

        Args:
            ctx: what autograd passes on to `backward`.
            x: (…, in).
            parts: the tensors that x can be computed from; none if A does not train.
            weight, bias, scaling, A, B: W, b, s, A and B of the formula.
        """
        low = _low_rank_input(x, A, scaling)
        ctx.save_for_backward(low, weight, A, B, *parts.tensors())
        ctx.scaling, ctx.input_shape, ctx.part_counts = scaling, x.shape, parts.counts()
        return _output(x, low, weight, bias, B)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        """Gradients of x, A and B."""
        gradients = _differentiable_gradients if torch.is_grad_enabled() else _gradients
        device_type = grad_output.device.type
        if not torch.is_autocast_enabled(device_type):
            return gradients(ctx, grad_output)
        # Manual optimization may call backward inside autocast. The forward ran outside it, and its dtypes count.
        with torch.autocast(device_type, enabled=False):
            return gradients(ctx, grad_output)


def corrected_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scaling: float, A: Tensor, B: Tensor) -> Tensor:
    """The output of a linear layer with its correction; the arguments are those of `CorrectedLinear.forward`."""
    if not torch.is_grad_enabled():
        return _output(x, _low_rank_input(x, A, scaling), weight, bias, B)
    parts = parts_of(x) if A.requires_grad else _NO_PARTS
    return CorrectedLinear.apply(x, parts, weight, bias, scaling, A, B)


# ---- forward -------------------------------------------------------------------------------------------------------
def _low_rank_input(x: Tensor, A: Tensor, scaling: float) -> Tensor:
    """``low``: (batch, r, length) or (r, rows)."""
    A = in_dtype(A, x.dtype)
    x = with_leading_shape(x, leading_shape(x, len(A)))
    return scaled_product(for_each_batch(A, x), x.mT, scaling)


def _output(x: Tensor, low: Tensor, weight: Tensor, bias: Tensor | None, B: Tensor) -> Tensor:
    """``lowᵀ·Bᵀ + b + x·Wᵀ`` in the shape of the layer's output, (…, out)."""
    low = low.mT
    B = transposed(B, low)
    if bias is None:
        y = product(low, B)
    elif low.ndim == 2:
        y = torch.addmm(bias, low, B)
    else:
        y = torch.baddbmm(bias, low, B)
    y_rows = y if y.ndim == 2 else y.view(-1, y.shape[2])
    y_rows.addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    if y.shape[:-1] == x.shape[:-1]:
        return y
    return _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))  # its user could not write into a plain view


# ---- backward ------------------------------------------------------------------------------------------------------
def _gradients(ctx: Any, dy: Tensor) -> Any:
    """The gradients, computed in place where possible."""
    low, weight, A, B, *kept = ctx.saved_tensors
    needs_x, _, _, _, _, needs_A, needs_B = ctx.needs_input_grad
    dy = with_leading_shape(dy, (*low.shape[:-2], low.shape[-1]))
    dx = dA = dB = None
    if needs_B:
        dB = product_over_rows(low, dy).t()
    if needs_x or needs_A:
        dlow = scaled_product(transposed(B, dy), dy.mT, ctx.scaling)
        if needs_A:
            dA = InputParts.of(kept, ctx.part_counts).gradient_of_A(dlow)
        if needs_x:
            dx = _input_gradient(dy, weight, dlow, A, ctx.input_shape)
    return dx, None, None, None, None, dA, dB


def _input_gradient(dy: Tensor, weight: Tensor, dlow: Tensor, A: Tensor, shape: torch.Size) -> Tensor:
    """``dlowᵀ·A + dy·W`` in the shape of the layer's input, (…, in)."""
    dx = product(dlow.mT, for_each_batch(in_dtype(A, dlow.dtype), dlow))
    if dx.ndim == 2:
        dx.addmm_(dy, weight)
    else:
        dx.view(-1, dx.shape[2]).addmm_(dy.reshape(-1, dy.shape[2]), weight)
    return dx if dx.shape == shape else dx.view(shape)


def _differentiable_gradients(ctx: Any, dy: Tensor) -> Any:
    """The gradients with a history of their own, which ``create_graph=True`` asks for. Nothing is written in place."""
    _, weight, A, B, *kept = ctx.saved_tensors
    needs_x, _, _, _, _, needs_A, needs_B = ctx.needs_input_grad
    A, B = in_dtype(A, weight.dtype), in_dtype(B, weight.dtype)
    dy = dy.reshape(-1, dy.shape[-1])
    dlow = dy @ B * ctx.scaling  # here (rows, r)
    dx = dA = dB = None
    if needs_x:
        dx = (dlow @ A + dy @ weight).view(ctx.input_shape)
    if needs_A or needs_B:
        parts = InputParts.of(kept, ctx.part_counts)
        if not parts.full:
            raise RuntimeError(
                "With A frozen (LoRA-FA) a layer keeps A·x and not x, so its gradients cannot be differentiated again"
                " (create_graph=True); those of LoRA can."
            )
        x = parts.recompute(weight.dtype).reshape(-1, weight.shape[1])
        dA = dlow.t() @ x if needs_A else None
        dB = dy.t() @ (x @ A.t() * ctx.scaling) if needs_B else None
    return dx, None, None, None, None, dA, dB
