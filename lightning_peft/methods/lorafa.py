"""LoRA-FA: LoRA with A frozen (Zhang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError
from lightning_peft.lowrank import LowRank, Place
from lightning_peft.methods.lora import LoRA

_RIDGE = 1e-8  # keeps the inverse of A·Aᵀ finite


class LoRAFAFactors(LowRank):
    """`LowRank` with ``lora_A`` frozen: the backward pass keeps ``A·x`` (r numbers a token) instead of x."""

    def build(self, place: Place, r: int) -> None:
        """Make the tensors."""
        super().build(place, r)
        self.lora_A.requires_grad_(False)
        self._inverse: tuple[int, Tensor] | None = None

    def project(self) -> None:
        """Replace B's gradient by ``(1/s²)·g·(A·Aᵀ + 1e-8·I)⁺``: the step that, through A, fits the full gradient."""
        grad = self.lora_B.grad
        if grad is None:
            return
        wide = grad.flatten(self.stacked + 1).to(self.lora_A.dtype)
        if self.parts is None:
            wide = wide @ self.inverse()
        else:
            blocks = zip(wide.chunk(len(self.parts)), self.inverse(), strict=True)
            wide = torch.cat([block @ inverse for block, inverse in blocks])
        grad.copy_((wide / self.scaling**2).reshape(grad.shape))

    def inverse(self) -> Tensor:
        """``(A·Aᵀ + 1e-8·I)⁺``; A is frozen, so it is computed once (again when other values were loaded)."""
        version = self.lora_A._version
        if self._inverse is None or self._inverse[0] != version or self._inverse[1].device != self.lora_A.device:
            A = self.lora_A.detach().flatten(self.stacked + 1)
            if self.parts is not None:
                A = A.view(len(self.parts), self.rank, -1)
            gram = A @ A.mT + _RIDGE * torch.eye(self.rank, dtype=A.dtype, device=A.device)
            self._inverse = version, torch.linalg.pinv(gram, hermitian=True)
        return self._inverse[1]


@dataclass(frozen=True)
class LoRAFA(LoRA):
    """LoRA that trains only B; A keeps its random start values.

    Saves activation memory: nothing of a layer's input is kept for the backward pass but ``A·x``. Trains ``r·out``
    numbers per layer; A is saved with them. Before each optimizer step B's gradient becomes the one whose effect
    ``s·B·A`` is nearest to the gradient of the full weight. Arguments are those of `LoRA`; ``lr_ratio`` does not
    apply. Beside an embedding A is random and B zero.

    Args:
        project_grads: use that gradient (Wang et al.'s correction); False trains B by its plain gradient.

    >>> from torch import nn
    >>> from lightning_peft import LoRAFA, inject, state_names, trainable_names
    >>> net = nn.Sequential(nn.Linear(4, 8))
    >>> inject(net, LoRAFA(r=2))
    >>> trainable_names(net), state_names(net)
    (['0.delta.lora_B'], ['0.delta.lora_A'])
    """

    paper: ClassVar[str] = "LoRA-FA: Memory-efficient Low-rank Adaptation, Zhang et al. 2023, arXiv:2308.03303"
    reference_lr: ClassVar[float] = 1e-3
    lr_source: ClassVar[str] = "2.5 times LoRA's, as only B moves: ours, MiniLM on BBC topics"
    factors: ClassVar[type[LowRank]] = LoRAFAFactors

    project_grads: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_ratio != 1:
            raise ConfigError(f"LoRAFA(lr_ratio={self.lr_ratio!r}): A is frozen, so there is no ratio; set lr instead.")

    def fill(self, delta: LowRank, place: Place, name: str) -> None:
        """As `LoRA`; an embedding's A must not start, and stay, at zero."""
        super().fill(delta, place, name)
        if place.table and self.init in ("kaiming", "gaussian") and not delta.lora_A.is_meta:
            drawn = torch.randn(delta.lora_A.shape, generator=self.generator(name), dtype=delta.lora_A.dtype)
            delta.fill(drawn, torch.zeros_like(delta.lora_B))

    def transform_grads(self, model: nn.Module) -> None:
        """Project the gradients of B, in float32 or wider."""
        if self.project_grads:
            for module in model.modules():
                if isinstance(module, LoRAFAFactors):
                    module.project()
