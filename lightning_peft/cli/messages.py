"""Parser errors in one sentence: the key, the value, the way out."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

from lightning_peft.untrusted import PACKAGES

#: what a class_path may stand for where none is given
_BASES = ("Method", "LightningModule", "LightningDataModule", "Callback", "Logger")


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
    for find in (_denied, _command, _class, _required, _option, _file):
        text = find(key, inner, message, classes, options)
        if text:
            return text
    value = re.search(r"Expected an? (.+?)\. Got value: (.+)", inner)
    union = re.search(r"Subtypes: \[(.+)\]\n.*?Given value: ([^\n]+)", inner, re.DOTALL)
    found = value or union
    if not found:
        return _shortest(message)
    given = found[2].strip()
    quote = f" YAML reads the word so; quote it: '\"{given}\"'." if given in ("True", "False") else ""
    return f"{key}: expected {_type(found[1])}, got {given!r}.{quote}"


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _denied(key: str, inner: str, message: str, classes: Mapping, options: Mapping) -> str | None:
    """An import path in a config that nobody has asked for."""
    denied = re.search(r"Importing '([^']+)' is not allowed", message)
    if not denied:
        return None
    return (
        f"{key}: the config beside the checkpoint names {denied[1]!r}. Of what a file names, only classes of"
        f" {', '.join(PACKAGES)} are used, because anything else could run code. If you trust the file, give it"
        " yourself with --config."
    )


def _command(key: str, inner: str, message: str, classes: Mapping, options: Mapping) -> str | None:
    """A command that is not known."""
    choice = re.search(r"invalid choice: '([^']+)' \(choose from (.+)\)", message)
    if not choice:
        return None
    known = re.findall(r"'([^']+)'", choice[2])
    return f"unknown command {choice[1]!r}.{_near(choice[1], known)} Commands: {', '.join(known)}."


def _class(key: str, inner: str, message: str, classes: Mapping, options: Mapping) -> str | None:
    """A class that is not known, cannot be imported, or is one of another kind."""
    unknown = re.search(r"Expected a dot import path string: (\S+)", message)
    if unknown:
        return _unknown_class(key, unknown[1], classes)
    value = re.search(r"Given value: (\S+)$", inner, re.MULTILINE)
    kind = re.search(r"Import path does not correspond to a subclass of (\w+)", inner)
    if kind and value:
        return f"{key}: {value[1]} is no {kind[1]}.{_known(key, classes)}"
    lost = re.search(r"No module named '[^']+'|module '[^']+' has no attribute '[^']+'", inner)
    if lost and value:
        return f"{key}: {value[1]} cannot be imported ({lost[0]}).{_known(key, classes)}"
    return None


def _required(key: str, inner: str, message: str, classes: Mapping, options: Mapping) -> str | None:
    """Options that a class or the command cannot do without."""
    needed = re.search(r"following arguments are required: ([^\n]+)", message)
    if not needed:
        return None
    owners = re.findall(r"class_path(?:=| )'([\w.]+)'", message[: needed.start()] + inner)
    kind = owners[-1].rsplit(".", 1)[-1] if owners else ""
    names = re.sub(r"\b(fit|validate|test|predict)\.", "", needed[1].strip())
    first = names.split(", ")[0]
    if not kind:
        return f"{names} missing. Give a config, --config quickstart.yaml or task/own_csv.yaml, or these options."
    return f"{key + ': ' if key else ''}{kind} needs {names}; give --{key + '.' if key else ''}{first}."


def _option(key: str, inner: str, message: str, classes: Mapping, options: Mapping) -> str | None:
    """A name that nobody knows."""
    command = re.search(r"Subcommand '(\w+)' does not accept option '([^']+)'", message)
    if command:
        return f"{command[1]} has no option {command[2]!r}.{_near(command[2].split('.')[-1], _all(options))}"
    option = re.search(r"(?:Option|[Kk]ey) '([^']+)' is not (?:accepted|expected)([^\n]*)", message)
    if not option or 0 <= inner.find("Got value: ") < inner.find(option[0]):  # the value is wrong, not the name
        return None
    owner = re.search(r"class_path='([\w.]+)'", option[2]) or re.search(r"given class_path '([\w.]+)'", message)
    path = owner[1] if owner and owner[1].rsplit(".", 1)[-1] not in _BASES else ""
    return _unknown_option(key, option[1], path, {**_signature(path), **options})


def _file(key: str, inner: str, message: str, classes: Mapping, options: Mapping) -> str | None:
    missing = re.search(r"File does not exist: '?([^'\n]+)'?", message)
    return f"{key + ': ' if key else ''}the file {missing[1]} does not exist." if missing else None


def _signature(path: str) -> dict[str, list[str]]:
    """The options of a class that was imported already."""
    module, _, name = path.rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    return {name: list(inspect.signature(kind).parameters)} if isinstance(kind, type) else {}


def _known(key: str, classes: Mapping[str, Sequence[str]]) -> str:
    known = classes.get(key.split(".")[-1], [])
    return f" Known: {', '.join(known)}." if known else " Give a short class name or a full import path."


def _unknown_class(key: str, name: str, classes: Mapping[str, Sequence[str]]) -> str:
    known = classes.get(key.split(".")[-1], []) if key else sorted(n for names in classes.values() for n in names)
    hint = _near(name, known)
    return f"{key or 'class_path'}: unknown class {name!r}.{hint}{_known(key, classes)}"


def _unknown_option(key: str, name: str, path: str, options: Mapping[str, Sequence[str]]) -> str:
    kind = path.rsplit(".", 1)[-1]
    known = list((options.get(kind) if kind else None) or _all(options))
    if name in known:
        whose = f"{kind} was found" if kind else "no class_path stands beside it"
        place = f"{key}: " if key else ""
        return f"{place}Option {name!r} belongs to a class, and {whose}. Give class_path and init_args."
    hint = _near(name.split(".")[0], ["class_path", "init_args"]) or _near(name.split(".")[-1], known)
    if kind and kind in options:
        return f"{kind} has no option {name!r}.{hint} It has: {', '.join(known)}."
    return f"{key + ': ' if key else ''}Option {name!r} is not accepted.{hint or ' See --help.'}"


def _all(options: Mapping[str, Sequence[str]]) -> list[str]:
    return [*(n for names in options.values() for n in names), "peft", "model", "data", "trainer", "ckpt_path"]


def _near(name: str, known: Sequence[str]) -> str:
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f" Did you mean {lower[near[0]]}?" if near else ""


def _type(text: str) -> str:
    """A type as a person writes it.

    >>> _type("<class 'float'>, <class 'NoneType'>"), _type("typing.Literal['a', 'b'], typing.Literal['b', 1]")
    ('float or nothing', 'one of a, b, 1')
    >>> _type("<class 'x.Method'>, list[x.Method]")
    'Method or list[Method]'
    """
    text = text.replace("collections.abc.", "").replace("typing.", "")
    choices = re.findall(r"Literal\[([^\]]+)\]", text)
    if choices:
        words = [word for group in choices for word in group.replace("'", "").split(", ")]
        return "one of " + ", ".join(dict.fromkeys(words))
    names = re.sub(r"<class '([^']+)'>", r"\1", text).replace("NoneType", "nothing")
    parts = re.split(r", (?![^\[]*\])", names)  # not inside brackets
    return " or ".join(re.sub(r"[\w.]+\.(\w+)", r"\1", part.strip()) for part in parts)


def _shortest(message: str) -> str:
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    return " ".join(lines) if len(lines) <= 4 else f"{lines[0]} {lines[-1]}"
