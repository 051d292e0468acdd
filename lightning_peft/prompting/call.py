"""What one forward pass knows, for the hooks and adapted layers that act inside it.

Virtual tokens need facts that the input embedding is never given: which tokens are padding, where the labels begin, how
many tokens the cache holds. The outermost hook of a network opens a `Call`; hooks and layers further in read it and add
to it; it is dropped when the module that it was opened for has returned or raised::

    calls = Calls()                  # one for each network, kept by an adapter's state
    call = calls.open(module)        # in a forward pre-hook of the outermost module
    call = calls.current()           # in a hook or an adapted layer inside: the pass that this thread is in, or None
    calls.close(module, output)      # in a forward hook of the outermost module, registered with always_call=True

Threads do not see each other's calls, so replicas and generation in a thread of its own do not meet. A forward pass
inside another one of the same network has a call of its own. Copies and pickles of `Calls` are empty.

Gradient checkpointing runs layers once more during the backward pass, when the call is over. The autograd graph of the
output therefore keeps the call, and `Calls.current` returns it while that graph is differentiated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lightning_peft.adapted import current_backward, thread_key
from lightning_peft.errors import ConfigError
from lightning_peft.prompting.insertion import Insertion, row_ends, row_starts


@dataclass(eq=False)
class Call:
    """One forward pass of a module, with what is known about it.

    The tokens are those of the caller, before virtual ones were put in. They are None until the backbone is reached,
    and where the caller gave nothing.
    """

    #: the module, or any other object, that the call was opened for
    opener: object
    #: the pass around this one, whose labels, prompt length and embedded ids it takes over
    enclosing: Call | None = None
    #: token ids (batch, tokens)
    input_ids: Tensor | None = None
    #: embeddings (batch, tokens, dim), where the backbone was given these instead of ids
    inputs_embeds: Tensor | None = None
    #: (batch, cached + tokens), 1 at real tokens and 0 at padding
    attention_mask: Tensor | None = None
    #: (batch, tokens), or one such plane for each axis of a rotary embedding
    position_ids: Tensor | None = None
    #: keys and values of earlier tokens, while text is generated
    cache: Any = None
    #: what the head compares its output with
    labels: Tensor | None = None
    #: how many tokens ``generate`` was given, where it runs around this pass
    prompt_length: int | None = None
    #: the ids that the input embedding looked up last
    embedded_ids: Tensor | None = None
    #: where virtual tokens stand in the backbone's sequence
    insertion: Insertion | None = None
    #: where they stand in the encoder states that a decoder attends to
    memory_insertion: Insertion | None = None

    def __post_init__(self) -> None:
        if self.enclosing is not None:
            self.labels = self.enclosing.labels
            self.prompt_length = self.enclosing.prompt_length
            self.embedded_ids = self.enclosing.embedded_ids

    def read(self, arguments: Mapping[str, Any]) -> None:
        """Take the tokens, and what goes with them, from the arguments of a backbone, by name."""
        self.input_ids = arguments.get("input_ids")
        self.inputs_embeds = arguments.get("inputs_embeds")
        self.attention_mask = arguments.get("attention_mask")
        self.position_ids = arguments.get("position_ids")
        self.cache = cache_among(arguments)

    @property
    def tokens(self) -> Tensor | None:
        """The ids, or else the embeddings: (batch, tokens, …)."""
        return self.inputs_embeds if self.input_ids is None else self.input_ids

    @property
    def length(self) -> int:
        """How many tokens the caller gave in this pass."""
        return 0 if self.tokens is None else self.tokens.shape[1]

    def row_starts(self) -> Tensor | int:
        """Column of the first real token: of each row (batch, 1), or 0 for all rows without a mask."""
        return 0 if self.attention_mask is None else row_starts(self.attention_mask)

    def row_ends(self, length: int) -> Tensor | int:
        """Column behind the last real token among the first ``length``: of each row (batch, 1), or one for all rows."""
        return length if self.attention_mask is None else row_ends(self.attention_mask[:, :length])


class Calls:
    """The forward passes of one network that are running."""

    def __init__(self) -> None:
        # By thread: the running calls, the innermost last.
        self._running: dict[int, list[Call]] = {}
        # By thread: what is known before the next call.
        self._ahead: dict[int, Call] = {}
        # By torch's number of a backward pass: the call that is differentiated. Only the graph of its output keeps it,
        # so that it goes when the graph goes.
        self._differentiated: WeakValueDictionary[int, Call] = WeakValueDictionary()

    def current(self) -> Call | None:
        """The innermost pass that this thread is in, or the one that it differentiates; None outside of both."""
        running = self._running.get(thread_key())
        if running:
            return running[-1]
        if torch.compiler.is_compiling():
            return None
        return self._differentiated.get(current_backward())

    def current_or_next(self) -> Call:
        """The current call; outside of one, a call that the next one of this thread takes its facts from.

        Whoever embeds the ids himself calls the embedding before the model.
        """
        call = self.current()
        return self._ahead.setdefault(thread_key(), Call(None)) if call is None else call

    def open(self, opener: object) -> Call:
        """Begin a call inside the current one."""
        thread = thread_key()
        enclosing = self.current() or self._ahead.pop(thread, None)
        call = Call(opener, enclosing)
        self._running.setdefault(thread, []).append(call)
        return call

    def close(self, opener: object, output: Any = None) -> None:
        """End the call that was opened for ``opener``; nothing happens if that is not the innermost one.

        Args:
            opener: what `open` was given.
            output: what the module returned. Its graph keeps the call for checkpointed layers.
        """
        # A hook that runs after a failure is called also where the pre-hook that opens was never reached.
        running = self._running.get(thread_key())
        if not running or running[-1].opener is not opener:
            return
        call = running.pop()
        if not running:
            del self._running[thread_key()]
        # Compiled code recomputes inside its own graph, without these hooks.
        if not torch.compiler.is_compiling():
            self._keep_for_backward(call, output)

    @contextmanager
    def opened(self, opener: object) -> Iterator[Call]:
        """A call that lasts as long as the block."""
        call = self.open(opener)
        try:
            yield call
        finally:
            self.close(opener)

    def forget(self) -> None:
        """Drop what an interrupted pass has left behind: on Ctrl-C torch runs no hooks."""
        self._running.clear()
        self._ahead.clear()

    def _keep_for_backward(self, call: Call, output: Any) -> None:
        """Let the backward pass find the call.

        It arrives at an output before it reaches any layer behind it. Where several passes are differentiated together,
        autograd goes through them one after the other, the last one first.
        """

        def arrive(gradients: tuple[Tensor, ...]) -> None:
            self._differentiated[current_backward()] = call

        for tensor in _tensors_in(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(arrive)

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The generation cache among the arguments of a call: ``cache``; before transformers 5.24 the other names."""
    for name in ("cache", "past_key_values", "cache_params"):
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def length_of(cache: Any) -> int:
    """How many tokens a cache holds, virtual ones included; 0 without a cache.

    Raises:
        ConfigError: the cache is a recurrent state, which does not count.
    """
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # the state of xLSTM has no such method, that of Mamba raises
        raise ConfigError(
            "This model keeps a recurrent state that does not count its tokens: with virtual tokens call it, or"
            " generate, with use_cache=False."
        ) from None


def _tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors of a model's output, which may be a mapping or a tuple of further ones."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors_in(tuple(output.values()))
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors_in(part)
