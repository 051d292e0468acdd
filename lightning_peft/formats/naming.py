"""Names: of base tensors as peft spells them, and patterns that mean exactly the modules one has."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.adapted import Adapted, Delta
from lightning_peft.heads import label_names
from lightning_peft.model.adapters import adapter_tensors, persistent_buffers

#: modules that peft saves by itself for a task
TASK_MODULES = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def task_of(root: nn.Module) -> str | None:
    """What peft calls the task of a transformers model, by its class; None for models without a head or without text.

    >>> import transformers
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    >>> task_of(transformers.BertForTokenClassification(transformers.BertConfig(**sizes)))
    'TOKEN_CLS'
    """
    name = type(root).__name__
    task = next((t for ending, t in _TASKS.items() if name.endswith(ending)), None)
    if task and "input_ids" not in inspect.signature(type(root).forward).parameters:
        return None  # speech: peft's classes for tasks pass token ids on
    encoder_decoder = getattr(getattr(root, "config", None), "is_encoder_decoder", False)
    return None if task == "SEQ_2_SEQ_LM" and not encoder_decoder else task


def class_names(root: nn.Module) -> list[str] | None:
    """Names of the classes of a transformers model with a head for them; None where they are only numbered."""
    return label_names(root) if task_of(root) in ("SEQ_CLS", "TOKEN_CLS") else None


def name_in_peft(root: nn.Module, name: str) -> str:
    """The name that a tensor or module of the base has in peft, which wraps what it adapts."""
    module: Any = root
    theirs: list[str] = []
    for part in name.split("."):
        if _is_adapted(module):
            theirs.append("base_layer")
        in_attention = isinstance(module, nn.MultiheadAttention) and theirs[-1:] == ["base_layer"]
        module = getattr(module, part, None)
        theirs.append(part)
        if in_attention and part == "out_proj" and not _is_adapted(module):
            theirs.append("base_layer")  # peft wraps it together with the attention
    return ".".join(theirs)


def _is_adapted(module: Any) -> bool:
    return isinstance(module, Adapted) and "delta" in module._modules


def base_tensors(root: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Parameters and buffers of the base by their name: peft's name, and the tensor."""
    added = adapter_tensors(root)
    found = {}
    for name, tensor in (dict(root.named_parameters()) | persistent_buffers(root)).items():
        if id(tensor) not in added:
            found[name] = name_in_peft(root, name), tensor
    return found


def module_names(root: nn.Module) -> list[str]:
    """Names of all modules of the base."""
    names, closed = [], []
    for name, module in root.named_modules():
        if isinstance(module, Delta):
            closed.append(name + ".")
        elif name and not name.startswith(tuple(closed)):
            names.append(name)
    return names


def ends(pattern: str, name: str) -> bool:
    """Whether peft takes ``pattern`` to mean the module ``name``: all of it, or its trailing dotted part."""
    return name == pattern or name.endswith("." + pattern)


def ends_anyhow(pattern: str, name: str) -> bool:
    """As `ends`, where peft forgets the dot."""
    return name.endswith(pattern)


def searched(pattern: str, name: str) -> bool:
    """Whether peft's ``rank_pattern`` or ``alpha_pattern`` means a module."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


Means = Callable[[str, str], bool]


def suffixes(names: Iterable[str], universe: Iterable[str], means: Means = ends) -> list[str] | None:
    """The shortest list that means ``names`` and nothing else of ``universe``; None if there is no such list.

    >>> suffixes(["a.0.q", "a.1.q"], ["a.0.q", "a.1.q", "a.0.k"]), suffixes(["0"], ["0", "1.0"])
    (['q'], None)
    """
    wanted, every = set(names), set(universe)
    parts = max((n.count(".") for n in wanted), default=0) + 1
    for depth in [*range(1, parts + 1)]:
        choice = sorted({".".join(n.split(".")[-depth:]) for n in wanted})
        if {n for n in every if any(means(c, n) for c in choice)} == wanted:
            return choice
    return None


def expression(names: Iterable[str]) -> str:
    """A regular expression for full names, for the rare case in which no list of endings says it."""
    return "|".join(re.escape(n) for n in sorted(names))


def target_patterns(names: Iterable[str], universe: Iterable[str]) -> list[str] | str:
    """``target_modules`` for peft: a list of endings where one is exact, else an expression."""
    names = list(names)
    return suffixes(names, universe) or expression(names)


def differing(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """``rank_pattern`` or ``alpha_pattern`` for peft: what differs from the default, by pattern."""
    found: dict[str, Any] = {}
    for value in sorted({v for v in values.values() if v != default}):
        names = [n for n, v in values.items() if v == value]
        keys = suffixes(names, values, searched) or [f"^{re.escape(n)}" for n in sorted(names)]
        found |= dict.fromkeys(keys, value)
    return dict(sorted(found.items()))


def exact(name: str, others: Iterable[str]) -> str:
    """A pattern of ours that means this module and no other.

    >>> exact("0", ["0", "1.0"]), exact("a.q", ["a.q", "a.k"])
    ('re:0', 'a.q')
    """
    return f"re:{re.escape(name)}" if any(n.endswith("." + name) for n in others) else name
