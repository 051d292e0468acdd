"""What a layer's input is made of, so that the input itself need not be kept for the backward pass.

The gradient of A is ``dlow·x``. Where x is a product of tensors that autograd keeps anyway (RMSNorm, ``act(gate)·up``)
or a layer norm of one, those are enough: factors with one number a row scale the rows of ``dlow``, factors with one
number a feature scale the columns of the result, and only what is left is as large as x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_MOST = 4  # products in a row that are looked through


class Source(NamedTuple):
    """``x = (full[0] - mean)·full[1]·…·rows·columns + shift``: (…, in), (…, 1), (in)."""

    full: tuple[Tensor, ...]
    rows: tuple[Tensor, ...] = ()
    columns: tuple[Tensor, ...] = ()
    mean: tuple[Tensor, ...] = ()
    shift: tuple[Tensor, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many tensors there are of each kind."""
        return tuple(map(len, self))

    @classmethod
    def of(cls, tensors: list[Tensor], sizes: tuple[int, ...]) -> Source:
        """From the tensors in one row."""
        kinds, start = [], 0
        for size in sizes:
            kinds.append(tuple(tensors[start : start + size]))
            start += size
        return cls(*kinds)

    def core(self) -> Tensor:
        """What is as large as x, (…, in)."""
        x = self.full[0]
        for mean in self.mean:
            x = x - mean
        for other in self.full[1:]:
            x = x * other
        return x

    def whole(self, dtype: torch.dtype) -> Tensor:
        """x, (…, in), with the history of its parts."""
        rows, x = self._statistics() if self.mean else (self.rows, self.core())
        for factor in rows:
            x = x * factor
        for factor in self.columns:
            x = x * factor
        for shift in self.shift:
            x = x + shift
        return x.to(dtype)

    def _statistics(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """A layer norm's factors and centred input, with the history that the kept statistics lack."""
        start, (scale,) = self.full[0], self.rows
        variance, mean = torch.var_mean(start, -1, unbiased=False, keepdim=True)
        epsilon = (scale.pow(-2) - variance).detach()
        return ((variance + epsilon).rsqrt(),), start - mean

    def gradient(self, dlow: Tensor) -> Tensor:
        """``dlow·x``, (r, in); dlow: (batch, r, length) or (r, rows)."""
        core = self.core()
        lead = (*dlow.shape[:-2], dlow.shape[-1])
        core = core if core.shape[:-1] == lead else core.reshape(*lead, core.shape[-1])
        dlow = given = dlow if dlow.dtype is core.dtype else dlow.to(core.dtype)
        for factor in self.rows:
            dlow = dlow * factor.reshape(*lead, 1).mT
        found = summed((torch.mm if dlow.ndim == 2 else torch.bmm)(dlow, core))
        for factor in self.columns:
            found.mul_(factor)
        for shift in self.shift:
            found.addcmul_(summed(given.sum(-1, keepdim=True)), shift.to(found.dtype))
        return found


def summed(products: Tensor) -> Tensor:
    """Over the batch, if there is one."""
    return products.sum(0) if products.ndim == 3 else products


def source(x: Tensor) -> Source:
    """The tensors that give x and that autograd keeps for other reasons; x itself where there are none.

    x was written into if its version says so (``.data`` escapes that); then it is no longer what its history gives.
    """
    node: Any = x.grad_fn
    if node is None or x._version:
        return Source((x,))
    kind = node.name()
    if kind == "NativeLayerNormBackward0":
        return _normalised(node, x) or Source((x,))
    factors = _factors(node, kind, x.dtype, 0) if kind == "MulBackward0" else None
    return _sorted(factors, x) or Source((x,)) if factors else Source((x,))


def _factors(node: Any, kind: str, dtype: torch.dtype, depth: int) -> list[Tensor] | None:
    """The tensors whose product a node gave; casts in between are looked through unless they round more than x."""
    if node is None or depth > _MOST:
        return None
    if kind == "ToCopyBackward0":
        before = node.next_functions[0][0]
        if before is None or node._input_metadata[0].dtype not in (dtype, _wider(dtype)):
            return None
        return _factors(before, before.name(), dtype, depth + 1)
    if kind != "MulBackward0":
        return None
    found: list[Tensor] = []
    for place, (before, _) in enumerate(node.next_functions):
        value = kept(node, "other" if place else "self", before)
        parts = [value] if value is not None else _factors(before, before.name() if before else "", dtype, depth + 1)
        if parts is None:
            return None
        found += parts
    return found


def kept(node: Any, name: str, before: Any) -> Tensor | None:
    """What a node keeps under a name, or None. Never runs an unpack hook: under checkpointing it would recompute.

    With hooks in force the value is taken only if it is the very tensor (it carries the history it must have, or is a
    parameter), not something a hook put in its place; without, autograd itself tells whether it was written into.
    """
    raw = getattr(node, f"_raw_saved_{name}")
    if not hasattr(raw, "data"):  # torch before 2.9
        return None if top_hooks() is not None else _checked(node, name)
    if raw.unpack_hook is None:
        return _checked(node, name)
    value = raw.data
    if type(value) is nn.Parameter:
        return value
    return value if isinstance(value, Tensor) and before is not None and value.grad_fn is before else None


def _checked(node: Any, name: str) -> Tensor | None:
    try:
        return getattr(node, f"_saved_{name}")
    except RuntimeError:  # written into since
        return None


def top_hooks() -> Any:
    """The hooks on saved tensors that are in force, None if there are none; something where torch does not tell."""
    look = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return "unknown" if look is None else look(True)


def _sorted(factors: list[Tensor], x: Tensor) -> Source | None:
    """Factors by their shape; None where one fits no place or nothing is won."""
    full, rows, columns = [], [], []
    row = (*x.shape[:-1], 1)
    for factor in factors:
        if factor.device != x.device or factor.dtype not in (x.dtype, _wider(x.dtype)):
            return None
        if factor.shape == x.shape:
            full.append(factor)
        elif factor.shape == row:
            rows.append(factor)
        elif factor.shape == x.shape[-1:]:
            columns.append(factor)
        else:
            return None
    return Source(tuple(full), tuple(rows), tuple(columns)) if 0 < len(full) < 3 else None


def _wider(dtype: torch.dtype) -> torch.dtype:
    """What norms compute in; below float64 they may not."""
    return torch.float32 if dtype is torch.bfloat16 else dtype


def _normalised(node: Any, x: Tensor) -> Source | None:
    """A layer norm over the last dimension."""
    weight, shift = kept(node, "weight", None), kept(node, "bias", None)
    start = kept(node, "input", node.next_functions[0][0])
    mean, scale = kept(node, "result1", node), kept(node, "result2", node)
    parts = (weight, shift, start, mean, scale)
    if any(p is None for p in parts) or start.shape != x.shape or weight.shape != x.shape[-1:]:
        return None
    if mean.dtype is torch.bfloat16:  # on the CPU statistics are rounded to the input's dtype
        return None
    return Source((start,), (scale,), (weight,), (mean,), (shift,))
