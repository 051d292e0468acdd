"""Computing a layer's input again from tensors that autograd keeps anyway, so that the input itself need not be kept.

The gradient of A is ``dlow·x``, and it is all that a low-rank correction needs x for. In many networks x is a product
whose factors the node that made it keeps for its own backward pass:

========================  =======================================  =================================
node that made x          what it keeps                            x
========================  =======================================  =================================
MulBackward0              ``self`` and ``other``                   self·other
ToCopyBackward0 (a cast)  nothing: the node before it is asked     the same numbers, in another dtype
NativeLayerNormBackward0  input, weight, bias, mean, 1/deviation   (input - mean)·rows·weight + bias
========================  =======================================  =================================

x is not computed whole either. Take RMSNorm, ``x = h·rsqrt(ms)·w``, where rsqrt(ms) has one number for each row and w
one for each feature. The factors for rows scale the columns of dlow, the factors for features scale the columns of the
result, and the one large product is with h::

    dA = ((dlow·rsqrt(ms)) @ h)·w
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.lowrank.layouts import in_dtype, product_over_rows, with_leading_shape

#: so many nodes in a row are looked through
_MOST_NODES = 4


class InputParts(NamedTuple):
    """The tensors that give a layer's input: ``x = (full[0] - mean)·full[1]·rows·columns + shift``.

    Each field holds any number of tensors of one shape, most often none or one.

    Attributes:
        full: (…, in), as large as x. If it is x itself, nothing is won and nothing else is needed.
        rows: (…, 1), factors for rows.
        columns: (in), factors for features.
        mean: (…, 1), of a layer norm.
        shift: (in), the bias of a layer norm.
    """

    full: tuple[Tensor, ...]
    rows: tuple[Tensor, ...] = ()
    columns: tuple[Tensor, ...] = ()
    mean: tuple[Tensor, ...] = ()
    shift: tuple[Tensor, ...] = ()

    def tensors(self) -> list[Tensor]:
        """All tensors in one row, as autograd keeps them; `of` is the inverse."""
        return [tensor for field in self for tensor in field]

    def counts(self) -> tuple[int, ...]:
        """The number of tensors in each field."""
        return tuple(map(len, self))

    @classmethod
    def of(cls, tensors: list[Tensor], counts: tuple[int, ...]) -> InputParts:
        """The parts again, from `tensors` and `counts`."""
        fields, start = [], 0
        for count in counts:
            fields.append(tuple(tensors[start : start + count]))
            start += count
        return cls(*fields)

    def recompute(self, dtype: torch.dtype) -> Tensor:
        """x, (…, in), with the history of its parts, for gradients that are differentiated again."""
        if self.mean:
            x = self._recompute_normalized()
        else:
            x = self._product_of_full()
            for factor in self.rows:
                x = x * factor
        for factor in self.columns:
            x = x * factor
        for shift in self.shift:
            x = x + shift
        return x.to(dtype)

    def gradient_of_A(self, dlow: Tensor) -> Tensor:
        """``dlow·x``, (r, in).

        Args:
            dlow: (batch, r, length) or (r, rows).
        """
        leading_shape = (*dlow.shape[:-2], dlow.shape[-1])
        x = with_leading_shape(self._product_of_full(), leading_shape)
        dlow = scaled = in_dtype(dlow, x.dtype)
        for factor in self.rows:
            scaled = scaled * with_leading_shape(factor, leading_shape).mT
        dA = product_over_rows(scaled, x)
        for factor in self.columns:
            dA.mul_(factor)
        for shift in self.shift:
            over_rows = dlow.sum(-1, keepdim=True)
            if over_rows.ndim == 3:
                over_rows = over_rows.sum(0)
            dA.addcmul_(over_rows, shift.to(dA.dtype))
        return dA

    def _product_of_full(self) -> Tensor:
        x = self.full[0]
        for mean in self.mean:
            x = x - mean
        for other in self.full[1:]:
            x = x * other
        return x

    def _recompute_normalized(self) -> Tensor:
        """A layer norm's input, centred and divided by its deviation.

        The mean and the deviation that the norm's node keeps have no history, so they are computed again. The node does
        not tell its epsilon, which is what is left between the two variances.
        """
        (start,), (kept_scale,) = self.full, self.rows
        variance, mean = torch.var_mean(start, -1, unbiased=False, keepdim=True)
        epsilon = (kept_scale.pow(-2) - variance).detach()
        return (start - mean) * (variance + epsilon).rsqrt()


def parts_of(x: Tensor) -> InputParts:
    """The tensors that give x and that autograd keeps for other reasons; x itself where there are none."""
    node: Any = x.grad_fn
    # A version above 0 says that x was written into, so it is no longer what its history gives (`.data` escapes that).
    if node is None or x._version:
        return InputParts((x,))
    parts = None
    if node.name() == "NativeLayerNormBackward0":
        parts = _parts_of_layer_norm(node, x)
    elif node.name() == "MulBackward0":
        factors = _factors(node, x.dtype, depth=0)
        parts = _sorted_by_shape(factors, x) if factors else None
    return parts or InputParts((x,))


# ---- products ------------------------------------------------------------------------------------------------------
def _factors(node: Any, dtype: torch.dtype, depth: int) -> list[Tensor] | None:
    """The tensors whose product a node computed, or None if they cannot be had.

    Casts in between are looked through, unless they round to fewer digits than x has.
    """
    if node is None or depth > _MOST_NODES:
        return None
    if node.name() == "ToCopyBackward0":
        if node._input_metadata[0].dtype not in (dtype, _dtype_of_norms(dtype)):
            return None
        return _factors(node.next_functions[0][0], dtype, depth + 1)
    if node.name() != "MulBackward0":
        return None
    factors: list[Tensor] = []
    for name, (previous, _) in zip(("self", "other"), node.next_functions, strict=True):
        value = _kept(node, name, previous)
        # a factor that was not kept may be a product itself
        inner = [value] if value is not None else _factors(previous, dtype, depth + 1)
        if inner is None:
            return None
        factors += inner
    return factors


def _sorted_by_shape(factors: list[Tensor], x: Tensor) -> InputParts | None:
    """Factors as `InputParts`; None if one has another shape, or if keeping them is no better than keeping x."""
    full, rows, columns = [], [], []
    row_shape = (*x.shape[:-1], 1)
    for factor in factors:
        if factor.device != x.device or factor.dtype not in (x.dtype, _dtype_of_norms(x.dtype)):
            return None
        if factor.shape == x.shape:
            full.append(factor)
        elif factor.shape == row_shape:
            rows.append(factor)
        elif factor.shape == x.shape[-1:]:
            columns.append(factor)
        else:
            return None
    return InputParts(tuple(full), tuple(rows), tuple(columns)) if 0 < len(full) < 3 else None


def _dtype_of_norms(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms compute for inputs of ``dtype``."""
    return torch.float32 if dtype is torch.bfloat16 else dtype


# ---- layer norms ---------------------------------------------------------------------------------------------------
def _parts_of_layer_norm(node: Any, x: Tensor) -> InputParts | None:
    """The parts of a layer norm over the last dimension, or None."""
    weight, bias = _kept(node, "weight", None), _kept(node, "bias", None)
    start = _kept(node, "input", node.next_functions[0][0])
    mean, scale = _kept(node, "result1", node), _kept(node, "result2", node)
    if weight is None or bias is None or start is None or mean is None or scale is None:
        return None
    if start.shape != x.shape or weight.shape != x.shape[-1:]:
        return None
    if mean.dtype is torch.bfloat16:  # on the CPU statistics are rounded to the input's dtype
        return None
    return InputParts((start,), (scale,), (weight,), (mean,), (bias,))


# ---- reading what a node keeps -------------------------------------------------------------------------------------
def _kept(node: Any, name: str, previous: Any) -> Tensor | None:
    """The tensor that a node keeps under a name, or None.

    An unpack hook is never run: under activation checkpointing it would compute the forward pass again.

    Args:
        node: of the graph. Its ``_raw_saved_*`` and ``_saved_*`` attributes are private to torch; no public API tells
            what a node keeps.
        name: of the tensor, as torch calls it.
        previous: the node whose output it must be; None for a parameter.
    """
    raw = getattr(node, f"_raw_saved_{name}")
    if not hasattr(raw, "data"):  # torch before 2.9 does not show whether a hook replaced this tensor
        return None if _saved_tensor_hooks() is not None else _unless_written_into(node, name)
    if raw.unpack_hook is None:
        return _unless_written_into(node, name)
    # A hook may have put something else in its place. What is left is the tensor itself if it is a parameter, or if it
    # has the history it must have.
    value = raw.data
    if type(value) is nn.Parameter:
        return value
    return value if isinstance(value, Tensor) and previous is not None and value.grad_fn is previous else None


def _unless_written_into(node: Any, name: str) -> Tensor | None:
    try:
        return getattr(node, f"_saved_{name}")
    except RuntimeError:  # autograd noticed that it was written into
        return None


def _saved_tensor_hooks() -> Any:
    """The hooks on saved tensors that are in force, or None. A torch that does not tell them counts as having some."""
    get_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return "unknown" if get_hooks is None else get_hooks(True)
