"""(IA)³: rescale keys, values and feed-forward activations (Liu et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_peft import lowrank
from lightning_peft.adapted import (
    Adapted,
    CorrectedWeights,
    Delta,
    adapt,
    base_tensor,
    factor_dtype,
    is_conv1d,
    is_given_weights,
    make_readable,
    runs_as_torch,
)
from lightning_peft.match import means
from lightning_peft.method import Method
from lightning_peft.quantized import packed

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class IA3Scale(Delta):
    """The vector ``ia3_l`` (n), one at the start."""

    def __init__(self, weight: Tensor, size: int) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(size, dtype=factor_dtype(weight), device=weight.device))

    def forward(self, x: Tensor, dim: int) -> Tensor:
        """x rescaled along a dimension, in its own dtype."""
        shape = [1] * x.ndim
        shape[dim] = -1
        return (x * self.ia3_l.view(shape)).to(x.dtype)


class IA3Layer(Adapted):
    """A linear layer or a convolution that is rescaled at its output or at its input."""

    def _feature_dim(self) -> int:
        """The dimension of input and output that holds features or channels."""
        return -1 - len(self.kernel_size) if isinstance(self, _CONVS) else -1

    def _obstacle(self) -> str | None:
        if runs_as_torch(self) or is_conv1d(self) or packed(self) is not None:
            return super()._obstacle()
        return (
            f"{type(self).__name__} computes with its weight in a way of its own, so a scale of its features cannot be"
            " folded into that weight."
        )


class IA3Output(IA3Layer):
    """A layer whose output is rescaled: ``y = l ⊙ (Wx + b)``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base: (…, in) -> (…, out)."""
        if is_given_weights(self):
            return self._own_forward(*args, **kwargs)
        output = self._base_forward(*args, **kwargs)
        return self.delta(output, self._feature_dim()) if self._adapter.active else output

    def _merged_tensors(self) -> dict[str, Tensor]:
        """Weight and bias, rescaled by output."""
        scale, weight, bias = self.delta.ia3_l, base_tensor(self, "weight"), base_tensor(self, "bias", None)
        shape = [1] * weight.ndim
        shape[1 if is_conv1d(self) else 0] = -1
        found = {"weight": weight.to(scale.dtype) * scale.view(shape)}
        if bias is not None:
            found["bias"] = bias.to(scale.dtype) * scale
        return found

    def _corrected_names(self) -> tuple[str, ...]:
        return ("weight",) if base_tensor(self, "bias", None) is None else ("weight", "bias")


class IA3Input(IA3Layer):
    """A layer whose input is rescaled: ``y = W(l ⊙ x) + b``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base: (…, in) -> (…, out); the first argument is rescaled."""
        if is_given_weights(self):
            return self._own_forward(*args, **kwargs)
        if not self._adapter.active:
            return self._base_forward(*args, **kwargs)
        if args:
            return self._base_forward(self.delta(args[0], self._feature_dim()), *args[1:], **kwargs)
        name, input = next(iter(kwargs.items()))
        return self._base_forward(**{**kwargs, name: self.delta(input, self._feature_dim())})

    def _merged_tensors(self) -> dict[str, Tensor]:
        """The weight, rescaled by input."""
        scale, weight = self.delta.ia3_l, base_tensor(self, "weight")
        if is_conv1d(self):
            return {"weight": weight.to(scale.dtype) * scale.unsqueeze(1)}
        # the rows of a convolution with groups see the channels of their own group only
        groups = getattr(self, "groups", 1)
        by_group = weight.to(scale.dtype).unflatten(0, (groups, -1))
        columns = scale.view(groups, 1, -1, *(1,) * (weight.ndim - 2))
        return {"weight": (by_group * columns).flatten(0, 1)}

    def _corrected_names(self) -> tuple[str, ...]:
        return ("weight",)


class IA3Attention(CorrectedWeights):
    """The packed input projections of `nn.MultiheadAttention`, whose parameters are read, not called."""

    def _merged_tensors(self) -> dict[str, Tensor]:
        """Weight and bias, rescaled by output."""
        scale, weight, bias = self.delta.ia3_l, base_tensor(self, "in_proj_weight"), base_tensor(self, "in_proj_bias")
        found = {"in_proj_weight": weight.to(scale.dtype) * scale.unsqueeze(1)}
        if bias is not None:
            found["in_proj_bias"] = bias.to(scale.dtype) * scale
        return found

    def _corrected_names(self) -> tuple[str, ...]:
        return ("in_proj_weight",) if base_tensor(self, "in_proj_bias") is None else ("in_proj_weight", "in_proj_bias")


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
    reference_lr: ClassVar[float] = 1e-2
    lr_width_exponent: ClassVar[float] = 0.0
    lr_source: ClassVar[str] = (
        "arXiv:2205.05638, section 3.3: 3e-3; peft's table, a 3B model: 5e-3; ours on MiniLM: 3e-2"
    )

    target_modules: str | list[str] = field(default_factory=lambda: ["key-value", "down-projection"])
    feedforward_modules: str | list[str] = "down-projection"
    exclude_modules: str | list[str] | None = None
    modules_to_save: str | list[str] | None = None
    layers: list[int] | None = None

    def adapts(self, module: nn.Module) -> bool:
        """Linear layers, Conv1D, convolutions, and `nn.MultiheadAttention` with packed projections."""
        if isinstance(module, nn.MultiheadAttention):
            return module.in_proj_weight is not None
        if isinstance(module, NonDynamicallyQuantizableLinear):  # the output projection of nn.MultiheadAttention
            return False
        return (isinstance(module, _CONVS) or self.is_linear(module)) and sizes_of(module) is not None

    def is_linear(self, module: nn.Module) -> bool:
        """Linear layers, also those of other libraries that name their sizes, and Conv1D."""
        return lowrank.is_linear(module) and not isinstance(module, nn.MultiheadAttention)

    def adapt(self, module: Any, name: str) -> None:
        """Adapt one layer, at its input or its output."""
        if isinstance(module, nn.MultiheadAttention):
            adapt(module, IA3Attention, IA3Scale(module.in_proj_weight, 3 * module.embed_dim), name=name)
            make_readable(module, module._readable_names())
            return
        sizes = sizes_of(module)
        assert sizes is not None  # `adapts` has seen to it
        size_in, size_out = sizes
        if means(self.feedforward_modules, name, module, self.is_linear):
            adapt(module, IA3Input, IA3Scale(module.weight, size_in), name=name)
        else:
            adapt(module, IA3Output, IA3Scale(module.weight, size_out), name=name)


def sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """Features, or channels, of a layer's input and output; None if its attributes do not say."""
    for names in (("in_features", "out_features"), ("in_channels", "out_channels"), ("nx", "nf")):
        size_in, size_out = [getattr(module, name, None) for name in names]
        if isinstance(size_in, int) and isinstance(size_out, int) and min(size_in, size_out) > 0:
            return size_in, size_out
    return None
