"""Adapter tensors to files and back, strict both ways."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import CheckpointError
from lightning_peft.files import SECTION, locate, read, write_adapter
from lightning_peft.format1 import upgraded
from lightning_peft.guards import bounded
from lightning_peft.injection import place, remove, settle_outside
from lightning_peft.sections import without_aliases
from lightning_peft.sharding import reshard, whole, write
from lightning_peft.switching import reset_buffers, switch
from lightning_peft.trainable import (
    adapter_names,
    base_weights,
    find,
    model_tensors,
    network,
    refuse_disabled,
    refuse_flat,
    require,
    required_names,
    trainable_names,
)
from lightning_peft.verify import (
    FORMAT_VERSION,
    method_from,
    other_base,
    other_values,
    short,
    some,
    source,
    verify,
    verify_keys,
    verify_section,
    verify_tensors,
)

#: bytes that an adapter may take whatever the size of the model
_ROOM = 2**28
#: the ways a file can be given
Source = str | os.PathLike | Mapping[str, Any]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that make up the adapter: exactly ``trainable_names + state_names``, detached.

    Of a sharded model all processes get whole tensors, and all must call this.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, adapter_state_dict, inject
    >>> net = nn.Sequential(nn.Linear(4, 4))
    >>> inject(net, LoRA(r=2))
    >>> {name: tuple(t.shape) for name, t in adapter_state_dict(net).items()}
    {'0.delta.lora_A': (2, 4), '0.delta.lora_B': (4, 2)}
    """
    refuse_disabled(require(model)[0], "save")
    refuse_flat(model, "adapter_state_dict")
    reshard(model)
    names, tensors = adapter_names(model), model_tensors(model)
    return {name: whole(tensors[name].detach()) for name in names}


def section(model: nn.Module) -> dict[str, Any]:
    """The description that travels with the tensors (primitives only)."""
    from lightning_peft import __version__

    injection, prefix, root = require(model)
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
        "labels": label_names(root),
        "save": "trainable",
    }


def label_names(root: nn.Module) -> list[str] | None:
    """Names of the classes in a transformers configuration, in order; None where they are only numbered."""
    names = getattr(getattr(root, "config", None), "id2label", None)
    if not isinstance(names, Mapping) or all(str(n).startswith("LABEL_") for n in names.values()):
        return None
    return [str(names[i]) for i in sorted(names)]


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
    write_adapter(locate(path), adapter_state_dict(model), section(model))


def load_adapter(model: nn.Module, path: Source) -> None:
    """Load a saved adapter, strictly.

    A model without adapters is injected with what the file describes; one with the same method takes the new values;
    anything else is an error, and then the model is as it was.

    Args:
        model: a LightningModule or the network inside it.
        path: a safetensors file, a folder with one, a Lightning checkpoint, or a state dict as `adapter_state_dict`
            gives it.

    Raises:
        CheckpointError: another base, method, rank or set of tensors, a plain checkpoint, a broken or newer file.
    """
    where = "the state dict" if isinstance(path, Mapping) else str(path)
    state, info = (path, None) if isinstance(path, Mapping) else read(path)
    if isinstance(path, Mapping) and SECTION in path:  # a whole checkpoint, loaded by the user
        state, info = upgraded(path["state_dict"], path[SECTION])
    fresh = find(model) is None
    if fresh and info is None:
        raise CheckpointError(f"{where} holds no {SECTION!r} section, so it cannot say how to adapt the model.")
    if fresh:
        inject_from(model, info, where)
    try:
        if info is not None:
            state = fitting(model, state, info, where)
        assign(model, state, where)
    except Exception:
        if fresh:
            withdraw(model)
        raise


def fitting(
    model: nn.Module, state: Mapping[str, Tensor], info: Mapping[str, Any], where: str, *, hollow: bool = False
) -> dict[str, Tensor]:
    """The tensors of a file under the names they have in ``model``, after all comparisons.

    ``hollow``: they stand for shapes alone, on the meta device.
    """
    verify_section(info, where)
    verify(model, info, where)
    state = without_aliases(state, info)
    verify_keys(state, info, where, hollow=hollow)
    if info.get("save") == "full":
        state = {name: state[name] for name in info["keys"]}
    state = reroot(state, info, model)
    verify_tensors(model, state, where)
    return state


def fitting_whole(model: nn.Module, state: Mapping[str, Tensor], info: Mapping[str, Any], where: str) -> dict:
    """As `fitting`, for a file with ``save="full"`` of which everything is to be loaded: it brings its own base."""
    verify_section(info, where)
    verify(model, info, where, values=False)
    state = reroot(state, info, model)
    injection, prefix, root = require(model)
    known = set(adapter_names(model)) | set(required_names(model))
    verify_tensors(model, {n: t for n, t in state.items() if n in known}, where)
    lost = [n for n, _ in root.named_parameters() if prefix + n not in state]
    if lost:
        raise CheckpointError(f"{where} should hold the whole model (save='full'), but lacks {some(lost)}.")
    injection.base = dict(info["base"])
    moved = {n[len(info["network"]) :] for n in info["keys"]}
    for name in injection.buffers:
        if name not in moved and prefix + name in state:
            injection.buffers[name] = state[prefix + name].detach().clone()
    base = set(base_weights(injection, root))
    injection.samples.update({name: state[prefix + name] for name in base - moved})
    injection.moved = base & moved
    return state


def inject_from(model: nn.Module, info: Mapping[str, Any], where: str, *, values: bool = True) -> None:
    """Inject the methods a file describes at the modules it names; ``values`` of the base must be the file's."""
    verify_section(info, where)
    methods = [method_from(entry, where) for entry in info["methods"]]
    _, root = network(model)
    modules = dict(root.named_modules(remove_duplicate=False))
    names = [n for entry in info["methods"] for n in entry["targets"]] + info["modules_to_save"]
    lost = [n for n in names if n not in modules]
    if lost:
        raise CheckpointError(
            f"{where} adapts modules that {type(root).__name__} lacks: {some(lost)}. It was made for"
            f" {info['base']['class']}{source(info)}; load it into that model."
        )
    targets = [{n: modules[n] for n in entry["targets"]} for entry in info["methods"]]
    size = sum(p.numel() * p.element_size() for p in root.parameters())
    try:
        with bounded(4 * size + _ROOM):
            place(root, methods, targets, info["modules_to_save"], info["new_modules"])
    except Exception as error:  # a file may name sizes and modules that no method was written for
        raise CheckpointError(f"{where}: its methods do not fit {type(root).__name__}: {short(error)}") from error
    settle_outside(model)
    ours = require(model)[0].base
    reason = other_values(require(model)[0], info, values=values)
    if reason:
        withdraw(model)
        raise CheckpointError(other_base(where, info, ours, reason))


def withdraw(model: nn.Module) -> None:
    """Take a fresh injection out again; no value has changed yet."""
    injection, _, root = require(model)
    remove(injection, root)


def reroot(state: Mapping[str, Tensor], info: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename a file's tensors from the place its network had to the place it has in ``model``.

    Tensors that a LightningModule kept beside its network are left out where the model has none of that name.
    """
    _, prefix, _ = require(model)
    old, known = info["network"], model_tensors(model)
    inside = {prefix + n[len(old) :]: t for n, t in state.items() if n.startswith(old)}
    return inside | {n: t for n, t in state.items() if not n.startswith(old) and n in known}


def assign(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copy values in after all names and shapes were compared; unmerges first. Other statistics start afresh."""
    verify_tensors(model, state, where)
    refuse_flat(model, "load_adapter")
    make_way(model, state)
    tensors = model_tensors(model)
    for name, value in state.items():
        write(tensors[name], value)


def make_way(model: nn.Module, state: Mapping[str, Tensor], *, whole: bool = False) -> None:
    """Unmerge, and set statistics that ``state`` does not hold back to their start: they had not moved then.

    Frozen weights among ``state`` had moved, unless it is the state of a ``whole`` model.
    """
    injection, prefix, root = require(model)
    refuse_disabled(injection, "load")
    reshard(root)
    switch(injection, root, merged=False)
    names = {name.removeprefix(prefix) for name in state}
    reset_buffers(injection, root, given=names)
    if not whole:
        injection.moved = names & set(base_weights(injection, root))
