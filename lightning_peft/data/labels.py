"""Labels: names to numbers, the same way in every split and every run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from lightning_peft.errors import ConfigError


def need_column(name: str, columns: Sequence[str], field: str, where: str) -> None:
    """Raise if a column is missing, with the columns there are."""
    if name in columns:
        return
    columns = [column for column in columns if not column.startswith("_")]  # ours
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{where} has no column {name!r} ({field}={name!r}). Columns: {', '.join(columns)}.{hint}")


def need_values(values: Sequence[Any], rows: Sequence[int], name: str, where: str) -> None:
    """Raise if a cell is empty, with its row."""
    for row, value in zip(rows, values, strict=True):
        if value is None:
            raise ConfigError(f"{where}, row {row} (from 0): column {name!r} is empty. Fill it in or drop the row.")


def as_names(values: Sequence[Any], rows: Sequence[int], where: str, class_names: Sequence[str] | None) -> list[str]:
    """Each label as text; numbers of a ``ClassLabel`` become its names.

    >>> as_names([1, 0], [0, 1], "train", ["no", "yes"]), as_names([2.0, True], [0, 1], "train", None)
    (['yes', 'no'], ['2', 'True'])
    """
    names = []
    for row, value in zip(rows, values, strict=True):
        if value is None or (class_names and isinstance(value, int) and value < 0):
            raise ConfigError(f"{where}, row {row} (from 0): the label is {value!r}, which means none. Drop such rows.")
        if class_names and isinstance(value, int):
            names.append(class_names[value])
        elif isinstance(value, float) and value.is_integer():
            names.append(str(int(value)))
        else:
            names.append(str(value))
    return names


def vocabulary(names: Sequence[str]) -> list[str]:
    """Distinct labels, sorted; numbers by value.

    >>> vocabulary(["10", "9", "9"]), vocabulary(["b", "a"])
    (['9', '10'], ['a', 'b'])
    """
    found = set(names)
    try:
        return sorted(found, key=int)
    except ValueError:
        return sorted(found)


def as_indices(names: Sequence[str], label_names: Sequence[str], rows: Sequence[int], where: str) -> list[int]:
    """Numbers of labels.

    Raises:
        ConfigError: a label outside ``label_names``, with its row.
    """
    index = {name: i for i, name in enumerate(label_names)}
    # class numbers with names given for them: 0 means the first name
    numbers = {str(i): i for i in range(len(label_names))} if all(n.isdecimal() for n in set(names)) else {}
    encoded = []
    for row, name in zip(rows, names, strict=True):
        number = index.get(name, numbers.get(name))
        if number is None:
            known = ", ".join(repr(n) for n in label_names[:12]) + (" …" if len(label_names) > 12 else "")
            raise ConfigError(f"{where}, row {row} (from 0): label {name!r} is not one of the labels: {known}.")
        encoded.append(number)
    return encoded


def as_numbers(values: Sequence[Any], rows: Sequence[int], where: str) -> list[float]:
    """Targets of a regression.

    Raises:
        ConfigError: a value that is no finite number, with its row.
    """
    numbers = []
    for row, value in zip(rows, values, strict=True):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not abs(number) < float("inf"):
            raise ConfigError(f"{where}, row {row} (from 0): a regression needs a number, the label is {value!r}.")
        numbers.append(number)
    return numbers
