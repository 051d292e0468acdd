"""LoRA: low-rank adaptation (Hu et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapted import Adapted, factor_dtype
from lightning_peft.errors import ConfigError
from lightning_peft.lowrank import LowRank, LowRankConv1D, LowRankEmbedding, LowRankLinear, kaiming
from lightning_peft.match import matcher
from lightning_peft.method import Method, check_number


@dataclass(frozen=True)
class LoRA(Method):
    """Train a low-rank product beside frozen weights: ``y = Wx + b + s·B(A·dropout(x))``, ``s = alpha / r``.

    A (r, in) starts random and B (out, r) at zero, so training starts from the base model. Trains ``r·(in + out)``
    numbers per layer. For `nn.Embedding` A (r, num) starts at zero and B (dim, r) random.

    Args:
        r: rank.
        alpha: numerator of the scaling.
        dropout: probability of dropping an input feature of the low-rank branch (not for embeddings).
        target_modules: patterns or words (``all-linear``, ``attention``, ``mlp``); see `lightning_peft.match`.
        use_rslora: scale by ``alpha / √r`` instead (Kalajdzievski 2023, arXiv:2312.03732).
        init: start values of A.
        rank_pattern, alpha_pattern: pattern -> rank or alpha for the layers it matches.
        bias: also train ``all`` biases of the model, or those of the adapted layers (``lora_only``).
        exclude_modules: patterns to leave alone.
        modules_to_save: further modules, trained and saved in full (heads).
        layers: adapt only the layers with these numbers.
        init_seed: seed of the start values.

    Raises:
        ConfigError: a value that cannot work.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject, trainable_names
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> inject(net, LoRA(r=2, target_modules="0"))
    >>> trainable_names(net)
    ['0.delta.lora_A', '0.delta.lora_B']
    """

    paper: ClassVar[str] = "LoRA: Low-Rank Adaptation of Large Language Models, Hu et al. 2021, arXiv:2106.09685"
    default_lr: ClassVar[float] = 2e-4
    lr_range: ClassVar[tuple[float, float]] = (5e-5, 2e-3)
    lr_source: ClassVar[str] = "QLoRA, Dettmers et al. 2023, arXiv:2305.14314, table 9: 2e-4; the range is ours"
    free_fields: ClassVar[frozenset[str]] = Method.free_fields | {"init"}

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    init: Literal["kaiming", "gaussian"] = "kaiming"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: Literal["none", "all", "lora_only"] = "none"
    exclude_modules: str | list[str] | None = None
    modules_to_save: str | list[str] | None = None
    layers: list[int] | None = None
    init_seed: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_number(name, "r", self.r, 1)
        check_number(name, "dropout", self.dropout, 0.0, high=1.0)
        for pattern, rank in self.rank_pattern.items():
            check_number(name, f"rank_pattern[{pattern!r}]", rank, 1)
        for option, allowed in (("init", ("kaiming", "gaussian")), ("bias", ("none", "all", "lora_only"))):
            if getattr(self, option) not in allowed:
                raise ConfigError(f"{name}({option}={getattr(self, option)!r}): choose one of {', '.join(allowed)}.")

    def adapts(self, module: nn.Module) -> bool:
        """Linear layers, transformers' Conv1D and embeddings."""
        return isinstance(module, nn.Embedding) or self.is_linear(module)

    def thaw(self, model: nn.Module, targets: Mapping[str, nn.Module]) -> list[str]:
        """The biases that ``bias`` asks for."""
        if self.bias == "all":
            return [n for n, _ in model.named_parameters() if n.rpartition(".")[2] == "bias"]
        if self.bias == "lora_only":
            return [f"{n}.bias" for n, m in targets.items() if getattr(m, "bias", None) is not None]
        return []

    def rank(self, name: str) -> int:
        """Rank of the layer called ``name``."""
        return next((r for p, r in self.rank_pattern.items() if matcher(p)(name)), self.r)

    def scaling(self, name: str) -> float:
        """Factor in front of B·A for the layer called ``name``."""
        alpha = next((a for p, a in self.alpha_pattern.items() if matcher(p)(name)), self.alpha)
        r = self.rank(name)
        return alpha / (r**0.5 if self.use_rslora else r)

    def wrap(self, module: nn.Module, name: str) -> Adapted:
        """Wrap one layer; A and B are drawn from a generator seeded by ``init_seed`` and ``name``."""
        size_in, size_out = sizes(module)
        delta = LowRank(module.weight, size_in, size_out, self.rank(name), self.scaling(name), self.dropout)
        if not delta.lora_A.is_meta:
            self.start(delta, module, name)
        if isinstance(module, nn.Embedding):
            return LowRankEmbedding(module, delta)
        return (LowRankLinear if isinstance(module, nn.Linear) else LowRankConv1D)(module, delta)

    def start(self, delta: LowRank, module: nn.Module, name: str) -> None:
        """Draw the start values of one layer."""
        (r, size_in), (size_out, _) = delta.lora_A.shape, delta.lora_B.shape
        generator, dtype = self.generator(name), factor_dtype(module.weight)
        if isinstance(module, nn.Embedding):
            normal = torch.randn(size_out, r, generator=generator, dtype=dtype)
            delta.fill(torch.zeros_like(delta.lora_A), normal)
        else:
            delta.fill(self.draw(r, size_in, generator, dtype))

    def draw(self, r: int, size_in: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """A's start value: ``kaiming`` uniform within 1/√in, ``gaussian`` N(0, 1/r²)."""
        if self.init == "gaussian":
            return torch.randn(r, size_in, generator=generator, dtype=dtype) / r
        return kaiming(r, size_in, generator, dtype)


def sizes(module: nn.Module) -> tuple[int, int]:
    """Input and output features, read from the layer's attributes (a sharded or packed weight has another shape)."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    return module.nx, module.nf  # transformers' Conv1D
