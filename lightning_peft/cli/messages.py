"""Parser errors in one sentence: the key, the value, the way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence


def explain(message: str, classes: Mapping[str, Sequence[str]], options: Mapping[str, Sequence[str]]) -> str:
    """Shorten a jsonargparse message.

    Args:
        message: what jsonargparse says, often many lines.
        classes: known class names by the key they may stand at.
        options: option names by class name; those of the command itself at ``""``.

    >>> text = 'Parser key "peft":\\n  Errors:\\n    - Expected a dot import path string: LORA'
    >>> explain(text, {"peft": ["LoRA", "DoRA"]}, {})
    "peft: unknown class 'LORA'. Did you mean LoRA? Known: LoRA, DoRA."
    >>> text = "Problem with given class_path 'lightning_peft.LoRA':\\n  Option 'rank' is not accepted"
    >>> explain(text, {}, {"LoRA": ["r", "alpha"]})
    "LoRA has no option 'rank'. It has: r, alpha."
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)
    key = ".".join(dict.fromkeys([keys[0], keys[-1]])) if keys else ""
    inner = message[message.rindex("Parser key") :] if keys else message  # the innermost of nested reports
    unknown = re.search(r"Expected a dot import path string: (\S+)", message)
    if unknown:
        return _unknown_class(key, unknown[1], classes)
    option = re.search(r"(?:Option|[Kk]ey) '([^']+)' is not (?:accepted|expected)", message)
    if option:
        return _unknown_option(key, option[1], message, options)
    choice = re.search(r"invalid choice: '([^']+)' \(choose from (.+)\)", message)
    if choice:
        known = re.findall(r"'([^']+)'", choice[2])
        return f"unknown command {choice[1]!r}.{_near(choice[1], known)} Commands: {', '.join(known)}."
    needed = re.search(r"the following arguments are required: ([\w., ]+)", message)
    if needed:
        return _required(key, needed[1], message)
    if absent := re.search(r"module '[\w.]+' has no attribute '\w+'", message):
        return f"{key}: {absent[0]}."
    missing = re.search(r"File does not exist: '?([^'\n]+)'?", message)
    if missing:
        return f"{key + ': ' if key else ''}the file {missing[1]} does not exist."
    value = re.search(r"Expected an? (.+?)\. Got value: (.+)", inner)
    union = re.search(r"Subtypes: \[(.+?)\]\n.*?Given value: ([^\n]+)", inner, re.DOTALL)
    found = value or union
    return f"{key}: expected {_type(found[1])}, got {found[2].strip()!r}." if found else _shortest(message)


def _required(key: str, names: str, message: str) -> str:
    owner = re.search(r"class_path='([\w.]+)'", message)
    if owner:
        return f"{key}: {owner[1].rsplit('.', 1)[-1]} needs {names}."
    return f"{names} missing. Give a config, --config quickstart.yaml or --config task/own_csv.yaml, or these options."


def _unknown_class(key: str, name: str, classes: Mapping[str, Sequence[str]]) -> str:
    known = classes.get(key.split(".")[-1], []) if key else sorted(n for names in classes.values() for n in names)
    hint = _near(name, known)
    listed = f" Known: {', '.join(known)}." if known else " Give a short class name or a full import path."
    return f"{key or 'class_path'}: unknown class {name!r}.{hint}{listed}"


def _unknown_option(key: str, name: str, message: str, options: Mapping[str, Sequence[str]]) -> str:
    owner = re.search(r"Problem with given class_path '([\w.]+)'", message)
    kind = owner[1].rsplit(".", 1)[-1] if owner else ""
    known = list(options.get(kind) or [n for names in options.values() for n in names])
    hint = _near(name.split(".")[-1], known)
    if kind and kind in options:
        return f"{kind} has no option {name!r}.{hint} It has: {', '.join(known)}."
    return f"{key + ': ' if key else ''}Option {name!r} is not accepted.{hint or ' See --help.'}"


def _near(name: str, known: Sequence[str]) -> str:
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f" Did you mean {lower[near[0]]}?" if near else ""


def _type(text: str) -> str:
    """A type as a person writes it.

    >>> _type("<class 'float'>, <class 'NoneType'>"), _type("typing.Literal['a', 'b'], typing.Literal['b', 1]")
    ('float or nothing', 'one of a, b, 1')
    >>> _type("<class 'x.Method'>, list[x.Method]")
    'Method or list of Method'
    """
    choices = re.findall(r"Literal\[(.+?)\]", text)
    if choices:
        return "one of " + ", ".join(dict.fromkeys(re.split(", ", ", ".join(choices).replace("'", ""))))
    names = re.sub(r"<class '([^']+)'>", r"\1", text).replace("NoneType", "nothing")
    names = re.sub(r"\b(\w+)\[[\w.]*?(\w+)\]", r"\1 of \2", names)
    return " or ".join(part.strip().rsplit(".", 1)[-1] for part in names.split(", "))


def _shortest(message: str) -> str:
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    return " ".join(lines) if len(lines) <= 4 else f"{lines[0]} {lines[-1]}"
