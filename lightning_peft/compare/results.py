"""One small file for each finished run, so that an interrupted comparison goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.replacing import replacing


class Results:
    """Records of finished runs below a folder; a run is known by everything that its outcome depends on.

    >>> import tempfile
    >>> results = Results(Path(tempfile.mkdtemp()))
    >>> results.put({"label": "LoRA", "seed": 1}, {"val": {"loss": 0.5}})
    >>> results.get({"label": "LoRA", "seed": 1})["val"], results.get({"label": "LoRA", "seed": 2})
    ({'loss': 0.5}, None)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: Mapping[str, Any], suffix: str = ".json") -> Path:
        """Where a run's file lies: a readable name and a hash of the key."""
        words = [str(key[name]) for name in ("label", "what", "rate", "seed") if name in key]
        name = re.sub(r"[^A-Za-z0-9.+]+", "-", "-".join(words))[:60].strip("-")
        return self.folder / f"{name}-{digest(key)}{suffix}"

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of a run, or None if there is none, or none that can be read."""
        try:
            return json.loads(self.path(key).read_text(encoding="utf-8"))["record"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Write a record, whole or not at all."""
        with replacing(self.path(key)) as temporary:
            temporary.write_text(json.dumps({"key": key, "record": record}, indent=1, default=str), encoding="utf-8")


def digest(value: Any) -> str:
    """A short hash of plain values.

    >>> digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
