"""Layers that correct their weight: their code reads the parameter itself, so nothing can be added to an output."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from lightning_peft.adapted import Adapted, Delta
from lightning_peft.lowrank.layers import LowRankLinear


class DeltaSet(Delta):
    """The factors of several parameters of one module, by the parameter's name."""

    def __init__(self, deltas: dict[str, Delta]) -> None:
        super().__init__()
        for name, delta in deltas.items():
            self.add_module(name, delta)


class LowRankWeights(Adapted):
    """Runs the base with corrected parameters in place of its own, for the length of the call."""

    base: Any
    delta: Any

    def corrected(self) -> dict[str, Tensor]:
        """The parameters the base should see, in their own dtype."""
        parameters = self.base._parameters
        return {n: d.fold(parameters[n]).to(parameters[n].dtype) for n, d in self.delta.named_children()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments and result are those of the base."""
        if not self.active:
            return self.base(*args, **kwargs)
        return functional_call(self.base, self.corrected(), args, kwargs, tie_weights=False)

    def merged(self) -> dict[str, Tensor]:
        """The corrected parameters."""
        return {name: delta.fold(self.base._parameters[name]) for name, delta in self.delta.named_children()}


class LowRankStack(LowRankWeights):
    """Expert weights of a mixture, stacked to 3-D parameters: each expert has its own A and B.

    The corrected weights of all experts exist for the length of the call, as large as the weights themselves.
    """


class LowRankAttention(LowRankWeights):
    """The input projections of `nn.MultiheadAttention`; its ``out_proj`` is wrapped by itself.

    `nn.TransformerEncoderLayer` has a fast path that never calls this module but reads its parameters: it finds the
    corrected ones.
    """

    @property
    def in_proj_weight(self) -> Tensor | None:
        """What a reader of the parameter must see: the corrected one while the adapter is on."""
        weight = self.base.in_proj_weight
        if weight is None or not self.active:
            return weight
        return self.delta.in_proj_weight.fold(weight).to(weight.dtype)


class LowRankProjection(LowRankLinear):
    """``out_proj`` of `nn.MultiheadAttention`: never called, its ``weight`` is read."""

    read = True

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in) -> (…, out), for code that does call it."""
        return F.linear(x, self.weight, self.base.bias)
