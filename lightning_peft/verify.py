"""Does a saved adapter fit a model? One clear error if not, before anything changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.errors import CheckpointError, ConfigError
from lightning_peft.fields import settle
from lightning_peft.files import SECTION
from lightning_peft.fingerprint import difference
from lightning_peft.method import Method, registry
from lightning_peft.trainable import Injection, model_tensors, require, required_names

FORMAT_VERSION = 1
_SHAPE = {
    "network": str,
    "methods": list,
    "modules_to_save": list,
    "new_modules": list,
    "keys": list,
    "base": dict,
}
_BASE = {"structure": str, "values": str, "sketch": str, "class": str, "dtype": str, "parameters": int}


def verify_section(info: Mapping[str, Any], where: str) -> None:
    """Refuse a section of a newer format, or one whose parts are missing or of another type."""
    version = info.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format {version}, written by lightning_peft {info.get('library_version')}; this version"
            f" reads up to format {FORMAT_VERSION}. Upgrade: pip install -U lightning-peft."
        )
    broken = [k for k, kind in _SHAPE.items() if not isinstance(info.get(k), kind)]
    if isinstance(info.get("base"), dict):
        broken += [f"base.{k}" for k, kind in _BASE.items() if not isinstance(info["base"].get(k), kind)]
    for i, entry in enumerate(info["methods"] if isinstance(info.get("methods"), list) else []):
        good = isinstance(entry, dict) and isinstance(entry.get("type"), str) and isinstance(entry.get("config"), dict)
        if not good or not _names(entry.get("targets")):
            broken.append(f"methods[{i}]")
    lists = ("modules_to_save", "new_modules", "keys")
    broken += [k for k in lists if isinstance(info.get(k), list) and not _names(info[k])]
    if not isinstance(version, int) or version < 1 or broken:
        parts = ", ".join(broken) or f"format_version={version!r}"
        raise CheckpointError(f"{where}: its {SECTION!r} section is damaged ({parts}).")


def method_from(entry: Mapping[str, Any], where: str) -> Method:
    """Build a method from its entry in a file; names resolve through the registry, nothing is imported."""
    import lightning_peft.methods  # noqa: F401  (defines the classes)

    kinds = registry()
    kind = kinds.get(entry["type"])
    if kind is None:
        raise CheckpointError(f"{where} uses the method {entry['type']!r}, unknown here. Known: {', '.join(kinds)}.")
    try:
        method = kind(**entry["config"])
        settle(method)
        return method
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{where}: its {entry['type']} cannot be built: {error}") from error


def verify(model: nn.Module, info: Mapping[str, Any], where: str) -> None:
    """Compare a file's description with what is in the model."""
    injection = require(model)[0]
    theirs = [method_from(entry, where) for entry in info["methods"]]
    _verify_methods(injection, theirs, info, where)
    if set(injection.saved) != set(info["modules_to_save"]):
        raise CheckpointError(
            f"{where} trains {_listed(info['modules_to_save'])} in full, the model {_listed(injection.saved)}."
            " Use the same modules_to_save."
        )
    reason = difference(injection.base, info["base"])
    if reason:
        raise CheckpointError(other_base(where, info, injection.base, reason))


def verify_keys(state: Mapping[str, Tensor], info: Mapping[str, Any], where: str) -> None:
    """Raise unless a file holds what its own section lists."""
    if info.get("save") == "full":
        return
    missing, extra = set(info["keys"]) - set(state), set(state) - set(info["keys"])
    if missing or extra:
        raise CheckpointError(_misfit(where, missing, extra))


def verify_tensors(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Raise unless names and shapes of ``state`` are those of the adapter in ``model``."""
    needed, tensors = required_names(model), model_tensors(model)
    missing = [n for n in needed if n not in state]
    known = set(needed) | set(dict(model.named_buffers()))  # statistics travel only when they moved
    extra = [n for n in state if n not in known]
    if missing or extra:
        raise CheckpointError(_misfit(where, missing, extra))
    kept = require(model)[0].shapes
    shapes = {n: kept.get(n, tensors[n].shape) for n in state if n in tensors}
    wrong = [f"{n} {tuple(state[n].shape)} (here {tuple(s)})" for n, s in shapes.items() if state[n].shape != s]
    if wrong:
        raise CheckpointError(f"{where} has other shapes than the adapters in the model: {some(wrong)}.")


def other_base(where: str, info: Mapping[str, Any], ours: Mapping[str, Any], reason: str) -> str:
    """The message for an adapter that was trained beside other weights."""
    return (
        f"{where} was trained on another base model (fingerprint {info['base']['values'][:8]}, here"
        f" {ours['values'][:8]}): {reason}. Load it into {info['base']['class']}{source(info)}."
    )


def source(info: Mapping[str, Any]) -> str:
    """Where the base came from, if it is known."""
    path = info["base"].get("source")
    return f" from {path}" if path else ""


def some(names: Collection[str], count: int = 4) -> str:
    """The first few names."""
    names = sorted(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _verify_methods(injection: Injection, theirs: list[Method], info: Mapping[str, Any], where: str) -> None:
    ours = injection.methods
    if [type(m) for m in ours] != [type(m) for m in theirs]:
        names = [" + ".join(type(m).__name__ for m in methods) for methods in (theirs, ours)]
        raise CheckpointError(
            f"{where} was trained with {names[0]}, the model has {names[1]}. Inject the method of the file,"
            " or load it into a model without adapters."
        )
    for mine, other, names, entry in zip(ours, theirs, injection.targets, info["methods"], strict=True):
        _verify_config(mine.config(), other.config(), mine.free_fields, f"{where}: its {type(other).__name__}")
        if set(names) != set(entry["targets"]):
            raise CheckpointError(
                f"{where}: it adapts {len(entry['targets'])} modules, the model has {len(names)} adapted; they differ"
                f" in {some(set(names) ^ set(entry['targets']))}. Use the same target_modules."
            )


def _verify_config(mine: dict[str, Any], other: dict[str, Any], free: Collection[str], what: str) -> None:
    wrong = [
        f"{k}={other.get(k)!r} (here {mine.get(k)!r})" for k in mine if k not in free and mine.get(k) != other.get(k)
    ]
    if wrong:
        raise CheckpointError(f"{what} differs from the one in the model: {', '.join(wrong)}. Use the file's settings.")


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _listed(names: Collection[str]) -> str:
    return some(names) if names else "nothing"


def _misfit(where: str, missing: Collection[str], extra: Collection[str]) -> str:
    parts = [f"it lacks {some(missing)}" if missing else "", f"it has in excess {some(extra)}" if extra else ""]
    return f"{where} does not fit the adapters in the model: {'; '.join(p for p in parts if p)}."
