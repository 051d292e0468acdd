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

    table = Table(box=None, pad_edge=False, header_style="bold", row_styles=("", "dim"))
    for title in ("method", "learning rate", "merges", "parameters (defaults)", "paper"):
        table.add_column(title, no_wrap=title in ("method", "learning rate"), overflow="fold")
    for name, kind in registry().items():
        low, high = kind.lr_range
        rate = f"{kind.default_lr:g} ({low:g} to {high:g})"
        table.add_row(name, rate, "yes" if kind.mergeable else "no", _fields(kind), kind.paper)
    console = Console()
    console.print(table)
    console.print(f"\nShared where they apply: {', '.join(_SHARED)}.", highlight=False)
    console.print(
        "Details: lightning-peft fit --peft.help METHOD. Use: --peft METHOD --peft.FIELD VALUE", highlight=False
    )


def _fields(kind: type[Method]) -> str:
    own = [f for f in dataclasses.fields(kind) if f.name not in _SHARED]  # type: ignore[arg-type]
    return ", ".join(f"{f.name}={_default(f)}" for f in own) or "none"


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"{field.default}"
    return "required" if field.default_factory is dataclasses.MISSING else f"{field.default_factory()}"
