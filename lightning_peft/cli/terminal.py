"""Lines for a terminal: broken between words, where the terminal itself would break them inside."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import TextIO


def width_of(stream: TextIO) -> int | None:
    """Letters in a line of the terminal that a stream goes to; None for a file or a pipe, whose lines stay whole."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def filled(text: str, width: int | None) -> str:
    """A text with its long lines broken between words, each as far to the right as it began.

    >>> print(filled("one two three", 8))
    one two
    three
    >>> filled("one two three", None)
    'one two three'
    """
    if width is None:
        return text
    lines = []
    for line in text.split("\n"):
        indent = line[: len(line) - len(line.lstrip())]
        options = {"subsequent_indent": indent, "break_long_words": False, "break_on_hyphens": False}
        lines += textwrap.wrap(line, width, **options) if len(line) > width else [line]  # type: ignore[arg-type]
    return "\n".join(lines)


def command(text: str, width: int | None, indent: str) -> str:
    """A command for the shell that can be copied: a long one goes on after a backslash.

    >>> print(command("lightning-peft test --ckpt_path best.ckpt", 30, "  "))
      lightning-peft test \\
        --ckpt_path best.ckpt
    """
    quoted = "'" in text or '"' in text  # a space between quotes is no place to break
    if width is None or quoted or len(indent + text) <= width:
        return indent + text
    room = width - len(indent) - 4
    words = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    return indent + f" \\\n{indent}  ".join(words)


def say_error(text: str) -> None:
    """One error for the user, on the standard error stream."""
    print(filled(f"lightning-peft: error: {text}", width_of(sys.stderr)), file=sys.stderr)
