"""Images as arrays: ``.npz`` files, or a function that returns them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

_PIXELS = ("images", "x", "X", "data", "arr_0")
_LABELS = ("labels", "label", "y", "target", "arr_1")
_SPLITS = {"train": ("_train", ""), "validation": ("_val", "_validation"), "test": ("_test",)}


def from_npz(path: Path) -> dict[str, Dataset]:
    """Arrays ``images`` (or x, data) and ``labels`` (or y, target), also per split: ``x_train``, ``y_test`` …"""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            return _splits({name: file[name] for name in file.files}, str(path))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as npz: {error}") from None


def is_function(name: Any) -> bool:
    """Whether a source of data is the import path of a function, and no file.

    >>> is_function("sklearn.datasets.load_digits"), is_function("images/train"), is_function(None)
    (True, False, False)
    """
    if not isinstance(name, str) or "." not in name or not all(part.isidentifier() for part in name.split(".")):
        return False
    return not os.path.exists(name)


def from_function(name: str) -> dict[str, Dataset]:
    """What an importable function returns: (images, labels), or a mapping as an npz file has it."""
    module, _, attribute = name.rpartition(".")
    try:
        result = getattr(import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"data={name!r} is no file, and no function that can be imported: {error}") from None
    if isinstance(result, tuple) and len(result) == 2:
        result = {"images": result[0], "labels": result[1]}
    if not isinstance(result, Mapping):
        raise ConfigError(f"data={name!r} returned a {type(result).__name__}, not (images, labels) or a mapping.")
    return _splits(result, name)


def _splits(arrays: Mapping[str, Any], where: str) -> dict[str, Dataset]:
    found = {split: _table(arrays, ends, where) for split, ends in _SPLITS.items()}
    kept = {split: rows for split, rows in found.items() if rows is not None}
    if not kept:
        raise ConfigError(f"{where} has no array called images, x or data; it has {', '.join(arrays)}.")
    return kept


def _table(arrays: Mapping[str, Any], ends: tuple[str, ...], where: str) -> Dataset | None:
    import datasets
    import numpy as np

    pixels = next((arrays[name + end] for end in ends for name in _PIXELS if name + end in arrays), None)
    labels = next((arrays[name + end] for end in ends for name in _LABELS if name + end in arrays), None)
    if pixels is None:
        return None
    pixels = np.ascontiguousarray(pixels)
    if pixels.ndim not in (3, 4):
        raise ConfigError(f"{where}: images have shape {pixels.shape}; give (n, height, width[, channels]).")
    columns: dict[str, Any] = {
        "pixels": [row.tobytes() for row in pixels],
        "shape": [list(pixels.shape[1:])] * len(pixels),
        "dtype": [str(pixels.dtype)] * len(pixels),
    }
    if labels is not None:
        if len(labels) != len(pixels):
            raise ConfigError(f"{where} has {len(pixels)} images but {len(labels)} labels.")
        columns["label"] = np.asarray(labels).reshape(len(pixels)).tolist()
    return datasets.Dataset.from_dict(columns)
