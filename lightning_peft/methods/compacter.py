"""Compacter: bottlenecks whose projections are sums of Kronecker products (Karimi Mahabadi et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapted import Delta, factor_dtype
from lightning_peft.bottleneck.layers import NON_LINEARITIES, NonLinearity, check_width
from lightning_peft.bottleneck.placement import AdapterMethod
from lightning_peft.errors import ConfigError
from lightning_peft.method import check_number


class PHMRule(Delta):
    """The ``n`` matrices C (n, n, n) that all projections of a model share."""

    def __init__(self, like: Tensor, n: int, generator: torch.Generator) -> None:
        super().__init__()
        dtype = factor_dtype(like)
        self.rule = nn.Parameter(torch.empty(n, n, n, dtype=dtype, device=like.device))
        if not like.is_meta:
            self.rule.data.copy_(torch.randn(n, n, n, generator=generator, dtype=dtype) * 1e-4)


class PHMBottleneck(Delta):
    """``act(v·H_down + b)·H_up + b`` with ``H = Σ C_i ⊗ (left_i·right_i)``; the rule C comes from `PHMRule`.

    Args:
        like: a tensor of the base, for dtype and device.
        size_in, width, size_out: features at the input, in the middle and at the output, all divisible by ``n``.
        n, rank: number of Kronecker terms and rank of their factors.
        non_linearity: name of the function in the middle.
        dropout: probability of dropping a feature of the correction while training.
        generator: for the start values, Glorot-uniform with gain √2.
    """

    shared: PHMRule

    def __init__(
        self,
        like: Tensor,
        size_in: int,
        width: int,
        size_out: int,
        n: int,
        rank: int,
        non_linearity: str,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        dtype, device = factor_dtype(like), like.device
        # H_down and H_up are never stored: each is built from n pairs of thin factors and the shared rule.
        shapes = {
            "down_left": (n, size_in // n, rank),
            "down_right": (n, rank, width // n),
            "up_left": (n, width // n, rank),
            "up_right": (n, rank, size_out // n),
        }
        for name, shape in shapes.items():
            factor = torch.empty(shape, dtype=dtype, device=device)
            if not like.is_meta:
                # Glorot-uniform with gain √2, over the two last dimensions.
                bound = math.sqrt(2 * 6 / (shape[1] + shape[2]))
                factor.copy_((torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1) * bound)
            setattr(self, name, nn.Parameter(factor))
        self.down_bias = nn.Parameter(torch.zeros(width, dtype=dtype, device=device))
        self.up_bias = nn.Parameter(torch.zeros(size_out, dtype=dtype, device=device))
        self.non_linearity, self.dropout = non_linearity, dropout

    def forward(self, v: Tensor) -> Tensor:
        """v: (…, size_in) -> (…, size_out), in the dtype of the factors (or of autocast)."""
        check_width(v, self.down_left.shape[0] * self.down_left.shape[1])
        # The rule is one for the whole model, whose layers may stand on several devices.
        rule = self.shared.rule.to(self.down_left.device)
        down = kronecker(rule, self.down_left, self.down_right)
        up = kronecker(rule, self.up_left, self.up_right)
        middle = F.linear(v.to(self.down_left.dtype), down.T, self.down_bias)
        out = F.linear(NON_LINEARITIES[self.non_linearity](middle), up.T, self.up_bias)
        return F.dropout(out, self.dropout) if self.dropout and self.training else out


def kronecker(rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``Σ_i C_i ⊗ (left_i·right_i)``: (n, n, n), (n, a, k), (n, k, b) -> (n·a, n·b)."""
    n, a, b = len(rule), left.shape[1], right.shape[2]
    return torch.einsum("ipq,iab->paqb", rule, left @ right).reshape(n * a, n * b)


@dataclass(frozen=True)
class Compacter(AdapterMethod):
    """As `Houlsby`, with projections ``Σ C_i ⊗ (left_i·right_i)`` whose rule C all adapters of the model share.

    Trains ``2k(d + B) + B + d`` numbers at each of two places a layer, and ``n³`` once. The width B is
    ``d // reduction_factor`` rounded up to a multiple of ``n = phm_dim``; ``d`` must be divisible by n. C starts normal
    with σ = 1e-4, so the first output differs from the base model's by less than rounding in half precision. The
    published adapters train the layer normalisations as well; here they stay frozen unless asked for.

    Args:
        reduction_factor: how many times narrower than the layer the adapter is.
        phm_dim: number of Kronecker terms n.
        phm_rank: rank k of the factors.
        non_linearity: function between the projections.
        dropout: probability of dropping a feature of the correction.
        target_modules: None for the published places, ``attention`` or ``mlp`` for one of the two, or patterns: an
            adapter behind each module they match, on any network.
        exclude_modules: patterns to leave alone.
        modules_to_save: further modules, trained and saved in full (heads).
        layers: adapt only the layers with these numbers.
        train_layer_norms: also train the normalisations of the adapted sub-layers.
        init_seed: seed of the start values.

    Raises:
        ConfigError: a value that cannot work.
        NoMatchError: the model's layers are unknown, or a pattern matches nothing.

    >>> from torch import nn
    >>> from lightning_peft import Compacter, inject, summarize
    >>> net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1, enable_nested_tensor=False)
    >>> inject(net, Compacter()); summarize(net)["trainable"]
    136
    """

    paper: ClassVar[str] = (
        "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, Karimi Mahabadi et al. 2021, arXiv:2106.04647"
    )
    reference_lr: ClassVar[float] = 2e-3
    lr_source: ClassVar[str] = "five times LoRA's; the authors' configs/compacter.json: 3e-3"

    reduction_factor: float = 32
    phm_dim: int = 4
    phm_rank: int = 1
    non_linearity: NonLinearity = "gelu"
    dropout: float = 0.0
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: str | list[str] | None = None
    layers: list[int] | None = None
    train_layer_norms: bool = False
    init_seed: int = 0

    def __post_init__(self) -> None:
        self.check_fields()
        check_number(type(self).__name__, "phm_dim", self.phm_dim, 1)
        check_number(type(self).__name__, "phm_rank", self.phm_rank, 1)

    def width(self, size: int) -> int:
        """The next multiple of ``phm_dim``."""
        return math.ceil(super().width(size) / self.phm_dim) * self.phm_dim

    def delta(self, like: Tensor, size_in: int, size_out: int, name: str) -> PHMBottleneck:
        """One adapter, still without its rule."""
        n = self.phm_dim
        if size_in % n or size_out % n:
            raise ConfigError(
                f"{type(self).__name__}(phm_dim={n}): {name!r} has {size_out} features, not a multiple of {n}. Choose"
                " a phm_dim that divides it."
            )
        options = (n, self.phm_rank, self.non_linearity, self.dropout, self.generator(name))
        return PHMBottleneck(like, size_in, self.width(size_out), size_out, *options)

    def share(self, deltas: Mapping[str, Delta]) -> None:
        """Register one rule in all of them; ``named_parameters`` gives it once, under the first."""
        first = next(iter(deltas.values()))
        rule = PHMRule(first.down_left, self.phm_dim, self.generator("phm_rule"))
        for delta in deltas.values():
            delta.shared = rule
