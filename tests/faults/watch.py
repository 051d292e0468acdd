"""What a case did beside its result: code that ran, modules that were looked for, files that were written or removed.

Python's audit events name each of these, whoever asks for it; a hook cannot be taken out again, so it is switched.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_RUNS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn")
#: events and the places of a path, and of the open folder it is relative to, among their arguments
_REMOVES = {"os.remove": (0, 1), "os.rmdir": (0, 1), "shutil.rmtree": (0, 1), "os.rename": (0, 2)}
_REMOVES |= {"os.truncate": (0, 99), "os.chmod": (0, 2)}
_WRITES = {"os.mkdir": (0, 2), "os.symlink": (1, 2), "os.link": (1, 3), "os.rename": (1, 3)}
_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Collects what happens while it is on.

    Args:
        inside: the folders in which a case may write and remove.
        foreign: the packages that no case may look for.
    """

    def __init__(self, inside: list[Path], foreign: tuple[str, ...]) -> None:
        self.inside = [str(place.resolve()) for place in inside]
        self.foreign = foreign
        self.active = False
        self.seen: dict[str, list[str]] = {}
        sys.addaudithook(self._hook)

    @contextmanager
    def on(self) -> Iterator[dict[str, list[str]]]:
        """Everything that the block did, under ``executed``, ``imported``, ``removed`` and ``written``."""
        self.seen = {"executed": [], "imported": [], "removed": [], "written": []}
        self.active = True
        try:
            yield self.seen
        finally:
            self.active = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in _RUNS:
            self.seen["executed"].append(f"{event} {arguments[:2]!r:.200}")
        elif event == "import" and str(arguments[0]).split(".")[0] in self.foreign:
            self.seen["imported"].append(str(arguments[0]))
        elif event == "open" and self._writes(arguments[1], arguments[2]) and self._outside(arguments[0]):
            self.seen["written"].append(str(arguments[0]))
        for kind, table in (("removed", _REMOVES), ("written", _WRITES)):
            if event in table and self._outside(*_of(arguments, table[event])):
                self.seen[kind].append(f"{event} {arguments}")

    def _writes(self, mode: Any, flags: Any) -> bool:
        if isinstance(mode, str):
            return bool(set(mode) & set("wax+"))
        return isinstance(flags, int) and bool(flags & _FLAGS)

    def _outside(self, path: Any, folder: Any = None) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False  # a descriptor, whose opening was seen
        self.active = False  # what follows looks at files itself
        try:
            start = f"/proc/self/fd/{folder}" if isinstance(folder, int) and folder >= 0 else ""
            # a link is removed, not what it leads to
            outer, name = os.path.split(os.path.join(start, os.fsdecode(path)))
            place = os.path.join(os.path.realpath(outer), name)
        except ValueError:
            return False
        finally:
            self.active = True
        if place.startswith(("/dev/", "/proc/")):
            return False
        return not any(place == top or place.startswith(top + os.sep) for top in self.inside)


def _of(arguments: tuple[Any, ...], places: tuple[int, int]) -> tuple[Any, Any]:
    path, folder = places
    return arguments[path], arguments[folder] if folder < len(arguments) else None
