"""Read an offline W&B run back: a LevelDB log of protobuf records."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

_BLOCK = 32768


def records(path: Path) -> Iterator[Any]:
    """All records of one ``run-*.wandb`` file, checksums verified."""
    data = path.read_bytes()
    identity, magic, _ = struct.unpack("<4sHB", data[:7])
    assert (identity, magic) == (b":W&B", 0xBEE1)
    position, part = 7, b""
    while position + 7 <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < 7:
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + 7])
        piece = data[position + 7 : position + 7 + length]
        position += 7 + length
        if len(piece) < length or kind == 0:
            return
        assert zlib.crc32(piece, zlib.crc32(bytes([kind]))) == checksum
        part = piece if kind in (1, 2) else part + piece
        if kind in (1, 4):
            record = pb.Record()
            record.ParseFromString(part)
            yield record


def contents(folder: Path) -> dict[str, Any]:
    """Config, metrics by name, and artifacts of the only run below ``folder``."""
    (file,) = folder.rglob("run-*.wandb")
    found: dict[str, Any] = {"config": {}, "metrics": {}, "artifacts": []}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                found["metrics"].setdefault(name, []).append(json.loads(item.value_json))
        elif kind in ("config", "run"):
            updates = record.config.update if kind == "config" else record.run.config.update
            found["config"].update({u.key or "/".join(u.nested_key): json.loads(u.value_json) for u in updates})
        elif kind == "artifact":
            artifact = record.artifact
            files = {c.path: c.size for c in artifact.manifest.contents}
            found["artifacts"].append((artifact.name, artifact.type, list(artifact.aliases), files))
    return found
