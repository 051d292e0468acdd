"""Learned keys and values that stand in front of an attention's own: tensors, shapes, masks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapted import Adapted, Delta, factor_dtype
from lightning_peft.errors import NoMatchError
from lightning_peft.match import role
from lightning_peft.prompting.backbone import argument_names, named_arguments
from lightning_peft.prompting.hooked import HookedState
from lightning_peft.prompting.insertion import row_starts


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
    """``prefix_key`` (n, heads, key width) and ``prefix_value`` (n, heads, value width) of one attention.

    Args:
        like: a tensor of the base, for dtype and device.
        length: number n of virtual tokens.
        heads: of its keys and values.
    """

    def __init__(self, like: Tensor, length: int, heads: Heads) -> None:
        super().__init__()
        dtype, device = factor_dtype(like), like.device
        self.prefix_key = nn.Parameter(torch.empty(length, heads.count, heads.key, dtype=dtype, device=device))
        self.prefix_value = nn.Parameter(torch.empty(length, heads.count, heads.value, dtype=dtype, device=device))

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

    Args:
        like: a tensor of the base, for dtype and device.
        length: number n of virtual tokens.
        width: numbers that stand for one virtual token.
        hidden: width of the network.
    """

    def __init__(self, like: Tensor, length: int, width: int, hidden: int) -> None:
        super().__init__()
        dtype, device = factor_dtype(like), like.device
        self.embedding = nn.Parameter(torch.empty(length, width, dtype=dtype, device=device))
        self.weight = nn.Parameter(torch.empty(hidden, width, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(hidden, dtype=dtype, device=device))

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
        self.shared, self.heads = shared, heads
        self.weight = nn.Parameter(shared.bias.new_empty(heads.width, len(shared.bias)))
        self.bias = nn.Parameter(shared.bias.new_empty(heads.width))

    def fill(self, generator: torch.Generator) -> None:
        """Draw the start values of the last layer."""
        linear_(self.weight, self.bias, generator)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (n, heads, width) each."""
        # One row for each virtual token: the keys of all heads, then the values.
        count, key_width, value_width = self.heads
        both = F.linear(self.shared(), self.weight, self.bias)
        keys, values = both.split([count * key_width, count * value_width], dim=-1)
        return keys.unflatten(-1, (count, key_width)), values.unflatten(-1, (count, value_width))

    def folded(self) -> Prefix:
        """The same keys and values as plain tensors."""
        prefix = Prefix(self.weight, len(self.shared.embedding), self.heads)
        with torch.no_grad():
            keys, values = self.pair()
            prefix.prefix_key.copy_(keys)
            prefix.prefix_value.copy_(values)
        return prefix


class PrefixState(HookedState):
    """What an attention with a prefix remembers."""

    def number_positions(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Before a backbone with rotary embeddings: without position ids, count from the first real token of a row.

        The prefix stands still while rotary embeddings turn queries by their position, so a row padded on the left
        would see another prefix than the row alone. Among the tokens themselves only distances count.
        """
        arguments = named_arguments(argument_names(module), args, kwargs)
        mask = arguments.get("attention_mask")
        if not self.active or arguments.get("position_ids") is not None or getattr(mask, "ndim", 0) != 2:
            return None
        tokens = arguments.get("input_ids")
        if tokens is None:
            tokens = arguments["inputs_embeds"]
        columns = torch.arange(mask.shape[1], device=mask.device)
        positions = (columns - row_starts(mask)).clamp(min=0)
        # The mask covers the cache as well; positions are those of the new tokens.
        arguments["position_ids"] = positions[:, -tokens.shape[1] :]
        return (), arguments


class PrefixedAttention(Adapted):
    """An attention module with learned keys and values; each kind of module has its own subclass."""

    _adapter: PrefixState

    @classmethod
    def _new_state(cls, attention: nn.Module) -> PrefixState:
        """What this kind remembers of an attention that is about to be adapted."""
        return PrefixState()

    def _put_prefix(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, int]:
        """keys and values (…, heads, length, width) with the prefix in front, and the length of the prefix."""
        prefix_keys, prefix_values = self.delta.pair()
        return in_front(prefix_keys, keys), in_front(prefix_values, values), len(prefix_keys)

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
    count = _number(module, "num_heads", "n_heads", "n_head", "num_attention_heads", "heads", "nhead", "nh")
    width = _number(module, "head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "head_size")
    # With grouped queries there are fewer heads of keys than of queries
    groups = _number(module, "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
    # Keys and values are made from a latent state, and their widths stand beside each other (DeepSeek)
    latent_width, value_width = _number(module, "qk_head_dim"), _number(module, "v_head_dim")
    if count and latent_width and value_width:
        return Heads(count, latent_width, value_width)

    # Otherwise the projections tell, called by their roles: "q", "k", "v", "qkv", "kv".
    projections: dict[str, nn.Module] = {}
    for child_name, child in module.named_children():
        projections[role(f"attention.{child_name}") or child_name] = child
    heads = None
    if "k" in projections and "v" in projections:
        heads = _heads_of_separate(projections, count, width)
    elif "qkv" in projections:
        heads = _heads_of_fused(projections, count, width, groups)
    elif "kv" in projections and (width or count):
        # keys and values from one layer, queries from another (timm)
        numbers = _outputs(projections["kv"]) // 2
        width = width or numbers // (groups or count or 1)
        heads = Heads(numbers // width, width, width)
    if heads is not None:
        return heads
    if next(module.parameters(), None) is None:
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


def _heads_of_separate(projections: dict[str, nn.Module], count: int | None, width: int | None) -> Heads | None:
    """Heads where keys and values have a layer each. The width of a head is that of the queries."""
    keys, values = _outputs(projections["k"]), _outputs(projections["v"])
    if width is None and count:
        width = _outputs(projections.get("q", projections["k"])) // count
    if not width or keys % width != 0:
        return None
    groups = keys // width
    return Heads(groups, width, values // groups) if values % groups == 0 else None


def _heads_of_fused(
    projections: dict[str, nn.Module], count: int | None, width: int | None, groups: int | None
) -> Heads | None:
    """Heads where one layer gives queries, keys and values: (queries + 2 · groups) heads of one width."""
    outputs = _outputs(projections["qkv"])
    if width is None and count:
        width = outputs // (count + 2 * (groups or count))
    if not width:
        return None
    if not groups:
        # GPT-2's cross-attention projects queries apart, and keys and values together.
        kinds = 2 if "q_attn" in projections else 3
        groups = outputs // (kinds * width)
    return Heads(groups, width, width) if groups else None


def _number(module: nn.Module, *names: str) -> int | None:
    """The first attribute that exists, of the module or its transformers config."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return None


def _outputs(layer: Any) -> int:
    """Features that a projection gives: ``nf`` is transformers' `Conv1D`."""
    features = getattr(layer, "out_features", None) or getattr(layer, "nf", None)
    return features if isinstance(features, int) else layer.weight.shape[0]


def in_front(prefix: Tensor, states: Tensor) -> Tensor:
    """Put a prefix before keys or values.

    prefix (n, groups, width), states (…, heads, length, width) -> (…, heads, n + length, width).

    Where the model has repeated its groups to the number of query heads, those of the prefix are repeated as well.
    """
    # The prefix is kept in float32 or wider; attention runs in the dtype of the model.
    prefix = prefix.transpose(0, 1).to(states.dtype)
    num_groups, num_heads = prefix.shape[0], states.shape[-3]
    if num_heads != num_groups:
        prefix = prefix.repeat_interleave(num_heads // num_groups, dim=0)
    return torch.cat([prefix.expand(*states.shape[:-2], *prefix.shape[-2:]), states], dim=-2)


def widen_mask(mask: Tensor, prefix_length: int, num_keys: int) -> Tensor:
    """A mask over the caller's keys, with visible columns for the prefix in front.

    Args:
        mask: (…, queries, keys), or one column for all keys. Float masks are added to scores; True means visible.
        prefix_length: columns to add.
        num_keys: keys without the prefix; a mask that covers more is cut.
    """
    if mask.shape[-1] == 1 and num_keys != 1:
        mask = mask.expand(*mask.shape[:-1], num_keys)
    mask = mask[..., :num_keys]
    shape = (*mask.shape[:-1], prefix_length)
    front = mask.new_ones(shape) if mask.dtype == torch.bool else mask.new_zeros(shape)
    return torch.cat([front, mask], dim=-1)


def causal_mask(num_queries: int, num_keys: int, prefix_length: int, device: torch.device) -> Tensor:
    """Query i sees the prefix and the keys up to i: (queries, prefix + keys), True where visible."""
    visible = torch.ones(num_queries, prefix_length + num_keys, dtype=torch.bool, device=device)
    return visible.tril(prefix_length)


def worth_idle_queries(num_queries: int, num_keys: int, prefix_length: int) -> bool:
    """Whether idle queries before a causal call pay off: as many as the prefix make it square again.

    The kernels for square causal attention skip half the work and read no mask; at 2,048 tokens and 20 virtual ones
    that halves the time on a CPU, below some 500 tokens the idle queries cost more than the mask.
    """
    return num_queries == num_keys and num_queries > 16 * prefix_length
