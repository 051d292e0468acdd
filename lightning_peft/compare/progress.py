"""How far the comparison is: a line for each finished run, and on a terminal a bar for the one at work."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar


class Progress:
    """Prints to a console; piped into a file it leaves the bar out.

    >>> import sys
    >>> progress = Progress(Console(file=sys.stdout, width=80))
    >>> with progress.over(2, 10):
    ...     progress.start("LoRA lr 2e-4 seed 1"); progress.done("LoRA", {"val": {"loss": 0.5}, "seconds": 1}, "loss")
    [1/2] LoRA: val loss 0.5000 (... left)
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.fresh = self.known = 0
        self._total = self._finished = 0
        self._spent = 0.0
        self._started = time.monotonic()
        self._bar: Bar | None = None
        self._task: Any = None

    @contextmanager
    def over(self, total: int, steps: int) -> Iterator[None]:
        """Around all runs."""
        self._total = total
        if not self.console.is_terminal:
            yield
            return
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[left]}")]
        with Bar(*columns, console=self.console, transient=True) as self._bar:
            self._task = self._bar.add_task("", total=steps, left="")
            yield
        self._bar = None

    def start(self, title: str) -> None:
        """A run begins."""
        self._started = time.monotonic()
        if self._bar is not None:
            text = f"[{self._finished + 1}/{self._total}] {title}".replace("[", r"\[")
            self._bar.update(self._task, description=text, completed=0, left=self._left())

    def tick(self, step: int) -> None:
        """The run has done so many steps."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def done(self, title: str, record: Mapping[str, Any], metric: str, *, fresh: bool = True) -> None:
        """A run is over, or was over before (``fresh=False``)."""
        self._finished += 1
        if not fresh:
            self.known += 1
            return
        self.fresh += 1
        seconds = time.monotonic() - self._started
        self._spent += seconds
        text = f"[{self._finished}/{self._total}] {title}: {_outcome(record, metric)}"
        self.say(f"{text} ({_time(seconds)}{self._left(', ')})")

    def expect(self, count: int) -> None:
        """More runs than were planned."""
        self._total += count

    def skip(self, count: int) -> None:
        """Runs that will not happen."""
        self._finished += count

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=not self.console.is_terminal)

    def _left(self, before: str = "") -> str:
        rest = self._total - self._finished
        return f"{before}{_time(rest * self._spent / self.fresh)} left" if self.fresh and rest > 0 else ""


def _outcome(record: Mapping[str, Any], metric: str) -> str:
    if "error" in record:
        return f"failed: {record['error']}"
    if "kept" in record:
        return f"costs measured, {record['trainable']:,} parameters, step {record['step_ratio']:.2f}x of full"
    said = [f"{name} {metric} {record[name][metric]:.4f}" for name in ("val", "test") if metric in record.get(name, {})]
    return ", ".join(said)


def _time(seconds: float) -> str:
    """A duration for people.

    >>> _time(4), _time(75), _time(7300)
    ('4 s', '1 min 15 s', '2 h 01 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )
