"""Counts and bytes of what trains and what stays frozen: one source for console, loggers and README."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn

from lightning_peft.adapted import Delta
from lightning_peft.fingerprint import logical_shape
from lightning_peft.paths import size as size
from lightning_peft.trainable import adapter_names, adapter_tensors, model_tensors, require


def summarize(model: nn.Module) -> dict[str, Any]:
    """Describe an adapted model with plain values.

    Returns:
        ``methods`` (name and fields), ``trainable``, ``total`` (adapters included) and ``percent``,
        ``adapter_bytes`` (what a checkpoint holds) and ``base_bytes``, ``targets``: a row for each kind of adapted
        module with ``name`` (layer numbers as ``*``), ``modules``, ``parameters`` and ``bytes``,
        ``saved_modules`` and ``new_modules`` (trained in full), ``frozen``: the top modules in which nothing trains,
        with their sizes, and ``fingerprint`` of the base.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject, summarize
    >>> net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    >>> inject(net, LoRA(r=1, target_modules="0"))
    >>> s = summarize(net); s["trainable"], s["total"], [f["name"] for f in s["frozen"]]
    (20, 240, ['1'])
    """
    injection, _, root = require(model)
    if injection.summary is not None:
        return dict(injection.summary)
    parameters, tensors = dict(root.named_parameters()), model_tensors(model)
    added = adapter_tensors(root)
    trained = set(injection.trained)
    trainable = {n: p for n, p in parameters.items() if n in trained or p.requires_grad}
    total = sum(_count(p) for p in parameters.values())
    count = sum(_count(p) for p in trainable.values())
    return {
        "methods": [{"name": type(m).__name__, **m.config()} for m in injection.methods],
        "trainable": count,
        "total": total,
        "percent": 100 * count / max(total, 1),
        "adapter_bytes": sum(_bytes(tensors[n]) for n in adapter_names(model)),
        "base_bytes": sum(_bytes(p) for p in parameters.values() if id(p) not in added),
        "targets": _rows(trainable),
        "saved_modules": list(injection.saved),
        "new_modules": list(injection.new),
        "frozen": _frozen(root, trainable),
        "fingerprint": injection.base["values"],
    }


def keep_sizes(model: nn.Module) -> None:
    """Remember counts and shapes before a strategy flattens the parameters."""
    injection = require(model)[0]
    if injection.summary is None:
        injection.summary = summarize(model)
        injection.shapes = {n: logical_shape(t) for n, t in model_tensors(model).items()}


def describe(model: nn.Module) -> str:
    """The summary as text, at most 80 columns wide, for the console.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject
    >>> net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    >>> inject(net, LoRA(r=1, target_modules="0"))
    >>> print(describe(net))
    LoRA trains 20 of 240 parameters (8.33 %)
      the adapter takes 80 B, the base 880 B
      trained         modules   parameters
      0.delta               1           20
      frozen: 1 (110)
    """
    s = summarize(model)
    names = " + ".join(m["name"] for m in s["methods"])
    width = max([14, *(len(_short(t["name"])) for t in s["targets"])])
    lines = [
        f"{names} trains {s['trainable']:,} of {s['total']:,} parameters ({s['percent']:.2f} %)",
        f"  the adapter takes {size(s['adapter_bytes'])}, the base {size(s['base_bytes'])}",
        f"  {'trained':<{width}}  modules {'parameters':>12}",
    ]
    lines += [f"  {_short(t['name']):<{width}}  {t['modules']:>7} {t['parameters']:>12,}" for t in s["targets"]]
    if s["new_modules"]:
        lines.append(f"  new, trained in full: {', '.join(s['new_modules'])}")
    if s["frozen"]:
        shown = [f"{f['name']} ({f['parameters']:,})" for f in s["frozen"][:6]]
        more = f" and {len(s['frozen']) - 6} more" if len(s["frozen"]) > 6 else ""
        lines.append(f"  frozen: {', '.join(shown)}{more}")
    return "\n".join(lines)


def _rows(trainable: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Group by module, layer numbers folded together."""
    modules, counts, sizes = Counter(), Counter(), Counter()
    seen: set[str] = set()
    for name, parameter in trainable.items():
        owner = name.rpartition(".")[0] or name
        row = ".".join("*" if i and part.isdigit() else part for i, part in enumerate(owner.split(".")))
        modules[row] += owner not in seen
        seen.add(owner)
        counts[row] += _count(parameter)
        sizes[row] += _bytes(parameter)
    return [{"name": n, "modules": modules[n], "parameters": counts[n], "bytes": sizes[n]} for n in modules]


def _frozen(root: nn.Module, trainable: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The largest parts in which nothing trains."""
    parts: list[dict[str, Any]] = []
    holds_trainable: set[str] = set()  # every module above a trainable parameter
    for name in trainable:
        while name := name.rpartition(".")[0]:
            holds_trainable.add(name)

    def visit(module: nn.Module, name: str) -> None:
        for key, child in module.named_children():
            path = f"{name}.{key}" if name else key
            count = sum(_count(p) for p in child.parameters())
            if not count or isinstance(child, Delta):
                continue
            if path not in holds_trainable:
                parts.append({"name": path, "parameters": count})
            elif name.count(".") < 1:
                visit(child, path)

    visit(root, "")
    return parts


def _short(name: str, width: int = 48) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]


def _count(parameter: Tensor) -> int:
    return logical_shape(parameter).numel()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
