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
    # products of many short batches are slower in bfloat16 and on a GPU
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
    if a.ndim == 2:
        return torch.mm(a, b)
    return torch.bmm(a, b)


def scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``scaling·a·b`` in one call: with ``beta=0`` torch ignores the tensor it would add to."""
    ignored = _ignored(a.dtype, a.device)
    if a.ndim == 2:
        return torch.addmm(ignored, a, b, beta=0, alpha=scaling)
    return torch.baddbmm(ignored, a, b, beta=0, alpha=scaling)


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """``a·b`` over all rows, (r, n): (r, rows)·(rows, n), or the sum of (batch, r, length)·(batch, length, n)."""
    if a.ndim == 2:
        return torch.mm(a, b)
    return torch.addbmm(_ignored(a.dtype, a.device), a, b, beta=0)


@functools.cache
def _ignored(dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number in the place of a tensor that is multiplied by 0."""
    with torch.inference_mode(False):  # it may be made in inference and used again in training
        return torch.zeros((), dtype=dtype, device=device)


def with_leading_shape(x: Tensor, leading_shape: tuple[int, ...]) -> Tensor:
    """(…, n) -> (batch, length, n) or (rows, n)."""
    if x.shape[:-1] == leading_shape:
        return x
    return x.reshape(*leading_shape, x.shape[-1])


def for_each_batch(matrix: Tensor, like: Tensor) -> Tensor:
    """The matrix once for each batch of another tensor, without a copy."""
    if like.ndim == 2:
        return matrix
    return matrix.expand(len(like), -1, -1)


def transposed(B: Tensor, like: Tensor) -> Tensor:
    """(out, r) -> (r, out), or (batch, r, out) without a copy."""
    B = in_dtype(B, like.dtype)
    if like.ndim == 2:
        return B.t()
    # transposing and expanding in one call
    return B.as_strided((len(like), *B.shape[::-1]), (0, *B.stride()[::-1]))


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype. `Tensor.to` is a call into torch even where there is nothing to do."""
    if tensor.dtype is dtype:
        return tensor
    return tensor.to(dtype)
