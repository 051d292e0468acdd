"""Bottleneck corrections `up(act(down(v)))` and the layers that add them where a sub-layer ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft.adapted import Adapted, AdapterState, Delta, factor_dtype, thread_key
from lightning_peft.errors import ConfigError, PEFTError

NonLinearity = Literal["relu", "gelu", "gelu_new", "silu", "swish", "tanh", "leaky_relu"]


def _gelu_new(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_new,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
}


class Bottleneck(Delta):
    """``s · (W_up·act(W_down·v + b_down) + b_up)``; the up-projection starts at zero, the biases as well.

    Args:
        like: a tensor of the base, for dtype and device.
        size_in, width, size_out: features at the input, in the middle and at the output.
        non_linearity: name of the function in the middle.
        scaling: factor ``s``; None makes it a trained number that starts at 1.
        dropout: probability of dropping a feature of the correction while training.
    """

    def __init__(
        self,
        like: Tensor,
        size_in: int,
        width: int,
        size_out: int,
        non_linearity: str = "relu",
        scaling: float | None = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        # The up-projection starts at zero, so that the model starts as the base.
        options = {"dtype": factor_dtype(like), "device": like.device}
        self.down_weight = nn.Parameter(torch.zeros(width, size_in, **options))
        self.down_bias = nn.Parameter(torch.zeros(width, **options))
        self.up_weight = nn.Parameter(torch.zeros(size_out, width, **options))
        self.up_bias = nn.Parameter(torch.zeros(size_out, **options))
        self.scale = nn.Parameter(torch.ones(1, **options)) if scaling is None else None
        self.scaling = scaling
        self.non_linearity, self.dropout = non_linearity, dropout

    def forward(self, v: Tensor) -> Tensor:
        """v: (…, size_in) -> (…, size_out), in the dtype of the factors (or of autocast)."""
        check_width(v, self.down_weight.shape[1])
        middle = F.linear(v.to(self.down_weight.dtype), self.down_weight, self.down_bias)
        out = F.linear(NON_LINEARITIES[self.non_linearity](middle), self.up_weight, self.up_bias)
        if self.scale is not None:
            out = out * self.scale
        elif self.scaling is not None and self.scaling != 1.0:
            out = out * self.scaling
        return F.dropout(out, self.dropout) if self.dropout and self.training else out

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        (width, size_in), size_out = self.down_weight.shape, self.up_weight.shape[0]
        return f"{size_in} -> {width} -> {size_out}, {self.non_linearity}"


def check_width(v: Tensor, width: int) -> None:
    """Raise unless the last dimension of what an adapter gets is what it was built for."""
    if v.shape[-1] != width:
        raise ConfigError(
            f"An adapter built for {width} features got a tensor of shape {tuple(v.shape)}: the size read off the"
            " module it follows is not that of its output. Name the module inside it that produces the output."
        )


class Slot:
    """Takes a layer's input from where it enters to where the adapter reads it, within one pass through the layer.

    The input enters a part (often a normalisation) that has returned long before the adapter is reached, so no call of
    a module encloses both. Each thread has its own pass. Copies and pickles are empty: a tensor left over from a pass
    that broke off never travels.
    """

    def __init__(self) -> None:
        self.values: dict[int, Tensor] = {}

    def put(self, value: Tensor) -> None:
        """Keep the input of the pass that begins."""
        self.values[thread_key()] = value

    def take(self) -> Tensor | None:
        """The input of this pass; the slot is empty afterwards, so that nothing outlives its pass."""
        return self.values.pop(thread_key(), None)

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()


class Tap:
    """A forward pre-hook that puts its module's input into a slot."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.slot.put(first_tensor(args, kwargs))


class BottleneckState(AdapterState):
    """What a layer with a bottleneck remembers: the dimension of its features, and whose input the bottleneck reads.

    Args:
        channel: dimension of the output that holds the features.
    """

    def __init__(self, channel: int = -1) -> None:
        super().__init__()
        self.channel = channel
        #: the module whose input is read; None for the layer's own input
        self.source: nn.Module | None = None
        #: takes that input to the bottleneck
        self.slot: Slot | None = None
        #: the hook on the source, while the bottleneck is on
        self.tap: RemovableHandle | None = None

    def listen(self, layer: nn.Module, source: nn.Module) -> None:
        """Read the input of ``source`` instead of the layer's own."""
        self.source, self.slot = source, Slot()
        self.switch(layer, self.active)

    def switch(self, layer: nn.Module, on: bool) -> None:
        """Switch the bottleneck on or off; while it is off, no hook is left anywhere and it costs nothing."""
        super().switch(layer, on)
        if self.tap is not None:
            self.tap.remove()
            self.tap = None
        if on and self.source is not None and self.slot is not None:
            self.tap = self.source.register_forward_pre_hook(Tap(self.slot), with_kwargs=True)


class WithBottleneck(Adapted):
    """A module with a bottleneck behind or beside it."""

    _adapter: BottleneckState

    def _correction(self, v: Tensor, like: Tensor) -> Tensor:
        """The bottleneck's output for ``v``, computed over its features, in the dtype of ``like``."""
        channel = self._adapter.channel
        if channel == -1:
            return self.delta(v).to(like.dtype)
        # Feature maps (batch, channels, …): the bottleneck works over the last dimension.
        correction = self.delta(v.movedim(channel, -1)).movedim(-1, channel)
        return correction.to(like.dtype)

    def _read_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The input of the layer that the bottleneck reads, which may be that of a module around this one."""
        slot = self._adapter.slot
        if slot is None:
            return first_tensor(args, kwargs)
        x = slot.take()
        if x is None:
            raise PEFTError(
                f"{type(self).__name__} was called alone, without the layer around it whose input its adapter reads."
                " Call the layer, or use disabled(model)."
            )
        return x


class AfterOutput(WithBottleneck):
    """``h + delta(h)`` (Houlsby, and any module named by the user)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base; in a tuple the first element is corrected."""
        output = self._base_forward(*args, **kwargs)
        if not self._adapter.active:
            return output
        return with_first(output, lambda h: h + self._correction(h, h))


class AroundNorm(WithBottleneck):
    """``LN(v + delta(LN(v)))`` for the ``v = h + x`` that a post-norm layer normalises (Pfeiffer)."""

    def forward(self, input: Tensor) -> Tensor:
        """input: (…, d) -> (…, d)."""
        output = self._base_forward(input)
        if not self._adapter.active:
            return output
        return self._base_forward(input + self._correction(output, input))


class ReadingInput(WithBottleneck):
    """``h + delta(…)`` of something that the layer's input takes part in."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base; in a tuple the first element is corrected."""
        if not self._adapter.active:
            return self._base_forward(*args, **kwargs)
        x = self._read_input(args, kwargs)
        return with_first(self._base_forward(*args, **kwargs), lambda h: h + self._correction(self._seen(h, x), h))

    def _seen(self, h: Tensor, x: Tensor) -> Tensor:
        """What the bottleneck reads; each kind defines it."""
        raise NotImplementedError


class OnSum(ReadingInput):
    """``h + delta(h + x)`` (Pfeiffer in pre-norm layers; the layer adds x afterwards)."""

    def _seen(self, h: Tensor, x: Tensor) -> Tensor:
        return h + x


class Beside(ReadingInput):
    """``h + delta(x)`` (parallel adapter)."""

    def _seen(self, h: Tensor, x: Tensor) -> Tensor:
        return x


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor a module is called with: its input."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise ConfigError("A parallel adapter reads its module's input, but the module was called without a tensor.")


def with_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``change`` to a tensor, or to the first element of a tuple or list, which keeps its type."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        parts = [change(output[0]), *output[1:]]
        is_named_tuple = hasattr(output, "_fields")  # takes its elements one by one
        return type(output)(*parts) if is_named_tuple else type(output)(parts)
    raise ConfigError(
        f"An adapter follows a module that returns {type(output).__name__}; it needs a tensor, or a tuple or list that"
        " starts with one. Name a module inside it."
    )


def output_features(module: nn.Module) -> tuple[int, int] | None:
    """Features of a module's output and the dimension they are in, read off it or off its last part; None if unknown.

    Feature maps of convolutions, (B, C, …), have them in dimension 1: an adapter acts on the channels at each position.
    """
    # Containers that are never called.
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
        return None
    if isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        num_channels = _first_number(module, "out_channels", "num_features", "num_channels")
        assert num_channels is not None
        return num_channels, 1
    if isinstance(module, nn.RNNBase):
        num_directions = 1 + module.bidirectional
        return (module.proj_size or module.hidden_size) * num_directions, -1
    size = _first_number(module, "out_features", "nf", "embedding_dim", "embed_dim")
    if size is not None:
        return size, -1
    # A weight of one dimension is that of a normalisation; PReLU's has no features.
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 1 and not isinstance(module, nn.PReLU):
        return len(weight), -1
    # Otherwise the last part that tells is taken for the one that gives the output.
    for part in reversed(list(module.children())):
        features = output_features(part)
        if features is not None:
            return features
    return None


def input_features(module: nn.Module) -> int | None:
    """Features of a module's input, read off it or off its first part; None if unknown or if positions change."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Embedding)):
        return None
    size = _first_number(module, "in_features", "nx", "embed_dim", "input_size")
    if size is not None:
        return size
    parts = list(module.children())
    if not parts:  # a normalisation gives what it takes
        features = output_features(module)
        return features[0] if features and features[1] == -1 else None
    for part in parts:
        size = input_features(part)
        if size is not None:
            return size
    return None


def _first_number(module: nn.Module, *names: str) -> int | None:
    """The first of these attributes that is a whole number."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None
