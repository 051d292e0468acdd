"""Learned keys and values that stand in front of an attention's own: tensors, shapes, masks."""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapted import Adapted, AdapterState, Delta, factor_dtype
from lightning_peft.errors import NoMatchError
from lightning_peft.match import role


class Heads(NamedTuple):
    """Key/value heads of an attention, and the width of a key and of a value in each."""

    count: int
    key: int
    value: int

    @property
    def width(self) -> int:
        """Numbers one virtual token takes: its key and its value in every head."""
        return self.count * (self.key + self.value)


class Prefix(Delta):
    """``prefix_key`` (n, heads, key width) and ``prefix_value`` (n, heads, value width) of one attention."""

    def __init__(self, weight: Tensor, n: int, heads: Heads) -> None:
        super().__init__()
        options = {"dtype": factor_dtype(weight), "device": weight.device}
        self.prefix_key = nn.Parameter(torch.empty(n, heads.count, heads.key, **options))
        self.prefix_value = nn.Parameter(torch.empty(n, heads.count, heads.value, **options))

    def fill(self, generator: torch.Generator, std: float) -> None:
        """Draw the start values."""
        for parameter in (self.prefix_key, self.prefix_value):
            normal_(parameter, generator, std)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (n, heads, width) each."""
        return self.prefix_key, self.prefix_value

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"tokens={len(self.prefix_key)}, heads={self.prefix_key.shape[1]}"


class PrefixEncoder(Delta):
    """The shared half of the reparametrisation: ``tanh(W E + b)``, one row for each virtual token.

    ``embedding`` (n, width), ``weight`` (hidden, width), ``bias`` (hidden).
    """

    def __init__(self, weight: Tensor, n: int, width: int, hidden: int) -> None:
        super().__init__()
        options = {"dtype": factor_dtype(weight), "device": weight.device}
        self.embedding = nn.Parameter(torch.empty(n, width, **options))
        self.weight = nn.Parameter(torch.empty(hidden, width, **options))
        self.bias = nn.Parameter(torch.empty(hidden, **options))

    def fill(self, generator: torch.Generator) -> None:
        """Draw the start values: a standard normal embedding, a layer as `nn.Linear` starts."""
        normal_(self.embedding, generator, 1.0)
        linear_(self.weight, self.bias, generator)

    def forward(self) -> Tensor:
        """(n, hidden)."""
        return torch.tanh(F.linear(self.embedding, self.weight, self.bias))


class ProjectedPrefix(Delta):
    """Keys and values of one attention as a linear map of the shared `PrefixEncoder`.

    The rows of ``weight`` (heads · (key width + value width), hidden) give the keys of all heads, then the values;
    the weights of all layers of a stack together are the last layer of the paper's network.
    """

    def __init__(self, shared: PrefixEncoder, heads: Heads) -> None:
        super().__init__()
        hidden = shared.bias
        options = {"dtype": hidden.dtype, "device": hidden.device}
        self.shared, self.heads = shared, heads
        self.weight = nn.Parameter(torch.empty(heads.width, len(hidden), **options))
        self.bias = nn.Parameter(torch.empty(heads.width, **options))

    def fill(self, generator: torch.Generator) -> None:
        """Draw the start values of the last layer."""
        linear_(self.weight, self.bias, generator)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (n, heads, width) each."""
        flat, (count, key, value) = F.linear(self.shared(), self.weight, self.bias), self.heads
        keys, values = flat.split([count * key, count * value], dim=-1)
        return keys.unflatten(-1, (count, key)), values.unflatten(-1, (count, value))

    def folded(self) -> Prefix:
        """The same keys and values as plain tensors."""
        prefix = Prefix(self.weight, len(self.shared.embedding), self.heads)
        with torch.no_grad():
            for parameter, value in zip((prefix.prefix_key, prefix.prefix_value), self.pair(), strict=True):
                parameter.copy_(value)
        return prefix


class PrefixState(AdapterState):
    """What an attention with a prefix remembers; its method `place` is a hook on the backbone around it."""

    def place(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Hook on a backbone with rotary embeddings: without position ids, count from the first real token of a row.

        The prefix stands still while rotary embeddings turn queries by their position, so a row padded on the left
        would see another prefix than the row alone. Among the tokens themselves only distances count.
        """
        bound = dict(zip(inspect.signature(type(module).forward).parameters, (None, *args), strict=False)) | kwargs
        mask, states = bound.get("attention_mask"), bound.get("input_ids")
        states = bound.get("inputs_embeds") if states is None else states
        if not self.active or bound.get("position_ids") is not None or getattr(mask, "ndim", 0) != 2:
            return None
        bound.pop("self")
        places = torch.arange(mask.shape[1], device=mask.device) - (mask != 0).int().argmax(dim=1, keepdim=True)
        return (), bound | {"position_ids": places.clamp(min=0)[:, -states.shape[1] :]}


class PrefixedAttention(Adapted):
    """An attention module with learned keys and values; each kind of module has its own subclass."""

    _adapter: PrefixState

    @classmethod
    def _new_state(cls, attention: nn.Module) -> PrefixState:
        """What this kind remembers of an attention that is about to be adapted."""
        return PrefixState()

    def _put_prefix(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
        """key, value (…, heads, length, width) with the prefix in front, and its length."""
        keys, values = self.delta.pair()
        return in_front(keys, key), in_front(values, value), len(keys)

    def _undo(self) -> None:
        """Undo what was changed on the attention itself."""


def normal_(tensor: Tensor, generator: torch.Generator, std: float) -> None:
    """Fill with N(0, std²) from a CPU generator, wherever the tensor lives; tensors without storage are left."""
    if not tensor.is_meta:
        with torch.no_grad():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * std)


def linear_(weight: Tensor, bias: Tensor, generator: torch.Generator, fan_in: int | None = None) -> None:
    """The start values of `nn.Linear`: uniform within 1/√inputs."""
    bound = 1 / math.sqrt(fan_in or weight.shape[1])
    for tensor in (weight, bias):
        if not tensor.is_meta:
            with torch.no_grad():
                tensor.copy_((torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) * 2 - 1) * bound)


def heads_of(module: nn.Module, name: str) -> Heads:
    """Key/value heads of an attention module, read from its projections and the usual attribute names.

    Raises:
        NoMatchError: they cannot be read.
    """
    if isinstance(module, nn.MultiheadAttention):
        return Heads(module.num_heads, module.head_dim, module.head_dim)
    parts = {role(f"attention.{child}") or child: layer for child, layer in module.named_children()}
    count = _number(module, "num_heads", "n_heads", "n_head", "num_attention_heads", "heads", "nhead", "nh")
    width = _number(module, "head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "head_size")
    groups = _number(module, "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
    if count and (latent := _number(module, "qk_head_dim")) and (values := _number(module, "v_head_dim")):
        return Heads(count, latent, values)  # keys and values from a latent state (DeepSeek)
    if "k" in parts and "v" in parts:
        keys, values = _outputs(parts["k"]), _outputs(parts["v"])
        if width is None and count:
            width = (_outputs(parts["q"]) if "q" in parts else keys) // count
        if width and keys % width == 0 and values % (keys // width) == 0:
            return Heads(keys // width, width, values // (keys // width))
    elif "qkv" in parts:
        total = _outputs(parts["qkv"])
        if width is None and count:
            width = total // (count + 2 * (groups or count))
        kinds = 2 if "q_attn" in parts else 3  # GPT-2's cross-attention projects queries apart
        groups = groups or (total // (kinds * width) if width else None)
        if width and groups:
            return Heads(groups, width, width)
    elif "kv" in parts and (width or count):  # keys and values from one layer, queries from another (timm)
        half = _outputs(parts["kv"]) // 2
        width = width or half // (groups or count)
        return Heads(half // width, width, width)
    if not any(True for _ in module.parameters()):
        raise NoMatchError(
            f"The attention {name!r} ({type(module).__name__}) has no projections of its own: they stand in the module"
            " around it, so the heads and widths of its keys and values cannot be read off, and it takes no prefix."
            " LoRA adapts those projections; exclude_modules leaves this module out."
        )
    raise NoMatchError(
        f"The attention {name!r} ({type(module).__name__}) does not tell its heads: it needs linear layers named"
        " q_proj/k_proj/v_proj, query/key/value, qkv or c_attn, and an attribute num_heads or head_dim. Rename them,"
        " or leave the module out with exclude_modules."
    )


def _number(module: nn.Module, *names: str) -> int | None:
    """The first attribute that exists, of the module or its transformers config."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return None


def _outputs(layer: nn.Module) -> int:
    features = getattr(layer, "out_features", None) or getattr(layer, "nf", None)
    return features if isinstance(features, int) else layer.weight.shape[0]


def in_front(prefix: Tensor, states: Tensor) -> Tensor:
    """prefix (n, heads, d) before states (…, heads, length, d); heads that the model repeated are repeated here."""
    prefix = prefix.transpose(0, 1).to(states.dtype)
    if states.shape[-3] != prefix.shape[0]:
        prefix = prefix.repeat_interleave(states.shape[-3] // prefix.shape[0], dim=0)
    return torch.cat([prefix.expand(*states.shape[:-2], *prefix.shape[-2:]), states], dim=-2)


def widen(mask: Tensor, n: int, length: int) -> Tensor:
    """mask (…, queries, keys) with n visible columns in front; float masks are added to scores, True means visible."""
    if mask.shape[-1] == 1 and length != 1:
        mask = mask.expand(*mask.shape[:-1], length)
    mask = mask[..., :length]
    front = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
    return torch.cat([front(*mask.shape[:-1], n), mask], dim=-1)


def causal(queries: int, keys: int, n: int, device: torch.device) -> Tensor:
    """Query i sees the prefix and the keys up to i: (queries, n + keys), True where visible."""
    return torch.ones(queries, n + keys, dtype=torch.bool, device=device).tril(n)


def squares(queries: int, keys: int, n: int) -> bool:
    """Whether n idle queries before a causal call pay off: they make it square again, so it needs no mask.

    The kernels for square causal attention skip half the work and read no mask; at 2,048 tokens and 20 virtual ones
    that halves the time on a CPU, below some 500 tokens the idle queries cost more than the mask.
    """
    return queries == keys and queries > 16 * n
