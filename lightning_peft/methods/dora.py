"""DoRA: the low-rank product changes a weight's direction, a vector its magnitude (Liu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.adapted import base_tensor
from lightning_peft.lowrank import LowRank, Place
from lightning_peft.methods.lora import LoRA

_TINY = 1e-6


class DoRAFactors(LowRank):
    """`LowRank` with ``lora_magnitude`` (…, out): the norm each row of the corrected weight shall have."""

    def build(self, place: Place, r: int) -> None:
        """Make the tensors."""
        super().build(place, r)
        shape = (*place.experts, place.size_out)
        self.lora_magnitude = nn.Parameter(self.lora_A.new_empty(shape))

    def gain(self, matrix: Tensor) -> Tensor:
        """``m / ‖W + s·B·A‖`` by row; the norm is a constant in the backward pass (section 4.3 of the paper)."""
        with torch.no_grad():
            norm = row_norms(super().combine(matrix))
        return self.lora_magnitude / norm

    def combine(self, matrix: Tensor) -> Tensor:
        """The corrected matrix: ``m · V / ‖V‖`` with ``V = W + s·B·A``."""
        return self.gain(matrix).unsqueeze(-1) * super().combine(matrix)

    def join(self, layer: Any, output: Tensor, low: Tensor) -> Tensor:
        """Scale output and correction; the bias stays as it is."""
        weight = base_tensor(layer, "weight")
        gain = layer._over_output(self.gain(self.matrix(weight)))
        bias = getattr(layer, "bias", None)
        if bias is None:
            return ((output + low) * gain).to(output.dtype)
        bias = layer._over_output(bias)
        return ((output - bias + low) * gain + bias).to(output.dtype)


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA whose rows are rescaled: ``y = m ⊙ (W + s·B·A)x / ‖W + s·B·A‖ + b``, the norm taken by output row.

    m (out) starts at ``‖W‖``, so training starts from the base model; the norm is a constant in the backward pass and
    the bias is not scaled. Trains ``r·(in + out) + out`` numbers per layer. Arguments are those of `LoRA`; dropout
    acts on the input of the low-rank branch only.

    >>> from torch import nn
    >>> from lightning_peft import DoRA, inject, trainable_names
    >>> net = nn.Sequential(nn.Linear(4, 8))
    >>> inject(net, DoRA(r=2))
    >>> trainable_names(net)
    ['0.delta.lora_A', '0.delta.lora_B', '0.delta.lora_magnitude']
    """

    paper: ClassVar[str] = "DoRA: Weight-Decomposed Low-Rank Adaptation, Liu et al. 2024, arXiv:2402.09353"
    lr_source: ClassVar[str] = "as LoRA: the paper, arXiv:2402.09353, trains both at 1e-4 to 3e-4"
    factors: ClassVar[type[LowRank]] = DoRAFactors
    additive: ClassVar[bool] = False
    why_not_additive: ClassVar[str] = (
        "its magnitudes rescale the rows of the base, which the file does not hold, so corrections do not add up."
        " Merge it into a model (merge_and_unload) and train the next adapter on top."
    )

    def fill(self, delta: LowRank, place: Place, name: str) -> None:
        """Start values of the factors, then the norms they give."""
        super().fill(delta, place, name)
        if delta.lora_A.is_meta:
            return
        with torch.no_grad():
            delta.lora_magnitude.copy_(row_norms(LowRank.combine(delta, delta.matrix(place.weight))))


def row_norms(matrix: Tensor) -> Tensor:
    """Norms by row, above zero: a row of zeros (a layer that starts at zero) has no direction to divide by."""
    return torch.linalg.vector_norm(matrix, dim=-1).clamp(min=_TINY)
