"""What a saved adapter says of itself, without torch: headers and plain values, no tensor data, no code.

A Lightning checkpoint is a zip with a pickle of its structure. That is read without building any object, so that
nothing in it can run.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

from lightning_peft.errors import CheckpointError
from lightning_peft.header import completed
from lightning_peft.paths import ADAPTER, SECTION, missing
from lightning_peft.pickles import PickleReader
from lightning_peft.untrusted import check_extent, short

_LONGEST = 100_000_000  # bytes of a safetensors header, as the format allows
_WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
_STORAGES = {"Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32"}


class Stored(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    kind: str

    @property
    def dtype(self) -> str:
        """As torch calls it."""
        return _NAMES.get(self.kind, self.kind.lower())

    @property
    def numel(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """How much room."""
        return self.numel * _WIDTH.get(self.kind, 1)


class Peek(NamedTuple):
    """The tensors of a file, its section (None in a file of peft's), and what else is known."""

    path: Path
    tensors: dict[str, Stored]
    section: dict[str, Any] | None
    facts: dict[str, Any]


def peek(place: Path) -> Peek:
    """Look into a checkpoint, an adapter file, or a folder with one (ours or peft's).

    Raises:
        CheckpointError: missing, broken, or nothing that was trained here.
    """
    if not os.path.exists(place):
        raise missing(place)
    if place.is_dir():
        if (place / "adapter_config.json").is_file():
            return _peft(place)
        if not (place / ADAPTER).is_file():
            raise CheckpointError(f"{place} is a folder without an {ADAPTER} or adapter_config.json.")
        place = place / ADAPTER
    try:
        # Everything is read from one open file: another may take its name at any moment.
        with place.open("rb") as file:
            found = _checkpoint(place, file) if zipfile.is_zipfile(file) else _safetensors(place, file)
    except CheckpointError:
        raise
    except Exception as error:  # a broken file fails in many ways; all mean the same to the user
        why = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{place} is broken or no adapter: {type(error).__name__}: {why}") from None
    if not isinstance(found.section, dict) or not isinstance(found.section.get("methods"), list):
        raise CheckpointError(
            f"{place} has no {SECTION!r} section: a plain model or checkpoint, written without lightning_peft."
        )
    return found


def _safetensors(path: Path, file: BinaryIO) -> Peek:
    tensors, metadata = _header(file)
    section = json.loads(metadata[SECTION]) if SECTION in metadata else None
    return Peek(path, tensors, completed(section, tensors) if isinstance(section, dict) else section, {})


def _header(file: BinaryIO) -> tuple[dict[str, Stored], dict[str, str]]:
    file.seek(0)
    length = struct.unpack("<Q", file.read(8))[0]
    if length > _LONGEST:
        raise ValueError("no safetensors header")
    header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if os.fstat(file.fileno()).st_size != 8 + length + end:
        raise ValueError("the file is cut off or has something behind its tensors")
    return {n: Stored(tuple(e["shape"]), e["dtype"]) for n, e in header.items()}, metadata


def _peft(place: Path) -> Peek:
    try:
        config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
        weights = place / "adapter_model.safetensors"
        tensors: dict[str, Stored] = {}
        if weights.is_file():
            with weights.open("rb") as file:
                tensors, _ = _header(file)
        return Peek(place, tensors, None, {"peft": dict(config)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{place} is broken: {type(error).__name__}: {short(error)}") from None


def _checkpoint(path: Path, file: BinaryIO) -> Peek:
    with zipfile.ZipFile(file) as archive:
        name = next((n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl"), None)
        if name is None:
            raise CheckpointError(f"{path} is a zip file, but no checkpoint.")
        record = archive.getinfo(name)
        # torch packs nothing; a small file that is packed could take any amount of memory
        if record.compress_type != zipfile.ZIP_STORED or record.file_size > os.fstat(file.fileno()).st_size:
            raise zipfile.BadZipFile("its records declare more bytes than it has")
        content = _Reader(io.BytesIO(archive.read(name))).load()
    if not isinstance(content, dict):
        raise ValueError("no dictionary")
    check_extent(content.get(SECTION), most=2_000_000)
    state = content.get("state_dict")
    tensors = {n: t for n, t in state.items() if isinstance(t, Stored)} if isinstance(state, dict) else {}
    facts = {k: content[k] for k in ("epoch", "global_step") if isinstance(content.get(k), int)}
    if isinstance(content.get("pytorch-lightning_version"), str):
        facts["lightning"] = content["pytorch-lightning_version"]
    return Peek(path, tensors, content.get(SECTION), facts | {"optimizer": "optimizer_states" in content})


def _tensor(storage: Any, offset: Any, size: Any, *rest: Any) -> Stored:
    return Stored(tuple(size), storage if isinstance(storage, str) else "")


def _parameter(data: Any, *rest: Any) -> Any:
    return data


class _Reader(PickleReader):
    """Tensors become `Stored`; their storages are known by their kind alone, and their data stay in the file."""

    known: ClassVar[Mapping[str, Any]] = {
        **PickleReader.known,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_parameter": _parameter,
    }

    def find_class(self, module: str, name: str) -> Any:
        """The name of a storage's class, or what is known."""
        return name if module == "torch" and name.endswith("Storage") else super().find_class(module, name)

    def persistent_load(self, pid: Any) -> str:
        """The kind of a storage."""
        kind = pid[1] if isinstance(pid, tuple) and len(pid) > 1 else ""
        return _STORAGES.get(str(kind).removesuffix("Storage"), str(kind).removesuffix("Storage"))
