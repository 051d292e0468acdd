"""Does a saved adapter fit a model? One clear error if not, before anything changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.errors import CheckpointError
from lightning_peft.fields import settle
from lightning_peft.fingerprint import difference
from lightning_peft.method import Method, registry
from lightning_peft.sections import (  # noqa: F401  (part of them for those who import from here)
    FORMAT_VERSION,
    misfit,
    short,
    some,
    verify_finite,
    verify_keys,
    verify_section,
)
from lightning_peft.trainable import (
    Injection,
    base_weights,
    model_tensors,
    moved_weights,
    require,
    required_names,
)


def method_from(entry: Mapping[str, Any], where: str) -> Method:
    """Build a method from its entry in a file; names resolve through the registry, nothing is imported."""
    import lightning_peft.methods  # noqa: F401  (defines the classes)

    kinds = registry()
    kind = kinds.get(entry["type"])
    if kind is None:
        raise CheckpointError(
            f"{where} uses the method {short(entry['type'])!r}, unknown here. Known: {', '.join(kinds)}."
        )
    try:
        method = kind.rebuilt(entry["config"])
        settle(method)
        return method
    except Exception as error:  # values of any type and size
        raise CheckpointError(f"{where}: its {entry['type']} cannot be built: {short(error)}") from error


def verify(model: nn.Module, info: Mapping[str, Any], where: str, *, values: bool = True) -> None:
    """Compare a file's description with what is in the model, the base's ``values`` included."""
    injection = require(model)[0]
    theirs = [method_from(entry, where) for entry in info["methods"]]
    _verify_methods(injection, theirs, info, where)
    if set(injection.saved) != set(info["modules_to_save"]):
        raise CheckpointError(
            f"{where} trains {_listed(info['modules_to_save'])} in full, the model {_listed(injection.saved)}."
            " Use the same modules_to_save."
        )
    reason = other_values(injection, info, values=values)
    if reason:
        raise CheckpointError(other_base(where, info, injection.base, reason))


def other_values(injection: Injection, info: Mapping[str, Any], *, values: bool = True) -> str | None:
    """Why the base of a model is not the one that a file was made with, or None.

    The values of weights that the file brings with it do not matter: the module had moved them.
    """
    brought = {name.removeprefix(info["network"]) for name in info["keys"]}
    frozen = sorted(set(injection.flags) - set(injection.trained))
    but_for = [number for number, name in enumerate(frozen) if name in brought]
    return difference(injection.base, info["base"], values=values, but_for=but_for)


def verify_tensors(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Raise unless names and shapes of ``state`` are those of the adapter in ``model``."""
    injection, prefix, root = require(model)
    needed, tensors = required_names(model), model_tensors(model)
    missing = [n for n in needed if n not in state]
    # statistics and frozen weights travel only when they moved
    known = {*needed, *dict(model.named_buffers()), *(prefix + name for name in base_weights(injection, root))}
    extra = [n for n in state if n not in known]
    if missing or extra:
        raise CheckpointError(misfit(where, missing, extra))
    kept = require(model)[0].shapes
    shapes = {n: kept.get(n, tensors[n].shape) for n in state if n in tensors}
    wrong = [f"{n} {tuple(state[n].shape)} (here {tuple(s)})" for n, s in shapes.items() if state[n].shape != s]
    if wrong:
        raise CheckpointError(f"{where} has other shapes than the adapters in the model: {some(wrong)}.")
    kinds = [
        f"{n} {t.dtype} (here {tensors[n].dtype})"
        for n, t in state.items()
        if n in tensors
        and t.dtype != tensors[n].dtype
        and not (t.is_floating_point() and tensors[n].is_floating_point())
    ]
    if kinds:
        raise CheckpointError(f"{where} has tensors of another type than the model: {some(kinds)}.")
    verify_finite({n: state[n] for n in needed}, where)
    lost = [prefix + name for name in moved_weights(injection, root) if prefix + name not in state]
    if lost:
        raise CheckpointError(
            f"{where} was saved before {some(lost)} moved, which the module has moved since then, and there is no copy"
            " to put back. Build the model again, and load it there."
        )


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
        f"{k}={short(repr(other.get(k)))} (here {mine.get(k)!r})"
        for k in mine
        if k not in free and mine.get(k) != other.get(k)
    ]
    if wrong:
        raise CheckpointError(f"{what} differs from the one in the model: {', '.join(wrong)}. Use the file's settings.")


def _listed(names: Collection[str]) -> str:
    return some(names) if names else "nothing"
