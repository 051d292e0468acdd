"""Where a transformers model has its input embedding, its backbone, its decoder, and its limits."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightning_peft.errors import ConfigError
from lightning_peft.prompting.positions import TABLES


def backbones(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The innermost transformers models that take token ids, each with its input embedding."""
    known = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    found = {}
    for module in model.modules():
        if isinstance(module, known) and "input_ids" in parameters_of(module):
            table = embedding_of(module)
            if table is not None:
                found[module] = table
    for module, table in found.items():
        if not any(other is not module and other in found for other in module.modules()):
            yield module, table


def embedding_of(module: nn.Module) -> nn.Module | None:
    """The table of a model's input embedding, if it has one."""
    try:
        table = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return table if isinstance(table, nn.Module) and hasattr(table, "num_embeddings") else None


def outermost(model: nn.Module, inner: nn.Module) -> nn.Module:
    """The outermost transformers model around another."""
    known = sys.modules["transformers.modeling_utils"].PreTrainedModel
    return next(m for m in model.modules() if isinstance(m, known) and any(c is inner for c in m.modules()))


def decoder_of(outer: nn.Module, encoder: nn.Module) -> nn.Module | None:
    """The decoder that attends to this encoder, in an encoder-decoder model."""
    if outer is encoder or not getattr(outer.config, "is_encoder_decoder", False):
        return None
    decoder = outer.get_decoder() if hasattr(outer, "get_decoder") else None
    return None if decoder in (None, encoder, outer) else decoder


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The generation cache among the arguments of a call: ``cache``; before transformers 5.24 the other names."""
    given = (arguments.get(name) for name in ("cache", "past_key_values", "cache_params"))
    return next((cache for cache in given if cache is not None), None)


def length_of(cache: Any) -> int:
    """Tokens that a cache holds, virtual ones included."""
    try:
        return 0 if cache is None else int(cache.get_seq_length())
    except (AttributeError, ValueError):  # xLSTM's state has no such method
        raise ConfigError(
            "This model keeps a recurrent state that does not count its tokens: with virtual tokens call it, or"
            " generate, with use_cache=False."
        ) from None


def make_room(cache: Any, n: int, backbone: nn.Module) -> None:
    """Static caches are made for the caller's tokens: add room for the virtual ones before they are allocated."""
    cache = getattr(cache, "self_attention_cache", cache)
    for layer in getattr(cache, "layers", ()):
        if hasattr(layer, "max_cache_len") and not layer.is_initialized:
            window = getattr(backbone.config, "sliding_window", None) if "Sliding" in type(layer).__name__ else None
            layer.max_cache_len = min(layer.max_cache_len + n, window or layer.max_cache_len + n)


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def maximum(backbone: nn.Module) -> int | None:
    """How many tokens a backbone has positions for; None if there is no limit."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in TABLES:
            taken = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
            return module.num_embeddings - taken
    limits = (getattr(backbone.config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def is_causal(backbone: nn.Module) -> bool:
    """Whether a token sees only what stands before it; where no attention says so, the family does (Bloom, Mamba)."""
    said = [m.is_causal for m in backbone.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    if said:
        return any(said)
    auto = sys.modules["transformers"].models.auto.modeling_auto
    kind = type(backbone.config)
    decodes = kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING
    return decodes and getattr(backbone.config, "attn_type", "uni") == "uni"  # XLNet sees both sides
