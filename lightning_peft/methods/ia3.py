"""(IA)³: rescale keys, values and feed-forward activations (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_peft.adapted import Adapted, Delta, factor_dtype
from lightning_peft.lowrank import read_children
from lightning_peft.match import means
from lightning_peft.method import Method


class IA3Scale(Delta):
    """The vector ``ia3_l`` (n), one at the start."""

    def __init__(self, weight: Tensor, size: int) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(size, dtype=factor_dtype(weight), device=weight.device))


class IA3Output(Adapted):
    """A linear layer whose output is rescaled: ``y = l ⊙ (Wx + b)``."""

    base: Any
    delta: Any
    #: whether some code reads ``weight`` and ``bias`` instead of calling this module
    read = False

    @property
    def weight(self) -> Tensor:
        """The base's weight; the rescaled one where it is read instead of this module being called."""
        weight = self.base.weight
        return self.merged()["weight"].to(weight.dtype) if self.read and self.active else weight

    @property
    def bias(self) -> Tensor | None:
        """As `weight`."""
        bias = self.base.bias
        return self.merged()["bias"].to(bias.dtype) if bias is not None and self.read and self.active else bias

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in) -> (…, out)."""
        y = self.base(x)
        return (y * self.delta.ia3_l).to(y.dtype) if self.active else y

    def merged(self) -> dict[str, Tensor]:
        """Weight and bias, rescaled by output."""
        scale, weight = self.delta.ia3_l, self.base.weight
        rows = scale.unsqueeze(1) if isinstance(self.base, nn.Linear) else scale
        found = {"weight": weight.to(scale.dtype) * rows}
        if self.base.bias is not None:
            found["bias"] = self.base.bias.to(scale.dtype) * scale
        return found


class IA3Input(Adapted):
    """A linear layer whose input is rescaled: ``y = W(l ⊙ x) + b``."""

    base: Any
    delta: Any
    #: whether some code reads ``weight`` instead of calling this module
    read = False

    @property
    def weight(self) -> Tensor:
        """The base's weight; the rescaled one where it is read instead of this module being called."""
        weight = self.base.weight
        return self.merged()["weight"].to(weight.dtype) if self.read and self.active else weight

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in) -> (…, out)."""
        return self.base((x * self.delta.ia3_l).to(x.dtype) if self.active else x)

    def merged(self) -> dict[str, Tensor]:
        """The weight, rescaled by input."""
        scale, weight = self.delta.ia3_l, self.base.weight
        columns = scale if isinstance(self.base, nn.Linear) else scale.unsqueeze(1)
        return {"weight": weight.to(scale.dtype) * columns}


class IA3Attention(Adapted):
    """The packed input projections of `nn.MultiheadAttention`, whose parameters are read, not called."""

    base: Any
    delta: Any

    def merged(self) -> dict[str, Tensor]:
        """Weight and bias, rescaled by output."""
        scale, base = self.delta.ia3_l, self.base
        found = {"in_proj_weight": base.in_proj_weight.to(scale.dtype) * scale.unsqueeze(1)}
        if base.in_proj_bias is not None:
            found["in_proj_bias"] = base.in_proj_bias.to(scale.dtype) * scale
        return found

    def corrected(self) -> dict[str, Tensor]:
        """The parameters the base should see, in their own dtype."""
        return {n: t.to(self.base._parameters[n].dtype) for n, t in self.merged().items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments and result are those of the base."""
        if not self.active:
            return self.base(*args, **kwargs)
        return functional_call(self.base, self.corrected(), args, kwargs, tie_weights=False)

    @property
    def in_proj_weight(self) -> Tensor:
        """What `nn.TransformerEncoderLayer`'s fast path reads."""
        return self.corrected()["in_proj_weight"] if self.active else self.base.in_proj_weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        """What `nn.TransformerEncoderLayer`'s fast path reads."""
        return self.corrected().get("in_proj_bias") if self.active else self.base.in_proj_bias


@dataclass(frozen=True)
class IA3(Method):
    """Train one vector for the keys, one for the values and one for the feed-forward activations of each layer.

    Keys and values are rescaled at the output of their projections (of a fused projection the whole output: a vector
    on the queries equals one on the keys), the feed-forward activations at the input of the down projection, after
    the non-linearity. All start at one. Trains ``d_k + d_v + d_ff`` numbers per layer.

    Args:
        target_modules: patterns or words; ``key-value`` and ``down-projection`` find the modules of the paper.
        feedforward_modules: those among the targets that are rescaled at their input.
        exclude_modules: patterns to leave alone.
        modules_to_save: further modules, trained and saved in full (heads).
        layers: adapt only the layers with these numbers.

    >>> from torch import nn
    >>> from lightning_peft import IA3, inject, trainable_names
    >>> net = nn.ModuleDict({"k_proj": nn.Linear(4, 8), "up_proj": nn.Linear(8, 16), "down_proj": nn.Linear(16, 4)})
    >>> inject(net, IA3())
    >>> {n: len(p) for n, p in net.named_parameters() if n in trainable_names(net)}
    {'k_proj.delta.ia3_l': 8, 'down_proj.delta.ia3_l': 16}
    """

    paper: ClassVar[str] = (
        "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, Liu et al. 2022,"
        " arXiv:2205.05638"
    )
    default_lr: ClassVar[float] = 3e-3
    lr_range: ClassVar[tuple[float, float]] = (1e-3, 3e-2)
    lr_source: ClassVar[str] = "the paper, arXiv:2205.05638, section 3.3: 3e-3; the range is ours"

    target_modules: str | list[str] = field(default_factory=lambda: ["key-value", "down-projection"])
    feedforward_modules: str | list[str] = "down-projection"
    exclude_modules: str | list[str] | None = None
    modules_to_save: str | list[str] | None = None
    layers: list[int] | None = None

    def adapts(self, module: nn.Module) -> bool:
        """Linear layers, Conv1D and `nn.MultiheadAttention` with packed projections."""
        packed = isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
        return packed or (self.is_linear(module) and not isinstance(module, NonDynamicallyQuantizableLinear))

    def wrap(self, module: nn.Module, name: str) -> Adapted:
        """Wrap one layer, at its input or its output."""
        if isinstance(module, nn.MultiheadAttention):
            return IA3Attention(module, IA3Scale(module.in_proj_weight, 3 * module.embed_dim))
        size_in, size_out = (
            (module.in_features, module.out_features)
            if hasattr(module, "in_features")
            else (
                module.nx,
                module.nf,
            )
        )
        if means(self.feedforward_modules, name, module, self.is_linear):
            return IA3Input(module, IA3Scale(module.weight, size_in))
        return IA3Output(module, IA3Scale(module.weight, size_out))

    def connect(self, model: nn.Module, wrapped: Mapping[str, nn.Module]) -> None:
        """Link layers to code that reads their weights."""
        for _, child in read_children(model):
            if isinstance(child, (IA3Input, IA3Output)):
                child.read = True
