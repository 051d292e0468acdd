"""What can be given for ``--model``, ``--data`` and ``--peft``: a screen for each."""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from docstring_parser import parse_from_object

_NOUNS = {"model": "model", "data": "data module", "peft": "method"}


def show_choices(words: Sequence[str], classes: Mapping[str, Sequence[type]]) -> bool:
    """Answer ``--data.help`` and its like where no class is named; whether that was asked for."""
    for word, after in zip_longest(words, words[1:]):
        part = word.removeprefix("--").removesuffix(".help")
        if word == f"--{part}.help" and part in classes and (after is None or after.startswith("-")):
            print("\n".join(choices(words[0], part, classes[part])))
            return True
    return False


def choices(command: str, part: str, classes: Sequence[type]) -> list[str]:
    """The classes, each with the first sentence on it; of a single one, its options."""
    width = max(60, shutil.get_terminal_size().columns)
    noun = _NOUNS[part]
    if len(classes) == 1:
        (kind,) = classes
        lines = [f"--{part} {kind.__name__}: {_sentence(inspect.getdoc(kind) or '')}", *_options(part, kind, width)]
    else:
        lines = [f"Choose a {noun} with --{part} CLASS, its options with --{part}.NAME VALUE."]
        rows = [(kind.__name__, _sentence(inspect.getdoc(kind) or "")) for kind in classes]
        lines += _table(rows, width)
    lines.append(f"In full: lightning-peft {command} --{part}.help {classes[0].__name__}")
    if part == "peft":
        lines.append("Their parameters, rates and papers: lightning-peft methods")
    else:
        lines.append(f"A {noun} of your own goes by its import path: --{part} package.module.Class")
    return lines


def _options(part: str, kind: type, width: int) -> list[str]:
    """A line for each argument of the constructor."""
    told = {entry.arg_name: entry.description or "" for entry in parse_from_object(kind).params}
    names = list(inspect.signature(kind).parameters)
    return _table([(f"--{part}.{name}", _sentence(told.get(name, ""))) for name in names], width)


def _table(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    longest = max(len(name) for name, _ in rows)
    room = width - longest - 5
    return [f"  {name:<{longest}}  {textwrap.shorten(text, room, placeholder=' …')}" for name, text in rows]


def _sentence(text: str) -> str:
    """What a docstring says first, without the marks of code."""
    plain = " ".join(text.split()).replace("`", "")
    plain = re.sub(r"(?<! of) \([^)]*\)", "", plain)  # what stands in brackets can be left out
    return re.split(r"\. (?=[A-Z])|; ", plain)[0].rstrip(".")
