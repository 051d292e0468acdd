"""LoRA: low-rank adaptation (Hu et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from lightning_peft import lowrank
from lightning_peft.errors import ConfigError
from lightning_peft.lowrank import LowRank, Place
from lightning_peft.lowrank.starts import STARTS, start
from lightning_peft.match import bias_names, matcher
from lightning_peft.method import Method, check_number

_PARTS = ("q", "k", "v")
#: scaling times rank of the runs that `LoRA.reference_lr` comes from
REFERENCE_SCALED_RANK = 32
#: best rate relative to that of random starts: arXiv:2602.04998 (OLoRA 1/18)
START_FACTORS = {"pissa": 0.1, "olora": 0.055, "orthogonal": 0.5}


@dataclass(frozen=True)
class LoRA(Method):
    """Train a low-rank product beside frozen weights: ``y = Wx + b + s·B(A·dropout(x))``, ``s = alpha / r``.

    A (r, in) starts random and B (out, r) at zero, so training starts from the base model. Trains ``r·(in + out)``
    numbers per layer. For `nn.Embedding` A (r, num) starts at zero and B (dim, r) random; for convolutions A is
    (r, in/groups, *kernel); `nn.MultiheadAttention` and stacked expert weights (name the module that holds them) are
    corrected at the weight.

    Args:
        r: rank.
        alpha: numerator of the scaling.
        dropout: probability of dropping an input feature of the low-rank branch (not for embeddings).
        target_modules: patterns or words (``all-linear``, ``attention``, ``mlp``); see `lightning_peft.match`.
        use_rslora: scale by ``alpha / √r`` instead (Kalajdzievski 2023, arXiv:2312.03732).
        init: start values. ``pissa`` (Meng et al. 2024, arXiv:2404.02948) and ``olora`` (Büyükakyüz 2024,
            arXiv:2406.01775) start from the weight itself; their start product is kept in the file, frozen, and taken
            off in every pass, so the base stays what it was.
        lr_ratio: learning rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354), in `param_groups`.
        lr_embedding: learning rate of embeddings' factors while ``lr_ratio`` is not 1.
        rank_pattern, alpha_pattern: pattern -> rank or alpha for the layers it matches.
        bias: also train ``all`` biases of the model, or those of the adapted layers (``lora_only``).
        fused_parts: of a fused query-key-value projection (``c_attn``, ``in_proj``, …) adapt these of ``q``, ``k``,
            ``v``, each with its own factors of rank r; None: one pair of factors over the whole output.
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
    reference_lr: ClassVar[float] = 4e-4
    lr_source: ClassVar[str] = (
        "the sweep of tinker-cookbook over 35 language models; width and scaling: μA, arXiv:2602.06204; PiSSA, OLoRA:"
        " Learning Rate Matters, arXiv:2602.04998"
    )
    free_fields: ClassVar[frozenset[str]] = Method.free_fields | {"init", "lr_ratio", "lr_embedding"}
    #: the factors of one matrix; relatives have their own
    factors: ClassVar[type[LowRank]] = LowRank
    #: whether corrections of several files add up (see `combine`)
    additive: ClassVar[bool] = True

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"] = "kaiming"
    lr_ratio: float = 1.0
    lr_embedding: float = 1e-6
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: Literal["none", "all", "lora_only"] = "none"
    fused_parts: list[Literal["q", "k", "v"]] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: str | list[str] | None = None
    layers: list[int] | None = None
    init_seed: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_number(name, "r", self.r, 1)
        check_number(name, "dropout", self.dropout, 0.0, high=1.0)
        check_number(name, "alpha", self.alpha, 0.0)
        if self.alpha == 0 or self.dropout == 1:
            raise ConfigError(f"{name}(alpha={self.alpha!r}, dropout={self.dropout!r}): the adapter would add nothing.")
        check_number(name, "lr_ratio", self.lr_ratio, 1.0)
        for pattern, rank in self.rank_pattern.items():
            check_number(name, f"rank_pattern[{pattern!r}]", rank, 1)
        for pattern, alpha in self.alpha_pattern.items():
            check_number(name, f"alpha_pattern[{pattern!r}]", alpha, 0.0)
            if alpha == 0:
                raise ConfigError(
                    f"{name}(alpha_pattern={{{pattern!r}: {alpha!r}}}): with an alpha of 0 the adapters there would add"
                    f" nothing. To leave those modules alone, use exclude_modules={pattern!r}."
                )
        for option, allowed in (("init", STARTS), ("bias", ("none", "all", "lora_only"))):
            if getattr(self, option) not in allowed:
                raise ConfigError(f"{name}({option}={getattr(self, option)!r}): choose one of {', '.join(allowed)}.")
        if self.fused_parts is not None and (not self.fused_parts or set(self.fused_parts) - set(_PARTS)):
            raise ConfigError(f"{name}(fused_parts={self.fused_parts!r}): name some of q, k, v.")

    # ---- where -----------------------------------------------------------------------------------------------------
    def adapts(self, module: nn.Module) -> bool:
        """Linear layers, Conv1D, embeddings, convolutions, `nn.MultiheadAttention`, stacked expert weights."""
        return lowrank.adapts(module)

    def is_linear(self, module: nn.Module) -> bool:
        """Linear layers, Conv1D and attention with packed projections."""
        return lowrank.is_linear(module)

    def targets(self, model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
        """The modules to adapt; an attention module of torch brings its output projection along."""
        chosen = lowrank.with_output(super().targets(model, prefix), self.exclude_modules, prefix)
        for pattern in [*self.rank_pattern, *self.alpha_pattern]:
            if not any(matcher(pattern)(n) for n in chosen):
                raise ConfigError(
                    f"rank_pattern or alpha_pattern: {pattern!r} matches none of the {len(chosen)} targets"
                    f" ({', '.join(list(chosen)[:3])}, …), so it would do nothing."
                )
        if self.fused_parts and not any(p.fused for n, m in chosen.items() for p in lowrank.places(m, n)):
            raise ConfigError(
                f"fused_parts={self.fused_parts!r}: none of the {len(chosen)} targets is a fused query-key-value"
                f" projection ({', '.join(list(chosen)[:3])}, …). Name the projections in target_modules instead."
            )
        return chosen

    def thaw(self, model: nn.Module, targets: Mapping[str, nn.Module]) -> list[str]:
        """The biases that ``bias`` asks for."""
        if self.bias == "none":
            return []
        own = {n: set(m._parameters) for n, m in targets.items()}
        found = [n.rpartition(".") for n in bias_names(model)]
        return [f"{m}{dot}{n}" for m, dot, n in found if self.bias == "all" or n in own.get(m, ())]

    # ---- what ------------------------------------------------------------------------------------------------------
    def rank(self, name: str) -> int:
        """Rank of the layer called ``name``."""
        return next((r for p, r in self.rank_pattern.items() if matcher(p)(name)), self.r)

    def numerator(self, name: str) -> float:
        """alpha of the layer called ``name``."""
        return next((a for p, a in self.alpha_pattern.items() if matcher(p)(name)), self.alpha)

    def scaling(self, name: str) -> float:
        """Factor in front of B·A for the layer called ``name``."""
        r = self.rank(name)
        return self.numerator(name) / (r**0.5 if self.use_rslora else r)

    def adapt(self, module: nn.Module, name: str) -> None:
        """Adapt one layer; the factors are drawn from a generator seeded by ``init_seed`` and ``name``."""
        lowrank.adapt_layer(module, name, lambda place: self.make(place, name))

    def make(self, place: Place, name: str) -> LowRank:
        """The factors of one matrix of the layer ``name``, with their start values."""
        parts = tuple(i for i, p in enumerate(_PARTS) if p in self.fused_parts) if self.fused_parts else None
        delta = self.factors(place, self.rank(name), self.scaling(name), self.dropout, parts if place.fused else None)
        self.fill(delta, place, name if place.name == "weight" else f"{name}.{place.name}")
        return delta

    def fill(self, delta: LowRank, place: Place, name: str) -> None:
        """Draw the start values."""
        start(delta, place, self.init, self.generator(name), name)

    def state_names(self, model: nn.Module) -> list[str]:
        """The start product of ``pissa`` and ``olora``."""
        return lowrank.frozen_names(model, self.factors)

    # ---- learning rate ---------------------------------------------------------------------------------------------
    def lr_factors(self) -> dict[str, float]:
        """Scaling times rank against 32, start values, and the ratio of LoRA+.

        The best rate falls with ``√(scaling·r)`` (μA, arXiv:2602.06204, corollary 4.4). Starts from the weight's own
        directions want a tenth or less (arXiv:2602.04998).
        """
        factors = scaling_factor(self.alpha * self.r**0.5 if self.use_rslora else self.alpha)
        if self.init in START_FACTORS:
            factors[f"{START_FACTORS[self.init]} ({self.init})"] = START_FACTORS[self.init]
        if self.lr_ratio != 1:  # the geometric mean of both rates stays
            factors[f"1/√{self.lr_ratio:g} (lr_ratio)"] = self.lr_ratio**-0.5
        return factors

    # ---- LoRA+ -----------------------------------------------------------------------------------------------------
    def param_groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """With ``lr_ratio`` other than 1: A, embeddings, B and vectors, and those of them that do not decay."""
        if self.lr_ratio == 1:
            return super().param_groups(model, lr, weight_decay)
        held: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B_no_decay": []}
        kinds = _kinds(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                held[kinds.get(id(parameter)) or _kind(name, parameter)].append(parameter)
        fast = lr * self.lr_ratio
        rates = {"A": lr, "embedding": self.lr_embedding, "B": fast, "B_no_decay": fast}
        return [
            {"params": ps, "lr": rates[k], "weight_decay": 0.0 if k == "B_no_decay" else weight_decay, "name": k}
            for k, ps in held.items()
            if ps
        ]


def scaling_factor(scaled_rank: float) -> dict[str, float]:
    """What scaling times rank does to the best rate: `Method.lr_factors`.

    >>> scaling_factor(8)
    {'√(32/8)': 2.0}
    """
    if scaled_rank == REFERENCE_SCALED_RANK:
        return {}
    return {f"√({REFERENCE_SCALED_RANK}/{scaled_rank:g})": (REFERENCE_SCALED_RANK / scaled_rank) ** 0.5}


def _kinds(model: nn.Module) -> dict[int, str]:
    """Factors of embeddings, and the vectors of norms, whatever they are called."""
    found: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, lowrank.LowRankEmbedding):
            found |= {id(p): "embedding" for p in module.delta.parameters()}
        elif "norm" in type(module).__name__.lower():
            found |= {id(p): "B_no_decay" for p in module.parameters(recurse=False)}
    return found


def _kind(name: str, parameter: nn.Parameter) -> str:
    leaf = name.rpartition(".")[2]
    if "lora_B" in leaf:
        return "B"
    if parameter.ndim == 1:
        return "B_no_decay" if "bias" in leaf else "B"
    return "A"
