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


def need_text(values: Sequence[Any], rows: Sequence[int], name: str, field: str, where: str) -> None:
    """Raise if a cell is a list, a mapping or bytes: as text it would be Python's way of writing it.

    Numbers and dates read the same as text, so they are taken.
    """
    for row, value in zip(rows, values, strict=True):
        if not isinstance(value, (list, tuple, dict, bytes)):
            continue
        kind = "a list" if isinstance(value, (list, tuple)) else "a mapping" if isinstance(value, dict) else "bytes"
        way_out = "Make a column of texts out of it."
        if _is_chat(value):
            kind = "a chat, which is a list of messages"
            way_out = (
                "Put the question and the answer into columns of their own and give prompt_column and answer_column;"
                " the tokenizer's chat template is applied to them."
            )
        raise ConfigError(f"{where}, row {row} (from 0): {field}={name!r} holds {kind}, not text. {way_out}")


def need_words(values: Sequence[Any], rows: Sequence[int], name: str, where: str) -> None:
    """Raise if a cell is not a list of words."""
    for row, value in zip(rows, values, strict=True):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"token-classification needs lists of words; {name!r} holds text.")
        if not all(isinstance(word, str) for word in value):
            raise ConfigError(
                f"{where}, row {row} (from 0): {name!r} holds a list of other things than words. token-classification"
                " needs lists of words."
            )


def _is_chat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], dict) and "content" in value[0]


def is_empty(value: Any) -> bool:
    """Whether a label is an empty cell, or no number.

    >>> is_empty(None), is_empty(float("nan")), is_empty("no")
    (True, True, False)
    """
    return value is None or value == "" or value != value


def as_names(values: Sequence[Any], rows: Sequence[int], where: str, class_names: Sequence[str] | None) -> list[str]:
    """Each label as text; numbers of a ``ClassLabel`` become its names.

    >>> as_names([1, 0], [0, 1], "train", ["no", "yes"]), as_names([2.0, True], [0, 1], "train", None)
    (['yes', 'no'], ['2', 'True'])
    """
    names = []
    for row, value in zip(rows, values, strict=True):
        if value is None or (class_names and isinstance(value, int) and value < 0):
            raise ConfigError(
                f"{where}, row {row} (from 0): the label is {value!r}, which means none. Fill it in, or leave such rows"
                " out: drop_unlabelled=True (--data.drop_unlabelled true)."
            )
        if isinstance(value, (list, dict)):
            raise ConfigError(
                f"{where}, row {row} (from 0): the label is {str(value)[:60]}, and a label is one name or number. For a"
                " label a word take task='token-classification'; several labels a row are not supported."
            )
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
