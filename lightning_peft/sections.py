"""The description inside a file of ours: what it must hold before anyone looks at its parts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_peft.errors import CheckpointError
from lightning_peft.format1 import FORMAT_VERSION
from lightning_peft.paths import SECTION
from lightning_peft.untrusted import short as short

_SHAPE = {
    "network": str,
    "methods": list,
    "modules_to_save": list,
    "new_modules": list,
    "keys": list,
    "trainable": list,
    "base": dict,
}
_BASE = {"structure": str, "values": str, "sketch": str, "class": str, "dtype": str, "parameters": int}


def verify_section(info: Mapping[str, Any], where: str) -> None:
    """Refuse a section of a newer format, or one whose parts are missing or of another type."""
    version = info.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format {version}, written by lightning_peft {short(info.get('library_version'))}; this one"
            f" reads up to format {FORMAT_VERSION}. Upgrade: pip install -U lightning-peft."
        )
    broken = [k for k, kind in _SHAPE.items() if not isinstance(info.get(k), kind)]
    if isinstance(info.get("base"), dict):
        broken += [f"base.{k}" for k, kind in _BASE.items() if not isinstance(info["base"].get(k), kind)]
        broken += [] if re.fullmatch(r"(?:[0-9a-f]{4})*", str(info["base"].get("sketch"))) else ["base.sketch"]
    for i, entry in enumerate(info["methods"] if isinstance(info.get("methods"), list) else []):
        good = isinstance(entry, dict) and isinstance(entry.get("type"), str) and isinstance(entry.get("config"), dict)
        if not good or not _names(entry.get("targets")):
            broken.append(f"methods[{i}]")
    broken += ["save"] if info.get("save", "trainable") not in ("trainable", "full") else []
    lists = ("modules_to_save", "new_modules", "keys", "trainable")
    broken += [k for k in lists if isinstance(info.get(k), list) and not _names(info[k])]
    if not isinstance(version, int) or version < 1 or broken:
        parts = short(", ".join(broken)) or f"format_version={short(repr(version))}"
        raise CheckpointError(f"{where}: its {SECTION!r} section is damaged ({parts}).")


def verify_keys(state: Mapping[str, Tensor], info: Mapping[str, Any], where: str, *, hollow: bool = False) -> None:
    """Raise unless a file holds the tensors that its own section lists, and no others.

    ``hollow``: the tensors stand for shapes alone, on the meta device.
    """
    missing, extra = set(info["keys"]) - set(state), set(state) - set(info["keys"])
    if missing or (extra and info.get("save") != "full"):
        raise CheckpointError(misfit(where, missing, extra))
    odd = [n for n in info["keys"] if not _plain(state[n], hollow)]
    if odd:
        raise CheckpointError(f"{where}: {some(odd)} should be plain tensors and are {type(state[odd[0]]).__name__}.")


def without_aliases(state: Mapping[str, Tensor], info: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file, those that several modules share under the one name that its section lists.

    DeepSpeed's converter writes a shared tensor under each of its names; in the file they are one and the same storage.
    """
    state = dict(state)
    if info.get("save") == "full":  # the names of everything, as the module itself gives them
        return state
    listed = set(info["keys"])
    known = {_memory(state[name]) for name in listed if name in state}
    return {name: t for name, t in state.items() if name in listed or _memory(t) is None or _memory(t) not in known}


def _memory(value: Any) -> tuple | None:
    """What a tensor shows of which memory; None if it has none."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta or not value.numel():
        return None
    return value.data_ptr(), value.dtype, value.shape, value.stride()


def _plain(value: Any, hollow: bool) -> bool:
    """Whether this is a tensor with as many bytes as it has elements; a view may declare any number of them."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or (value.is_meta and not hollow):
        return False
    ordinary = type(value) in (Tensor, torch.nn.Parameter)
    return not ordinary or value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def verify_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raise if something trained is no number: training had diverged, or the file is damaged."""
    broken = [n for n, t in state.items() if t.is_floating_point() and not t.is_meta and not torch.isfinite(t).all()]
    if broken:
        raise CheckpointError(
            f"{where} holds NaN or infinite values in {some(broken)}: the training diverged, or the file is damaged."
            " Take an earlier checkpoint."
        )


def some(names: Collection[str], count: int = 4) -> str:
    """The first few names."""
    names = sorted(short(name, 120) for name in names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def misfit(where: str, missing: Collection[str], extra: Collection[str]) -> str:
    """What a file lacks, and what it has that the model does not know."""
    parts = [f"it lacks {some(missing)}" if missing else "", f"it has in excess {some(extra)}" if extra else ""]
    return f"{where} does not fit the adapters in the model: {'; '.join(p for p in parts if p)}."
