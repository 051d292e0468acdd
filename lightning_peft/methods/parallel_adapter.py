"""Parallel adapters: a scaled bottleneck beside the feed-forward part (He et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_peft.bottleneck.layers import Bottleneck, NonLinearity
from lightning_peft.bottleneck.placement import AdapterMethod
from lightning_peft.errors import ConfigError
from lightning_peft.lowrank import kaiming


@dataclass(frozen=True)
class ParallelAdapter(AdapterMethod):
    """Put a bottleneck beside the feed-forward part: ``h + s·up(x)`` in the place of its output ``h``.

    ``x`` is the residual that enters the sub-layer, not normalised in pre-norm models. Trains ``2dB + B + d`` numbers
    a layer (one more with a learned scale), ``B = max(1, d // reduction_factor)``. The down-projection starts as
    `nn.Linear` does, the up-projection at zero.

    Args:
        reduction_factor: how many times narrower than the layer the adapter is.
        scaling: factor ``s``, or ``learned`` for a trained number that starts at 1.
        non_linearity: function between the projections.
        dropout: probability of dropping a feature of the correction.
        target_modules: None for the published place, the words ``attention`` and ``mlp`` for sub-layers, or patterns:
            ``y + s·up(input)`` for each module they match, on any network.
        exclude_modules: patterns to leave alone.
        modules_to_save: further modules, trained and saved in full (heads).
        layers: adapt only the layers with these numbers.
        init_seed: seed of the start values.

    Raises:
        ConfigError: a value that cannot work.
        NoMatchError: the model's layers are unknown, or a pattern matches nothing.

    >>> from torch import nn
    >>> from lightning_peft import ParallelAdapter, inject, summarize
    >>> net = nn.Sequential(nn.Linear(8, 4))
    >>> inject(net, ParallelAdapter(target_modules="0")); summarize(net)["trainable"]
    30
    """

    paper: ClassVar[str] = (
        "Towards a Unified View of Parameter-Efficient Transfer Learning, He et al. 2021, arXiv:2110.04366"
    )
    roles: ClassVar[tuple[str, ...]] = ("mlp",)
    reads: ClassVar[str] = "input"
    reference_lr: ClassVar[float] = 4e-4
    lr_source: ClassVar[str] = "as LoRA; He et al., arXiv:2110.04366, tune it per task"

    reduction_factor: float = 2
    scaling: float | Literal["learned"] = 4.0
    non_linearity: NonLinearity = "relu"
    dropout: float = 0.0
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: str | list[str] | None = None
    layers: list[int] | None = None
    init_seed: int = 0

    def __post_init__(self) -> None:
        self.check_fields()
        if isinstance(self.scaling, str) and self.scaling != "learned":
            raise ConfigError(f"ParallelAdapter(scaling={self.scaling!r}): give a number, or 'learned'.")

    def delta(self, like: Tensor, size_in: int, size_out: int, name: str) -> Bottleneck:
        """One adapter; its down-projection is drawn from a generator seeded by ``init_seed`` and ``name``."""
        scaling = None if self.scaling == "learned" else self.scaling
        width = self.width(size_out)
        made = Bottleneck(like, size_in, width, size_out, self.non_linearity, scaling, self.dropout)
        if not made.down_weight.is_meta:
            shape, dtype = made.down_weight.shape, made.down_weight.dtype
            made.down_weight.data.copy_(kaiming(shape, size_in, self.generator(name), dtype))
        return made
