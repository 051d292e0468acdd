"""Folders as peft writes them: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft.errors import CheckpointError, PEFTError
from lightning_peft.files import load_checkpoint, locate
from lightning_peft.method import Method
from lightning_peft.paths import held
from lightning_peft.replacing import replacing_folder, under_way
from lightning_peft.untrusted import short, without_code

#: the names of the classes, in the order of the head's outputs: peft has no place for them
LABELS = "label_names.json"
CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_ATTEMPTS, _PAUSE = 40, 0.05  # to read a folder that is being written, and the seconds between two of them
TUNER, PROMPT = "base_model.model.", "base_model."

#: fields of a configuration that say who, where and for what: they do not change the result
COMMON = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version"),
    *("revision", "modules_to_save", "runtime_config"),
}
#: the same for methods that choose modules: the tensors' names say which were chosen
CHOOSING = COMMON | {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
}
#: fields of LoRA's that do nothing by themselves
HARMLESS = {"qalora_group_size": ..., "megatron_core": ..., "ensure_weight_tying": ...}


class Outgoing(NamedTuple):
    """What a method gives to peft: fields of the configuration, tensors by their whole key."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    prefix: str = TUNER  # before the names of base tensors


class Incoming(NamedTuple):
    """What a folder becomes here: a method, the modules it stands at, its tensors by our names."""

    method: Method
    targets: dict[str, nn.Module]
    tensors: dict[str, Tensor]
    known: set[str]  # keys of the file that are dealt with


class Folder(NamedTuple):
    """A folder that peft wrote."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def kind(self) -> str:
        """``peft_type``."""
        return str(self.config["peft_type"])

    @property
    def prefix(self) -> str:
        """What stands before the names of base tensors."""
        return PROMPT if self.kind in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING") else TUNER

    def refuse(self, reason: str) -> CheckpointError:
        """The error for what cannot be imported."""
        return CheckpointError(f"{self.path}: {short(reason, 1000)}")

    def neutral(self, known: Mapping[str, Any] | set[str], harmless: Mapping[str, Any]) -> None:
        """Refuse fields that change the result and that nothing here stands for."""
        for field, value in self.config.items():
            empty = value in (None, False, "", "none") or value in ([], {})
            if field in known or empty or (field in harmless and harmless[field] in (value, ...)):
                continue
            raise self.refuse(
                f"{short(field, 60)}={short(repr(value), 120)} of {short(self.kind, 60)} has no counterpart here. Merge"
                " it with peft (merge_and_unload) and go on from the merged model."
            )


def is_folder(path: str | os.PathLike) -> bool:
    """Whether a path is a folder that peft wrote."""
    return (locate(path) / CONFIG).is_file()


def read_folder(path: str | os.PathLike) -> Folder:
    """Configuration and tensors of one export; nothing is unpickled but tensors.

    Raises:
        CheckpointError: no such folder, or a broken file in it.
    """
    place = locate(path)
    if not place.is_dir():
        ours = " load_adapter reads files of ours." if place.exists() else ""
        raise CheckpointError(f"{place} is no folder: import_peft reads folders written by peft.{ours}")
    # A writer removes the earlier weights, exchanges the configuration, and then brings the new weights. If the same
    # files are there before and after a read, they belong together.
    for _ in range(_ATTEMPTS):
        before = _files(place)
        is_complete = CONFIG in before and len(before) > 1
        if not is_complete and under_way(place):
            time.sleep(_PAUSE)
            continue
        try:
            folder = _read(place)
        except CheckpointError:
            if _files(place) == before:
                raise
        else:
            if _files(place) == before:
                return folder
    raise CheckpointError(
        f"{place} holds no complete export: another process is writing into it, or was interrupted. Try again when it"
        " is done, or export once more."
    )


def _read(place: Path) -> Folder:
    if not (place / CONFIG).is_file():
        raise CheckpointError(
            f"{place} holds no {CONFIG}: import_peft reads folders written by peft. load_adapter reads files of ours."
        )
    tensors = None
    try:
        config = without_code(json.loads((place / CONFIG).read_text(encoding="utf-8")))
        kind = config["peft_type"]
        if (place / WEIGHTS).is_file():
            with held(place / WEIGHTS) as weights:
                tensors = load_file(weights)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{place} is broken: {type(error).__name__}: {short(error)}") from None
    if tensors is None:
        if not (place / OLD_WEIGHTS).is_file():
            raise CheckpointError(f"{place} holds no {WEIGHTS}; the adapter's tensors are missing.")
        tensors = dict(load_checkpoint(place / OLD_WEIGHTS))
    return Folder(place, dict(config) | {"peft_type": str(kind).rpartition(".")[2]}, tensors)


def _files(place: Path) -> dict[str, tuple[int, ...]]:
    """The files of an export that are there, with what tells each from any other that had or will have its name."""
    files = {}
    for name in (CONFIG, WEIGHTS, OLD_WEIGHTS):
        with suppress(OSError):
            found = (place / name).stat()
            files[name] = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return files


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    card: str,
    label_names: Sequence[str] | None = None,
    tokenizer: Any = None,
) -> None:
    """All files, together complete or absent; the same content gives the same bytes."""
    if folder.is_file():
        raise PEFTError(f"{folder} is a file; give a folder.")
    held = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    with replacing_folder(folder) as temporary:
        save_file(held, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
        (temporary / "README.md").write_text(card)
        if label_names is not None:
            (temporary / LABELS).write_text(json.dumps(list(label_names), indent=2, ensure_ascii=False))
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
