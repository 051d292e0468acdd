"""Houlsby adapters: a bottleneck after attention and one after the feed-forward part (Houlsby et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.bottleneck.layers import Bottleneck, NonLinearity
from lightning_peft.bottleneck.placement import AdapterMethod


@dataclass(frozen=True)
class Houlsby(AdapterMethod):
    """Put ``up(act(down(h))) + h`` in the place of each sub-layer's output ``h``, before the residual is added.

    Trains ``2dB + B + d`` numbers at each of two places a layer, with ``B = max(1, d // reduction_factor)``. The
    down-projection starts as published, normal with σ = 0.01 cut at 2σ; the up-projection starts at zero, so that
    training starts exactly from the base model. The published adapters train the layer normalisations as well; here
    they stay frozen unless ``train_layer_norms`` is set.

    Args:
        reduction_factor: how many times narrower than the layer the adapter is.
        non_linearity: function between the projections.
        dropout: probability of dropping a feature of the correction.
        target_modules: None for the published places (`lightning_peft.bottleneck.sites` has the models), ``attention``
            or ``mlp`` for one of the two, or patterns: an adapter behind each module they match, on any network. Behind
            convolutions it acts on the channels at each position.
        exclude_modules: patterns to leave alone.
        modules_to_save: further modules, trained and saved in full (heads).
        layers: adapt only the layers with these numbers.
        train_layer_norms: also train the normalisations of the adapted sub-layers.
        init_seed: seed of the start values.

    Raises:
        ConfigError: a value that cannot work.
        NoMatchError: the model's layers are unknown, or a pattern matches nothing.

    >>> from torch import nn
    >>> from lightning_peft import Houlsby, inject, summarize
    >>> net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1, enable_nested_tensor=False)
    >>> inject(net, Houlsby(reduction_factor=4)); summarize(net)["trainable"]
    84
    """

    paper: ClassVar[str] = "Parameter-Efficient Transfer Learning for NLP, Houlsby et al. 2019, arXiv:1902.00751"
    reference_lr: ClassVar[float] = 8e-4
    lr_source: ClassVar[str] = (
        "ours: MiniLM on BBC topics, 72 steps, 3e-3; the paper, arXiv:1902.00751, section 3.2, tries 3e-5, 3e-4, 3e-3"
    )

    reduction_factor: float = 16
    non_linearity: NonLinearity = "swish"
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
            start = torch.empty(made.down_weight.shape, dtype=made.down_weight.dtype)
            nn.init.trunc_normal_(start, std=0.01, a=-0.02, b=0.02, generator=self.generator(name))
            made.down_weight.data.copy_(start)
        return made
