"""Layers that add the correction to their output."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_peft.adapted import Adapted
from lightning_peft.lowrank import siblings

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LowRankLinear(Adapted):
    """`nn.Linear` with a low-rank correction: ``y = Wx + b + s·B(A x)``."""

    base: Any
    delta: Any
    #: whether some code reads ``weight`` instead of calling this module (see `read_by_parents`)
    read = False
    #: whether output and correction are one product of plain factors, which has a short way (see `products`)
    direct = False
    #: layers that read the same input, this one among them
    siblings: siblings.Siblings | None = None

    @property
    def weight(self) -> Tensor:
        """The base's weight; the corrected one where it is read instead of this module being called."""
        weight = self.base.weight
        return self.delta.fold(weight).to(weight.dtype) if self.read and self.active else weight

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in) -> (…, out)."""
        if self.direct and (short := siblings.run(self, x)) is not None:
            return short
        y = self.base(x)
        return self.delta.join(self, y, self.branch(x)) if self.active else y

    def branch(self, x: Tensor) -> Tensor:
        """The low-rank part of the output."""
        return self.delta(x)

    def channels(self, vector: Tensor) -> Tensor:
        """A vector over output features, shaped to multiply the output."""
        return vector

    def merged(self) -> dict[str, Tensor]:
        """The corrected weight."""
        return {"weight": self.delta.fold(self.base.weight)}


class LowRankConv1D(LowRankLinear):
    """transformers' ``Conv1D``, a linear layer that stores its weight as (in, out)."""


class LowRankConv(LowRankLinear):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: A is a convolution like the base, B one of kernel size 1.

    Stride, padding, its mode, dilation and groups are the base's. With groups, the rows of B are split among them and
    A is shared, so that the correction is a weight of the base's shape.
    """

    def branch(self, x: Tensor) -> Tensor:
        """x: (N, in, …) or (in, …) -> (N, out, …) or (out, …)."""
        A, B = self.delta.factors()
        base, groups = self.base, self.base.groups
        x = self.delta.dropped(x.to(A.dtype))
        if groups > 1:
            A = A.repeat(groups, *(1,) * (A.ndim - 1))
        return _CONV[A.ndim - 2](base._conv_forward(x, A, None), B, groups=groups)

    def channels(self, vector: Tensor) -> Tensor:
        """(out) -> (out, 1, …)."""
        return vector.view(-1, *(1,) * len(self.base.kernel_size))


class LowRankEmbedding(LowRankLinear):
    """`nn.Embedding` with a low-rank correction: row ``i`` gets ``s·B·A[:, i]``; A starts at zero, B does not.

    The padding row is corrected like any other, and as in the base it sends no gradient to its column of A.
    """

    def branch(self, x: Tensor) -> Tensor:
        """x: ids (…) -> (…, dim)."""
        A, B = self.delta.factors()
        e = self.base
        low = F.linear(F.embedding(x, A.T, e.padding_idx, None, 2.0, e.scale_grad_by_freq), B)
        scale = getattr(e, "embed_scale", None)  # Gemma multiplies its embedding's output
        return low if scale is None else low * scale
