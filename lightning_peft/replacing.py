"""Files and folders that never appear half-written under their final name, even if the process is killed.

Everything is first written into a workshop: a hidden folder on the file system of the target, named
``.NAME.XXXXXXXX.lightning_peft.tmp``. From there it is renamed. A library that makes temporary files of its own
(safetensors does) makes them in the workshop as well, so they never lie about elsewhere. A workshop holds:

``lock``
    locked by the writer, so that the next write can tell a workshop in use from one that a killed process left behind
``new``
    what is being written
``old``
    the files of an earlier export, while they are being exchanged for the new ones
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from lightning_peft.errors import WriteError

try:
    import fcntl
except ImportError:  # Windows: nothing can be locked, so nothing is swept
    fcntl = None

_SUFFIX = ".lightning_peft.tmp"
_LOCK, _NEW, _OLD = "lock", "new", "old"
_YOUNG = 60.0  # seconds: a workshop may be this old before its writer has locked it
_NAME_BYTES = 100  # of the final name, in the name of a workshop; file systems allow 255, some only 143
#: the names under which libraries look for the weights of a model (whole, or the list of their parts) and an adapter
_MODEL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
#: all names of weights that would be loaded in place of new ones, or together with them
_WEIGHTS = ((*_MODEL, "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin"), _ADAPTER)
#: Errors of a flush that say that this file system cannot do it at all: some in the network, and some in user space.
_CANNOT_FLUSH = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file to; rename that file to ``path`` at the end.

    If anything fails, the temporary file is removed, and what was at ``path`` is still there.

    Raises:
        WriteError: the disk is full, the folder cannot be written, …
    """
    with _explained(path), _workshop(path.parent, path.name) as workshop:
        temporary = workshop / _NEW / path.name
        temporary.touch()  # a name that the file system does not take is refused before anything is written
        yield temporary
        _finish(workshop)
        os.replace(temporary, path)
        _flush_folder(path.parent)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder to write into; its files stand in ``target`` at the end.

    A folder that does not exist yet appears at once. One that exists may be a mount point, or may lie in a folder that
    cannot be written, so it is never renamed: its files are exchanged one by one. The earlier weights leave first, and
    the new weights come last. In between there are none, so nobody loads a part of an export, or of two: a class
    such as ``LlamaForCausalLM`` would load weights without ``config.json``, but nothing loads without weights. If
    anything fails, the earlier files are put back. Other files in ``target`` stay.

    Raises:
        WriteError: the disk is full, the folder cannot be written, …; the message says what is in ``target``.
    """
    with _explained(target):
        if target.exists() and not target.is_dir():
            raise WriteError(errno.ENOTDIR, f"{target} could not be written: it is a file; give a folder.")
        parent = target if target.is_dir() else target.parent
        with _workshop(parent, target.name) as workshop:
            yield workshop / _NEW
            _finish(workshop)
            if target.is_dir():
                _exchange(workshop, target)
                sweep(target, exchanged=True)
            else:
                os.replace(workshop / _NEW, target)
            _flush_folder(parent)


def under_way(folder: Path) -> bool:
    """Whether files are being exchanged in a folder, or were when the process that did so was killed."""
    return any(folder.glob(f".*{_SUFFIX}"))


def sweep(folder: Path, *, exchanged: bool = False) -> None:
    """Remove the workshops that killed processes left in a folder; those that are in use are locked, and stay.

    A process that was killed during an exchange leaves files of an earlier export in its workshop. They stay as well,
    until another export has been ``exchanged`` for them.
    """
    if fcntl is None:
        return
    for entry in folder.glob(f".*{_SUFFIX}"):
        with suppress(OSError):
            young = time.time() - entry.stat().st_mtime < _YOUNG
            if not young and (exchanged or not _keeps_old(entry)):
                _remove_unlocked(entry)


def _remove_unlocked(entry: Path) -> None:
    """Remove a workshop, or raise OSError if a process holds its lock."""
    locked = entry / _LOCK
    if not locked.exists():  # killed before it made its lock
        locked = entry
    handle = os.open(locked, os.O_RDONLY if locked.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[union-attr]
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    finally:
        os.close(handle)


@contextmanager
def _workshop(parent: Path, name: str) -> Iterator[Path]:
    """Make a workshop in ``parent``, lock it, and remove it in the end."""
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    workshop = Path(tempfile.mkdtemp(prefix=f".{_beginning(name)}.", suffix=_SUFFIX, dir=parent))
    lock = None
    try:
        (workshop / _NEW).mkdir()
        (workshop / _OLD).mkdir()
        lock = _locked(workshop / _LOCK)
        yield workshop
    finally:
        if lock is not None:
            os.close(lock)
        if not _keeps_old(workshop):
            shutil.rmtree(workshop, ignore_errors=True)


def _beginning(name: str) -> str:
    """The beginning of a file name. File systems limit the bytes of a name, and a letter may take four of them."""
    start = os.fsencode(name)[:_NAME_BYTES]
    return start.decode(sys.getfilesystemencoding(), "ignore")  # without a letter that was cut in two


def _locked(path: Path) -> int | None:
    """Make a file and lock it, where that can be done. Returns the handle that holds the lock."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    if fcntl is None:
        os.close(handle)
        return None
    with suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _keeps_old(workshop: Path) -> bool:
    """Whether files of an earlier export are in a workshop."""
    old = workshop / _OLD
    return old.is_dir() and any(old.iterdir())


def _finish(workshop: Path) -> None:
    """Bring the new files to the disk, and give them the usual permissions."""
    # safetensors writes files that only their owner may read. The lock was made with the permissions that the umask,
    # or the folder, gives to every new file.
    mode = stat.S_IMODE((workshop / _LOCK).stat().st_mode)
    for path in (workshop / _NEW).rglob("*"):
        if path.is_dir():
            _flush_folder(path)
        else:
            try:
                _flush(path)  # some file systems report only now that the disk is full
            except OSError as error:
                if error.errno not in _CANNOT_FLUSH:
                    raise
            with suppress(OSError):  # some mounted file systems have no permissions to change
                path.chmod(mode)
    _flush_folder(workshop / _NEW)


def _flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    flags = os.O_RDWR if os.name == "nt" else os.O_RDONLY  # Windows flushes only what is open for writing
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system can
        _flush(folder)


def _exchange(workshop: Path, target: Path) -> None:
    """Put the new files into a folder that exists already; if that fails, put the earlier ones back."""
    new = workshop / _NEW
    written = [str(path.relative_to(new)) for path in new.rglob("*") if not path.is_dir()]
    with _alone_in(target):
        replaced = _stale(written, target)
        replaced += [name for name in written if os.path.lexists(target / name)]
        _refuse_folders(replaced, target)
        if len(written) == 1 and replaced in ([], written):
            # One file is exchanged by one renaming: a reader finds the earlier one, and then the new one.
            os.replace(new / written[0], target / written[0])
            return
        written.sort(key=_is_weights)  # the weights last
        replaced.sort(key=_is_weights, reverse=True)  # the weights first
        try:
            _move_away(replaced, workshop, target)
            _move_in(written, workshop, target)
        except BaseException as error:
            _put_back(written, replaced, workshop, target, error)
            raise
    shutil.rmtree(workshop / _OLD, ignore_errors=True)


def _refuse_folders(names: list[str], target: Path) -> None:
    for name in names:
        if (target / name).is_dir():
            raise WriteError(
                errno.EISDIR,
                f"{target} could not be written: {target / name} is a folder, and a file of the export has that name."
                " Nothing has changed; move that folder away, or write elsewhere.",
            )


def _is_weights(name: str) -> bool:
    """Whether a library that is given the folder looks for weights under this name."""
    return name in (*_MODEL, *_ADAPTER)


def _stale(written: list[str], target: Path) -> list[str]:
    """The earlier weights that would be loaded in place of the new ones, or together with them."""
    found = set()
    for patterns in _WEIGHTS:
        if any(fnmatchcase(name, pattern) for name in written for pattern in patterns):
            for pattern in patterns:
                found.update(path.name for path in target.glob(pattern))
    return sorted(found.difference(written))


def _move_away(replaced: list[str], workshop: Path, target: Path) -> None:
    """Move the earlier files out of the folder, in their order."""
    for name in replaced:
        kept = workshop / _OLD / name
        kept.parent.mkdir(parents=True, exist_ok=True)
        os.replace(target / name, kept)
        if _is_weights(name):
            _flush_folder(target)  # the disk too must see the weights go before anything else does
    _flush_folder(target)  # and all earlier files go before a new one comes


def _move_in(written: list[str], workshop: Path, target: Path) -> None:
    """Move the new files into the folder, in their order."""
    for name in written:
        if _is_weights(name):
            _flush_folder(target)  # the disk too must see everything else come before the weights
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(workshop / _NEW / name, target / name)


def _put_back(written: list[str], replaced: list[str], workshop: Path, target: Path, cause: BaseException) -> None:
    """Undo `_move_in` and `_move_away` as far as they came, which the places of the files tell.

    ``shutil.move`` copies where a file cannot be renamed.

    Raises:
        WriteError: that failed as well; the message says what is where.
    """
    new, old = workshop / _NEW, workshop / _OLD
    try:
        for name in reversed(written):
            if not os.path.lexists(new / name):
                shutil.move(target / name, new / name)
        for name in reversed(replaced):
            if os.path.lexists(old / name):
                shutil.move(old / name, target / name)
    except OSError as error:
        text = f"{target} could not be written: {cause}. "
        if _keeps_old(workshop):
            text += (
                f"Its earlier files could not be put back either ({error}). They are in {old}; move them to {target}."
            )
        else:
            text += f"Some files of the unfinished export are in it and could not be removed ({error})."
        raise WriteError(error.errno, text) from cause


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process exchanges files in a folder: two at once would leave a mixture."""
    handle = None
    with suppress(OSError):  # Windows cannot open folders, and some file systems have no locks
        handle = os.open(folder, os.O_RDONLY)
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise one sentence for what the system reports, whichever library met it."""
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        number = _number(error)
        if number is None:
            raise
        text = f"{path} could not be written: {os.strerror(number)}. {_way_out(number)}"
        raise WriteError(number, text) from error


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
        advice = "free some space, or write elsewhere"
    elif number == errno.ENAMETOOLONG:
        advice = "give a shorter name"
    else:
        advice = "write into a folder that you may change"
    return f"Nothing that was there is lost; {advice}."
