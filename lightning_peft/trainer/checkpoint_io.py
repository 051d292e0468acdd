"""Checkpoints of a run, written so that a kill or a full disk leaves no half file, and read without unpickling."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from packaging.version import InvalidVersion, Version

from lightning_peft.errors import CheckpointError
from lightning_peft.files import SECTION, load_checkpoint
from lightning_peft.lightning_packages import TorchCheckpointIO, every
from lightning_peft.objects import left_out, objects_in
from lightning_peft.paths import missing
from lightning_peft.replacing import replacing
from lightning_peft.untrusted import short

if TYPE_CHECKING:
    import lightning.pytorch as L


#: SHA-256 of the files with objects that this process has written
_written: set[bytes] = set()


class SafeCheckpointIO(TorchCheckpointIO):
    """What Lightning does, with a temporary file beside the checkpoint in place of one in the system's folder for them.

    That folder is often on another disk. Then Lightning's last step is no renaming but a copy onto the final name, and
    what was there before is lost when the process is killed or the disk is full in the midst of it.

    Files are read without building the objects that a module's own hook has added. Only a file whose every byte this
    process has written itself is read as Lightning reads it.

    Args:
        alone: whether there is one process. With several, one of them writes, and all must read the same.
    """

    def __init__(self, alone: bool = False) -> None:
        self.alone = alone

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a local file through a temporary name beside it; anything else goes Lightning's way."""
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        own = self.alone and bool(objects_in(checkpoint))
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            hashed = _HashedFile(file)
            torch.save(checkpoint, hashed if own else file)
        if own:
            _written.add(hashed.sha256.digest())

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a local file, strictly; with ``weights_only=False`` the user trusts it and Lightning reads it."""
        if _is_local(path) and not os.path.exists(path):
            raise missing(Path(path))
        if weights_only is False or not _is_local(path):
            return super().load_checkpoint(path, map_location, weights_only)
        if not Path(path).is_file():
            raise CheckpointError(f"{path} is not a file.")
        content = load_checkpoint(Path(path), map_location, mmap=False)
        if self.alone and left_out(content):
            content = _own_content(Path(path), map_location) or content
        _check_version(content, path)
        return content


class _HashedFile:
    """A file being written, and the digest of what went into it: on the disk another could change it meanwhile."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """The next bytes."""
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        """As of the file."""
        self.file.flush()


def _own_content(path: Path, map_location: Any) -> dict[str, Any] | None:
    """Everything in a file that this process has written; None for any other file."""
    data = path.read_bytes()
    if hashlib.sha256(data).digest() not in _written:
        return None
    return torch.load(io.BytesIO(data), map_location=map_location, weights_only=False)


def _check_version(content: Any, path: Any) -> None:
    """Lightning rewrites checkpoints of older versions before anyone can look at them; ours are of version 2 or newer.

    Raises:
        CheckpointError: an adapter checkpoint that says otherwise.
    """
    if not isinstance(content, dict) or SECTION not in content:
        return
    version = content.get("pytorch-lightning_version")
    try:
        good = Version(version) >= Version("2.0")
    except (InvalidVersion, TypeError):
        good = False
    if not good:
        raise CheckpointError(
            f"{path} is damaged: it says that version {short(repr(version), 60)} of Lightning wrote it, which it is"
            " too new for. Take another checkpoint."
        )


def use_safe_files(trainer: L.Trainer) -> None:
    """Replace Lightning's plain reader and writer; one that the user chose stays, as do those of sharded strategies."""
    strategy, outer, alone = trainer.strategy, None, trainer.world_size == 1
    inner: Any = strategy.checkpoint_io
    while isinstance(inner, every("plugins.io.wrapper._WrappingCheckpointIO")):
        outer, inner = inner, inner.checkpoint_io
    if type(inner) not in every("plugins.io.TorchCheckpointIO"):
        return
    if outer is None:
        strategy.checkpoint_io = SafeCheckpointIO(alone)
    else:
        outer._checkpoint_io = SafeCheckpointIO(alone)


def _is_local(path: Any) -> bool:
    return "://" not in str(path)
