"""The run's folder: everything that a run writes lies below ``--output_dir``, and one folder holds one run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_peft.errors import ConfigError
from lightning_peft.files import ADAPTER
from lightning_peft.untrusted import PLACES

#: what fit writes into the run's folder first
CONFIG = "config.yaml"


def put_below(options: Any, folder: Path) -> None:
    """Let every relative place in the options of a Trainer stand below the run's folder, in place.

    >>> options = {"callbacks": [{"class_path": "MergeOnFitEnd", "init_args": {"dirpath": "merged"}}]}
    >>> put_below(options, Path("runs/1")); options["callbacks"][0]["init_args"]
    {'dirpath': 'runs/1/merged'}
    """
    if isinstance(options, list):
        for part in options:
            put_below(part, folder)
        return
    if not isinstance(options, (Mapping, Namespace)):
        return
    fields = vars(options) if isinstance(options, Namespace) else options
    for name, value in list(fields.items()):
        if name in PLACES and isinstance(value, str) and "://" not in value:
            options[name] = str(folder / Path(value).expanduser())  # an absolute path stays as it is
        else:
            put_below(value, folder)


def holds_run(folder: Path) -> bool:
    """Whether a run has written into a folder."""
    if (folder / CONFIG).exists() or (folder / ADAPTER).exists():
        return True
    return next(_checkpoints(folder), None) is not None


def free_neighbour(folder: Path) -> Path:
    """The first of ``folder-2``, ``folder-3``, … that holds no run."""
    place = folder if folder.name else folder.resolve()
    neighbours = (place.with_name(f"{place.name}-{number}") for number in count(2))
    return next(neighbour for neighbour in neighbours if not holds_run(neighbour))


def newest_checkpoint(folder: Path, since: float = 0.0) -> Path | None:
    """The checkpoint below a folder that was written last, not before the time ``since``."""
    found = [(path.stat().st_mtime_ns, path) for path in _checkpoints(folder)]
    recent = [(written, path) for written, path in found if written >= since * 1e9]
    return max(recent)[1] if recent else None


def _checkpoints(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*.ckpt") if path.is_file())


class OldRun:
    """The files of a run that is to be replaced. They go when the new run really starts, so that a command that fails
    before leaves the old run as it was.

    Raises:
        ConfigError: the folder is the working directory, or one above it.
    """

    def __init__(self, folder: Path) -> None:
        if Path.cwd().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"--overwrite would empty {folder.resolve()}, in which this command runs. Give --output_dir a folder of"
                " its own."
            )
        self.folder = folder
        self.files = {path: _identity(path) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}

    def remove(self) -> None:
        """Remove the files that the new run has not written anew, and the folders that are empty then."""
        for path, identity in self.files.items():
            if os.path.lexists(path) and _identity(path) == identity:
                path.unlink()
        for folder, _, _ in os.walk(self.folder, topdown=False):
            if not os.listdir(folder) and Path(folder) != self.folder:
                os.rmdir(folder)


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_ino, found.st_mtime_ns
