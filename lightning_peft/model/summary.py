"""Counts and bytes of what trains and what stays frozen: one source for console, loggers and README."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import Any

from torch import Tensor, nn

from lightning_peft.adapted import Adapted, CorrectedWeights, Delta, base_tensor
from lightning_peft.fingerprint import logical_shape
from lightning_peft.heads import unmarked_heads
from lightning_peft.lowrank import stacked
from lightning_peft.match import as_patterns
from lightning_peft.method import Method
from lightning_peft.model.adapters import Adapters, adapter_tensors, model_tensors
from lightning_peft.paths import size as size


def summarize(model: nn.Module) -> dict[str, Any]:
    """Describe an adapted model with plain values.

    Returns:
        ``methods`` (name and fields), ``trainable``, ``total`` (adapters included) and ``percent``,
        ``adapter_bytes`` (what a checkpoint holds) and ``base_bytes``, ``targets``: a row for each kind of adapted
        module with ``name`` (layer numbers as ``*``), ``modules``, ``parameters`` and ``bytes``,
        ``saved_modules`` and ``new_modules`` (trained in full), ``untrained_heads``: new output layers of timm and
        torchvision models, which are not trained unless they are named, ``frozen``: the top modules in which nothing
        trains, with their sizes, ``frozen_experts``: those of them that are stacked experts, with the methods that
        could adapt them, ``corrected_weights``: how many modules are corrected at their weights, and how many
        ``bytes`` of corrected copies a training step keeps until its backward pass (DoRA twice as many), and
        ``fingerprint`` of the base.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject, summarize
    >>> net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    >>> inject(net, LoRA(r=1, target_modules="0"))
    >>> s = summarize(net); s["trainable"], s["total"], [f["name"] for f in s["frozen"]]
    (20, 240, ['1'])
    """
    adapters = Adapters.of(model)
    record, root = adapters.record, adapters.network
    if record.summary is not None:
        return dict(record.summary)
    parameters = dict(root.named_parameters())
    added = adapter_tensors(root)
    trained = set(record.trained)
    trainable = {n: p for n, p in parameters.items() if n in trained or p.requires_grad}
    total = sum(_count(p) for p in parameters.values())
    count = sum(_count(p) for p in trainable.values())
    frozen = _frozen(root, trainable)
    experts = _frozen_experts(root, adapters.methods, trainable, [part["name"] for part in frozen])
    return {
        "methods": [{"name": type(m).__name__, **m.config()} for m in adapters.methods],
        "trainable": count,
        "total": total,
        "percent": 100 * count / max(total, 1),
        "adapter_bytes": sum(map(_bytes, adapters.tensors().values())),
        "base_bytes": sum(_bytes(p) for p in parameters.values() if id(p) not in added),
        "targets": _rows(trainable),
        "saved_modules": list(record.modules_to_save),
        "new_modules": list(record.new_modules),
        "untrained_heads": [name for name in unmarked_heads(root) if f"{name}.weight" not in trainable],
        "frozen": frozen + [row for row in experts if row["name"] not in {part["name"] for part in frozen}],
        "frozen_experts": experts,
        "corrected_weights": _corrected_weights(root),
        "fingerprint": record.base.values,
    }


def keep_sizes(model: nn.Module) -> None:
    """Remember counts and shapes before a strategy flattens the parameters."""
    record = Adapters.of(model).record
    if record.summary is None:
        record.summary = summarize(model)
        record.shapes = {n: logical_shape(t) for n, t in model_tensors(model).items()}


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
    if s["untrained_heads"]:
        lines.append(f"  new, and not trained: {', '.join(s['untrained_heads'])}")
        lines.append(f"    modules_to_save={s['untrained_heads']} trains it in full")
    if count := s["corrected_weights"]["modules"]:
        copies = f"{count} modules, copies" if count > 1 else "1 module, a copy"
        lines.append(
            f"  corrected at the weight: {copies} of {size(s['corrected_weights']['bytes'])} kept until backward"
        )
    experts = s["frozen_experts"]
    frozen = [row for row in s["frozen"] if row["name"] not in {expert["name"] for expert in experts}]
    if frozen:
        shown = [f"{f['name']} ({f['parameters']:,})" for f in frozen[:6]]
        more = f" and {len(frozen) - 6} more" if len(frozen) > 6 else ""
        lines.append(f"  frozen: {', '.join(shown)}{more}")
    lines += [f"  frozen experts: {_short(row['name'])} ({row['parameters']:,})" for row in experts]
    lines += textwrap.wrap(_how_to_train(s), 80, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _how_to_train(summary: dict[str, Any]) -> str:
    """What to name so that frozen experts train, if a word was given that might be taken to mean them."""
    for method in summary["methods"]:
        rows = [row for row in summary["frozen_experts"] if method["name"] in row["adaptable_by"]]
        patterns = as_patterns(method.get("target_modules"))
        words = [pattern for pattern in patterns if pattern in ("all-linear", "mlp")]
        if rows and words:
            endings = dict.fromkeys(row["name"].rpartition(".")[2] for row in rows)
            return f"{words[0]} leaves stacked experts out; target_modules={[*patterns, *endings]} trains them too"
    return ""


def _rows(trainable: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Group by module, layer numbers folded together."""
    modules, counts, sizes = Counter(), Counter(), Counter()
    seen: set[str] = set()
    for name, parameter in trainable.items():
        owner = name.rpartition(".")[0] or name
        row = _folded(owner)
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


def _frozen_experts(
    root: nn.Module, methods: list[Method], trainable: dict[str, nn.Parameter], frozen: list[str]
) -> list[dict[str, Any]]:
    """Stacked experts that stay frozen, but for those inside larger parts that do; layer numbers folded together."""
    rows: dict[str, dict[str, Any]] = {}
    for name, module in root.named_modules():
        if not stacked(module) or any(name.startswith(part + ".") for part in frozen):
            continue
        if any(n.startswith(name + ".") for n in trainable):
            continue
        row = rows.setdefault(_folded(name), {"name": _folded(name), "parameters": 0, "adaptable_by": []})
        row["parameters"] += sum(_count(p) for p in module.parameters())
        row["adaptable_by"] = [type(m).__name__ for m in methods if m.adapts(module)]
    return list(rows.values())


def _corrected_weights(root: nn.Module) -> dict[str, int]:
    """The modules that are corrected at their weights, and the size of those weights."""
    layers = {}
    for module in root.modules():
        if isinstance(module, CorrectedWeights):
            layers[id(module)] = module
        projection = getattr(module, "out_proj", None)
        if isinstance(module, nn.MultiheadAttention) and isinstance(projection, Adapted):  # it reads that weight
            layers[id(projection)] = projection
    weights = [base_tensor(layer, name) for layer in layers.values() for name in layer._corrected_names()]
    return {"modules": len(layers), "bytes": sum(_bytes(weight) for weight in weights)}


def _folded(name: str) -> str:
    """A name with the numbers of layers as stars."""
    return ".".join("*" if i and part.isdigit() else part for i, part in enumerate(name.split(".")))


def _short(name: str, width: int = 48) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]


def _count(parameter: Tensor) -> int:
    return logical_shape(parameter).numel()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
