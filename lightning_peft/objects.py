"""Checkpoints that hold objects beside what was trained: a module's own ``on_save_checkpoint`` may add some.

torch reads such a file with ``weights_only=False`` alone, which can run any code. Here everything else in it is read,
and none of the objects is built: the parts that hold them are left out, and named in `Checkpoint.left_out`.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_peft.paths import SECTION
from lightning_peft.pickles import PickleReader, first_object
from lightning_peft.untrusted import PARAMETERS

#: what marks a checkpoint of Lightning, and is never left out
_VERSION = "pytorch-lightning_version"
_NEEDED = (_VERSION, "state_dict", SECTION, "epoch", "global_step")
#: parts of which each entry counts for itself
_BY_ENTRY = ("callbacks", *PARAMETERS)
#: classes of storages, as files name them, by the type of their elements
_STORAGES = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8},
    **{"BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128},
}


class Checkpoint(dict):
    """The content of a checkpoint without its objects.

    Attributes:
        left_out: classes of objects by the parts that hold them, such as ``{"hyper_parameters.loss": "torch.nn.…"}``.
    """

    left_out: dict[str, str]


def left_out(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """The parts of a loaded checkpoint that were left out, with a class for each."""
    return getattr(checkpoint, "left_out", {})


def load_plain(path: Path, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """What ``torch.load(weights_only=True)`` gives; of a checkpoint that holds objects, everything else.

    Raises:
        pickle.UnpicklingError: an object is where it cannot be done without, or the file is no checkpoint of Lightning.
    """
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        if not zipfile.is_zipfile(path):
            raise
        content = _read(path, map_location)
        if not isinstance(content, dict) or _VERSION not in content:
            raise
    return _without_objects(content)


def _without_objects(content: dict[str, Any]) -> Checkpoint:
    for key in _NEEDED:
        found = first_object(content.get(key))
        if found is not None:
            raise pickle.UnpicklingError(f"GLOBAL {found.path}")
    checkpoint = Checkpoint(content)
    checkpoint.left_out = {}
    for place, owner, key in _parts(content, checkpoint):
        found = first_object([key, owner[key]])
        if found is not None:
            del owner[key]
            checkpoint.left_out[place] = found.path
    for part in PARAMETERS:
        _record_arguments(checkpoint, part)
    return checkpoint


def _record_arguments(checkpoint: Checkpoint, part: str) -> None:
    """Note arguments that were left out where the writer of the file notes those that it left out."""
    section = checkpoint.get(SECTION)
    lost = arguments_left_out(checkpoint, part)
    if isinstance(section, dict) and lost:
        recorded = section.get("left_out")
        others = recorded if isinstance(recorded, dict) else {}
        section["left_out"] = {**others, part: lost}


def arguments_left_out(checkpoint: Mapping[str, Any], part: str) -> dict[str, str]:
    """Constructor arguments that are objects and so are not in a loaded checkpoint, with their classes.

    Args:
        checkpoint: what `load_plain` gives.
        part: ``hyper_parameters`` or another part that holds arguments.
    """
    section = checkpoint.get(SECTION)
    recorded = section.get("left_out") if isinstance(section, Mapping) else None
    written = recorded.get(part) if isinstance(recorded, Mapping) else None
    lost = {}
    for name, kind in written.items() if isinstance(written, Mapping) else ():
        if isinstance(name, str) and isinstance(kind, str):
            lost[name] = kind
    for place, kind in left_out(checkpoint).items():
        if place.startswith(f"{part}."):
            lost[place.removeprefix(f"{part}.")] = kind
    return lost


def objects_in(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """The parts of a checkpoint to be saved that ``weights_only`` will not read, with a class for each."""
    found = {}
    for place, owner, key in _parts(checkpoint, checkpoint):
        reason = object_in(owner[key])
        if reason is not None:
            found[place] = reason
    return found


def _parts(content: Mapping[str, Any], owner: Any) -> list[tuple[str, Any, Any]]:
    """The parts that count for themselves: where each stands, the mapping that it is in, and its key there."""
    parts: list[tuple[str, Any, Any]] = []
    for key, value in content.items():
        if key in _BY_ENTRY and isinstance(value, dict):
            parts += [(f"{key}.{name}", value, name) for name in value]
        else:
            parts.append((str(key), owner, key))
    return parts


def object_in(value: Any) -> str | None:
    """The class of an object in a value that ``weights_only`` will not read; None where all can be read back.

    >>> object_in({"lr": 0.1, "sizes": (1, 2)}), object_in([torch.nn.ReLU()])
    (None, 'torch.nn.modules.activation.ReLU')
    """
    try:
        _Structure(file := io.BytesIO(), protocol=2).dump(value)
    except Exception:  # whatever pickle raises for what it cannot do
        return f"{type(value).__module__}.{type(value).__qualname__}"
    file.seek(0)
    found = first_object(_StructureReader(file).load(), _allowed())
    return None if found is None else found.path


def is_picklable(value: Any) -> bool:
    """Whether ``torch.save`` can write a value."""
    try:
        _Structure(io.BytesIO(), protocol=2).dump(value)
    except Exception:  # whatever pickle raises for what it cannot do
        return False
    return True


def _allowed() -> set[str]:
    """Classes that the user lets torch build."""
    paths = set()
    for entry in torch.serialization.get_safe_globals():
        kind, path = entry if isinstance(entry, tuple) else (entry, None)
        paths.add(path or f"{kind.__module__}.{kind.__qualname__}")
    return paths


class _Structure(pickle.Pickler):
    """Writes everything but the data of tensors."""

    def persistent_id(self, obj: Any) -> str | None:
        """A mark in place of a tensor."""
        return "tensor" if isinstance(obj, (Tensor, torch.UntypedStorage, torch.TypedStorage)) else None


# ---- reading ---------------------------------------------------------------------------------------------------------
def check_zip(path: Path) -> None:
    """Check the sums in the archive, which torch writes and does not look at; and that nothing in it is packed."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [e.filename for e in entries]
        if len(set(names)) < len(names):
            raise zipfile.BadZipFile("a record stands twice in it")
        packed = any(e.compress_type != zipfile.ZIP_STORED for e in entries)
        if packed or sum(e.file_size for e in entries) > path.stat().st_size:
            raise zipfile.BadZipFile("its records declare more bytes than it has")
        bad = archive.testzip() if torch.serialization.get_crc32_options() else None
        if bad is not None:
            raise zipfile.BadZipFile(f"the checksum of its record {bad!r} is wrong")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                check_pickle(archive.read(entry))


def check_pickle(data: bytes) -> None:
    """Refuse `bytearray(n)`, the only object that torch builds from a number in the file: it could take all memory."""
    if re.search(rb"c(builtins|__builtin__)\nbytearray\n", data):
        raise pickle.UnpicklingError("GLOBAL builtins.bytearray")


def _read(path: Path, map_location: Any) -> Any:
    """A file with `NotBuilt` for each object."""
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl")
        folder = name.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder").decode() != sys.byteorder:
            raise pickle.UnpicklingError("its numbers are in another order of bytes")
        device = map_location if isinstance(map_location, (str, torch.device)) else "cpu"
        return _TensorReader(archive, folder, device).load()


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    """A tensor in its storage. The sizes are the file's, so they are compared with what the storage holds."""
    if not isinstance(storage, Tensor) or math.prod(size) > storage.numel():
        raise pickle.UnpicklingError("a tensor has more elements than its storage")
    return storage.as_strided(size, stride, offset)


def _parameter(tensor: Any, *rest: Any) -> Any:
    return tensor


def _bytes(text: str, encoding: str) -> bytes:
    """How a pickle of this protocol holds bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"its bytes are in {encoding}")
    return text.encode("latin1")


class _StructureReader(PickleReader):
    """Builds what torch does with ``weights_only``, and knows of tensors only that they are there."""

    known: ClassVar[Mapping[str, Any]] = {
        **{"collections.OrderedDict": OrderedDict, "collections.Counter": Counter},
        **{"builtins.set": set, "builtins.complex": complex, "_codecs.encode": _bytes},
        **{"torch.Size": torch.Size, "torch.device": torch.device},
        **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
    }

    def persistent_load(self, pid: Any) -> Any:
        """A tensor."""
        return None


class _TensorReader(_StructureReader):
    """Builds tensors from the records of an archive."""

    known: ClassVar[Mapping[str, Any]] = {
        **_StructureReader.known,
        **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
        **{"torch._utils._rebuild_tensor_v2": _tensor, "torch._utils._rebuild_parameter": _parameter},
    }

    def __init__(self, archive: zipfile.ZipFile, folder: str, device: str | torch.device) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self.archive, self.folder, self.device = archive, folder, device
        self.storages: dict[str, Tensor] = {}

    def persistent_load(self, pid: Any) -> Tensor:
        """The elements of a storage, in one row."""
        _, dtype, key, *_ = pid
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.folder}data/{key}"))
            row = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            self.storages[key] = row.to(self.device)
        return self.storages[key]
