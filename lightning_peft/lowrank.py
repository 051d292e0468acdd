"""Low-rank corrections `W + s·B·A` and the layers that carry them, shared by LoRA and its relatives."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapted import Adapted, Delta, factor_dtype


class LowRank(Delta):
    """The factors ``lora_A`` (r, in) and ``lora_B`` (out, r) of one correction ``scaling · B · A``.

    Args:
        weight: a tensor of the base, for dtype and device.
        size_in, size_out: input and output features of the base.
        r: rank.
        scaling: factor in front of the product.
        dropout: probability of dropping an input feature while training.
    """

    def __init__(
        self, weight: Tensor, size_in: int, size_out: int, r: int, scaling: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        options = {"dtype": factor_dtype(weight), "device": weight.device}
        self.lora_A = nn.Parameter(torch.empty(r, size_in, **options))
        self.lora_B = nn.Parameter(torch.zeros(size_out, r, **options))
        self.scaling = scaling
        self.dropout = dropout

    def fill(self, lora_A: Tensor, lora_B: Tensor | None = None) -> None:
        """Set the start values; ``lora_B`` stays zero unless given."""
        if self.lora_A.is_meta:
            return
        with torch.no_grad():
            self.lora_A.copy_(lora_A)
            if lora_B is not None:
                self.lora_B.copy_(lora_B)

    def product(self) -> Tensor:
        """``scaling · B · A`` (out, in)."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in) -> (…, out)."""
        x = x.to(self.lora_A.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return F.linear(F.linear(x, self.lora_A) * self.scaling, self.lora_B)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        (r, size_in), size_out = self.lora_A.shape, self.lora_B.shape[0]
        return f"r={r}, in={size_in}, out={size_out}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class LowRankLinear(Adapted):
    """`nn.Linear` with a low-rank correction: ``y = Wx + b + s·B(A x)``."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in) -> (…, out)."""
        y = self.base(x)
        return y + self.delta(x).to(y.dtype) if self.active else y

    def merged(self) -> dict[str, Tensor]:
        """The weight (out, in) with the product added."""
        product = self.delta.product()
        return {"weight": self.base.weight.to(product.dtype) + product}


class LowRankConv1D(LowRankLinear):
    """transformers' ``Conv1D``, a linear layer that stores its weight as (in, out)."""

    def merged(self) -> dict[str, Tensor]:
        """The weight (in, out) with the transposed product added."""
        product = self.delta.product().T
        return {"weight": self.base.weight.to(product.dtype) + product}


class LowRankEmbedding(Adapted):
    """`nn.Embedding` with a low-rank correction: row ``i`` gets ``s·B·A[:, i]``; A starts at zero, B does not.

    The padding row is corrected like any other, and as in the base it sends no gradient to its column of A.
    """

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (…) -> (…, dim)."""
        y = self.base(ids)
        if not self.active:
            return y
        e = self.base
        rows = F.embedding(ids, self.delta.lora_A.T, e.padding_idx, None, 2.0, e.scale_grad_by_freq, e.sparse)
        scale = self.delta.scaling * getattr(e, "embed_scale", 1.0)  # Gemma multiplies its embedding's output
        return y + (F.linear(rows, self.delta.lora_B) * scale).to(y.dtype)

    def merged(self) -> dict[str, Tensor]:
        """The table (num, dim) with the transposed product added."""
        product = self.delta.product().T
        return {"weight": self.base.weight.to(product.dtype) + product}


def kaiming(rows: int, columns: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """`kaiming_uniform_(a=√5)`, the start value of `nn.Linear` and of LoRA's A: uniform within 1/√columns."""
    bound = 1 / math.sqrt(columns)
    return (torch.rand(rows, columns, generator=generator, dtype=dtype) * 2 - 1) * bound
