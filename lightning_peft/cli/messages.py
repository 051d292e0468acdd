"""Parser errors in one sentence: the key, the value, the way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def explain(message: str, classes: dict[str, list[str]], options: Iterable[str]) -> str:
    """Shorten a jsonargparse message.

    Args:
        message: what jsonargparse says, often many lines.
        classes: known class names by the key they may stand at.
        options: every option name that our classes take.

    >>> text = 'Parser key "peft":\\n  Errors:\\n    - Expected a dot import path string: LORA'
    >>> explain(text, {"peft": ["LoRA", "DoRA"]}, [])
    "peft: unknown class 'LORA'. Did you mean LoRA? Known: LoRA, DoRA."
    >>> explain("Option 'rnak' is not accepted", {}, ["rank", "alpha"])
    "Option 'rnak' is not accepted. Did you mean 'rank'?"
    """
    key = _key(message)
    unknown = re.search(r"Expected a dot import path string: (\S+)", message)
    if unknown:
        return _unknown_class(key, unknown[1], classes)
    option = re.search(r"(?:Option|Key|key) '([^']+)' is not (?:accepted|expected)", message)
    if option:
        return _unknown_option(key, option[1], options)
    missing = re.search(r"File does not exist: '?([^'\n]+)'?", message)
    if missing:
        return f"{key + ': ' if key else ''}the file {missing[1]} does not exist."
    value = re.search(r"Expected an? (.+?)\. Got value: (.+)", message)
    if value:
        return f"{key}: expected {_type(value[1])}, got {value[2].strip()!r}."
    union = re.search(r"Subtypes: \[(.+)\].*Given value: (.+)", message, re.DOTALL)
    if union:
        return f"{key}: expected {_type(union[1])}, got {union[2].strip()!r}."
    return _shortest(message)


def _type(text: str) -> str:
    """A type as a person writes it.

    >>> _type("<class 'float'>, <class 'NoneType'>"), _type("typing.Literal['a', 'b']")
    ('float or nothing', 'one of a, b')
    """
    choices = re.search(r"Literal\[(.+)\]", text)
    if choices:
        return "one of " + choices[1].replace("'", "")
    names = re.sub(r"<class '([^']+)'>", r"\1", text).replace("NoneType", "nothing")
    return " or ".join(part.strip().rsplit(".", 1)[-1] for part in names.split(", "))


def _unknown_class(key: str, name: str, classes: dict[str, list[str]]) -> str:
    leaf = key.split(".")[-1] if key else ""
    known = classes.get(leaf, [])
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    hint = f" Did you mean {lower[near[0]]}?" if near else ""
    listed = f" Known: {', '.join(known)}." if known else " Give a short class name or a full import path."
    return f"{key or 'class_path'}: unknown class {name!r}.{hint}{listed}"


def _unknown_option(key: str, name: str, options: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.split(".")[-1], sorted(set(options)), n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else " `lightning-peft fit --help` lists what is."
    return f"{key + ': ' if key else ''}Option {name!r} is not accepted.{hint}"


def _key(message: str) -> str:
    """The innermost key a message names."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    return keys[-1] if keys else ""


def _shortest(message: str) -> str:
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    return " ".join(lines[:4]) if len(lines) <= 4 else f"{lines[0]} {lines[-1]}"
