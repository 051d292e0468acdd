"""Prefixes inside attention, whatever computes it.

The prefix is put in front of keys and values where they meet the queries, after rotary embeddings and after the
generation cache, so caches, lengths and positions stay the model's own. No public place serves all attentions, so
there are three ways in, one for each kind of attention:

* `RegistryAttention`: transformers' attentions look a function up in a registry, by a name that stands in their config.
  A function of ours is registered there, and an adapted attention is given a config that names it.
* `CalledAttention`: other modules (timm's, hand-written ones) call ``F.scaled_dot_product_attention`` themselves. While
  their forward runs, that call comes to us.
* `MultiheadPrefix`: torch's `nn.MultiheadAttention` does neither in all of its cases, so its forward is written out.

Which kind a module is follows from what its forward calls. Python has no question for that, so `kind_of` reads the
names in the compiled code: nothing is run, and no list of classes has to follow every new model.
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
from lightning_peft.prompting.call import cache_among
from lightning_peft.prompting.multihead import MultiheadPrefix
from lightning_peft.prompting.prefix import (
    PrefixedAttention,
    PrefixState,
    causal_mask,
    widen_mask,
    worth_idle_queries,
)

#: the name under which our function stands in transformers' registry
REGISTERED = "lightning_peft_prefix"
#: the keyword by which an adapted attention tells that function how many tokens its cache held before
PAST_LENGTH = "lightning_peft_past_length"
SUPPORTED = (
    "transformers models on the attention interface, nn.MultiheadAttention, and modules that call"
    " F.scaled_dot_product_attention"
)


# ---- transformers' registry ----------------------------------------------------------------------------------------
class RegistryState(PrefixState):
    """What an attention of transformers remembers.

    Args:
        eager: the model's own eager attention function.
    """

    def __init__(self, eager: Any) -> None:
        super().__init__()
        self.eager = eager
        #: the module that computes T5's relative position bias for this stack, if there is one
        self.bias_owner: nn.Module | None = None


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
        if self._adapter.active and self._adapter.bias_owner is not None:
            # The forward adds its tokens to the cache before it calls us, and T5's bias needs the number before that.
            # These forwards hand keywords on that they do not know.
            kwargs[PAST_LENGTH] = self._cached_length(cache_among(kwargs))
        return self._base_forward(*args, **kwargs)

    def _cached_length(self, cache: Any) -> Any:
        """Tokens in the cache of this layer: a number, or a tensor."""
        length = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        # A static cache counts in a tensor, and changes it in place.
        return length.clone() if isinstance(length, Tensor) else length

    def _widen_bias(self, bias: Tensor, prefix_length: int, past_length: Any) -> Tensor:
        """T5's position bias with the prefix in front: (1, heads, queries, keys) -> (1, heads, queries, n + keys).

        The prefix stands at the positions -n … -1. Where no layer computes a bias, its own is zero.
        """
        owner: Any = self._adapter.bias_owner
        if owner is None:
            front = bias.new_zeros(*bias.shape[:-1], prefix_length)
        else:
            # The owner counts keys from 0, so queries are told to stand n further on.
            past = past_length + prefix_length
            front = owner.compute_bias(bias.shape[-2], prefix_length, device=bias.device, past_seen_tokens=past)
            front = front.to(bias.dtype).expand(*bias.shape[:-1], prefix_length)
        return torch.cat([front, bias], dim=-1)


class PrefixedConfig:
    """A transformers config as one adapted attention sees it: the same, but for the attention implementation.

    Args:
        config: the model's config.
        state: of the attention; while it is switched off, the config is the model's in all.
    """

    def __init__(self, config: Any, state: RegistryState) -> None:
        self.config, self.state = config, state

    @property
    def _attn_implementation(self) -> str | None:
        return REGISTERED if self.state.active else self.config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "config" not in self.__dict__:  # copying and unpickling ask before it is filled
            raise AttributeError(name)
        return getattr(self.config, name)


def register() -> None:
    """Make our function known to transformers; it acts for adapted modules only."""
    import transformers.modeling_utils

    registry = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    if REGISTERED not in registry:
        registry.register(REGISTERED, prefix_attention)


def sdpa_function() -> Any:
    """transformers' own way to call ``F.scaled_dot_product_attention``."""
    return sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS["sdpa"]


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
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What the registry calls for an adapted attention: the model's own function, over longer keys and values.

    Args:
        module: the attention.
        query, key, value: (batch, heads, length, width); keys and values may have fewer heads.
        attention_mask: (batch or 1, heads or 1, queries, keys), or None.
        kwargs: what the model tells its attention function besides.

    Returns:
        States (batch, queries, heads, width), and weights over the caller's keys if the function gives any.
    """
    implementation = check_implementation(module.config.config)
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    key, value, prefix_length = module._put_prefix(key, value)
    past_length = kwargs.pop(PAST_LENGTH, 0)
    position_bias = kwargs.get("position_bias")
    if position_bias is not None:
        kwargs["position_bias"] = module._widen_bias(position_bias, prefix_length, past_length)
    if attention_mask is not None:
        attention_mask = widen_mask(attention_mask, prefix_length, num_keys)

    if implementation == "eager":  # its masks are always given
        output, weights = module._adapter.eager(module, query, key, value, attention_mask, **kwargs)
        return output, None if weights is None else weights[..., prefix_length:]

    # Without a mask sdpa is told to be causal. Torch aligns that with the first key, which is the prefix now.
    is_causal = kwargs.pop("is_causal", None)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is None and is_causal and num_queries > 1:
        # The function takes either a bias or the causal order, not both.
        if position_bias is None and worth_idle_queries(num_queries, num_keys, prefix_length):
            query = F.pad(query, (0, 0, prefix_length, 0))
            output, weights = sdpa_function()(module, query, key, value, None, is_causal=True, **kwargs)
            return output[:, prefix_length:], weights
        attention_mask = causal_mask(num_queries, num_keys, prefix_length, query.device)[None, None]
    return sdpa_function()(module, query, key, value, attention_mask, is_causal=False, **kwargs)


# ---- modules that call F.scaled_dot_product_attention ----------------------------------------------------------------
class CalledAttention(PrefixedAttention):
    """A module that calls ``F.scaled_dot_product_attention`` itself: the call sees longer keys and values."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base."""
        if not self._adapter.active:
            return self._base_forward(*args, **kwargs)
        redirection = AttentionRedirection(self)
        with redirection:
            output = self._base_forward(*args, **kwargs)
        if redirection.num_calls == 0:
            raise ConfigError(
                f"{type(self).__name__} did not call F.scaled_dot_product_attention, so its prefix had no effect."
                " Switch its fused attention on (timm: fused_attn), or leave it out with exclude_modules."
            )
        return output

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
        num_queries, num_keys = query.shape[-2], key.shape[-2]
        key, value, prefix_length = self._put_prefix(key, value)
        if attn_mask is not None:
            attn_mask = widen_mask(attn_mask, prefix_length, num_keys)
        elif is_causal and worth_idle_queries(num_queries, num_keys, prefix_length):
            query = F.pad(query, (0, 0, prefix_length, 0))
            output = F.scaled_dot_product_attention(query, key, value, None, dropout_p, is_causal=True, **kwargs)
            return output[..., prefix_length:, :]
        elif is_causal:
            attn_mask = causal_mask(num_queries, num_keys, prefix_length, query.device)
            is_causal = False
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)


class AttentionRedirection(TorchFunctionMode):
    """While active, sends this thread's calls of ``F.scaled_dot_product_attention`` to a module's `_attend`."""

    def __init__(self, attention: CalledAttention) -> None:
        super().__init__()
        self.attention = attention
        #: how many calls there were
        self.num_calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.num_calls += 1
        return self.attention._attend(*args, **kwargs)


# ---- which kind a module is ----------------------------------------------------------------------------------------
def kind_of(module: nn.Module) -> type[PrefixedAttention] | None:
    """The kind of adapted attention for a module, or None for every other module."""
    if isinstance(module, nn.MultiheadAttention):
        return MultiheadPrefix
    if "ALL_ATTENTION_FUNCTIONS" in names_in(type(module).forward) and hasattr(module, "config"):
        return RegistryAttention
    # The call may stand in any method of the module's own classes.
    bases = type(module).__mro__
    for base in bases[: bases.index(nn.Module)]:
        for member in vars(base).values():
            if callable(member) and "scaled_dot_product_attention" in names_in(member):
                return CalledAttention
    return None


def names_in(function: Any) -> tuple[str, ...]:
    """The names of globals and attributes that a function's code uses."""
    # Decorators of transformers wrap the function that is meant.
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_names if code else ()


def eager_function(attention: nn.Module) -> Any:
    """The model's own eager attention: the function that its forward hands to the registry as the default.

    It is a global of the model's file, and no attribute leads to it.

    Raises:
        ConfigError: there is none.
    """
    for base in type(attention).__mro__:
        if "forward" not in vars(base):
            continue
        forward: Any = inspect.unwrap(vars(base)["forward"])
        for name in names_in(forward):
            if name.endswith("eager_attention_forward"):
                return forward.__globals__[name]
    raise ConfigError(f"{type(attention).__name__} has no eager attention function, so a prefix cannot be put into it.")
