"""The methods under contract: one for each file in configs/method, found by themselves."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from pathlib import Path

import torch
import yaml
from torch import nn

import lightning_peft
from lightning_peft import Method, adapter_state_dict, trainable_names
from lightning_peft.model.adapters import Adapters
from tests.models import MODELS, batch

#: QLoRA needs a base in 4 bits, which the models here are not: tests/methods/test_qlora.py
CONFIGS = sorted(c for c in (Path(__file__).parents[2] / "configs" / "method").glob("*.yaml") if c.stem != "qlora")


def example(config: Path, folder: Path, kind: str) -> Method:
    """The method of a config; a test module may supply one whose defaults need files (``battery_example``)."""
    module = f"tests.methods.test_{config.stem}"
    supplied = importlib.import_module(module) if importlib.util.find_spec(module) else None
    if hasattr(supplied, "battery_example"):
        return supplied.battery_example(folder, MODELS[kind])
    entry = yaml.safe_load(config.read_text())["peft"]
    method = getattr(lightning_peft, entry["class_path"])(**entry.get("init_args", {}))
    # small numbers for small models: a rank or length above their width says nothing more
    small = {"r": 2, "init_r": 3, "target_r": 2, "num_virtual_tokens": 3, "hidden_size": 16}
    fields = {f.name for f in dataclasses.fields(method)}
    extra = getattr(supplied, "BATTERY_FIELDS", {})
    return dataclasses.replace(method, **{k: v for k, v in small.items() if k in fields} | extra)


def train(model: nn.Module, kind: str, steps: int = 4, lr: float = 1e-2) -> dict[str, bool]:
    """A plain training loop; returns which trainable tensors got a non-zero gradient."""
    method = Adapters.of(model).methods[0]
    optimizer = torch.optim.AdamW(method.param_groups(model, lr, 0.0))
    seen = dict.fromkeys(trainable_names(model), False)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = model(**batch(kind, seed=step)).loss
        term = method.regularizer(model)
        (loss if term is None else loss + term).backward()
        method.transform_grads(model)
        for name, parameter in model.named_parameters():
            if name in seen and parameter.grad is not None:
                assert torch.isfinite(parameter.grad).all(), name
                seen[name] |= bool(parameter.grad.any())
        optimizer.step()
        method.after_step(model, step, steps)
    return seen


def shake(model: nn.Module) -> None:
    """Give every trained tensor a value far from its start, so that losing one changes the output."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        names = set(trainable_names(model))
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=g).to(parameter))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal names and equal bits."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def state_copy(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors, copied."""
    return {n: t.clone() for n, t in adapter_state_dict(model).items()}
