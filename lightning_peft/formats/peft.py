"""To peft and back: folders that ``peft.PeftModel.from_pretrained`` reads and writes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.bottleneck.placement import AdapterMethod
from lightning_peft.errors import CheckpointError, ConfigError, PEFTError
from lightning_peft.fields import settle
from lightning_peft.formats.card import card
from lightning_peft.formats.folder import PROMPT, TUNER, Folder, Incoming, Outgoing, read_folder, write_folder
from lightning_peft.formats.for_vllm import check_for_vllm
from lightning_peft.formats.lowrank import read_lora, write_biases, write_lora
from lightning_peft.formats.naming import (
    TASK_MODULES,
    base_tensors,
    class_names,
    ends_anyhow,
    module_names,
    suffixes,
    target_patterns,
    task_of,
)
from lightning_peft.formats.prompts import read_prefix, read_prompt, write_prefix, write_prompt, write_ptuning
from lightning_peft.formats.vectors import read_adalora, read_ia3, read_vera, write_adalora, write_ia3, write_vera
from lightning_peft.heads import new_modules
from lightning_peft.method import Method
from lightning_peft.methods.adalora import AdaLoRA
from lightning_peft.methods.bitfit import BitFit
from lightning_peft.methods.full import FullFineTuning
from lightning_peft.methods.ia3 import IA3
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.prefix_tuning import PrefixTuning
from lightning_peft.methods.prompt_tuning import PromptTuning
from lightning_peft.methods.ptuning import PTuning
from lightning_peft.methods.vera import VeRA
from lightning_peft.model.adapters import Adapters, Injection, model_tensors, moved, network_of
from lightning_peft.model.injection import inject_at
from lightning_peft.saving.section import some

_WRITERS: dict[type[Method], Callable[[nn.Module, Any, list[str]], Outgoing]] = {
    LoRA: write_lora,
    BitFit: write_biases,
    AdaLoRA: write_adalora,
    VeRA: write_vera,
    IA3: write_ia3,
    PrefixTuning: write_prefix,
    PromptTuning: write_prompt,
    PTuning: write_ptuning,
}
_READERS: dict[str, Callable[[Folder, nn.Module], Incoming]] = {
    "LORA": read_lora,
    "ADALORA": read_adalora,
    "VERA": read_vera,
    "IA3": read_ia3,
    "PREFIX_TUNING": read_prefix,
    "PROMPT_TUNING": read_prompt,
    "P_TUNING": read_prompt,
}


def export_peft(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    data: str | None = None,
    metrics: Mapping[str, float] | None = None,
    tokenizer: Any = None,
    base_name: str | None = None,
    reader: Literal["peft", "vllm"] = "peft",
) -> None:
    """Write the adapter as a folder for peft, with a model card: the same outputs there, and the same merged weights.

    PiSSA and OLoRA starts, parts of fused projections and Delta-LoRA's followed weights become further ranks of a
    plain LoRA; networks behind prefixes and prompts are replaced by what they give. The model stays as it is.
    Prompts stand before the padding in peft, before the first real token here: pad on the right to compare.

    Args:
        model: an adapted LightningModule or network.
        directory: folder, made if it does not exist.
        data: what it was trained on, for the card.
        metrics: results, for the card.
        tokenizer: tokenizer or processor to write beside the adapter.
        base_name: what to call the base, such as its id on the hub; by default where it was loaded from, which for a
            local folder means something on this machine only.
        reader: what shall read the folder. ``vllm`` reads folders of peft's, but not all of them.

    Raises:
        PEFTError: peft (or vLLM) cannot express the method, or an option of it; the message says what can be done
            instead.

    >>> import os, tempfile
    >>> from torch import nn
    >>> from lightning_peft import LoRA, export_peft, inject
    >>> net, folder = nn.Sequential(nn.Linear(4, 4)), tempfile.mkdtemp()
    >>> inject(net, LoRA(r=2)); export_peft(net, folder); sorted(os.listdir(folder))
    ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    adapters = Adapters.of(model)
    adapters.refuse_disabled("export")
    record, root = adapters.record, adapters.network
    method = _single(adapters.methods)
    outgoing = _writer(method)(root, method, record.targets[0])
    patterns, kept = _saved(root, record, outgoing)
    tensors = outgoing.tensors | _base(base_tensors(root), kept, record, outgoing)
    named = base_name or record.base.source
    config = _common(root, record, outgoing, named) | outgoing.fields | {"modules_to_save": patterns or None}
    if isinstance(config.get("target_modules"), list) and config["peft_type"] != "IA3":
        universe = [n for n in module_names(root) if not _inside(n, kept)]
        config["target_modules"] = target_patterns(config["target_modules"], universe)
    if reader == "vllm":
        check_for_vllm(config, tensors)
    text = card(model, library="peft", data=data, metrics=metrics, base_name=base_name, tokenizer=tokenizer is not None)
    write_folder(Path(directory).expanduser(), config, tensors, text, class_names(root), tokenizer)


def _single(methods: list[Method]) -> Method:
    if len(methods) == 1:
        return methods[0]
    names = " + ".join(type(m).__name__ for m in methods)
    raise PEFTError(
        f"{names} cannot be exported to peft: a folder of peft's holds one method. save_adapter(model, path) writes"
        " them as one file of ours."
    )


def _writer(method: Method) -> Callable[[nn.Module, Any, list[str]], Outgoing]:
    for kind in type(method).__mro__:
        if kind in _WRITERS:
            return _WRITERS[kind]
    if isinstance(method, FullFineTuning):
        reason = "it is the whole model. save_merged(model, folder) writes it for from_pretrained."
    elif isinstance(method, AdapterMethod):
        reason = "peft has no bottleneck adapters. save_adapter(model, path) writes our own file."
    else:
        reason = "peft has no such method. save_adapter(model, path) writes our own file."
    raise PEFTError(f"{type(method).__name__} cannot be exported to peft: {reason}")


def _common(root: nn.Module, record: Injection, outgoing: Outgoing, base_name: str) -> dict[str, Any]:
    """Fields that every folder has. A task brings modules along that peft wants to find in the file."""
    task = task_of(root)
    config = getattr(root, "config", None)
    auto = None
    if task in TASK_MODULES and outgoing.prefix == TUNER:
        wanted = {n for n in module_names(root) if any(ends_anyhow(p, n) for p in TASK_MODULES[task])}
        task = task if wanted <= set(record.modules_to_save) else None
    if task is None and config is not None:
        auto = {"base_model_class": type(root).__name__, "parent_library": type(root).__module__}
    return {
        "auto_mapping": auto,
        "base_model_name_or_path": base_name or None,
        "inference_mode": True,
        "revision": None,
        "task_type": task,
    }


def _saved(root: nn.Module, record: Injection, outgoing: Outgoing) -> tuple[list[str], list[str]]:
    """``modules_to_save`` for peft, and all modules whose tensors it then wants to find."""
    every, saved = module_names(root), record.modules_to_save
    outer = [n for n in saved if not any(n != o and n.startswith(o + ".") for o in saved)]
    forced = TASK_MODULES.get(task_of(root) or "", ()) if outgoing.prefix == PROMPT else ()
    patterns = suffixes(outer, every, ends_anyhow) or sorted(outer) if outer else []
    kept = [n for n in every if any(ends_anyhow(p, n) for p in (*patterns, *forced))]
    adapted = [n for n in record.targets[0] if _inside(n, kept)] if outgoing.prefix == TUNER else []
    lists = [n for n in kept if isinstance(root.get_submodule(n), (nn.ModuleList, nn.ModuleDict))]
    if adapted or lists:
        raise PEFTError(
            f"modules_to_save={outer} cannot be exported to peft: it would mean {(adapted or lists)[0]!r} as well"
            + (", which is adapted." if adapted else ", a container that it cannot save; name the parts instead.")
        )
    return sorted({*patterns, *(p for p in forced if any(ends_anyhow(p, n) for n in kept))}), kept


def _inside(name: str, modules: list[str]) -> bool:
    return any(name == m or name.startswith(m + ".") for m in modules)


def _base(base: Mapping[str, tuple[str, Tensor]], kept: list[str], record: Injection, outgoing: Outgoing) -> dict:
    """Base tensors that travel: modules trained in full, biases, statistics that moved."""
    found = {}
    statistics = {n for n, start in record.start_buffers.items() if n in base and moved(start, base[n][1])}
    for name, (theirs, tensor) in base.items():
        trained = tensor.requires_grad or name in statistics
        if trained or _inside(name, kept):
            found[outgoing.prefix + theirs] = tensor
    return found


# ---- back ----------------------------------------------------------------------------------------------------------
def import_peft(model: nn.Module, directory: str | os.PathLike) -> None:
    """Load a folder that peft wrote into a model without adapters: injected and filled, or an error and no change.

    Args:
        model: a LightningModule or the network inside it; the base that the adapter was trained beside.
        directory: folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).

    Raises:
        CheckpointError: a type of peft's that has no counterpart here, another base, missing or further tensors.

    >>> import tempfile, torch
    >>> from torch import nn
    >>> from lightning_peft import LoRA, export_peft, import_peft, inject, unload
    >>> net, folder = nn.Sequential(nn.Linear(4, 4)), tempfile.mkdtemp()
    >>> inject(net, LoRA(r=2)); export_peft(net, folder); unload(net)
    >>> import_peft(net, folder); type(net[0]).__name__
    'Linear'
    """
    if Adapters.find(model) is not None:
        raise ConfigError("The model has adapters already; call unload(model) first, or import into a fresh model.")
    folder = read_folder(directory)
    _, root = network_of(model)
    reader = _READERS.get(folder.kind)
    if reader is None:
        known = ", ".join(_READERS)
        raise folder.refuse(f"peft_type {folder.kind} has no counterpart here. Known: {known}.")
    try:
        incoming = reader(folder, root)
        settle(incoming.method)
        saved = _saved_here(folder, root, incoming.known)
        targets = {n: m for n, m in incoming.targets.items() if not _inside(n, saved)}
        new = new_modules(root)
        adapters = inject_at(model, [incoming.method], [targets], saved, [n for n in new if n in saved])
    except CheckpointError:
        raise
    except Exception as error:  # fields of any content fail anywhere
        raise folder.refuse(f"it does not fit {type(root).__name__}: {error}") from error
    try:
        _fill(adapters, folder, incoming)
    except Exception:
        adapters.remove()
        raise
    if lost := [n for n in new if not _inside(n, saved)]:
        warnings.warn(f"{folder.path} holds no values for {', '.join(lost)}, which are new and random.", stacklevel=2)


def _saved_here(folder: Folder, root: nn.Module, known: set[str]) -> list[str]:
    """The modules the folder brings whole."""
    patterns = folder.config.get("modules_to_save") or []
    names = [_plain(folder, key) for key in folder.tensors if key not in known]
    meant = [n for n, _ in root.named_modules() if n and any(ends_anyhow(p, n) for p in patterns)]
    return [m for m in meant if any(n.startswith(m + ".") for n in names)]


def _plain(folder: Folder, key: str) -> str:
    """The name of a base tensor before adapters."""
    return key.removeprefix(folder.prefix).replace(".base_layer.", ".")


def _fill(adapters: Adapters, folder: Folder, incoming: Incoming) -> None:
    """Copy all values after all names and shapes were compared."""
    root = adapters.network
    tensors = model_tensors(root)
    values = {name: (tensors.get(name), value) for name, value in incoming.tensors.items()}
    values |= _base_values(root, folder, incoming)
    filled = {id(own) for own, _ in values.values()}
    started = (".start_A", ".start_B")  # taken from the base at injection
    parts = {
        "lacks": [n for n in Adapters.of(root).required if id(tensors[n]) not in filled and not n.endswith(started)],
        "has in excess": [n for n, (own, _) in values.items() if own is None],
        "has other shapes in": [n for n, (own, v) in values.items() if own is not None and own.shape != v.shape],
    }
    if any(parts.values()):
        said = "; ".join(f"it {verb} {some(names)}" for verb, names in parts.items() if names)
        raise folder.refuse(f"it does not fit {type(root).__name__}: {said}.")
    with torch.no_grad():
        for own, value in values.values():
            own.copy_(value)


def _base_values(root: nn.Module, folder: Folder, incoming: Incoming) -> dict[str, tuple[Tensor | None, Tensor]]:
    """Base tensors of the file with those of the model; what stays frozen must be equal, and is left out."""
    base, found = base_tensors(root), {}
    for key in sorted(set(folder.tensors) - incoming.known):
        name, value = _plain(folder, key), folder.tensors[key]
        own = base[name][1] if name in base else None
        if isinstance(own, nn.Parameter) and not own.requires_grad:
            if moved(own, value):
                kind = type(incoming.method).__name__
                raise folder.refuse(f"{key!r} is not the base's, and {kind} leaves that tensor alone: another base?")
            continue
        found[name] = own, value
    return found
