"""The two layouts of low-rank products, and products in either of them.

``low``, r numbers for each row of the input, is stored as (r, rows): BLAS multiplies that several times faster than
(rows, r). On the CPU, except in bfloat16, rows are divided into batches and ``low`` is stored as (batch, r, length),
which is faster by half again. The *leading shape* of a tensor (…, n) is (rows,) in the first layout and
(batch, length) in the second.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def leading_shape(x: Tensor, r: int) -> tuple[int, ...]:
    """(batch, length) or (rows,) for an input.

    Rows are divided into batches where each batch stays long enough that the gradient of B, which every batch computes
    for itself, is small beside the gradient of the output.
    """
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


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a·b``, for each batch if there are batches. `torch.matmul` would be several calls into torch."""
    return torch.mm(a, b) if a.ndim == 2 else torch.bmm(a, b)


def scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``scaling·a·b`` in one call: with ``beta=0`` torch ignores the tensor it would add to."""
    add_and_multiply = torch.addmm if a.ndim == 2 else torch.baddbmm
    return add_and_multiply(_ignored(a.dtype, a.device), a, b, beta=0, alpha=scaling)


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """``a·b`` over all rows, (r, n): (r, rows)·(rows, n), or the sum of (batch, r, length)·(batch, length, n)."""
    if a.ndim == 2:
        return torch.mm(a, b)
    return torch.addbmm(_ignored(a.dtype, a.device), a, b, beta=0)


@functools.cache
def _ignored(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may be made in inference and used again in training
        return torch.zeros((), dtype=dtype, device=device)


def with_leading_shape(x: Tensor, leading_shape: tuple[int, ...]) -> Tensor:
    """(…, n) -> (batch, length, n) or (rows, n)."""
    return x if x.shape[:-1] == leading_shape else x.reshape(*leading_shape, x.shape[-1])


def for_each_batch(matrix: Tensor, like: Tensor) -> Tensor:
    """The matrix once for each batch of another tensor, without a copy."""
    return matrix if like.ndim == 2 else matrix.expand(len(like), -1, -1)


def transposed(B: Tensor, like: Tensor) -> Tensor:
    """(out, r) -> (r, out), or (batch, r, out) without a copy."""
    B = in_dtype(B, like.dtype)
    if like.ndim == 2:
        return B.t()
    # transposing and expanding in one call
    return B.as_strided((len(like), *B.shape[::-1]), (0, *B.stride()[::-1]))


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)  # `to` is a call into torch even for nothing
