"""The two factors of one correction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapted import Delta, factor_dtype
from lightning_peft.errors import PEFTError
from lightning_peft.quantized import plain


@dataclass(frozen=True)
class Place:
    """A matrix that takes a correction, as its layer sees it: ``size_out`` rows and ``size_in`` columns.

    Args:
        weight: the parameter, for dtype and device; it may be packed or sharded, so sizes are given apart.
        size_in, size_out: features, or channels of one group of a convolution.
        name: of the parameter in its module.
        kernel: of a convolution.
        experts: how many matrices are stacked, if they are.
        transposed: whether the parameter is stored as (in, out).
        table: whether rows are looked up (an embedding).
        fused: whether the rows are queries, keys and values, a third each.
    """

    weight: Tensor
    size_in: int
    size_out: int
    name: str = "weight"
    kernel: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    transposed: bool = False
    table: bool = False
    fused: bool = False


class LowRank(Delta):
    """The factors ``lora_A`` (r, in) and ``lora_B`` (out, r) of one correction ``scaling · B · A``.

    Beside a convolution A is (r, in, *kernel) and B (out, r, 1, …); for stacked matrices both have the number of
    matrices in front; with ``parts`` (of queries 0, keys 1, values 2) each part has its own r rows of A and its own
    (out/3, r) block of B, which stand below each other.

    Args:
        place: the matrix.
        r: rank.
        scaling: factor in front of the product.
        dropout: probability of dropping an input feature while training.
        parts: thirds of a fused projection that get factors of their own; None for one pair over all of it.
    """

    def __init__(
        self, place: Place, r: int, scaling: float, dropout: float = 0.0, parts: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        self.scaling, self.dropout, self.parts = scaling, dropout, parts
        self.transposed, self.stacked = place.transposed, len(place.experts)
        self.rank = r
        self.build(place, r)

    def build(self, place: Place, r: int) -> None:
        """Make the tensors."""
        options = {"dtype": factor_dtype(place.weight), "device": place.weight.device}
        ones, parts = (1,) * len(place.kernel), self.parts
        rows, out = (r, place.size_out) if parts is None else (len(parts) * r, len(parts) * place.size_out // 3)
        self.lora_A = nn.Parameter(torch.empty(*place.experts, rows, place.size_in, *place.kernel, **options))
        self.lora_B = nn.Parameter(torch.zeros(*place.experts, out, r, *ones, **options))
        self.start_A: nn.Parameter | None = None
        self.start_B: nn.Parameter | None = None

    def fill(self, lora_A: Tensor, lora_B: Tensor | None = None) -> None:
        """Set the start values; ``lora_B`` stays zero unless given."""
        with torch.no_grad():
            self.lora_A.copy_(lora_A.reshape(self.lora_A.shape))
            if lora_B is not None:
                self.lora_B.copy_(lora_B.reshape(self.lora_B.shape))

    def subtract_start(self) -> None:
        """Keep today's factors beside the trained ones and take their product off: training starts from the base."""
        self.start_A = nn.Parameter(self.lora_A.detach().clone(), requires_grad=False)
        self.start_B = nn.Parameter(self.lora_B.detach().clone(), requires_grad=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B with everything in them, so that the correction is B·A."""
        start = None if self.start_A is None else (self.start_A, self.start_B)
        A, B = _with_start(self.lora_A, self.lora_B, start, self.scaling, self.stacked)
        return A, B if self.parts is None else self.spread(B)

    @classmethod
    def saved(cls, tensors: Mapping[str, Tensor], scaling: float, stacked: int) -> tuple[Tensor, Tensor]:
        """As `factors`, from the tensors in a file: A (…, r, in · kernel) and B (…, out, r)."""
        start = (tensors["start_A"], tensors["start_B"]) if "start_A" in tensors else None
        A, B = _with_start(tensors["lora_A"], tensors["lora_B"], start, scaling, stacked)
        return A.flatten(stacked + 1), B.flatten(stacked + 1)

    def spread(self, B: Tensor) -> Tensor:
        """Put the blocks of the parts at their rows and at their columns of the stacked A."""
        parts = self.parts or (0, 1, 2)
        blocks = dict(zip(parts, B.chunk(len(parts)), strict=True))
        out, r = blocks[parts[0]].shape
        columns = len(parts) * r
        rows = []
        for third in range(3):
            if third in blocks:
                before = parts.index(third) * r
                rows.append(F.pad(blocks[third], (before, columns - before - r)))
            else:
                rows.append(B.new_zeros(out, columns))
        return torch.cat(rows)

    def product(self) -> Tensor:
        """The correction (out, in); (out, in · kernel) beside a convolution."""
        A, B = self.factors()
        return B.flatten(self.stacked + 1) @ A.flatten(self.stacked + 1)

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight as (out, in), in the dtype of the factors."""
        wide = plain(weight).to(factor_dtype(weight))
        return wide.mT if self.transposed else wide.flatten(self.stacked + 1)

    def combine(self, matrix: Tensor) -> Tensor:
        """The corrected matrix."""
        return matrix + self.product()

    def fold(self, weight: Tensor) -> Tensor:
        """The corrected weight, in the layout of ``weight`` and the dtype of the factors."""
        matrix = self.combine(self.matrix(weight))
        return matrix.mT if self.transposed else matrix.reshape(weight.shape)

    def dropped(self, x: Tensor) -> Tensor:
        """The input of the low-rank branch."""
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    def is_plain(self) -> bool:
        """Whether the correction is ``scaling · lora_B · lora_A`` and no relative changes how it joins the output."""
        kind = type(self)
        for part in ("factors", "linear", "join", "dropped", "combine", "forward"):
            if getattr(kind, part) is not getattr(LowRank, part):
                return False
        return self.parts is None and len(self._parameters) == 2

    def linear(self, x: Tensor) -> Tensor:
        """The correction of a linear layer's output: x (…, in) -> (…, out)."""
        A, B = self.factors()
        return F.linear(F.linear(self.dropped(x.to(A.dtype)), A), B)

    def join(self, layer: Any, output: Tensor, low: Tensor) -> Tensor:
        """The layer's corrected output, from its base's output and the low-rank correction of it."""
        return output + low.to(output.dtype)

    def forward(self, value: Tensor, output: Tensor | None = None, layer: Any = None) -> Tensor:
        """The corrected weight for a weight, or the corrected output for a layer's input and output.

        All the work is done inside this call, because sharding strategies gather the factors around it.

        Args:
            value: the base's weight; with ``output`` and ``layer``, the layer's input.
            output: what the base gives for that input.
            layer: the adapted layer, which knows how its input meets the factors.
        """
        if output is None:
            return self.fold(value)
        low = layer._low_rank_output(value)
        if low.shape != output.shape:
            raise PEFTError(
                f"The adapter of {layer._adapter.name!r} was made for {low.shape[-1]} outputs, and the layer gives"
                f" {tuple(output.shape)}: it was resized after the adapters were injected. Resize first"
                " (resize_token_embeddings), then inject."
            )
        return self.join(layer, output, low)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"r={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def _with_start(A: Tensor, B: Tensor, start: Any, scaling: float, stacked: int) -> tuple[Tensor, Tensor]:
    """A and the scaled B; behind them, as further ranks, those of a start whose product is taken off again."""
    B = B * scaling
    if start is None:
        return A, B
    return torch.cat([A, start[0]], stacked), torch.cat([B, start[1] * -scaling], stacked + 1)


def kaiming(shape: torch.Size, fan_in: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """`kaiming_uniform_(a=√5)`, the start value of `nn.Linear` and of LoRA's A: uniform within 1/√fan_in."""
    return (torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1) / math.sqrt(fan_in)
