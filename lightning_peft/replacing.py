"""Files and folders that are never half-written under their final name, whenever the process is killed.

Everything is written to a hidden name beside the final one (``.NAME.XXXXXXXX.lightning_peft.tmp``) and renamed. The
writer holds a lock on it, so what a killed process left behind is known, and goes with the next write into the folder.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_peft.errors import WriteError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, so nothing is swept
    fcntl = None

_SUFFIX = ".lightning_peft.tmp"
_YOUNG = 60.0  # seconds in which a file may have been made and not be locked yet
#: what makes a folder loadable: taken away first and put back last where an earlier export is replaced
_MARKERS = ("config.json", "adapter_config.json")
#: weights of an earlier export that would be found before, or beside, the new ones
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*", "adapter_model.*")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; rename it to ``path`` at the end, or remove it if anything fails.

    Raises:
        WriteError: the disk is full, the folder cannot be written, …; what was at ``path`` is still there.
    """
    with _explained(path):
        temporary, lock = _start(path, folder=False)
        try:
            yield temporary
            _settle(temporary, lock)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
            _release(lock)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """As `replacing`, for a folder; other files that stand in ``target`` stay there.

    A new folder appears at once. In one that holds an earlier export the files are exchanged one by one, and in
    between it has no ``config.json``: it cannot be loaded, rather than be a mixture of two exports.
    """
    with _explained(target):
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file; give a folder")
        temporary, lock = _start(target, folder=True)
        try:
            yield temporary
            for path in (temporary, *temporary.rglob("*")):  # safetensors writes files for the owner alone
                path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
            _move_in(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            _release(lock)


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder; files that a process still writes are locked and stay."""
    for entry in folder.glob(f".*{_SUFFIX}") if fcntl is not None else ():
        with suppress(OSError):
            if time.time() - entry.stat().st_mtime < _YOUNG:
                continue
            handle = os.open(entry, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[union-attr]
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            finally:
                os.close(handle)


def _start(path: Path, *, folder: bool) -> tuple[Path, int | None]:
    """A locked temporary file or folder beside ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    name = {"prefix": f".{path.name[:100]}.", "suffix": _SUFFIX, "dir": path.parent}
    if folder:
        made = tempfile.mkdtemp(**name)
        handle = os.open(made, os.O_RDONLY) if fcntl is not None else None
    else:
        handle, made = tempfile.mkstemp(**name)
    if fcntl is None:
        _release(handle)  # an open file cannot be renamed there
        return Path(made), None
    with suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[arg-type]
    return Path(made), handle


def _settle(temporary: Path, lock: int | None) -> None:
    """Bring the bytes to the disk: some file systems report that it is full only now."""
    temporary.chmod(0o666 & ~_umask())
    if lock is not None:
        os.fsync(lock)


def _release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _move_in(temporary: Path, target: Path) -> None:
    if not target.exists() or not (target.is_symlink() or any(target.iterdir())):
        if target.exists():
            target.rmdir()
        os.replace(temporary, target)
        return
    new = sorted((p.name for p in temporary.iterdir()), key=lambda name: (name in _MARKERS, name))
    stale = {p.name for pattern in _WEIGHTS for p in target.glob(pattern)} - set(new)
    for name in [*_MARKERS, *sorted(stale)]:
        if name in new or name in stale:
            (target / name).unlink(missing_ok=True)
    for name in new:
        if (target / name).is_dir():
            shutil.rmtree(target / name)
        os.replace(temporary / name, target / name)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """One sentence for what the system says, whichever library met it."""
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        number = _number(error)
        if number is None:
            raise
        reason = os.strerror(number) if not isinstance(error, NotADirectoryError) else str(error.strerror)
        raise WriteError(number, f"{path} could not be written: {reason}. {_way_out(number)}") from error


def _number(error: Exception) -> int | None:
    """The system's error number; safetensors has it in its text only."""
    if isinstance(error, OSError):
        return error.errno
    code = re.search(r"\(os error (\d+)\)", str(error))
    if code:
        return int(code[1])
    cause = error.__cause__ or error.__context__
    return _number(cause) if isinstance(cause, Exception) else None


def _way_out(number: int) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Nothing that was there is lost; free some space, or write elsewhere."
    return "Nothing that was there is lost; write into a folder that you may change."


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
