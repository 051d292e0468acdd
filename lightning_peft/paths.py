"""Where adapters lie, and what is called what there; needs no torch, so that the quick commands stay quick."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from lightning_peft.errors import MissingFileError, PEFTError

#: the description's name, in a checkpoint and in the header of an adapter file
SECTION = "lightning_peft"
#: the adapter in a folder of ours
ADAPTER = "adapter.safetensors"


def locate(path: str | os.PathLike) -> Path:
    """A path as given, or a file inside an installed package: ``pkg://PACKAGE/SUB/PATH`` (found, not imported)."""
    text = os.fspath(path)
    if not _can_be_a_path(text):
        raise PEFTError(f"{text[:60]!r}… is no path: it has letters that names of files cannot have.")
    if not text.startswith("pkg://"):
        return Path(text).expanduser()
    package, _, rest = text.removeprefix("pkg://").partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise PEFTError(f"{text}: no package {package!r} is installed here. Try: pip install {package}")
    return Path(next(iter(spec.submodule_search_locations)), rest)


def missing(path: Path) -> MissingFileError:
    """The error for a path at which nothing is. It names the first saved adapters in the same folder."""
    names: list[str] = []
    with suppress(OSError):
        names = sorted(place.name for place in path.parent.glob("*") if place.suffix in (".ckpt", ".safetensors"))
    text = f"{path} does not exist."
    if names:
        text += f" There is: {', '.join(names[:5])}."
    return MissingFileError(errno.ENOENT, text)


@contextmanager
def held(path: Path) -> Iterator[Path]:
    """Open a file, and yield a path that leads to this very file whatever takes its name meanwhile.

    torch and safetensors open a file by its name several times: to read the header, and to map the tensors. Beside a
    process that saves, these could be two different files. On Windows a file that is open cannot be replaced, so its
    name will do; so it must on systems without ``/proc``.
    """
    with path.open("rb") as file:
        link = Path("/proc/self/fd", str(file.fileno()))
        try:
            leads_here = os.path.samestat(link.stat(), os.fstat(file.fileno()))
        except OSError:
            leads_here = False
        yield link if leads_here else path


def _can_be_a_path(text: str) -> bool:
    """Whether the system could have a file of this name; asking it about any other is an error of its own."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def size(count: float) -> str:
    """Bytes for people, in powers of 1000 as disks and hubs count.

    >>> size(999), size(91_000_000)
    ('999 B', '91.0 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
