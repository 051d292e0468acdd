"""The description in the header of an adapter file, without what the names of its tensors say; needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def shortened(info: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Leave out the keys, and name only those that do not train.

    >>> info = {"save": "trainable", "keys": ["A", "B"], "trainable": ["B"]}
    >>> shortened(info, ["B", "A"])
    {'save': 'trainable', 'frozen': ['A']}
    >>> completed(shortened(info, ["B", "A"]), ["B", "A"])
    {'save': 'trainable', 'keys': ['B', 'A'], 'trainable': ['B']}
    """
    keys, trainable = info["keys"], set(info["trainable"])
    if set(keys) != set(names) or not trainable <= set(keys):
        return dict(info)
    rest = {k: v for k, v in info.items() if k not in ("keys", "trainable")}
    return rest | {"frozen": [n for n in keys if n not in trainable]}


def completed(info: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The description as it is in a checkpoint; one that is complete, or damaged, stays as it is."""
    frozen = info.get("frozen")
    if "keys" in info or "trainable" in info or not isinstance(frozen, list):
        return info
    rest, keys = {k: v for k, v in info.items() if k != "frozen"}, list(names)
    if any(n not in keys for n in frozen):
        return info
    return rest | {"keys": keys, "trainable": [n for n in keys if n not in frozen]}
