"""Layers that add the low-rank correction to their output."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.adapted import Adapted, AdapterState, Delta, base_tensor, is_given_weights
from lightning_peft.errors import PEFTError
from lightning_peft.lowrank import fast

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LowRankState(AdapterState):
    """``fast`` says whether the layer may take one of the faster ways (see the module `fast`)."""

    def __init__(self, fast: bool = False) -> None:
        super().__init__()
        self.fast = fast


class DeltaSet(Delta):
    """The factors of several parameters of one module, by the parameter's name."""

    def __init__(self, deltas: dict[str, Delta]) -> None:
        super().__init__()
        for name, delta in deltas.items():
            self.add_module(name, delta)


class LowRankLayer(Adapted):
    """A layer some of whose parameters have low-rank corrections."""

    def _factors(self) -> dict[str, Any]:
        """The factors by the name of their parameter."""
        return dict(self.delta.named_children()) if isinstance(self.delta, DeltaSet) else {"weight": self.delta}

    def _merged_tensors(self) -> dict[str, Tensor]:
        """The corrected parameters."""
        return {name: delta.fold(base_tensor(self, name)) for name, delta in self._factors().items()}

    def _corrected_names(self) -> tuple[str, ...]:
        return tuple(self._factors())

    def _corrected(self, name: str) -> Tensor:
        weight = base_tensor(self, name)
        return self._factors()[name](weight).to(weight.dtype)


class LowRankLinear(LowRankLayer):
    """A linear layer (also in few bits, or transformers' ``Conv1D``) with a correction: ``y = Wx + b + s·B(A x)``."""

    _adapter: LowRankState

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The input, (…, in), under the name that the base gives it -> (…, out)."""
        state = self._adapter
        input = args[0] if args else next(iter(kwargs.values()))
        if state.windows and is_given_weights(self):
            return self._own_forward(*args, **kwargs)
        if state.fast and not torch.compiler.is_compiling():
            is_small = input.numel() <= fast.SMALL
            output = fast.small_output(self, input) if is_small else fast.fast_output(self, input)
            if output is not None:
                return output
        output = self._base_forward(*args, **kwargs)
        return self.delta(input, output, self) if state.active else output

    def _low_rank_output(self, x: Tensor) -> Tensor:
        """The correction of the output for the input x."""
        return self.delta.linear(x)

    def _over_output(self, vector: Tensor) -> Tensor:
        """A vector over output features, shaped to multiply the output."""
        return vector


class LowRankConv(LowRankLinear):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: A is a convolution like the base, B one of kernel size 1.

    Stride, padding, its mode, dilation and groups are the base's. With groups, the rows of B are split among them and
    A is shared, so that the correction is a weight of the base's shape.
    """

    _conv_forward: Any
    groups: int
    kernel_size: tuple[int, ...]

    def _low_rank_output(self, x: Tensor) -> Tensor:
        """x: (N, in, …) or (in, …) -> (N, out, …) or (out, …)."""
        A, B = self.delta.factors()
        x = self.delta.dropped(x.to(A.dtype))
        if self.groups > 1:
            A = A.repeat(self.groups, *(1,) * (A.ndim - 1))
        return _CONV[A.ndim - 2](self._conv_forward(x, A, None), B, groups=self.groups)

    def _over_output(self, vector: Tensor) -> Tensor:
        """(out) -> (out, 1, …)."""
        return vector.view(-1, *(1,) * len(self.kernel_size))


class LowRankEmbedding(LowRankLinear):
    """`nn.Embedding` with a low-rank correction: row ``i`` gets ``s·B·A[:, i]``; A starts at zero, B does not.

    The padding row is corrected like any other, and as in the base it sends no gradient to its column of A.
    """

    num_embeddings: int
    padding_idx: int | None
    scale_grad_by_freq: bool

    def _low_rank_output(self, x: Tensor) -> Tensor:
        """x: ids (…) -> (…, dim)."""
        A, B = self.delta.factors()
        if A.shape[1] != self.num_embeddings:
            raise PEFTError(
                f"The adapter of {self._adapter.name!r} was made for {A.shape[1]} rows, and the embedding has"
                f" {self.num_embeddings}: it was resized after the adapters were injected. Resize first"
                " (resize_token_embeddings), then inject."
            )
        rows = F.embedding(x, A.T, self.padding_idx, None, 2.0, self.scale_grad_by_freq)
        low = F.linear(rows, B)
        scale = getattr(self, "embed_scale", None)  # Gemma multiplies its embedding's output
        return low if scale is None else low * scale
