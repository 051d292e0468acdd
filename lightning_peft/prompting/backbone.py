"""Where a transformers model has its input embedding, its backbone, its decoder, and its limits."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightning_peft.prompting.positions import POSITION_TABLES


def pretrained_model_class() -> Any:
    """transformers' ``PreTrainedModel``; an empty tuple, which nothing is an instance of, if it was never imported."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return () if modeling is None else modeling.PreTrainedModel


def backbones(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The innermost transformers models that take token ids, each with its input embedding."""
    pretrained_model = pretrained_model_class()
    embeddings = {}
    for module in model.modules():
        if isinstance(module, pretrained_model) and "input_ids" in argument_names(module):
            embedding = embedding_of(module)
            if embedding is not None:
                embeddings[module] = embedding
    # A model with a head takes ids as well, but only hands them to the backbone inside it.
    for module, embedding in embeddings.items():
        inner = [part for part in module.modules() if part is not module and part in embeddings]
        if not inner:
            yield module, embedding


def embedding_of(module: nn.Module) -> Any:
    """The table of a model's input embedding, or None."""
    try:
        table = module.get_input_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):  # models of images and sound
        return None
    return table if isinstance(table, nn.Module) and hasattr(table, "num_embeddings") else None


def outermost(model: nn.Module, inner: nn.Module) -> nn.Module:
    """The outermost transformers model inside ``model`` that contains another; possibly that one itself."""
    pretrained_model = pretrained_model_class()
    for module in model.modules():  # from the outside to the inside
        if isinstance(module, pretrained_model) and any(part is inner for part in module.modules()):
            return module
    raise AssertionError(f"{type(inner).__name__} is not inside a transformers model")


def decoder_of(outer: nn.Module, encoder: nn.Module) -> nn.Module | None:
    """The decoder that attends to this encoder in an encoder-decoder model, or None."""
    config: Any = outer.config
    if outer is encoder or not getattr(config, "is_encoder_decoder", False) or not hasattr(outer, "get_decoder"):
        return None
    # Some models answer with themselves, or with the one stack that they have.
    decoder = outer.get_decoder()  # type: ignore[operator]
    return None if decoder in (None, encoder, outer) else decoder


def make_room(cache: Any, num_virtual_tokens: int, backbone: nn.Module) -> None:
    """Make an empty static cache longer, which was sized for the caller's tokens; other caches grow by themselves."""
    # The cross-attention's half of an encoder-decoder cache holds the encoder's states.
    cache = getattr(cache, "self_attention_cache", cache)
    for layer in getattr(cache, "layers", ()):
        if not hasattr(layer, "max_cache_len") or layer.is_initialized:
            continue
        longer = layer.max_cache_len + num_virtual_tokens
        # A sliding layer never holds more than its window. transformers tells it by its class alone.
        window = None
        if "Sliding" in type(layer).__name__:
            window = getattr(backbone.config, "sliding_window", None)
        layer.max_cache_len = min(longer, window) if window else longer


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, without ``self``."""
    return _argument_names(type(module).forward)


@functools.cache
def _argument_names(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def named_arguments(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; ``names`` are those of the positional ones."""
    named = dict(zip(names, args, strict=False))
    named.update(kwargs)
    return named


def position_limit(backbone: nn.Module) -> int | None:
    """How many tokens a backbone has positions for; None if there is no limit."""
    for name, module in backbone.named_modules():
        if not isinstance(module, nn.Embedding) or name.rpartition(".")[2] not in POSITION_TABLES:
            continue
        # RoBERTa's positions start behind the row of the padding, OPT's and BART's behind an offset.
        if module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
        return module.num_embeddings - getattr(module, "offset", 0)
    for name in ("max_position_embeddings", "max_seq_len"):
        limit = getattr(backbone.config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def is_causal(backbone: nn.Module) -> bool:
    """Whether a token sees only what stands before it."""
    answers = []
    for module in backbone.modules():
        answer = getattr(module, "is_causal", None)
        if isinstance(answer, bool):
            answers.append(answer)
    if answers:
        return any(answers)
    # Bloom's and Mamba's layers do not say it. Their family does: it generates text and fills no gaps.
    auto = sys.modules["transformers"].models.auto.modeling_auto
    config = type(backbone.config)
    generates = config in auto.MODEL_FOR_CAUSAL_LM_MAPPING and config not in auto.MODEL_FOR_MASKED_LM_MAPPING
    sees_both_sides = getattr(backbone.config, "attn_type", "uni") != "uni"  # XLNet
    return generates and not sees_both_sides
