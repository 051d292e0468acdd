"""The fields of a method as plain values of the declared types: what Python lets through, a checkpoint would not."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning_peft.errors import ConfigError


def settle(method: Any) -> None:
    """Turn numpy scalars, tuples and ranges into plain values in place; any other mismatch is an error.

    Raises:
        ConfigError: names the method, the field, the value and the declared type.

    >>> from lightning_peft import LoRA
    >>> method = LoRA(layers=range(2)); settle(method); method.layers
    [0, 1]
    >>> settle(LoRA(use_rslora="yes"))
    Traceback (most recent call last):
    lightning_peft.errors.ConfigError: LoRA(use_rslora='yes'): use_rslora must be bool.
    """
    hints = _hints(type(method))
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        try:
            plain = _fit(value, hints[field.name])
        except TypeError:
            kind = _spell(hints[field.name])
            text = f"{type(method).__name__}({field.name}={value!r}): {field.name} must be {kind}."
            raise ConfigError(text) from None
        object.__setattr__(method, field.name, plain)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _fit(value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` asks for, or a TypeError."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _fit_any(value, parts)
    if origin is Literal:
        return _demand(value, value in parts)
    if origin is list:
        _demand(value, not isinstance(value, (str, bytes, Mapping)) and hasattr(value, "__iter__"))
        return [_fit(v, parts[0]) for v in value]
    if origin is dict:
        _demand(value, isinstance(value, Mapping))
        return {_fit(k, parts[0]): _fit(v, parts[1]) for k, v in value.items()}
    return _fit_scalar(value, hint)


def _fit_any(value: Any, parts: tuple[Any, ...]) -> Any:
    for part in parts:
        try:
            return _fit(value, part)
        except TypeError:
            continue
    raise TypeError


def _fit_scalar(value: Any, hint: Any) -> Any:
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()  # numpy and torch scalars
    if hint is type(None):
        return _demand(value, value is None)
    if hint in (int, float):
        _demand(value, isinstance(value, (int, float)) and not isinstance(value, bool))
        _demand(value, hint is float or isinstance(value, int))
        return value
    return _demand(value, isinstance(value, hint))


def _demand(value: Any, fits: bool) -> Any:
    if not fits:
        raise TypeError
    return value


def _spell(hint: Any) -> str:
    """A type as a person writes it."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_spell(p) for p in parts)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, parts))
    if hint is type(None):
        return "None"
    return str(hint).replace("typing.", "") if origin else getattr(hint, "__name__", str(hint))
