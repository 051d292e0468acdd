"""Reading and writing adapter files: never half-written under their final name, never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_peft.errors import CheckpointError
from lightning_peft.folders import is_folder, read_folder
from lightning_peft.format1 import upgraded
from lightning_peft.header import completed, shortened
from lightning_peft.objects import check_pickle, check_zip, load_plain
from lightning_peft.paths import ADAPTER as ADAPTER
from lightning_peft.paths import SECTION as SECTION
from lightning_peft.paths import held, missing
from lightning_peft.paths import locate as locate
from lightning_peft.replacing import replacing
from lightning_peft.untrusted import check_extent, settle_parameters


def near(path: str | os.PathLike) -> str:
    """The path as a person in this folder would write it: relative below the folder, else in full."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(Path(path).resolve())


def write_adapter(path: Path, state: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """One safetensors file; the section travels as JSON in its header, with a checksum over itself and the tensors."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    info = json.loads(json.dumps(shortened(info, tensors)))  # as a reader will see it
    info["checksum"] = checksum(tensors, info)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", SECTION: json.dumps(info, separators=(",", ":"))})


def read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and section of an adapter file, a folder with one (``adapter.safetensors``), or a Lightning checkpoint,
    one file or a folder of shards, as they stand there: `SavedAdapter` looks at what they say.

    Raises:
        CheckpointError: missing (then also a FileNotFoundError), broken, unsafe, or not written by us.
    """
    place = locate(path)
    if not os.path.exists(place):
        raise missing(place)
    if (place / "checkpoint").is_dir() and (place / "latest").is_file():
        raise CheckpointError(
            f"{place} was written by DeepSpeed. Make one file of it with"
            " lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict(folder, file)."
        )
    if is_folder(place):
        return split(read_folder(place, optimizers=False), str(place))
    return _read_file(_inside(place) if place.is_dir() else place)


def _read_file(place: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not place.is_file():
        raise CheckpointError(f"{place} is neither a file nor a folder.")
    try:
        with held(place) as file:
            if _is_torch(file, place.suffix):
                return split(_load_torch(file, place), str(place))
            return _read_safetensors(file, place)
    except OSError as error:
        raise CheckpointError(f"{place} cannot be read: {error.strerror}.") from None


def _inside(folder: Path) -> Path:
    """The adapter in a folder of ours."""
    if (folder / ADAPTER).is_file():
        return folder / ADAPTER
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} was written by peft: import_peft(model, folder) reads it.")
    raise CheckpointError(f"{folder} is a folder without {ADAPTER}; give the file in it (.safetensors or .ckpt).")


def _read_safetensors(held_file: Path, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(held_file, framework="pt") as file:
            metadata = file.metadata() or {}
            if SECTION not in metadata:
                raise CheckpointError(
                    f"{path} is a plain safetensors file without a {SECTION!r} section: a model or another library's"
                    " adapter, not one of ours. `import_peft` reads folders written by peft."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            info = json.loads(metadata[SECTION], object_pairs_hook=_once)
    except CheckpointError:
        raise
    except Exception as error:  # safetensors, JSON and torch raise many kinds for a broken file; all mean the same
        raise CheckpointError(f"{path} is broken or no safetensors file: {_first_line(error)}") from None
    if not isinstance(info, dict):
        raise CheckpointError(f"{path}: its {SECTION!r} section is damaged (a {type(info).__name__}, no mapping).")
    if "checksum" in info and info["checksum"] != checksum(tensors, info):
        raise CheckpointError(
            f"{path} is damaged: its content does not give the checksum written with it. Copy it again from its source,"
            " or save it again."
        )
    return upgraded(tensors, completed(info, tensors))


def checksum(tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors, and over the section but for the checksum itself."""
    total = hashlib.sha256(json.dumps({k: v for k, v in info.items() if k != "checksum"}, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        if tensor.numel():
            total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping; readers of JSON differ in which of two equal keys they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in its section")
    return found


def load_checkpoint(path: Path, map_location: Any = "cpu", mmap: bool = True) -> Any:
    """The content of a file that ``torch.save`` wrote, without unpickling anything but tensors and plain values.

    Parts of a checkpoint that hold objects are left out (`lightning_peft.objects.left_out` names them). Constructor
    arguments come without the options that choose code.

    Raises:
        CheckpointError: missing, broken or unsafe.
    """
    if not os.path.exists(path):
        raise missing(path)
    try:
        with held(path) as file:
            return _load_torch(file, path, map_location, mmap)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None


def _load_torch(held_file: Path, path: Path, map_location: Any = "cpu", mmap: bool = True) -> Any:
    try:
        zipped = _is_zip(held_file)
        if zipped:
            check_zip(held_file)
        elif _is_torch(held_file, path.suffix):
            check_pickle(held_file.read_bytes())
        else:
            raise pickle.UnpicklingError("it starts like neither a zip archive nor a pickle")
        content = load_plain(held_file, map_location, mmap=mmap and zipped)
        settle_parameters(content)
        return content
    except Exception as error:  # torch raises many kinds for a broken archive; all mean the same to the user
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {_why(error)}") from None


def split(content: Any, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and section of a loaded Lightning checkpoint."""
    known = isinstance(content, Mapping) and isinstance(content.get(SECTION), Mapping)
    if known and not isinstance(content.get("state_dict"), Mapping):
        raise CheckpointError(f"{where} is damaged: it describes an adapter, and holds no tensors of it (state_dict).")
    if not known:
        raise CheckpointError(
            f"{where} is a plain checkpoint without a {SECTION!r} section: it was written without the PEFT callback, or"
            " before adapters were injected. Load it into the model before injection; only FullFineTuning resumes it."
        )
    try:
        check_extent(content[SECTION], most=2_000_000)
    except ValueError as error:
        raise CheckpointError(f"{where}: its {SECTION!r} section is damaged: {error}.") from None
    return upgraded(content["state_dict"], content[SECTION])


def _why(error: Exception) -> str:
    text = str(error)
    unsafe = re.search(r"GLOBAL (\S+)", text)
    if unsafe:
        return f"it holds an object of {unsafe[1]}, which is not loaded because a pickle can run code."
    return f"it is damaged, truncated or no checkpoint ({type(error).__name__}: {_first_line(error)})."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _is_torch(path: Path, suffix: str) -> bool:
    """By content where it tells, by the suffix of its name where the file is too broken to tell."""
    with path.open("rb") as file:
        start = file.read(10)
    if start[8:9] == b"{":  # safetensors: a length in eight bytes, whose first may be a pickle's, then JSON
        return False
    return start[:4] == b"PK\x03\x04" or start[:1] == b"\x80" or (len(start) < 10 and suffix != ".safetensors")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
