"""Reading and writing adapter files: never half-written under their final name, never unpickled."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_peft.errors import CheckpointError, PEFTError
from lightning_peft.folders import is_folder, read_folder

SECTION = "lightning_peft"


def locate(path: str | os.PathLike) -> Path:
    """A path as given, or a file inside an installed package: ``pkg://PACKAGE/SUB/PATH`` (found, not imported)."""
    text = os.fspath(path)
    if not text.startswith("pkg://"):
        return Path(text).expanduser()
    package, _, rest = text.removeprefix("pkg://").partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise PEFTError(f"{text}: no package {package!r} is installed here. Try: pip install {package}")
    return Path(next(iter(spec.submodule_search_locations)), rest)


def near(path: str | os.PathLike) -> str:
    """The path as a person in this folder would write it: relative below the folder, else in full."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(Path(path).resolve())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; rename it to ``path`` at the end, or remove it if anything fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_adapter(path: Path, state: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """One safetensors file; the section travels as JSON in its header."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", SECTION: json.dumps(dict(info))})


def read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and section of an adapter file, a Lightning checkpoint, or a folder of shards.

    Raises:
        CheckpointError: missing, broken, unsafe, or not written by us.
    """
    place = locate(path)
    if not place.exists():
        near = sorted(p.name for p in place.parent.glob("*") if p.suffix in (".ckpt", ".safetensors"))[:5]
        raise CheckpointError(f"{place} does not exist." + (f" There is: {', '.join(near)}." if near else ""))
    if is_folder(place):
        return split(read_folder(place, optimizers=False), str(place))
    if (place / "checkpoint").is_dir() and (place / "latest").is_file():
        raise CheckpointError(
            f"{place} was written by DeepSpeed. Make one file of it with"
            " lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict(folder, file)."
        )
    if place.is_dir():
        raise CheckpointError(f"{place} is a folder; give the file in it (adapter.safetensors or a .ckpt).")
    return split(load_checkpoint(place), str(place)) if _is_torch(place) else _read_safetensors(place)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if SECTION not in metadata:
                raise CheckpointError(
                    f"{path} is a plain safetensors file without a {SECTION!r} section: a model or another library's"
                    " adapter, not one of ours. `import_peft` reads folders written by peft."
                )
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata[SECTION])  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is broken or no safetensors file: {error}") from None


def load_checkpoint(path: Path) -> Any:
    """The content of a file that ``torch.save`` wrote, without unpickling anything but tensors and plain values."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # torch raises many kinds for a broken archive; all mean the same to the user
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {_why(error)}") from None


def split(content: Any, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and section of a loaded Lightning checkpoint."""
    known = isinstance(content, Mapping) and isinstance(content.get(SECTION), Mapping)
    if not known or not isinstance(content.get("state_dict"), Mapping):
        raise CheckpointError(
            f"{where} is a plain checkpoint without a {SECTION!r} section: it was written without the PEFT callback, or"
            " before adapters were injected. Load it into the model before injection; it cannot be resumed with PEFT."
        )
    return dict(content["state_dict"]), dict(content[SECTION])


def _why(error: Exception) -> str:
    text = str(error)
    unsafe = re.search(r"GLOBAL (\S+)", text)
    if unsafe:
        return f"it holds an object of {unsafe[1]}, which is not loaded because a pickle can run code."
    return f"it is truncated or no checkpoint ({type(error).__name__}: {text.splitlines()[0][:120] if text else ''})."


def _is_torch(path: Path) -> bool:
    """By content where it tells, by name where the file is too broken to tell."""
    with path.open("rb") as file:
        start = file.read(10)
    if start[8:9] == b"{":  # safetensors: a length in eight bytes, whose first may be a pickle's, then JSON
        return False
    return start[:4] == b"PK\x03\x04" or start[:1] == b"\x80" or (len(start) < 10 and path.suffix != ".safetensors")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
