"""AdaLoRA: ranks follow the importance of singular directions (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft import lowrank
from lightning_peft.errors import ConfigError, TrainingError
from lightning_peft.lowrank import LowRank, Place
from lightning_peft.method import Method, check_number
from lightning_peft.methods.lora import scaling_factor

_TRAINED = ("lora_A", "lora_B", "lora_E")
_START_STD = 0.02


class AdaLoRAFactors(LowRank):
    """The triplets ``lora_B[:, i] · lora_E[i] · lora_A[i]`` of one matrix; a pruned one has ``lora_E[i] = 0``."""

    def build(self, place: Place, r: int) -> None:
        """Make the tensors."""
        super().build(place, r)
        self.lora_E = nn.Parameter(self.lora_A.new_zeros(*place.experts, r))
        #: by name of a tensor: how much each of its numbers matters, smoothed over the steps
        self.importance: dict[str, Tensor] = {}
        #: by name of a tensor: how much that changes from step to step, smoothed
        self.uncertainty: dict[str, Tensor] = {}
        #: the triplets that stay for good, once they are chosen; shaped as ``lora_E``
        self.kept: Tensor | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """``diag(E)·A`` and B."""
        # lora_E has one number for each row of A, whose further dimensions are those of an input feature.
        num_further = self.lora_A.ndim - self.lora_E.ndim
        gain = (self.lora_E * self.scaling).view(*self.lora_E.shape, *[1] * num_further)
        return self.lora_A * gain, self.lora_B

    @classmethod
    def saved(cls, tensors: Mapping[str, Tensor], scaling: float, stacked: int) -> tuple[Tensor, Tensor]:
        """As `factors`, from the tensors in a file, without the pruned triplets of a single matrix."""
        A, B = super().saved(tensors, scaling, stacked)
        gain = tensors["lora_E"]
        A = A * gain.unsqueeze(-1)
        keep = gain != 0
        # Matrices in a stack keep different triplets, so their factors stay of one size; a rank of 0 is none.
        if stacked or not keep.any():
            return A, B
        return A[keep], B[:, keep]

    def orthogonality(self) -> list[Tensor]:
        """``‖A·Aᵀ - I‖`` and ``‖Bᵀ·B - I‖``."""
        A, B = self.lora_A.flatten(self.stacked + 1), self.lora_B.flatten(self.stacked + 1)
        identity = torch.eye(self.rank, dtype=A.dtype, device=A.device)
        rows = torch.linalg.vector_norm(A @ A.mT - identity)
        columns = torch.linalg.vector_norm(B.mT @ B - identity)
        return [rows, columns]

    def observe(self, beta1: float, beta2: float) -> None:
        """Take in the sensitivity ``|parameter · gradient|`` of the step just taken."""
        for name in _TRAINED:
            parameter = self._parameters[name]
            if parameter.grad is None:
                continue
            # In a step that the GradScaler skipped, gradients are infinite or no numbers.
            sensitivity = (parameter.detach() * parameter.grad).abs().nan_to_num(0.0, 0.0, 0.0)
            zeros = torch.zeros_like(sensitivity)
            # The device may be another one since a checkpoint was loaded.
            importance = self.importance.get(name, zeros).to(sensitivity.device)
            uncertainty = self.uncertainty.get(name, zeros).to(sensitivity.device)
            importance = beta1 * importance + (1 - beta1) * sensitivity
            deviation = (sensitivity - importance).abs()
            self.uncertainty[name] = beta2 * uncertainty + (1 - beta2) * deviation
            self.importance[name] = importance

    def scores(self) -> Tensor:
        """The importance of each triplet, shaped as ``lora_E``."""
        # A triplet is worth its own number and the mean over its row of A and its column of B.
        rows = self._score_of("lora_A").flatten(self.stacked + 1).mean(-1)
        columns = self._score_of("lora_B").flatten(self.stacked + 1).mean(-2)
        return self._score_of("lora_E") + rows + columns

    def _score_of(self, name: str) -> Tensor:
        """Importance times uncertainty of each number of one tensor."""
        return self.importance[name] * self.uncertainty[name]

    def prune(self, keep: Tensor) -> None:
        """Set the other triplets to zero."""
        with torch.no_grad():
            self.lora_E.masked_fill_(~keep.to(self.lora_E.device), 0.0)


@dataclass(frozen=True)
class AdaLoRA(Method):
    """LoRA in the form of a singular value decomposition; unimportant directions are pruned while training.

    ``y = Wx + b + s·B·diag(E)·A·x`` with ``s = alpha / (init_r + 1e-5)``; E starts at zero. A term that keeps A and B
    orthogonal joins the loss. After each step importance is measured; between ``tinit`` and ``total - tfinal`` steps
    the budget falls from ``init_r`` to ``target_r`` triplets per matrix on average, spent where they matter most. The
    `PEFT` callback drives all of that; without a known number of steps nothing is pruned. Trains
    ``init_r·(in + out + 1)`` numbers per layer.

    Args:
        init_r, target_r: average rank at the start and at the end.
        alpha: numerator of the scaling.
        dropout: probability of dropping an input feature of the low-rank branch.
        tinit: steps before the budget falls.
        tfinal: steps at the end with the final ranks.
        delta_t: steps between two allocations.
        beta1, beta2: smoothing of importance and of its uncertainty.
        orth_reg_weight: factor of the orthogonality term.
        target_modules, exclude_modules: patterns or words, as in `LoRA`.
        modules_to_save: further modules, trained and saved in full (heads).
        layers: adapt only the layers with these numbers.
        init_seed: seed of the start values.

    Raises:
        ConfigError: a target above the initial rank, or a schedule longer than the run.

    >>> from torch import nn
    >>> from lightning_peft import AdaLoRA, inject, trainable_names
    >>> net = nn.Sequential(nn.Linear(4, 8))
    >>> inject(net, AdaLoRA(init_r=3, target_r=2))
    >>> trainable_names(net)
    ['0.delta.lora_A', '0.delta.lora_B', '0.delta.lora_E']
    """

    paper: ClassVar[str] = "AdaLoRA: Adaptive Budget Allocation for PEFT, Zhang et al. 2023, arXiv:2303.10512"
    reference_lr: ClassVar[float] = 8e-4
    lr_source: ClassVar[str] = "twice LoRA's; the paper, arXiv:2303.10512, appendix D: 5e-4 to 2.2e-3 on GLUE"
    factors: ClassVar[type[LowRank]] = AdaLoRAFactors
    #: whether corrections of several files add up (see `combine`)
    additive: ClassVar[bool] = True

    init_r: int = 12
    target_r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    modules_to_save: str | list[str] | None = None
    layers: list[int] | None = None
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_number("AdaLoRA", "init_r", self.init_r, 1)
        check_number("AdaLoRA", "target_r", self.target_r, 1, high=self.init_r)
        check_number("AdaLoRA", "dropout", self.dropout, 0.0, high=1.0)
        for field, low in (("tinit", 0), ("tfinal", 0), ("delta_t", 1), ("orth_reg_weight", 0)):
            check_number("AdaLoRA", field, getattr(self, field), low)

    def adapts(self, module: nn.Module) -> bool:
        """What LoRA adapts."""
        return lowrank.adapts(module)

    def is_linear(self, module: nn.Module) -> bool:
        """Linear layers, Conv1D and attention with packed projections."""
        return lowrank.is_linear(module)

    def targets(self, model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
        """The modules to adapt; an attention module of torch brings its output projection along."""
        return lowrank.with_output(super().targets(model, prefix), self.exclude_modules, prefix)

    def scaling(self, name: str) -> float:
        """Factor in front of the triplets; the initial rank counts, also after pruning."""
        return self.alpha / (self.init_r + 1e-5)

    def adapt(self, module: nn.Module, name: str) -> None:
        """Adapt one layer."""
        lowrank.adapt_layer(module, name, lambda place: self.make(place, name))

    def make(self, place: Place, name: str) -> AdaLoRAFactors:
        """The triplets of one matrix: A and B from N(0, 0.02²)."""
        delta = AdaLoRAFactors(place, self.init_r, self.scaling(name), self.dropout)
        if not delta.lora_A.is_meta:
            # A layer with several matrices has a seed for each.
            generator = self.generator(name if place.name == "weight" else f"{name}.{place.name}")
            A = torch.randn(delta.lora_A.shape, generator=generator, dtype=delta.lora_A.dtype)
            B = torch.randn(delta.lora_B.shape, generator=generator, dtype=delta.lora_A.dtype)
            delta.fill(A * _START_STD, B * _START_STD)
        return delta

    def lr_factors(self) -> dict[str, float]:
        """Scaling times the initial rank, as for `LoRA`."""
        return scaling_factor(self.alpha)

    # ---- training --------------------------------------------------------------------------------------------------
    def regularizer(self, model: nn.Module) -> Tensor | None:
        """``orth_reg_weight`` times the mean distance of A and B from orthogonal ones."""
        if not self.orth_reg_weight:
            return None
        terms: list[Tensor] = []
        for _, delta in _deltas(model):
            terms += delta.orthogonality()
        # Layers may stand on several devices.
        distances = torch.stack([term.to(terms[0].device) for term in terms])
        return self.orth_reg_weight * distances.mean()

    def after_step(self, model: nn.Module, step: int, total_steps: int | None) -> None:
        """Measure importance; prune to the budget of this step (steps count from 1, the paper's t from 0)."""
        if total_steps is None:
            return
        now = step - 1
        end = total_steps - self.tfinal
        last = min(end, total_steps - 1)
        if self.tinit >= end:
            raise ConfigError(
                f"AdaLoRA(tinit={self.tinit}, tfinal={self.tfinal}) leaves no step to prune in, the run has"
                f" {total_steps}. Lower them, or train longer."
            )
        deltas = [delta for _, delta in _deltas(model)]
        if now < end:
            for delta in deltas:
                delta.observe(self.beta1, self.beta2)
        num_matrices = sum(delta.lora_E.numel() // self.init_r for delta in deltas)
        budget = self.budget(now, total_steps, num_matrices)
        # After the last allocation the optimizer goes on moving what was pruned, so it is set to zero again.
        if now > last:
            for delta in deltas:
                if delta.kept is not None:
                    delta.prune(delta.kept)
        elif now == last or (now > self.tinit and now % self.delta_t == 0):
            self._allocate(deltas, budget, final=now == last)

    def budget(self, now: int, total_steps: int, matrices: int) -> int:
        """Triplets that may stay at step ``now``, in all: falls with the cube of the time left."""
        first, last = self.init_r * matrices, self.target_r * matrices
        end = total_steps - self.tfinal
        if now <= self.tinit:
            return first
        if now >= min(end, total_steps - 1):
            return last
        time_left = 1 - (now - self.tinit) / (end - self.tinit)
        return int((first - last) * time_left**3 + last)

    def _allocate(self, deltas: list[AdaLoRAFactors], budget: int, *, final: bool) -> None:
        """Keep the ``budget`` best triplets of all layers, and set the others to zero; ``final`` is for good."""
        # A layer that no gradient has reached (a dropped one) has no importance yet, and keeps what it has.
        measured = [delta for delta in deltas if len(delta.importance) == len(_TRAINED)]
        scores = [delta.scores() for delta in measured]
        if not scores:
            raise TrainingError(
                "AdaLoRA measures importance by the gradients of the step just taken, and there are none. In manual"
                " optimization call zero_grad() before the backward pass, not after optimizer.step(); where adapters"
                " rest in the first steps, set tinit."
            )
        every_score = torch.cat([score.flatten().to(scores[0].device) for score in scores])
        excess = every_score.numel() - budget
        # The threshold stays a tensor: as a number it would make every allocation wait for the device.
        threshold = every_score.new_tensor(-1.0)
        if excess > 0:
            threshold = every_score.kthvalue(excess).values
        for delta, score in zip(measured, scores, strict=True):
            keep = score > threshold.to(score.device)
            delta.prune(keep)
            if final:
                delta.kept, delta.importance, delta.uncertainty = keep, {}, {}

    def resume_state(self, model: nn.Module) -> dict[str, Any]:
        """Smoothed importance of every tensor, and the final choice once it is made."""
        state = {}
        for name, delta in _deltas(model):
            importance = {key: value.clone() for key, value in delta.importance.items()}
            uncertainty = {key: value.clone() for key, value in delta.uncertainty.items()}
            state[name] = {"importance": importance, "uncertainty": uncertainty, "kept": delta.kept}
        return state

    def load_resume_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Take them back."""
        for name, delta in _deltas(model):
            saved = state.get(name, {})
            delta.importance = dict(saved.get("importance", {}))
            delta.uncertainty = dict(saved.get("uncertainty", {}))
            delta.kept = saved.get("kept")


def _deltas(model: nn.Module) -> Iterator[tuple[str, AdaLoRAFactors]]:
    """The triplets in a model, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, AdaLoRAFactors):
            yield name, module
