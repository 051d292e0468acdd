"""Adapter tensors to files and back, strict both ways."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import CheckpointError, ConfigError, PEFTError
from lightning_peft.files import SECTION, read, write_adapter
from lightning_peft.fingerprint import difference
from lightning_peft.injection import place, remove, switch, unload
from lightning_peft.method import Method, registry
from lightning_peft.trainable import Injection, find, network, require, state_names, trainable_names

FORMAT_VERSION = 1
#: the ways a file can be given
Source = str | os.PathLike | Mapping[str, Any]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that make up the adapter: exactly ``trainable_names + state_names``, detached.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, adapter_state_dict, inject
    >>> net = nn.Sequential(nn.Linear(4, 4))
    >>> inject(net, LoRA(r=2))
    >>> {name: tuple(t.shape) for name, t in adapter_state_dict(net).items()}
    {'0.delta.lora_A': (2, 4), '0.delta.lora_B': (4, 2)}
    """
    names = adapter_names(model)
    tensors = model_tensors(model)
    return {name: tensors[name].detach() for name in names}


def adapter_names(model: nn.Module) -> list[str]:
    """``trainable_names + state_names``."""
    return list(dict.fromkeys(trainable_names(model) + state_names(model)))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def section(model: nn.Module) -> dict[str, Any]:
    """The description that travels with the tensors (primitives only)."""
    from lightning_peft import __version__

    injection, prefix, _ = require(model)
    return {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "versions": {"torch": str(torch.__version__)},
        "network": prefix,
        "methods": [
            {"type": type(m).__name__, "config": m.config(), "targets": list(names)}
            for m, names in zip(injection.methods, injection.targets, strict=True)
        ],
        "modules_to_save": list(injection.saved),
        "new_modules": list(injection.new),
        "keys": adapter_names(model),
        "trainable": trainable_names(model),
        "base": dict(injection.base),
        "save": "trainable",
    }


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapter as one safetensors file with its description inside; through a temporary name, then renamed.

    >>> import tempfile, os
    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject, load_adapter, save_adapter
    >>> net = nn.Sequential(nn.Linear(4, 4))
    >>> inject(net, LoRA(r=2))
    >>> path = os.path.join(tempfile.mkdtemp(), "adapter.safetensors")
    >>> save_adapter(net, path); load_adapter(net, path)
    """
    write_adapter(Path(path), adapter_state_dict(model), section(model))


def load_adapter(model: nn.Module, path: Source) -> None:
    """Load a saved adapter, strictly.

    A model without adapters is injected with what the file describes; one with the same method takes the new values;
    anything else is an error, and then the model is as it was.

    Args:
        model: a LightningModule or the network inside it.
        path: a safetensors file, a Lightning checkpoint, or a state dict as `adapter_state_dict` gives it.

    Raises:
        CheckpointError: another base, method, rank or set of tensors, a plain checkpoint, a broken or newer file.
    """
    where = "the state dict" if isinstance(path, Mapping) else str(path)
    state, info = (path, None) if isinstance(path, Mapping) else read(path)
    if isinstance(path, Mapping) and SECTION in path:  # a whole checkpoint, loaded by the user
        state, info = path["state_dict"], path[SECTION]
    fresh = find(model) is None
    if info is not None:
        check_version(info, where)
        if fresh:
            inject_from(model, info, where)
        check(model, info, where)
        check_keys(state, info, where)
        state = reroot(state, info, model)
        if info.get("save") == "full":
            known = set(adapter_names(model))
            state = {n: t for n, t in state.items() if n in known}
    elif fresh:
        raise CheckpointError(f"{where} holds no {SECTION!r} section, so it cannot say how to adapt the model.")
    try:
        assign(model, state, where)
    except PEFTError:
        if fresh:
            unload(model)
        raise


def check_version(info: Mapping[str, Any], where: str) -> None:
    """Refuse a file written by a newer format."""
    version = info.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{where}: its {SECTION!r} section is damaged (format_version={version!r}).")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format {version}, written by lightning_peft {info.get('library_version')}; this version"
            f" reads up to format {FORMAT_VERSION}. Upgrade: pip install -U lightning-peft."
        )


def inject_from(model: nn.Module, info: Mapping[str, Any], where: str) -> None:
    """Inject the methods a file describes at the modules it names."""
    methods = [method_from(entry, where) for entry in info["methods"]]
    _, root = network(model)
    modules = dict(root.named_modules(remove_duplicate=False))
    names = [n for entry in info["methods"] for n in entry["targets"]] + list(info["modules_to_save"])
    lost = [n for n in names if n not in modules]
    if lost:
        raise CheckpointError(
            f"{where} adapts modules that {type(root).__name__} lacks: {_some(lost)}. It was made for"
            f" {info['base']['class']}{_source(info)}; load it into that model."
        )
    targets = [{n: modules[n] for n in entry["targets"]} for entry in info["methods"]]
    try:
        place(root, methods, targets, list(info["modules_to_save"]), list(info["new_modules"]))
    except (RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{where}: its methods do not fit {type(root).__name__}: {error}") from error
    ours = require(model)[0].base
    reason = difference(ours, info["base"])
    if reason:
        injection, _, root = require(model)
        remove(injection, root)
        raise CheckpointError(_other_base(where, info, ours, reason))


def method_from(entry: Mapping[str, Any], where: str) -> Method:
    """Build a method from its entry in a file; names resolve through the registry, nothing is imported."""
    import lightning_peft.methods  # noqa: F401  (defines the classes)

    kinds = registry()
    kind = kinds.get(entry["type"])
    if kind is None:
        raise CheckpointError(f"{where} uses the method {entry['type']!r}, unknown here. Known: {', '.join(kinds)}.")
    try:
        return kind(**entry["config"])
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{where}: its {entry['type']} cannot be built: {error}") from error


def check(model: nn.Module, info: Mapping[str, Any], where: str) -> None:
    """Compare a file's description with what is in the model; raise what differs."""
    injection = require(model)[0]
    theirs = [method_from(entry, where) for entry in info["methods"]]
    _check_methods(injection, theirs, info, where)
    reason = difference(injection.base, info["base"])
    if reason:
        raise CheckpointError(_other_base(where, info, injection.base, reason))


def check_keys(state: Mapping[str, Tensor], info: Mapping[str, Any], where: str) -> None:
    """Raise unless a file holds what its own section lists."""
    if info.get("save") == "full":
        return
    missing, extra = set(info["keys"]) - set(state), set(state) - set(info["keys"])
    if missing or extra:
        raise CheckpointError(_misfit(where, missing, extra))


def reroot(state: Mapping[str, Tensor], info: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename a file's tensors from the place its network had to the place it has in ``model``.

    Buffers that a LightningModule kept beside its network are left out where the model has none of that name.
    """
    _, prefix, _ = require(model)
    old, known = info["network"], dict(model.named_buffers())
    inside = {prefix + n[len(old) :]: t for n, t in state.items() if n.startswith(old)}
    return inside | {n: t for n, t in state.items() if not n.startswith(old) and n in known}


def compare(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Raise unless names and shapes of ``state`` are those of the adapter in ``model``."""
    needed = required_names(model)
    tensors = model_tensors(model)
    missing = [n for n in needed if n not in state]
    known = set(needed) | set(dict(model.named_buffers()))  # statistics travel only when they moved
    extra = [n for n in state if n not in known]
    if missing or extra:
        raise CheckpointError(_misfit(where, missing, extra))
    wrong = [
        f"{n} {tuple(t.shape)} (here {tuple(tensors[n].shape)})"
        for n, t in state.items()
        if n in tensors and t.shape != tensors[n].shape
    ]
    if wrong:
        raise CheckpointError(f"{where} has other shapes than the adapters in the model: {_some(wrong)}.")


def required_names(model: nn.Module) -> list[str]:
    """What a file must hold: `adapter_names` without the statistics, which travel only when they moved."""
    injection, prefix, root = require(model)
    state = [prefix + n for m in injection.methods for n in m.state_names(root)]
    return list(dict.fromkeys(trainable_names(model) + state))


def assign(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copy values in after all names and shapes were compared; unmerges first."""
    compare(model, state, where)
    injection, _, root = require(model)
    switch(injection, root, merged=False)
    tensors = model_tensors(model)
    with torch.no_grad():
        for name, value in state.items():
            if name in tensors:
                tensors[name].copy_(value)


def _check_methods(injection: Injection, theirs: list[Method], info: Mapping[str, Any], where: str) -> None:
    ours = injection.methods
    if [type(m) for m in ours] != [type(m) for m in theirs]:
        raise CheckpointError(
            f"{where} was trained with {_names(theirs)}, the model has {_names(ours)}. Inject the method of the file,"
            " or load it into a model without adapters."
        )
    for mine, other, names, entry in zip(ours, theirs, injection.targets, info["methods"], strict=True):
        mine_config, other_config = mine.config(), other.config()
        wrong = [
            f"{k}={other_config.get(k)!r} (here {mine_config.get(k)!r})"
            for k in mine_config
            if k not in mine.free_fields and mine_config.get(k) != other_config.get(k)
        ]
        if wrong:
            raise CheckpointError(
                f"{where}: its {type(other).__name__} differs from the one in the model: {', '.join(wrong)}."
                " Use the settings of the file; `lightning-peft inspect` shows them."
            )
        if set(names) != set(entry["targets"]):
            only = sorted(set(names) ^ set(entry["targets"]))
            raise CheckpointError(
                f"{where}: it adapts {len(entry['targets'])} modules, the model has {len(names)} adapted; they differ"
                f" in {_some(only)}. Use the same target_modules."
            )


def _misfit(where: str, missing: Collection[str], extra: Collection[str]) -> str:
    parts = [f"it lacks {_some(missing)}" if missing else "", f"it has in excess {_some(extra)}" if extra else ""]
    return f"{where} does not fit the adapters in the model: {'; '.join(p for p in parts if p)}."


def _names(methods: list[Method]) -> str:
    return " + ".join(type(m).__name__ for m in methods)


def _source(info: Mapping[str, Any]) -> str:
    source = info["base"].get("source")
    return f" from {source}" if source else ""


def _other_base(where: str, info: Mapping[str, Any], ours: Mapping[str, Any], reason: str) -> str:
    return (
        f"{where} was trained on another base model (fingerprint {info['base']['values'][:8]}, here"
        f" {ours['values'][:8]}): {reason}. Load it into {info['base']['class']}{_source(info)}."
    )


def _some(names: Collection[str], count: int = 4) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
