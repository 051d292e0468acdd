"""Checkpoints in folders, as sharding strategies write them: each process writes its shards to a file of its own.

The index of such a folder is a pickle. It is read with an unpickler that knows a handful of torch's data classes and
nothing else, the shards with ``weights_only=True``.
"""

from __future__ import annotations

import enum
import io
import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_peft.errors import CheckpointError
from lightning_peft.objects import check_zip, load_plain
from lightning_peft.untrusted import settle_parameters

INDEX, REST = ".metadata", "meta.pt"
_KNOWN = {
    "torch.distributed.checkpoint.metadata": [
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ],
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
    "torch.serialization": ["_get_layout"],
    "torch": ["Size", *(str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype))],
    "pathlib": ["Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"],
}


def is_folder(path: Path) -> bool:
    """Whether a path is such a checkpoint."""
    return os.path.isfile(path / INDEX) and os.path.isfile(path / REST)


def read_index(path: Path) -> Any:
    """The index of a folder: names, shapes and where they are."""
    try:
        with (path / INDEX).open("rb") as file:
            return _Unpickler(file).load()
    except (OSError, EOFError, ValueError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path / INDEX} cannot be read: {error}") from None


def read_rest(path: Path) -> dict[str, Any]:
    """Everything in a folder's checkpoint but weights and optimizer states."""
    try:
        check_zip(path / REST)
        content = load_plain(path / REST)
        settle_parameters(content)
        return content
    except Exception as error:  # torch raises many kinds for a broken archive; all mean the same to the user
        raise CheckpointError(f"{path / REST} cannot be read: {str(error).splitlines()[0][:120]}") from None


def shapes(path: Path) -> dict[str, Tensor]:
    """Tensors without storage for the weights in a folder."""
    found = read_index(path).state_dict_metadata
    return {
        name.removeprefix("state_dict."): torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in found.items()
        if name.startswith("state_dict.")
    }


def read_folder(path: Path, optimizers: bool = True) -> dict[str, Any]:
    """A folder's checkpoint as one file would hold it, but for the names of tensors in optimizer states.

    Raises:
        CheckpointError: a part is missing, broken or unsafe.
    """
    index = read_index(path)
    content = read_rest(path)
    try:
        values = dict(_values(path, index, ("state_dict.", "optimizer_") if optimizers else ("state_dict.",)))
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is incomplete or broken: {error}") from None
    content["state_dict"] = {n.removeprefix("state_dict."): v for n, v in values.items() if n.startswith("state_dict.")}
    if optimizers:
        states = _optimizers(values, index)
        if states:
            content["optimizer_states"] = states
    return content


@contextmanager
def as_file(path: Path) -> Iterator[Path]:
    """A path to one file: the checkpoint itself, or what a folder holds, without optimizer states, put together."""
    if not is_folder(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "whole.ckpt")
        torch.save(dict(read_folder(path, optimizers=False)), file)
        yield file


def _values(path: Path, index: Any, starts: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Every entry, put together from its chunks."""
    for name, entry in index.state_dict_metadata.items():
        if not name.startswith(starts):
            continue
        found = [(i, s) for i, s in index.storage_data.items() if i.fqn == name]
        if not hasattr(entry, "size"):
            yield name, _load(path, found[0][1])
            continue
        value = torch.empty(entry.size, dtype=entry.properties.dtype)
        for place, storage in found:
            chunk = _load(path, storage)
            offset = place.offset or (0,) * chunk.ndim
            value[tuple(slice(o, o + s) for o, s in zip(offset, chunk.shape, strict=True))] = chunk
        if sum(_load_size(i, entry) for i, _ in found) != value.numel():
            raise CheckpointError(f"{path} lacks parts of {name}.")
        yield name, value


def _load_size(place: Any, entry: Any) -> int:
    chunk = next(c for c in entry.chunks if place.offset is None or c.offsets == place.offset)
    return chunk.sizes.numel()


def _load(path: Path, storage: Any) -> Any:
    if Path(storage.relative_path).name != storage.relative_path:
        raise CheckpointError(f"{path}: its index points outside the folder ({storage.relative_path}).")
    with (path / storage.relative_path).open("rb") as file:
        file.seek(storage.offset)
        return torch.load(io.BytesIO(file.read(storage.length)), map_location="cpu", weights_only=True)


def _optimizers(values: dict[str, Any], index: Any) -> list[dict[str, Any]]:
    """Nested states out of the flat entries, by the path that the index keeps for each."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name.startswith("optimizer_"):
            path = index.planner_data[name]
            here = found
            for key in path[:-1]:
                here = here.setdefault(key, {})
            here[path[-1]] = value
    states = [found[k] for k in sorted(found, key=lambda k: int(k.removeprefix("optimizer_")))]
    for state in states:
        state.setdefault("state", {})
        groups = state["param_groups"]
        state["param_groups"] = [groups[i] for i in sorted(groups)] if isinstance(groups, dict) else groups
    return states


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Knows the data classes of an index. Written in Python, as that of C cannot be told to leave classes alone."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def load_build(self) -> None:
        """Give an object its state; a pickle could also give one to a class, for the whole process."""
        if isinstance(self.stack[-2], type) or callable(self.stack[-2]):
            raise pickle.UnpicklingError("it changes a class or a function")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        """A class by name, if it is one of those."""
        if (module, name) == ("builtins", "getattr"):  # how Python before 3.11.4 pickles the member of an enum
            return _member
        if module == "pathlib._local":  # where Python 3.13 keeps its classes, and no other
            module = "pathlib"
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it holds an object of {module}.{name}, which is not loaded")
        return super().find_class(module, name)


def _member(kind: type, name: str) -> enum.Enum:
    """A member of an enum by its name: the only use of `getattr` in an index."""
    if not (isinstance(kind, enum.EnumMeta) and name in kind.__members__):
        raise pickle.UnpicklingError(f"it takes {name!r} of {kind!r}, which is not loaded")
    return kind[name]
