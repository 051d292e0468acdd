"""What inject did to a model, and THE definition of what trains: optimizer, checkpoint and summary all ask here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapted import Adapted, Delta
from lightning_peft.errors import PEFTError
from lightning_peft.match import is_metric
from lightning_peft.method import Method
from lightning_peft.readers import RootReader
from lightning_peft.samples import Samples
from lightning_peft.sharding import named_parameters, unwrapped

MARK = "_lightning_peft"


@dataclass
class Injection:
    """The record of one injection, kept on the network (plain data: it pickles and deep-copies with the model)."""

    methods: list[Method]
    targets: list[list[str]]  # per method, names before wrapping
    saved: list[str]  # modules trained and saved in full, new heads included
    new: list[str]  # those of them that from_pretrained did not fill
    base: dict[str, Any]  # fingerprint of what stays frozen
    trained: list[str] = field(default_factory=list)  # parameter names now
    frozen: list[str] = field(default_factory=list)
    before: dict[str, Tensor] = field(default_factory=dict)  # start values of base parameters that train
    buffers: dict[str, Tensor] = field(default_factory=dict)  # start values of buffers
    samples: Samples = field(default_factory=lambda: Samples({}))  # of the frozen weights of the base, at injection
    moved: set[str] = field(default_factory=set)  # names of those that a loaded file has brought with it
    outside: dict[str, Tensor] = field(default_factory=dict)  # the same for buffers beside the network, by full name
    flags: dict[str, bool] = field(default_factory=dict)  # requires_grad before, by name before wrapping
    summary: dict[str, Any] | None = None  # counts, and shapes by full name, before a strategy flattened parameters
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    root_reader: RootReader = field(default_factory=lambda: RootReader(()))
    awaits_base: bool = False  # injected on the meta device: the values of the base, and its fingerprint, are to come
    merged: bool = False
    disabled: int = 0  # depth of `disabled` contexts


def network(model: nn.Module) -> tuple[str, nn.Module]:
    """The network inside a LightningModule, with its path: the only child that has parameters, else the module itself.

    Files name tensors relative to it, so an adapter trained in one LightningModule fits another, or the bare network.
    """
    path, module = "", model
    packages = [sys.modules.get(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    kinds = tuple(kind for p in packages if (kind := getattr(p, "LightningModule", None)) is not None)
    if isinstance(model, kinds):
        parts = [(n, m) for n, m in model.named_children() if not is_metric(m) and any(True for _ in m.parameters())]
        if len(parts) == 1 and not model._parameters and list(parts[0][1].children()):  # a single layer has no names
            path, module = parts[0][0] + ".", parts[0][1]
    if type(module).__name__ == "OptimizedModule":  # torch.compile(net) as a submodule
        path, module = path + "_orig_mod.", module.get_submodule("_orig_mod")
    return path, module


def find(model: nn.Module) -> tuple[Injection, str, nn.Module] | None:
    """The injection in ``model`` with the path and the network it was made in, or None."""
    for name, module in model.named_modules():
        if MARK in module.__dict__:
            return module.__dict__[MARK], unwrapped(name + ".") if name else "", module
    return None


def require(model: nn.Module) -> tuple[Injection, str, nn.Module]:
    """As `find`, but a model without adapters is an error."""
    found = find(model)
    if found is None:
        raise PEFTError(
            f"{type(model).__name__} has no adapters. Call inject(model, method) or load_adapter(model, path) first,"
            " and pass the module they were called with, or one that contains it."
        )
    return found


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """All adapted modules with their names."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, Adapted) and "delta" in m._modules)


def adapter_tensors(model: nn.Module) -> set[int]:
    """``id`` of every parameter and buffer that adapters brought with them."""
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, Delta):
            found |= {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    return found


def trainable_names(model: nn.Module) -> list[str]:
    """Names of all parameters that train, in the order of ``named_parameters``.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> inject(net, LoRA(target_modules="0", modules_to_save="1"))
    >>> trainable_names(net)
    ['0.delta.lora_A', '0.delta.lora_B', '1.weight', '1.bias']
    """
    injection, prefix, _ = require(model)
    trained = {prefix + n for n in injection.trained}
    return [n for n, p in named_parameters(model) if n in trained or p.requires_grad]


def state_names(model: nn.Module) -> list[str]:
    """Frozen tensors and buffers that inference needs beside the trained ones; empty for plain LoRA.

    That is what the method declares, the buffers of modules trained in full, statistics that moved since injection,
    the buffers a LightningModule keeps beside its network, and frozen weights that the module has moved itself.
    """
    injection, prefix, root = require(model)
    outside = {n: b for n, b in persistent_buffers(model).items() if n in injection.outside} if prefix else {}
    tensors = dict(named_parameters(root)) | persistent_buffers(root)  # state_dict() would ask for these names again
    names = {unwrapped(n) for m in injection.methods for n in m.state_names(root)}
    names |= {n for n in injection.buffers if any(n.startswith(s + ".") for s in injection.saved)}
    names |= {n for n, old in injection.buffers.items() if n in tensors and moved(old, tensors[n])}
    names |= moved_weights(injection, root)
    beside = [n for n, b in outside.items() if moved(injection.outside[n], b)]
    return [prefix + n for n in tensors if n in names and n not in injection.trained] + beside


def adapter_names(model: nn.Module) -> list[str]:
    """``trainable_names + state_names``."""
    return list(dict.fromkeys(trainable_names(model) + state_names(model)))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name; of merged layers those of the base, which will be there again."""
    tensors = dict(named_parameters(model)) | {unwrapped(n): b for n, b in model.named_buffers()}
    for name, layer in adapted_modules(model):
        for own_name, original in layer._adapter.originals.items():
            tensors[f"{unwrapped(name)}.{own_name}" if name else own_name] = original
    return tensors


def base_weights(injection: Injection, root: nn.Module) -> dict[str, Tensor]:
    """The parameters that stay frozen and are no part of an adapter, by name."""
    added, parameters = adapter_tensors(root), model_tensors(root)
    names = [name for name in injection.flags if name in parameters and name not in injection.trained]
    return {name: parameters[name] for name in names if id(parameters[name]) not in added}


def moved_weights(injection: Injection, root: nn.Module) -> set[str]:
    """Frozen weights that have other values than at injection: moved by the module itself, or by a file."""
    if injection.summary is not None:  # flattened by a strategy: each process holds pieces
        return injection.moved
    return injection.moved | set(injection.samples.moved(base_weights(injection, root)))


def required_names(model: nn.Module) -> list[str]:
    """What a file must hold: `adapter_names` without the statistics, which travel only when they moved."""
    injection, prefix, root = require(model)
    state = [prefix + unwrapped(n) for m in injection.methods for n in m.state_names(root)]
    return list(dict.fromkeys(trainable_names(model) + state))


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to a state dict."""
    state, seen = {}, set()
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                state[unwrapped(f"{prefix}.{name}") if prefix else name] = buffer
    return state


def moved(old: Tensor, new: Tensor) -> bool:
    """Whether a tensor differs from its earlier value."""
    if old.is_meta or new.is_meta:
        return False
    return old.shape != new.shape or not torch.equal(old, new.detach().to(old.device, old.dtype))


def frozen_statistics(model: nn.Module) -> list[nn.Module]:
    """Normalisation layers with running statistics that do not train; in train mode they would drift all the same."""
    injection, _, root = require(model)
    if any(m.complete for m in injection.methods):
        return []
    training = {id(m) for name in injection.saved for m in root.get_submodule(name).modules()}
    return [
        m
        for m in root.modules()
        if getattr(m, "running_mean", None) is not None
        and id(m) not in training
        and not is_metric(m)
        and not any(p.requires_grad for p in m.parameters(recurse=False))
    ]


def refuse_disabled(injection: Injection, verb: str) -> None:
    """Inside `disabled` the tensors are those of the base: not the time to save, load or merge."""
    if injection.disabled:
        raise PEFTError(f"{verb} inside `with disabled(model)`: the adapters are switched off. Do it outside.")


def refuse_flat(model: nn.Module, verb: str) -> None:
    """A strategy that flattened the parameters left pieces of them: not to be read or written one by one."""
    found = find(model)
    if found is not None and found[0].summary is not None:
        raise PEFTError(
            f"{verb}: FSDP or DeepSpeed flattened the parameters of this model, and each process holds pieces. Save"
            " with trainer.save_checkpoint(path), and load that into a model built anew."
        )
