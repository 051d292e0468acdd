"""A saved adapter in the base it was trained beside: found by what the file, or the config beside it, says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.errors import CheckpointError, PEFTError
from lightning_peft.files import load_checkpoint, locate
from lightning_peft.requirements import require_package
from lightning_peft.saving.checkpoint import load_saved
from lightning_peft.saving.saved_adapter import SavedAdapter
from lightning_peft.task.kinds import find_task
from lightning_peft.task.loading import (
    explained,
    label_options,
    load,
    load_tokenizer,
    quiet,
    refuse_adapter,
    resolve,
)
from lightning_peft.untrusted import check_extent, short, without_code, without_places

#: the constructor arguments that are read from a file, and their types
_MODEL = {
    "model": (Mapping, str),
    "task": (str,),
    "model_kwargs": (Mapping,),
    "label_names": (list,),
    "tokenizer": (Mapping, str),
}
_DATA = {"data": (Mapping, str), "tokenizer": (Mapping, str)}


class Opened(NamedTuple):
    """An adapter in its base, and what the run says of itself."""

    network: nn.Module
    tokenizer: Any
    data: str | None
    metrics: dict[str, float]


def open_adapter(path: str, base: str | None) -> Opened:
    """Build the base and load the adapter, strictly.

    Args:
        path: checkpoint, adapter file or adapter folder.
        base: hub id, folder or GGUF file to use instead of the one that the file names.

    Raises:
        PEFTError: no adapter, or its base cannot be found or built.
    """
    saved = SavedAdapter.read(path)
    record = _record(path, saved.section.base.source)
    given = record["model"]
    source = base or given.get("model") or saved.section.base.source
    if not source:
        raise PEFTError(f"{path} does not say where its base came from: give --base PATH (hub id, folder or .gguf).")
    network = _build(path, source, given, saved)
    load_saved(network, saved)
    named = given.get("tokenizer") or record["data"].get("tokenizer") or source
    tokenizer = load_tokenizer(named) if isinstance(named, str) else None
    return Opened(network.eval(), tokenizer, _data(record["data"]), record["metrics"])


def _build(path: str, source: Any, given: Mapping[str, Any], saved: SavedAdapter) -> nn.Module:
    """The base, in the precision it had; never in few bits: what is merged or exported is computed in floats."""
    described = saved.section.base
    options = {"trust_remote_code": False, **(given.get("model_kwargs") or {})}
    options.pop("quantization_config", None)
    options.setdefault("dtype", described.dtype or "float32")
    labels = given.get("label_names") or saved.section.labels  # the names it was trained with
    if isinstance(source, Mapping):
        return load(source, find_task(given.get("task")), labels, options)[0]
    transformers = require_package("transformers", f"{path}: its base, {source!r},")
    kind = getattr(transformers, described.class_name, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise PEFTError(
            f"{path}: its base is a {described.class_name}, which is no class of transformers, so it cannot be built"
            " here. In Python: load_adapter(network, path), then export_peft or save_merged(network, folder)."
        )
    place, extra = resolve(source)
    extra = extra or _gguf(Path(place))
    task = label_options(find_task(given["task"]), labels) if "task" in given else {}
    options = {**extra, **options, **_labels(labels, saved), **task}
    with quiet(local=os.path.exists(place)), explained(source, options):
        refuse_adapter(source, place, options)
        return kind.from_pretrained(place, ignore_mismatched_sizes=True, **options)


def _gguf(place: Path) -> dict[str, str]:
    """A folder with a GGUF file and no configuration: the adapter remembers the folder only."""
    files = list(place.glob("*.gguf")) if os.path.isdir(place) and not (place / "config.json").exists() else []
    return {"gguf_file": files[0].name} if len(files) == 1 else {}


def _labels(labels: Any, saved: SavedAdapter) -> dict[str, Any]:
    """Names of the classes, or their number by the new head's last matrix."""
    if labels:
        return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    new = tuple(f"{name}." for name in saved.section.new_modules)
    tensors = saved.under("").tensors
    rows = [len(t) for n, t in tensors.items() if new and n.startswith(new) and t.ndim == 2]
    return {"num_labels": rows[-1]} if rows else {}


def _record(path: str, source: str) -> dict[str, Any]:
    """What the checkpoint remembers of model, data and results; else the config that fit saved beside it.

    Both may come from anywhere, so what they hold builds a model and chooses no code.
    """
    place = locate(path)
    record: dict[str, Any] = {"model": {}, "data": {}, "metrics": {}}
    if place.is_file() and place.suffix != ".safetensors":
        content = load_checkpoint(place)
        model = content.get("hyper_parameters") or {}
        record["model"] = _arguments(model, _MODEL, path) if {"model", "task"} <= set(model) else {}
        record["data"] = _arguments(content.get("datamodule_hyper_parameters") or {}, _DATA, path)
        record["metrics"] = _metrics(content.get("callbacks"), place)
    file, config = _config(place)
    model, data = (_init_args(config, part) for part in ("model", "data"))
    if _fits(model, source):
        record["model"] = record["model"] or _arguments(model, _MODEL, str(file))
        record["data"] = record["data"] or _arguments(data, _DATA, str(file))
    return record


def _init_args(config: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """The arguments of a class in a config; empty where the config is of another form."""
    spec = config.get(part)
    arguments = spec.get("init_args") if isinstance(spec, Mapping) else None
    return arguments if isinstance(arguments, Mapping) else {}


def _arguments(found: Mapping[str, Any], kinds: Mapping[str, tuple], where: str) -> dict[str, Any]:
    """Those constructor arguments that are needed here.

    Raises:
        CheckpointError: one is of another type than it should be.
    """
    taken = {}
    for name, kind in kinds.items():
        value = found.get(name)
        if value is None:
            continue
        if not isinstance(value, kind):
            raise CheckpointError(
                f"{where}: {name}={short(repr(value), 120)} is damaged: it should be {kind[-1].__name__.lower()}."
            )
        taken[name] = without_places(without_code(value))
    if "label_names" in taken:
        taken["label_names"] = [str(name) for name in taken["label_names"]]
    return taken


def _fits(model: Mapping[str, Any], source: str) -> bool:
    """Whether a config that lies nearby is of this run: it names the same base, or the adapter names none."""
    named = model.get("model")
    if not isinstance(named, str) or not source:
        return bool(named) and not source
    return Path(named).name == Path(source).name or Path(named).parent.name == Path(source).name


def _config(place: Path) -> tuple[Path, dict[str, Any]]:
    """The first ``config.yaml`` in the folder or above it."""
    import yaml

    for folder in (place if place.is_dir() else place.parent, place.parent, place.parent.parent):
        file = folder / "config.yaml"
        if file.is_file():
            try:
                config = yaml.safe_load(file.read_text())
                check_extent(config)
            except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
                raise CheckpointError(f"{file} cannot be read: {short(error, 200)}") from None
            return file, config if isinstance(config, dict) else {}
    return place, {}


def _metrics(callbacks: Any, place: Path) -> dict[str, float]:
    """The monitored value of the best checkpoint, if this is it."""
    found = {}
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if isinstance(state, Mapping) and Path(str(state.get("best_model_path") or "")).name == place.name:
            score = state.get("best_model_score")
            if state.get("monitor") and isinstance(score, Tensor) and score.numel() == 1 and torch.isfinite(score):
                found[str(state["monitor"])] = float(score)
    return found


def _data(data: Mapping[str, Any]) -> str | None:
    value = data.get("data")
    return str(value) if value else None
