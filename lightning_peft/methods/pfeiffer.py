"""Pfeiffer adapters: one bottleneck a layer, after the feed-forward part (Pfeiffer et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_peft.bottleneck.layers import Bottleneck, NonLinearity
from lightning_peft.bottleneck.placement import AdapterMethod


@dataclass(frozen=True)
class Pfeiffer(AdapterMethod):
    """Put one bottleneck behind the feed-forward part of each layer.

    With ``h`` the output of that part and ``x`` its residual, post-norm layers give ``LN(up(LN(h + x)) + h + x)`` with
    their own frozen LN, pre-norm layers ``up(h + x) + h + x``, where ``up(v) = W_up·act(W_down·v + b) + b``. Trains
    ``2dB + B + d`` numbers a layer, ``B = max(1, d // reduction_factor)``. The down-projection starts normal with
    σ = 0.02, the up-projection at zero: training starts exactly from the base model.

    Args:
        reduction_factor: how many times narrower than the layer the adapter is.
        non_linearity: function between the projections.
        dropout: probability of dropping a feature of the correction.
        target_modules: None for the published place, the words ``attention`` and ``mlp`` for sub-layers, or patterns:
            ``y + up(y)`` for each module they match, on any network.
        exclude_modules: patterns to leave alone.
        modules_to_save: further modules, trained and saved in full (heads).
        layers: adapt only the layers with these numbers.
        train_layer_norms: also train the normalisations of the adapted sub-layers.
        init_seed: seed of the start values.

    Raises:
        ConfigError: a value that cannot work.
        NoMatchError: the model's layers are unknown, or a pattern matches nothing.

    >>> from torch import nn
    >>> from lightning_peft import Pfeiffer, inject, summarize
    >>> net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1, enable_nested_tensor=False)
    >>> inject(net, Pfeiffer(reduction_factor=4)); summarize(net)["trainable"]
    42
    """

    paper: ClassVar[str] = (
        "AdapterFusion: Non-Destructive Task Composition for Transfer Learning, Pfeiffer et al. 2020, arXiv:2005.00247"
    )
    roles: ClassVar[tuple[str, ...]] = ("mlp",)
    reads: ClassVar[str] = "sum"
    reference_lr: ClassVar[float] = 1.4e-3
    lr_source: ClassVar[str] = (
        "ours: MiniLM on BBC topics, 60 steps, 7e-3; AdapterFusion, arXiv:2005.00247, section 4.2: 1e-4 in long runs"
    )

    reduction_factor: float = 16
    non_linearity: NonLinearity = "relu"
    dropout: float = 0.0
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: str | list[str] | None = None
    layers: list[int] | None = None
    train_layer_norms: bool = False
    init_seed: int = 0

    def __post_init__(self) -> None:
        self.check_fields()

    def delta(self, like: Tensor, size_in: int, size_out: int, name: str) -> Bottleneck:
        """One adapter; its down-projection is drawn from a generator seeded by ``init_seed`` and ``name``."""
        made = Bottleneck(like, size_in, self.width(size_out), size_out, self.non_linearity, dropout=self.dropout)
        if not made.down_weight.is_meta:
            shape, dtype = made.down_weight.shape, made.down_weight.dtype
            made.down_weight.data.copy_(torch.randn(shape, generator=self.generator(name), dtype=dtype) * 0.02)
        return made
