"""A saved adapter in the base it was trained beside: found by what the file, or the config beside it, says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.checkpoint import load_adapter
from lightning_peft.errors import CheckpointError, PEFTError
from lightning_peft.files import SECTION, load_checkpoint, locate, read
from lightning_peft.task.kinds import find_task
from lightning_peft.task.loading import explained, label_options, load, load_tokenizer, quiet, resolve
from lightning_peft.verify import verify_section


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
    state, info = read(path)
    verify_section(info, path)
    record = _record(locate(path), str(info["base"].get("source") or ""))
    given = record["model"]
    source = base or given.get("model") or info["base"].get("source")
    if not source:
        raise PEFTError(f"{path} does not say where its base came from: give --base PATH (hub id, folder or .gguf).")
    network = _build(path, source, given, state, info)
    load_adapter(network, {"state_dict": state, SECTION: info})
    named = given.get("tokenizer") or record["data"].get("tokenizer") or source
    tokenizer = load_tokenizer(named) if isinstance(named, str) else None
    return Opened(network.eval(), tokenizer, _data(record["data"]), record["metrics"])


def _build(path: str, source: Any, given: Mapping[str, Any], state: Mapping[str, Tensor], info: Any) -> nn.Module:
    """The base, in the precision it had; never in few bits: what is merged or exported is computed in floats."""
    options = dict(given.get("model_kwargs") or {})
    options.pop("quantization_config", None)
    options.setdefault("dtype", info["base"]["dtype"] or "float32")
    labels = given.get("label_names") or info.get("labels")  # the names it was trained with
    if isinstance(source, Mapping):
        return load(source, find_task(given["task"]), labels, options)[0]
    import transformers

    kind = getattr(transformers, info["base"]["class"], None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise PEFTError(
            f"{path}: its base is a {info['base']['class']}, which is no class of transformers, so it cannot be built"
            " here. In Python: load_adapter(network, path), then export_peft or save_merged(network, folder)."
        )
    place, extra = resolve(source)
    extra = extra or _gguf(Path(place))
    task = label_options(find_task(given["task"]), labels) if "task" in given else {}
    options = {**extra, **options, **_labels(labels, state, info), **task}
    with quiet(local=Path(place).exists()), explained(source, options):
        return kind.from_pretrained(place, ignore_mismatched_sizes=True, **options)


def _gguf(place: Path) -> dict[str, str]:
    """A folder with a GGUF file and no configuration: the adapter remembers the folder only."""
    files = list(place.glob("*.gguf")) if place.is_dir() and not (place / "config.json").exists() else []
    return {"gguf_file": files[0].name} if len(files) == 1 else {}


def _labels(labels: Any, state: Mapping[str, Tensor], info: Mapping[str, Any]) -> dict[str, Any]:
    """Names of the classes, or their number by the new head's last matrix."""
    if labels:
        return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    new = tuple(f"{info['network']}{name}." for name in info["new_modules"])
    rows = [len(t) for n, t in state.items() if new and n.startswith(new) and t.ndim == 2]
    return {"num_labels": rows[-1]} if rows else {}


def _record(place: Path, source: str) -> dict[str, Any]:
    """What the checkpoint remembers of model, data and results; else the config that fit saved beside it."""
    record: dict[str, Any] = {"model": {}, "data": {}, "metrics": {}}
    if place.is_file() and place.suffix != ".safetensors":
        content = load_checkpoint(place)
        model = content.get("hyper_parameters") or {}
        record["model"] = dict(model) if {"model", "task"} <= set(model) else {}
        record["data"] = dict(content.get("datamodule_hyper_parameters") or {})
        record["metrics"] = _metrics(content.get("callbacks") or {}, place)
    config = _config(place)
    model, data = ((config.get(part) or {}).get("init_args") or {} for part in ("model", "data"))
    if _fits(model, source):
        record["model"] = record["model"] or dict(model)
        record["data"] = record["data"] or dict(data)
    return record


def _fits(model: Mapping[str, Any], source: str) -> bool:
    """Whether a config that lies nearby is of this run: it names the same base, or the adapter names none."""
    named = model.get("model")
    if not isinstance(named, str) or not source:
        return bool(named) and not source
    return Path(named).name == Path(source).name or Path(named).parent.name == Path(source).name


def _config(place: Path) -> dict[str, Any]:
    import yaml

    for folder in (place if place.is_dir() else place.parent, place.parent, place.parent.parent):
        file = folder / "config.yaml"
        if file.is_file():
            try:
                config = yaml.safe_load(file.read_text())
            except (yaml.YAMLError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from None
            return config if isinstance(config, dict) else {}
    return {}


def _metrics(callbacks: Mapping[str, Any], place: Path) -> dict[str, float]:
    """The monitored value of the best checkpoint, if this is it."""
    found = {}
    for state in callbacks.values():
        if isinstance(state, Mapping) and Path(str(state.get("best_model_path") or "")).name == place.name:
            score = state.get("best_model_score")
            if state.get("monitor") and isinstance(score, Tensor) and torch.isfinite(score):
                found[str(state["monitor"])] = float(score)
    return found


def _data(data: Mapping[str, Any]) -> str | None:
    value = data.get("data")
    return str(value) if value else None
