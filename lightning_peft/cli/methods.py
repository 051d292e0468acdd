"""``lightning-peft methods``: the table of methods, from the classes themselves."""

from __future__ import annotations

import dataclasses

import lightning_peft.methods  # noqa: F401  (defines the classes)
from lightning_peft.method import Method, registry

#: fields that every method shares, listed once below the table
_SHARED = ("target_modules", "exclude_modules", "modules_to_save", "layers", "init_seed")


def show() -> None:
    """Print the table, as wide as the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("method", "learning rate", "merges", "parameters (defaults)", "paper"):
        table.add_column(title, no_wrap=title in ("method", "learning rate"), overflow="fold")
    for name, kind in registry().items():
        low, high = kind.lr_range
        rate = f"{_rate(kind.default_lr)} ({_rate(low)}…{_rate(high)})"
        table.add_row(name, rate, "yes" if kind.mergeable else "no", _fields(kind), _citation(kind.paper))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"\nShared where they apply: {', '.join(_SHARED)}.")
    console.print("Use: lightning-peft fit --config … --peft METHOD --peft.FIELD VALUE")
    console.print("Details: lightning-peft fit --peft.help METHOD")


def _fields(kind: type[Method]) -> str:
    own = [f for f in dataclasses.fields(kind) if f.name not in _SHARED]  # type: ignore[arg-type]
    return ", ".join(f"{f.name}={_default(f)}" for f in own) or "none"


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"{field.default}"
    return "required" if field.default_factory is dataclasses.MISSING else f"{field.default_factory()}"


def _rate(value: float) -> str:
    """0.0002 as 2e-4."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _citation(paper: str) -> str:
    """Authors, year and number; the titles are in the classes' documentation."""
    return ", ".join(paper.split(", ")[-2:])
