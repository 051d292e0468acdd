"""Virtual tokens in a transformers backbone: the sequence is longer between its embedding and its last hidden state."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapted import Adapted, AdapterState
from lightning_peft.errors import ConfigError
from lightning_peft.prompting.backbone import (
    cache_of,
    decoder_of,
    is_causal,
    length_of,
    make_room,
    maximum,
    outermost,
    parameters_of,
)
from lightning_peft.prompting.insertion import Insertion, behind_real, first_real, trim

#: set on a cache: how many of the tokens it holds are virtual
HELD = "_lightning_peft_virtual"
SUPPORTED = "transformers models with token ids (encoders, decoders, encoder-decoders) and vision transformers"


class VirtualTokens(AdapterState):
    """Virtual tokens at the input embedding of a backbone. Inside the backbone, token i has the id ``-1 - i``.

    Hooks on the backbone put these ids into the batch and cut what comes out back to the caller's tokens. They are
    bound methods of this object, so the model copies and pickles.

    Args:
        embedding: the adapted embedding; its ``delta.vectors()`` (n, dim) are the tokens.
        n: number of virtual tokens.
        position: ``prepend`` (before the first real token) or ``append`` (behind the last).
    """

    def __init__(self, embedding: nn.Module, n: int, position: str = "prepend") -> None:
        super().__init__()
        self.embedding: Any = embedding
        self.n, self.position = n, position
        self.causal = False
        self.maximum: int | None = None
        self.names: tuple[str, ...] = ()  # arguments of the backbone
        # what belongs to one call:
        self.places: Insertion | None = None  # in the sequence of the backbone
        self.crossed: Insertion | None = None  # in the encoder states that a decoder attends to
        self.labels: Tensor | None = None
        self.text: int | None = None

    def fill(self, ids: Tensor) -> Tensor:
        """Embeddings of ids, of which negative ones stand for virtual tokens."""
        out = self.embedding._base_forward(ids.clamp(min=0))
        vectors = self.embedding.delta.vectors().to(out.dtype)
        # an id beyond the vectors is an error that may be found late: until then it must not stop the device
        virtual = nn.functional.embedding((-1 - ids).clamp(min=0, max=self.n - 1), vectors)
        return torch.where((ids < 0).unsqueeze(-1), virtual, out)

    # ---- hooks on the backbone -------------------------------------------------------------------------------------
    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Lengthen a batch on its way into the backbone."""
        self.places = None
        if not self.active:
            return None
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        states = kwargs.get("input_ids")
        states = kwargs.get("inputs_embeds") if states is None else states
        if states is None:
            return None
        cache, length = cache_of(kwargs), states.shape[1]
        past = length_of(cache)
        held = getattr(cache, HELD, 0)
        if not (held if past else self.wanted(states)):
            return None
        mask = kwargs.get("attention_mask")
        if mask is not None and getattr(mask, "ndim", 0) != 2:
            raise ConfigError(
                f"Virtual tokens need an attention mask of the form (batch, tokens); this one is {_form(mask)}."
            )
        kwargs.pop("cache_position", None)  # older transformers count the caller's tokens in it
        if past:
            self.lengthen_rest(kwargs, mask, past + length)
        else:
            make_room(cache, self.n, module)
            self.lengthen(kwargs, mask, length)
        return (), kwargs

    def wanted(self, states: Tensor) -> bool:
        """Whether a batch gets virtual tokens put in."""
        return True

    def lengthen(self, kwargs: dict[str, Any], mask: Tensor | None, length: int) -> None:
        """The first tokens of a sequence: ids, mask, positions and types get the virtual places."""
        self.check(length)
        self.places = places = Insertion(self.start(mask, length), self.n, length, self.causal and self.behind)
        if kwargs.get("input_ids") is not None:
            ids = kwargs["input_ids"]
            kwargs["input_ids"] = places.insert(ids, -1 - torch.arange(self.n, device=ids.device))
        else:
            kwargs["inputs_embeds"] = places.insert(kwargs["inputs_embeds"], self.embedding.delta.vectors())
        if mask is not None:  # over a static cache some models get one that is longer than the text
            kwargs["attention_mask"] = places._replace(length=mask.shape[1]).insert(mask, 1)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = places.positions(kwargs["position_ids"], mask)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if kwargs.get(name) is not None:
                kwargs[name] = places.insert(kwargs[name], 0)

    def lengthen_rest(self, kwargs: dict[str, Any], mask: Tensor | None, total: int) -> None:
        """Later tokens of a sequence whose cache holds the virtual tokens already."""
        self.check(total - self.n)
        if mask is not None:
            if mask.shape[1] + self.n < total:
                raise ConfigError(
                    f"The attention mask covers {mask.shape[1]} tokens; the cache and the new tokens have"
                    f" {total - self.n} beside the {self.n} virtual ones. Give only the tokens that the cache lacks."
                )
            longer = Insertion(first_real(mask), self.n, mask.shape[1]).insert(mask, 1)
            kwargs["attention_mask"] = longer[:, : max(total, mask.shape[1])]  # that of a static cache has its length
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + self.n

    @property
    def behind(self) -> bool:
        """Whether the virtual tokens stand behind the text."""
        return self.position == "append"

    def start(self, mask: Tensor | None, length: int) -> int | Tensor:
        """Column before which the virtual tokens go: at the edge of the real tokens, not of the padding.

        Appended on a causal model, they stand between the text and what is to be predicted: before the first label,
        and behind the text that ``generate`` was given.
        """
        if not self.behind:
            return 0 if mask is None else first_real(mask)
        if self.causal and self.labels is not None and self.labels.dim() == 2:
            known = self.labels != -100
            end = known.new_full((len(known), 1), length, dtype=torch.long)
            return torch.where(known.any(dim=1, keepdim=True), first_real(known), end)
        text = length if self.text is None else min(self.text, length)
        return text if mask is None else behind_real(mask[:, :text])

    def check(self, length: int) -> None:
        """Raise where the model has no positions for all tokens."""
        if self.maximum is not None and length + self.n > self.maximum:
            raise ConfigError(
                f"{length} tokens and {self.n} virtual tokens make {length + self.n}, more than the model's maximum of"
                f" {self.maximum}. Shorten the input or lower num_virtual_tokens."
            )

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Cut the backbone's output back."""
        places, self.places = self.places, None
        if places is None:
            return output
        parts = list(output.values() if hasattr(output, "values") else output)
        for part in parts:
            if hasattr(part, "get_seq_length"):
                setattr(part, HELD, self.n)
        if parts[0].shape[1] != places.length + places.n:
            raise ConfigError(
                f"{type(module).__name__} gives {parts[0].shape[1]} states for {places.length + places.n} tokens, so"
                " those of virtual tokens cannot be told from others. PTuning with placeholders, and LoRA, work on it."
            )
        return trim(output, places)

    def pool(self, module: nn.Module, args: tuple) -> tuple | None:
        """A pooler inside the backbone sees the caller's tokens."""
        if self.places is None or not args:
            return None
        return (trim(args[0], self.places), *args[1:])

    # ---- hooks around the backbone ---------------------------------------------------------------------------------
    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The labels tell where the text ends."""
        self.crossed = None
        self.labels = kwargs.get("labels")

    def leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Encoder states in an encoder-decoder's output have the caller's length."""
        self.labels = None
        places, self.crossed = self.crossed, None
        if places is None or not hasattr(output, "keys"):
            return output
        for name in [k for k in output if k.startswith(("encoder_", "cross_"))]:
            output[name] = trim(output[name], places)
        return output

    def cross(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """A decoder attends to the encoder's virtual tokens as well."""
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if not self.active or states is None:
            return None
        if mask is None:
            self.crossed = self.places
        elif mask.dim() == 2 and mask.shape[1] + self.n == states.shape[1]:
            self.crossed = Insertion(self.start(mask, mask.shape[1]), self.n, mask.shape[1])
            kwargs["encoder_attention_mask"] = self.crossed.insert(mask, 1)
        return args, kwargs

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"places": None, "crossed": None, "labels": None, "text": None}


class PromptedEmbedding(Adapted):
    """An embedding in which some ids stand for virtual tokens."""

    _adapter: VirtualTokens

    def forward(self, input: Tensor) -> Tensor:
        """input: ids (…) -> (…, dim)."""
        return self._adapter.fill(input) if self._adapter.active else self._base_forward(input)


class Generate:
    """Stands before a model's ``generate``: an appended prompt stays behind the text it was given."""

    def __init__(self, model: nn.Module, tokens: VirtualTokens) -> None:
        self.model, self.tokens = model, tokens

    def __call__(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", inputs)
        self.tokens.text = None if ids is None else ids.shape[1]
        try:
            return type(self.model).generate(self.model, inputs, *args, **kwargs)
        finally:
            self.tokens.text = None


class Prepare:
    """Stands before ``prepare_inputs_for_generation``, which for a static cache replaces the mask of real tokens by one
    over the cache that knows no virtual tokens: the backbone builds its own from the former."""

    def __init__(self, model: nn.Module, tokens: VirtualTokens) -> None:
        self.model, self.tokens = model, tokens

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(functools.partial(type(self.model).prepare_inputs_for_generation, self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = type(self.model).prepare_inputs_for_generation(self.model, *args, **kwargs)
        key = "decoder_attention_mask" if self.model.config.is_encoder_decoder else "attention_mask"
        if (self.tokens.active and getattr(inputs.get(key), "ndim", 2) != 2) or isinstance(inputs.get(key), dict):
            inputs[key] = kwargs.get(key)
        return inputs


def connect(model: nn.Module, tokens: VirtualTokens, backbone: nn.Module) -> None:
    """Hook virtual tokens into the backbone and what is around it."""
    outer = outermost(model, backbone)
    decoder = decoder_of(outer, backbone)
    tokens.causal = is_causal(backbone)
    tokens.maximum, tokens.names = maximum(backbone), parameters_of(backbone)
    if tokens.behind and hasattr(backbone, "eos_token_id") and not tokens.causal:
        raise ConfigError(
            f"{type(backbone).__name__} reads the state of its end-of-text token, which sees nothing behind it: use"
            " position='prepend'."
        )
    if tokens.behind and outer is not backbone and decoder is None and outer.config.is_encoder_decoder:
        raise ConfigError(f"The decoder of {type(outer).__name__} starts from fixed tokens: use position='prepend'.")
    backbone.register_forward_pre_hook(tokens.before, with_kwargs=True)
    for name in ("pooler", "head"):
        if isinstance(getattr(backbone, name, None), nn.Module):
            getattr(backbone, name).register_forward_pre_hook(tokens.pool)
    outer.register_forward_pre_hook(tokens.enter, with_kwargs=True)
    if decoder is None:
        backbone.register_forward_hook(tokens.after, with_kwargs=True)
    else:
        decoder.register_forward_pre_hook(tokens.cross, with_kwargs=True)
    outer.register_forward_hook(tokens.leave, with_kwargs=True)
    if tokens.behind and tokens.causal and hasattr(outer, "generate"):
        outer.__dict__["generate"] = Generate(outer, tokens)
    if decoder is None and hasattr(outer, "prepare_inputs_for_generation"):
        outer.__dict__["prepare_inputs_for_generation"] = Prepare(outer, tokens)


def disconnect(model: nn.Module, tokens: AdapterState) -> None:
    """Take every hook of these virtual tokens, or of a prefix, away."""
    for module in model.modules():
        for hooks, also in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is tokens]:
                del hooks[key]
                also.pop(key, None)
        for name in ("generate", "prepare_inputs_for_generation"):
            if getattr(module.__dict__.get(name), "tokens", None) is tokens:
                del module.__dict__[name]


def _form(mask: Any) -> str:
    return str(tuple(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__
