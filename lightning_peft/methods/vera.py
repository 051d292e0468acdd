"""VeRA: two vectors per layer around random matrices that all layers share (Kopiczko et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft import lowrank
from lightning_peft.adapted import Delta, factor_dtype
from lightning_peft.lowrank import LowRank, Place
from lightning_peft.method import Method, check_number


class VeRAShared(Delta):
    """The frozen matrices ``vera_A`` (r, widest input) and ``vera_B`` (widest output, r)."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.vera_A = nn.Parameter(A, requires_grad=False)
        self.vera_B = nn.Parameter(B, requires_grad=False)


class VeRAFactors(LowRank):
    """The vectors ``vera_d`` (r) and ``vera_b`` (out) of one layer, and the matrices it shares with all others."""

    shared: VeRAShared

    def build(self, place: Place, r: int) -> None:
        """Make the tensors; `VeRA.connect` adds the shared ones."""
        options = {"dtype": factor_dtype(place.weight), "device": place.weight.device}
        self.vera_d = nn.Parameter(torch.ones(r, **options))
        self.vera_b = nn.Parameter(torch.zeros(place.size_out, **options))
        self.size_in = place.size_in

    def slices(self) -> tuple[Tensor, Tensor]:
        """The top left parts that this layer uses: A (r, in) and B (out, r)."""
        return self.shared.vera_A[:, : self.size_in], self.shared.vera_B[: len(self.vera_b)]

    def factors(self) -> tuple[Tensor, Tensor]:
        """``diag(d)·A`` and ``diag(b)·B``."""
        A, B = self.slices()
        return self.vera_d.unsqueeze(1) * A, self.vera_b.unsqueeze(1) * B

    def linear(self, x: Tensor) -> Tensor:
        """x: (…, in) -> (…, out); the vectors multiply activations, so the frozen matrices take no gradient."""
        A, B = self.slices()
        return F.linear(F.linear(self.dropped(x.to(A.dtype)), A) * self.vera_d, B) * self.vera_b


@dataclass(frozen=True)
class VeRA(Method):
    """Train two vectors per layer: ``y = Wx + b + Λ_b·B·Λ_d·A·x`` with random A and B, frozen and shared.

    A (r, widest in) and B (widest out, r) are drawn once from ``init_seed`` and sliced for each layer; d (r) starts at
    ``d_initial`` and b (out) at zero, so training starts from the base model. Trains ``r + out`` numbers per layer;
    A and B are saved with them.

    Args:
        r: rank of the shared matrices; larger than LoRA's, as it costs only r numbers per layer.
        d_initial: start value of d.
        dropout: probability of dropping an input feature of the branch.
        target_modules, exclude_modules: patterns or words; linear layers, Conv1D, torch's attention.
        modules_to_save: further modules, trained and saved in full (heads).
        layers: adapt only the layers with these numbers.
        init_seed: seed of A and B.

    >>> from torch import nn
    >>> from lightning_peft import VeRA, inject, state_names, trainable_names
    >>> net = nn.Sequential(nn.Linear(4, 8))
    >>> inject(net, VeRA(r=16))
    >>> trainable_names(net), state_names(net)
    (['0.delta.vera_d', '0.delta.vera_b'], ['0.delta.shared.vera_A', '0.delta.shared.vera_B'])
    """

    paper: ClassVar[str] = "VeRA: Vector-based Random Matrix Adaptation, Kopiczko et al. 2023, arXiv:2310.11454"
    reference_lr: ClassVar[float] = 1e-2
    lr_width_exponent: ClassVar[float] = 0.0
    lr_source: ClassVar[str] = "the paper, arXiv:2310.11454, appendix A: 4e-3 for instruction tuning, 2e-3 to 3e-2 GLUE"

    r: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    modules_to_save: str | list[str] | None = None
    layers: list[int] | None = None
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_number("VeRA", "r", self.r, 1)
        check_number("VeRA", "dropout", self.dropout, 0.0, high=1.0)

    def adapts(self, module: nn.Module) -> bool:
        """Linear layers, Conv1D and `nn.MultiheadAttention`."""
        return lowrank.is_linear(module)

    def is_linear(self, module: nn.Module) -> bool:
        """Linear layers, Conv1D and attention with packed projections."""
        return lowrank.is_linear(module)

    def targets(self, model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
        """The modules to adapt; an attention module of torch brings its output projection along."""
        return lowrank.with_output(super().targets(model, prefix), self.exclude_modules, prefix)

    def adapt(self, module: nn.Module, name: str) -> None:
        """Adapt one layer; `connect` completes it."""
        lowrank.adapt_layer(module, name, self.make)

    def make(self, place: Place) -> VeRAFactors:
        """The vectors of one layer."""
        delta = VeRAFactors(place, self.r, 1.0, self.dropout)
        with torch.no_grad():
            delta.vera_d.fill_(self.d_initial)
        return delta

    def connect(self, model: nn.Module, adapted: Mapping[str, nn.Module]) -> None:
        """Give all layers the same matrices, wide enough for the widest."""
        deltas = [delta for layer in adapted.values() for delta in lowrank.factors_of(layer)]
        first = deltas[0].vera_b
        size_in, size_out = max(d.size_in for d in deltas), max(len(d.vera_b) for d in deltas)
        generator = torch.Generator().manual_seed(self.init_seed)
        A, B = _uniform((self.r, size_in), generator), _uniform((size_out, self.r), generator)
        shared = VeRAShared(A.to(first.device, first.dtype), B.to(first.device, first.dtype))
        for delta in deltas:
            delta.shared = shared

    def state_names(self, model: nn.Module) -> list[str]:
        """A and B."""
        return [n for n, _ in model.named_parameters() if n.endswith((".shared.vera_A", ".shared.vera_B"))]


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform with gain √2."""
    return (torch.rand(shape, generator=generator) * 2 - 1) * math.sqrt(6 / shape[1])
