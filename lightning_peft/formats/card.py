"""The model card of an adapter: a README with the head that the Hugging Face hub reads."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_peft.errors import printable
from lightning_peft.formats.naming import class_names, task_of
from lightning_peft.method import Method
from lightning_peft.model.adapters import Adapters
from lightning_peft.model.summary import size, summarize

_PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
}
#: by library, what is imported and what puts the adapter on the base
_USE = {
    "peft": ("from peft import PeftModel", 'model = PeftModel.from_pretrained(base, "PATH OF THIS FOLDER")'),
    "lightning_peft": (
        "from lightning_peft import load_adapter",
        'load_adapter(base, "PATH OF THIS FOLDER")  # or a LightningModule that holds the base',
    ),
}
#: classes that are named in the card's code
_MOST_NAMES = 30
_ELSEWHERE = ("target_modules", "modules_to_save", "adapters", "adapter")


def card(
    model: nn.Module,
    *,
    library: str,
    data: str | None = None,
    metrics: Mapping[str, float] | None = None,
    base_name: str | None = None,
    tokenizer: bool = False,
) -> str:
    """The card of the adapter in ``model``.

    Args:
        model: an adapted network or LightningModule.
        library: what the folder is for, ``peft`` or ``lightning_peft``.
        data: what it was trained on.
        metrics: results, by name.
        base_name: what to call the base; by default where it was loaded from.
        tokenizer: whether the folder has one.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject
    >>> net = nn.Sequential(nn.Linear(4, 4))
    >>> inject(net, LoRA(r=2))
    >>> print(card(net, library="peft", metrics={"val_accuracy": 0.5}).splitlines()[7])
    # LoRA adapter for Sequential
    """
    adapters = Adapters.of(model)
    base = adapters.record.base
    source = base_name or base.source
    names = " + ".join(type(m).__name__ for m in adapters.methods)
    parts = [
        _head(adapters.network, adapters.methods, source, library),
        f"# {names} adapter for {_title(source, base.class_name)}",
        _facts(model, source, data),
        _results(metrics),
        f"## Use\n\n```python\n{_use(adapters.network, source, library, tokenizer)}\n```",
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _use(root: nn.Module, source: str, library: str, tokenizer: bool) -> str:
    """Code that builds the base and puts the adapter on it."""
    imported, applied = _USE[library]
    kind = type(root).__name__
    if not hasattr(root, "from_pretrained"):
        return f"{imported}\n\n{applied}"
    named = source if on_hub(source) else f"PATH OF {_title(source, kind)}"
    lines = [imported, f"from transformers import {'AutoTokenizer, ' if tokenizer else ''}{kind}", ""]
    lines += [f"base = {kind}.from_pretrained({named!r}{_labels(root)})", applied]
    if tokenizer:
        lines.append('tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS FOLDER")')
    return "\n".join(lines)


def _labels(root: Any) -> str:
    """The argument that gives a new head its classes: with their names, where they have any and are not too many."""
    if task_of(root) not in ("SEQ_CLS", "TOKEN_CLS"):
        return ""
    names = class_names(root)
    if names is None or len(names) > _MOST_NAMES:
        return f", num_labels={root.config.num_labels}"
    return f", id2label={dict(enumerate(names))!r}"


def _head(root: nn.Module, methods: list[Method], source: str, library: str) -> str:
    tags = [type(m).__name__.lower() for m in methods] + ["lightning-peft"]
    lines = ["---"]
    if on_hub(source):
        lines.append(f"base_model: {source}")
        tags.insert(0, f"base_model:adapter:{source}")
    lines.append(f"library_name: {library}")
    if task := _PIPELINES.get(task_of(root) or ""):
        lines.append(f"pipeline_tag: {task}")
    return "\n".join([*lines, "tags:", *(f"- {t}" for t in tags), "---"])


def on_hub(source: str) -> bool:
    """Whether a base's source reads as an id of the hub: what stands in a card's head must be one.

    >>> on_hub("org/model"), on_hub("/data/model"), on_hub("")
    (True, False, False)
    """
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None and not os.path.exists(source)


def _title(source: str, kind: str) -> str:
    return (source if on_hub(source) else Path(source).name) or kind


def _facts(model: nn.Module, source: str, data: str | None) -> str:
    adapters = Adapters.of(model)
    record = adapters.record
    base, summary = record.base, summarize(model)
    rows = [("method", "; ".join(settings(m) for m in adapters.methods))]
    rows += [("paper", m.paper) for m in adapters.methods if m.paper]
    known = f"`{source}` " if source else ""
    rows.append(("base model", f"{known}({base.class_name}, {base.parameters:,} parameters)"))
    rows.append(("fingerprint of the base", f"`{base.values}`"))
    count = f"{summary['trainable']:,} of {summary['total']:,} parameters ({summary['percent']:.2f} %)"
    rows.append(("trained", f"{count}, {size(summary['adapter_bytes'])}"))
    rows.append(("at", _places([n for names in record.targets for n in names])))
    if record.modules_to_save:
        rows.append(("trained in full", ", ".join(f"`{n}`" for n in record.modules_to_save)))
    if data:
        rows.append(("data", data))
    return "\n".join(["| | |", "|---|---|", *(f"| {a} | {_cell(b)} |" for a, b in rows if b)])


def settings(method: Method) -> str:
    """A method with the fields that differ from its defaults.

    >>> from lightning_peft import LoRA
    >>> settings(LoRA(r=4, target_modules=["q_proj"]))
    'LoRA(r=4)'
    """
    given = []
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        made = field.default_factory is not dataclasses.MISSING
        default: Any = field.default_factory() if made else field.default  # type: ignore[misc]
        value = getattr(method, field.name)
        if value != default and field.name not in _ELSEWHERE:
            given.append(f"{field.name}={value!r}")
    return f"{type(method).__name__}({', '.join(given)})"


def _places(names: list[str]) -> str:
    last = list(dict.fromkeys(n.rpartition(".")[2] for n in names))
    shown = ", ".join(f"`{n}`" for n in last[:8]) + (", …" if len(last) > 8 else "")
    return f"{len(names)} module{'s' if len(names) > 1 else ''}: {shown}" if names else ""


def _results(metrics: Mapping[str, float] | None) -> str:
    if not metrics:
        return ""
    rows = [f"| {_cell(name)} | {value:.4f} |" for name, value in sorted(metrics.items())]
    return "\n".join(["## Results", "", "| metric | value |", "|---|---|", *rows])


def _cell(text: str) -> str:
    return printable(text.replace("|", "\\|").replace("\n", " "))
