"""Prefixes inside attention, whatever computes it: transformers' attention registry, torch's `nn.MultiheadAttention`,
or a module's own call of ``F.scaled_dot_product_attention``.

The prefix is put in front of keys and values where they meet the queries, after rotary embeddings and after the
generation cache, so caches, lengths and positions stay the model's own.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_peft.errors import ConfigError
from lightning_peft.prompting.backbone import cache_of
from lightning_peft.prompting.multihead import MultiheadPrefix
from lightning_peft.prompting.prefix import PrefixedAttention, PrefixState, causal, squares, widen

#: the name under which our function stands in transformers' registry
REGISTERED = "lightning_peft_prefix"
SUPPORTED = (
    "transformers models on the attention interface, nn.MultiheadAttention, and modules that call"
    " F.scaled_dot_product_attention"
)


class RegistryState(PrefixState):
    """What an attention of transformers remembers.

    Attributes:
        eager: the model's own eager attention function.
        bias_owner: the module that computes T5's relative position bias for this stack, if there is one.
        past: how many tokens are in the cache of this call.
    """

    def __init__(self, eager: Any) -> None:
        super().__init__()
        self.eager = eager
        self.bias_owner: tuple[nn.Module, ...] = ()
        self.past: Any = 0


class RegistryAttention(PrefixedAttention):
    """An attention of transformers. It sees a config that names our function; the model's config is untouched."""

    _adapter: RegistryState
    config: Any
    layer_idx: int

    @classmethod
    def _new_state(cls, attention: nn.Module) -> RegistryState:
        register()
        check_implementation(attention.config)
        return RegistryState(eager_function(attention))

    def _undo(self) -> None:
        """Give the attention its own config back."""
        self.config = self.config.config

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        register()  # a fresh process that unpickles the model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base."""
        state = self._adapter
        if state.bias_owner and state.active:
            cache = cache_of(kwargs)
            past = 0 if cache is None else cache.get_seq_length(self.layer_idx)
            state.past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts in place
        return self._base_forward(*args, **kwargs)

    def _widen_bias(self, bias: Tensor, n: int) -> Tensor:
        """T5's position bias (1, heads, queries, keys) with the prefix at the positions -n … -1."""
        state = self._adapter
        front = bias.new_zeros(*bias.shape[:-1], n)
        if state.bias_owner:
            owner: Any = state.bias_owner[0]
            front = owner.compute_bias(bias.shape[-2], n, device=bias.device, past_seen_tokens=state.past + n)
        return torch.cat([front.to(bias.dtype).expand(*bias.shape[:-1], n), bias], dim=-1)


class PrefixedConfig:
    """A transformers config as one adapted attention sees it: the same, but for the attention implementation."""

    def __init__(self, config: Any, owner: RegistryAttention) -> None:
        self.config, self.owner = config, owner

    @property
    def _attn_implementation(self) -> str | None:
        return REGISTERED if self.owner._adapter.active else self.config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "config" not in self.__dict__:  # copying and unpickling ask before it is filled
            raise AttributeError(name)
        return getattr(self.config, name)


def register() -> None:
    """Make our function known to transformers; it acts for adapted modules only."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if REGISTERED not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(REGISTERED, prefix_attention)


def check_implementation(config: Any) -> str:
    """The implementation a model uses; others than these take masks we cannot widen."""
    name = config._attn_implementation or "eager"
    if name not in ("eager", "sdpa"):
        raise ConfigError(
            f"Prefixes work with attn_implementation 'sdpa' or 'eager'; this model uses {name!r}. Call"
            " model.set_attn_implementation('sdpa') first."
        )
    return name


def prefix_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What the registry calls for an adapted module: the model's own function, over longer keys and values."""
    owner: Any = module.config.owner
    name = check_implementation(module.config.config)
    length, queries, bias = key.shape[-2], query.shape[-2], kwargs.get("position_bias")
    key, value, n = owner._put_prefix(key, value)
    flag = kwargs.get("is_causal")
    flag = getattr(module, "is_causal", True) if flag is None else flag
    implied = name == "sdpa" and attention_mask is None and queries > 1 and flag  # eager masks are always explicit
    if bias is not None:
        kwargs["position_bias"] = owner._widen_bias(bias, n)
    if attention_mask is not None:
        attention_mask = widen(attention_mask, n, length)
    elif implied and (bias is not None or not squares(queries, length, n)):
        attention_mask = causal(queries, length, n, query.device)[None, None]
    if name == "eager":
        output, weights = owner._adapter.eager(module, query, key, value, attention_mask, **kwargs)
        return output, None if weights is None else weights[..., n:]
    function = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS["sdpa"]
    square = implied and attention_mask is None
    if square:
        query = F.pad(query, (0, 0, n, 0))
    output, weights = function(module, query, key, value, attention_mask, **(kwargs | {"is_causal": square}))
    return output[:, n:] if square else output, weights


class CalledAttention(PrefixedAttention):
    """A module that calls ``F.scaled_dot_product_attention`` itself: the call sees longer keys and values."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base."""
        if not self._adapter.active:
            return self._base_forward(*args, **kwargs)
        calls = _Calls(self)
        with calls:
            out = self._base_forward(*args, **kwargs)
        if not calls.count:
            raise ConfigError(
                f"{type(self).__name__} did not call F.scaled_dot_product_attention, so its prefix had no effect."
                " Switch its fused attention on (timm: fused_attn), or leave it out with exclude_modules."
            )
        return out

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """``F.scaled_dot_product_attention`` with the prefix in front."""
        length, queries = key.shape[-2], query.shape[-2]
        key, value, n = self._put_prefix(key, value)
        if attn_mask is not None:
            attn_mask = widen(attn_mask, n, length)
        elif is_causal and not squares(queries, length, n):
            attn_mask, is_causal = causal(queries, length, n, query.device), False
        query = F.pad(query, (0, 0, n, 0)) if is_causal else query
        out = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        return out[..., n:, :] if is_causal else out


class _Calls(TorchFunctionMode):
    """While active, sends the calls of ``F.scaled_dot_product_attention`` to one module's `_attend`."""

    def __init__(self, owner: CalledAttention) -> None:
        super().__init__()
        self.owner, self.count = owner, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.count += 1
        return self.owner._attend(*args, **(kwargs or {}))


def kind_of(module: nn.Module) -> type[PrefixedAttention] | None:
    """The kind of adapted attention for a module, or None for every other module."""
    if isinstance(module, nn.MultiheadAttention):
        return MultiheadPrefix
    if "ALL_ATTENTION_FUNCTIONS" in _names(type(module).forward) and hasattr(module, "config"):
        return RegistryAttention
    own = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    methods = [member for kind in own for member in vars(kind).values() if callable(member)]
    return CalledAttention if any("scaled_dot_product_attention" in _names(m) for m in methods) else None


def _names(function: Any) -> tuple[str, ...]:
    """Global and attribute names a function uses."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_names if code else ()


def eager_function(module: nn.Module) -> Any:
    """The model's own eager attention: the one its forward hands to the registry as the default."""
    for kind in type(module).__mro__:
        forward = inspect.unwrap(vars(kind)["forward"]) if "forward" in vars(kind) else None
        for name in forward.__code__.co_names if forward else ():
            if name.endswith("eager_attention_forward"):
                return forward.__globals__[name]
    raise ConfigError(f"{type(module).__name__} has no eager attention function, so a prefix cannot be put into it.")
