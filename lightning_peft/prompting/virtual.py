"""Virtual tokens in a transformers backbone: the sequence is longer between its embedding and its last hidden state.

One forward pass, in the order in which its hooks run. All of them are methods of `VirtualTokens`, and hold no state of
their own: what they tell each other is in the `Call` of the pass::

    generate(ids)                              Generate              opens a call: the length of the prompt
      model(ids, mask, labels)                 open_call             opens a call: the labels
        [embedding(ids)]                       PromptedEmbedding     models of several modalities embed ids themselves
        backbone(ids, mask, positions)         open_inner_call       opens a call: ids, mask, positions, cache
                                               lengthen              puts the ids -1 … -n in; what goes with ids grows
          embedding(longer ids)                PromptedEmbedding     negative ids become the learned vectors
          layers                                                     see a longer sequence and know nothing of it
          pooler(states)                       shorten_pooler_input  sees the caller's tokens
                                               shorten               cuts the states back to the caller's tokens,
                                               hand_over             or, if a decoder reads them, says where they are
                                               close_call            drops the call of the backbone
        [decoder(ids, states, mask)]           lengthen_memory_mask  attends to virtual tokens as well
                                               shorten_memory        cuts back what the output tells of the encoder
                                               close_call            drops the call of the model

Where the backbone is the outermost model, there is one call. Every later token of a generation takes the same way, but
nothing is put in, because the cache holds the virtual tokens: `lengthen` only counts them in mask and positions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapted import Adapted
from lightning_peft.errors import ConfigError
from lightning_peft.prompting.backbone import (
    argument_names,
    decoder_of,
    embedding_of,
    is_causal,
    make_room,
    named_arguments,
    outermost,
    position_limit,
)
from lightning_peft.prompting.call import Call, Calls, length_of
from lightning_peft.prompting.hooked import HookedState
from lightning_peft.prompting.insertion import Insertion, row_ends, row_starts, trim

#: attribute of a generation cache: how many of the tokens that it holds are virtual
VIRTUAL_IN_CACHE = "_lightning_peft_virtual"
SUPPORTED = "transformers models with token ids (encoders, decoders, encoder-decoders) and vision transformers"


class InsertedTokens(HookedState):
    """Virtual tokens in a sequence, of text or of image patches: what both have in common.

    Args:
        num_virtual_tokens: how many they are.
    """

    def __init__(self, num_virtual_tokens: int) -> None:
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens
        #: the forward passes that are running
        self.calls = Calls()

    def switch(self, layer: nn.Module, on: bool) -> None:
        """Switch the virtual tokens on or off."""
        super().switch(layer, on)
        self.calls.forget()

    # ---- hooks -----------------------------------------------------------------------------------------------------
    def open_inner_call(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before a model: a call of its own, which knows what the one around it knows."""
        self.calls.open(module)

    def close_call(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a model, also when it raised: the call is over."""
        self.calls.close(module, output)

    def shorten(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After a backbone: cut its output back to the caller's tokens."""
        insertion = self.current_insertion()
        return output if insertion is None else trim(output, insertion)

    def shorten_pooler_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before a pooler inside the backbone: it pools the caller's tokens."""
        insertion = self.current_insertion()
        if insertion is None or not args:
            return None
        return (trim(args[0], insertion), *args[1:])

    def current_insertion(self) -> Insertion | None:
        """Where the virtual tokens stand in this pass; None if there are none."""
        call = self.calls.current()
        return None if call is None else call.insertion

    def hook_poolers(self, backbone: nn.Module) -> None:
        """Let the parts of a backbone that pool its states see the caller's tokens."""
        for name in ("pooler", "head"):
            pooler = getattr(backbone, name, None)
            if isinstance(pooler, nn.Module):
                self.before(pooler, self.shorten_pooler_input)


class VirtualTokens(InsertedTokens):
    """Virtual tokens at the input embedding of a backbone. Inside the backbone, token i has the id ``-1 - i``.

    Hooks are bound methods of this object, so that the model copies and pickles. The module docstring tells in which
    order they run.

    Args:
        num_virtual_tokens: how many they are.
        position: ``prepend`` (before the first real token) or ``append`` (behind the last).
    """

    def __init__(self, num_virtual_tokens: int, position: str = "prepend") -> None:
        super().__init__(num_virtual_tokens)
        self.position = position
        # What `connect` finds out about the backbone.
        #: arguments of its forward; empty where there is no backbone around the embedding
        self.argument_names: tuple[str, ...] = ()
        #: whether a token sees only what stands before it
        self.causal = False
        #: how many tokens it has positions for; None for any number
        self.position_limit: int | None = None

    def number(self, embedding: nn.Module, ids: Tensor) -> Tensor:
        """The ids that an embedding is given, with negative ones for virtual tokens. Here `lengthen` put them in."""
        return ids

    # ---- hooks on the outermost model ------------------------------------------------------------------------------
    def open_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the outermost model: its labels tell where the text ends."""
        call = self.calls.open(module)
        call.labels = kwargs.get("labels")

    def shorten_memory(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the outermost model: what an encoder-decoder tells of its encoder has the caller's length."""
        call = self.calls.current()
        if call is None or call.memory_insertion is None or not isinstance(output, Mapping):
            return
        for name in list(output):
            if name.startswith(("encoder_", "cross_")):
                output[name] = trim(output[name], call.memory_insertion)

    # ---- hooks on the backbone -------------------------------------------------------------------------------------
    def lengthen(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Before the backbone: make room for the virtual tokens in its arguments."""
        call = self.calls.current()
        if call is None or not self.active:
            return None
        arguments = named_arguments(self.argument_names, args, kwargs)
        call.read(arguments)
        if call.tokens is None:
            return None
        # P-tuning: the caller's text has places for the virtual tokens, so its length stays.
        marked_ids = self.marked_ids(module, call)
        if marked_ids is not None:
            return (), arguments | {"input_ids": marked_ids}
        cached_length = length_of(call.cache)
        if cached_length:
            # Later tokens of a generation. Its first pass may have been one without virtual tokens: adapters were off,
            # or the text had placeholders.
            if not getattr(call.cache, VIRTUAL_IN_CACHE, 0):
                return None
        elif not self.wanted(module, call):
            return None
        # A mask over scores (batch, heads, queries, keys) does not tell which tokens are padding.
        mask = call.attention_mask
        if mask is not None and getattr(mask, "ndim", 0) != 2:
            form = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ConfigError(f"Virtual tokens need an attention mask of the form (batch, tokens); this one is {form}.")
        arguments.pop("cache_position", None)  # older transformers count the caller's tokens in it
        if cached_length:
            self._count_cached(arguments, call, cached_length + call.length)
        else:
            self._check_length(call.length)
            make_room(call.cache, self.num_virtual_tokens, module)
            self._insert(arguments, call, module)
        return (), arguments

    def marked_ids(self, backbone: nn.Module, call: Call) -> Tensor | None:
        """The ids (batch, tokens) of a text that has places for the virtual tokens, negative there; else None."""
        return None

    def wanted(self, backbone: nn.Module, call: Call) -> bool:
        """Whether virtual tokens are put into this pass."""
        return True

    def _insert(self, arguments: dict[str, Any], call: Call, backbone: nn.Module) -> None:
        """The first pass over a text: put the virtual tokens in, and lengthen what goes with the tokens."""
        count, mask = self.num_virtual_tokens, call.attention_mask
        insertion = Insertion(self._start(call), count, call.length, last_answers=self.causal and self.behind)
        call.insertion = insertion
        if call.input_ids is not None:
            # The embedding inside the backbone knows by these ids which vector is meant.
            virtual_ids = -1 - torch.arange(count, device=call.input_ids.device)
            arguments["input_ids"] = insertion.insert(call.input_ids, virtual_ids)
        elif call.inputs_embeds is not None:
            vectors = embedding_of(backbone).delta.vectors()
            arguments["inputs_embeds"] = insertion.insert(call.inputs_embeds, vectors)
        if mask is not None:
            # Over a static cache the mask of some models is longer than the text.
            arguments["attention_mask"] = insertion._replace(length=mask.shape[1]).insert(mask, 1)
        if call.position_ids is not None:
            arguments["position_ids"] = insertion.positions(call.position_ids, mask)
        # Virtual tokens belong to the first segment, and to the text.
        for name in ("token_type_ids", "mm_token_type_ids"):
            if arguments.get(name) is not None:
                arguments[name] = insertion.insert(arguments[name], 0)

    def _count_cached(self, arguments: dict[str, Any], call: Call, total: int) -> None:
        """A later pass, whose cache holds the virtual tokens: count them in mask and positions.

        Args:
            arguments: of the backbone; changed.
            call: the pass.
            total: tokens in the cache and in this pass, virtual ones included.
        """
        count, mask = self.num_virtual_tokens, call.attention_mask
        self._check_length(total - count)
        if mask is not None:
            # transformers' generate gives the whole mask; a caller with a cache of his own may forget to.
            if mask.shape[1] + count < total:
                raise ConfigError(
                    f"The attention mask covers {mask.shape[1]} tokens; the cache and the new tokens have"
                    f" {total - count} beside the {count} virtual ones. Give only the tokens that the cache lacks."
                )
            longer = Insertion(row_starts(mask), count, mask.shape[1]).insert(mask, 1)
            # The mask over a static cache has the length of the cache, which has grown already.
            arguments["attention_mask"] = longer[:, : max(total, mask.shape[1])]
        if call.position_ids is not None:
            arguments["position_ids"] = call.position_ids + count

    @property
    def behind(self) -> bool:
        """Whether the virtual tokens stand behind the text."""
        return self.position == "append"

    def _start(self, call: Call) -> int | Tensor:
        """Column before which the virtual tokens go: at the edge of the real tokens, not of the padding.

        Appended on a causal model, they stand between the text and what is to be predicted: before the first label,
        and behind the prompt that ``generate`` was given.
        """
        if not self.behind:
            return call.row_starts()
        # Labels of a causal model name the token that follows, (batch, tokens); those of a classifier have one axis.
        labels = call.labels
        if self.causal and labels is not None and labels.dim() == 2:
            labelled = labels != -100
            row_end = labelled.new_full((len(labelled), 1), call.length, dtype=torch.long)
            return torch.where(labelled.any(dim=1, keepdim=True), row_starts(labelled), row_end)
        text_length = call.length
        if call.prompt_length is not None:
            text_length = min(call.prompt_length, text_length)
        return call.row_ends(text_length)

    def _check_length(self, length: int) -> None:
        """Raise where the model has no positions for ``length`` tokens and the virtual ones."""
        total = length + self.num_virtual_tokens
        if self.position_limit is not None and total > self.position_limit:
            raise ConfigError(
                f"{length} tokens and {self.num_virtual_tokens} virtual tokens make {total}, more than the model's"
                f" maximum of {self.position_limit}. Shorten the input or lower num_virtual_tokens."
            )

    def shorten(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the backbone: cut its output back to the caller's tokens, and say what its cache holds."""
        insertion = self.current_insertion()
        if insertion is None:
            return output
        # The next pass over this cache must know that virtual tokens are in it.
        parts = list(output.values()) if isinstance(output, Mapping) else list(output)
        for part in parts:
            if hasattr(part, "get_seq_length"):
                setattr(part, VIRTUAL_IN_CACHE, self.num_virtual_tokens)
        # Some models pool the sequence inside (Funnel).
        num_states = parts[0].shape[1]
        if num_states != insertion.longer_length:
            raise ConfigError(
                f"{type(module).__name__} gives {num_states} states for {insertion.longer_length} tokens, so"
                " those of virtual tokens cannot be told from others. PTuning with placeholders, and LoRA, work on it."
            )
        return trim(output, insertion)

    def hand_over(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After an encoder whose states a decoder reads: the model around it learns where the virtual ones are."""
        call = self.calls.current()
        if call is not None and call.enclosing is not None:
            call.enclosing.memory_insertion = call.insertion

    # ---- hook on the decoder of an encoder-decoder -----------------------------------------------------------------
    def lengthen_memory_mask(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a decoder: it attends to the encoder's virtual tokens as well."""
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if not self.active or states is None or mask is None or mask.dim() != 2:
            return None
        length = mask.shape[1]
        if length + self.num_virtual_tokens != states.shape[1]:
            return None
        # In a generation the encoder has run on its own before, so its places are found once more.
        start = row_ends(mask) if self.behind else row_starts(mask)
        insertion = Insertion(start, self.num_virtual_tokens, length)
        call = self.calls.current()
        if call is not None:
            call.memory_insertion = insertion
        return args, kwargs | {"encoder_attention_mask": insertion.insert(mask, 1)}


class PromptedEmbedding(Adapted):
    """An embedding in which negative ids stand for virtual tokens: ``-1 - i`` for the vector i of ``delta``."""

    _adapter: VirtualTokens

    def forward(self, input: Tensor) -> Tensor:
        """input: ids (…) -> (…, dim)."""
        tokens = self._adapter
        if not tokens.active:
            return self._base_forward(input)
        ids = tokens.number(self, input)
        embedded = self._base_forward(ids.clamp(min=0))
        vectors = self.delta.vectors().to(embedded.dtype)
        # An id beyond the vectors is an error that may be found late; until then it must not stop the device.
        vector_index = (-1 - ids).clamp(min=0, max=tokens.num_virtual_tokens - 1)
        virtual = nn.functional.embedding(vector_index, vectors)
        return torch.where((ids < 0).unsqueeze(-1), virtual, embedded)


class Generate:
    """Stands before a model's ``generate``: an appended prompt stays behind the text that it was given."""

    def __init__(self, model: nn.Module, tokens: VirtualTokens) -> None:
        self.model, self.tokens = model, tokens

    def __call__(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        # That of the class: the attribute of the instance is this object.
        generate: Any = type(self.model).generate
        ids = kwargs.get("input_ids", inputs)
        with self.tokens.calls.opened(self) as call:
            call.prompt_length = None if ids is None else ids.shape[1]
            return generate(self.model, inputs, *args, **kwargs)


class Prepare:
    """Stands before a model's ``prepare_inputs_for_generation``.

    For a static cache that replaces the mask of real tokens by one over the cache, which knows no virtual tokens. The
    backbone builds its own mask from that of real tokens.
    """

    def __init__(self, model: nn.Module, tokens: VirtualTokens) -> None:
        self.model, self.tokens = model, tokens

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model's own method: ``generate`` asks for the names of its arguments."""
        return inspect.signature(functools.partial(type(self.model).prepare_inputs_for_generation, self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        model: Any = self.model
        inputs = type(model).prepare_inputs_for_generation(model, *args, **kwargs)
        name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
        mask = inputs.get(name)
        # One mask over the cache (batch, 1, queries, keys), or one for each kind of layer by its name.
        one_over_the_cache = getattr(mask, "ndim", 2) != 2
        if isinstance(mask, dict) or (self.tokens.active and one_over_the_cache):
            inputs[name] = kwargs.get(name)
        return inputs


def connect(model: nn.Module, tokens: VirtualTokens, backbone: nn.Module) -> None:
    """Hook virtual tokens into the backbone and what is around it.

    Raises:
        ConfigError: the model cannot take tokens behind its text.
    """
    outer = outermost(model, backbone)
    decoder = decoder_of(outer, backbone)
    tokens.causal = is_causal(backbone)
    tokens.position_limit = position_limit(backbone)
    tokens.argument_names = argument_names(backbone)
    if tokens.behind:
        _check_appendable(tokens, outer, backbone, decoder)
    # Hooks of one module run in the order in which they are set.
    tokens.before(outer, tokens.open_call, with_kwargs=True)
    if outer is not backbone:
        tokens.before(backbone, tokens.open_inner_call)
    tokens.before(backbone, tokens.lengthen, with_kwargs=True)
    tokens.hook_poolers(backbone)
    if decoder is None:
        tokens.after(backbone, tokens.shorten)
    else:
        tokens.after(backbone, tokens.hand_over)
        tokens.before(decoder, tokens.lengthen_memory_mask, with_kwargs=True)
        tokens.after(outer, tokens.shorten_memory)
    # A call ends after all other hooks, and also where one of them or the forward raises.
    tokens.after(outer, tokens.close_call, always_call=True)
    if outer is not backbone:
        tokens.after(backbone, tokens.close_call, always_call=True)
    # Methods are replaced on the instance: no hook runs around them.
    if tokens.behind and tokens.causal and hasattr(outer, "generate"):
        outer.__dict__["generate"] = Generate(outer, tokens)
    if decoder is None and hasattr(outer, "prepare_inputs_for_generation"):
        outer.__dict__["prepare_inputs_for_generation"] = Prepare(outer, tokens)


def disconnect(model: nn.Module, tokens: InsertedTokens) -> None:
    """Undo `connect`, of text or of images."""
    tokens.unhook()
    for module in model.modules():
        for name in ("generate", "prepare_inputs_for_generation"):
            if getattr(module.__dict__.get(name), "tokens", None) is tokens:
                del module.__dict__[name]


def _check_appendable(tokens: VirtualTokens, outer: nn.Module, backbone: nn.Module, decoder: nn.Module | None) -> None:
    """Raise where tokens behind the text would be seen by nobody, or could not stand there."""
    # CLIP's text model pools at its end-of-text token, in front of an appended prompt.
    if hasattr(backbone, "eos_token_id") and not tokens.causal:
        raise ConfigError(
            f"{type(backbone).__name__} reads the state of its end-of-text token, which sees nothing behind it: use"
            " position='prepend'."
        )
    # The backbone is a decoder (Whisper) whose first tokens say the language and the task.
    config: Any = outer.config
    if outer is not backbone and decoder is None and config.is_encoder_decoder:
        raise ConfigError(f"The decoder of {type(outer).__name__} starts from fixed tokens: use position='prepend'.")
