"""``lightning-peft methods``: the table of methods, from the classes themselves."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import textwrap

import lightning_peft.methods  # noqa: F401  (defines the classes)
from lightning_peft.method import Method, registry
from lightning_peft.rates import REFERENCE_STEPS, REFERENCE_WIDTH, short_rate

#: fields that every method shares, listed once below the table
_SHARED = ("target_modules", "exclude_modules", "modules_to_save", "layers", "init_seed")

#: how the table shows the width's part in the default rate, by its exponent
_WIDTH_FACTORS = {0.0: "", 0.5: " × √w", 1.0: " × w"}
_RULE = (
    f"Default learning rate: the one above, with w = {REFERENCE_WIDTH} / width of the model, times"
    f" ({REFERENCE_STEPS} / steps)^¼, and what the method's settings do to it (LoRA: √(32 / alpha), a tenth with"
    " init=pissa). A fit prints the product; in Python: suggest_lr(model, method, steps)."
)


def show() -> None:
    """Print the table; a reader that has seen enough (``| head``) is no error."""
    try:
        _print()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end


def _print() -> None:
    """A line of facts a method, its parameters with their defaults below."""
    width = max(60, shutil.get_terminal_size().columns)
    print(f"{'method':<18} {'learning rate':<14} merges  paper")
    for name, kind in registry().items():
        rate = short_rate(kind.reference_lr) + _WIDTH_FACTORS[kind.lr_width_exponent]
        merges = "yes" if kind.mergeable else "no"
        print(f"{name:<18} {rate:<14} {merges:<6}  {_citation(kind.paper, width - 42)}")
        print(textwrap.fill(_fields(kind), width - 1, initial_indent="    ", subsequent_indent="    "))
    print("\n" + textwrap.fill("Where they apply, also: " + ", ".join(_SHARED) + ".", width - 1))
    print(textwrap.fill(_RULE, width - 1))
    print("Use:     lightning-peft fit --config … --peft METHOD --peft.FIELD VALUE")
    print("Details: lightning-peft fit --peft.help METHOD")


def _fields(kind: type[Method]) -> str:
    """The method's own fields; what it shares with the method it extends is not repeated."""
    parent = next((k for k in kind.__mro__[1:] if k.__name__ in registry()), None)
    same = {(f.name, _default(f)) for f in dataclasses.fields(parent)} if parent else set()  # type: ignore[arg-type]
    own = [f for f in dataclasses.fields(kind) if f.name not in _SHARED]  # type: ignore[arg-type]
    listed = [f"{f.name}={_default(f)}" for f in own if (f.name, _default(f)) not in same]
    return ", ".join([f"as {parent.__name__}", *listed] if parent else listed) or "no parameters of its own"


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"{field.default}"
    return "required" if field.default_factory is dataclasses.MISSING else f"{field.default_factory()}"


def _citation(paper: str, width: int) -> str:
    """Authors, year and number, or the number alone; the titles are in the classes' documentation."""
    text = ", ".join(paper.split(", ")[-2:])
    return text if len(text) <= width else text.rsplit(", ", 1)[-1]
