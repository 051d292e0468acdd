"""The results as a table: on the terminal, as CSV for programs, as Markdown for a README."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from lightning_peft.compare.comparison import Outcome
from lightning_peft.compare.plan import lower_is_better
from lightning_peft.files import replacing
from lightning_peft.rates import short_rate

COLUMNS = (
    *("method", "lr", "metric", "mean", "std", "seeds", "val_mean", "trainable", "percent", "file_bytes"),
    *("step_seconds", "step_ratio", "peak_bytes", "kept_bytes", "seconds", "error"),
)


def rows(outcomes: Sequence[Outcome], metric: str) -> list[dict[str, Any]]:
    """A dict for each method, the best first, failed ones last."""
    made = [_row(outcome, metric) for outcome in outcomes]
    sign = 1 if lower_is_better(metric) else -1
    return sorted(made, key=lambda r: (r["mean"] is None, sign * (r["mean"] or 0.0), r["method"]))


def _row(outcome: Outcome, metric: str) -> dict[str, Any]:
    values = [r["test"][metric] for r in outcome.tested if metric in r.get("test", {})]
    cost = outcome.cost
    return {
        "method": outcome.label,
        "lr": outcome.tested[0]["rate"] if outcome.tested else None,
        "metric": metric,
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
        "val_mean": statistics.fmean(r["val"][metric] for r in outcome.tested) if outcome.tested else None,
        "trainable": cost.get("trainable"),
        "percent": cost.get("percent"),
        "file_bytes": cost.get("file"),
        "step_seconds": cost.get("step_seconds"),
        "step_ratio": cost.get("step_ratio"),
        "peak_bytes": cost.get("peak"),
        "kept_bytes": cost.get("kept"),
        "seconds": statistics.fmean(r["seconds"] for r in outcome.tested) if outcome.tested else None,
        "error": "; ".join(outcome.errors) or None,
    }


def notes(outcomes: Sequence[Outcome], left_out: Mapping[str, str], about: str) -> list[str]:
    """What a reader of the table must know."""
    said = [
        about,
        "step: time of a training step, optimizer included, relative to a step of full fine-tuning taken in turns with"
        " it (median). peak: weights, gradients, optimizer states and all tensors of a step. kept: what autograd keeps"
        " between forward and backward. Memory is measured on the longest batch, in MB (10⁶ bytes).",
    ]
    said += [f"{o.label}: {note}" for o in outcomes for note in _once(o)]
    said += [f"{o.label} failed: {error}" for o in outcomes for error in o.errors]
    return said + [f"{name} is left out: {reason.rstrip('.')}." for name, reason in left_out.items()]


def _once(outcome: Outcome) -> list[str]:
    return list(dict.fromkeys(note for run in outcome.tested for note in run.get("notes", [])))


class _Column(NamedTuple):
    """A column of the table: its head, and the text in it for a row."""

    head: str
    text: Callable[[Mapping[str, Any]], str]


def _columns(metric: str, wide: bool) -> list[_Column]:
    """The columns for people; a wide table has more of them."""
    columns = [_Column("method", lambda row: row["method"])]
    if wide:
        columns.append(_Column("lr", _rate))
        columns.append(_Column(f"val {metric}", lambda row: _number(row["val_mean"], ".3f")))
        columns.append(_Column(f"test {metric}", _result))
        columns.append(_Column("trained", lambda row: _number(row["trainable"], ",")))
    else:
        columns.append(_Column(metric, _result))
        columns.append(_Column("trained", lambda row: _count(row["trainable"])))
    columns.append(_Column("%", lambda row: _number(row["percent"], ".2f")))
    columns.append(_Column("file MB", lambda row: _megabytes(row["file_bytes"])))
    columns.append(_Column("step", lambda row: _number(row["step_ratio"], ".2f")))
    columns.append(_Column("peak MB", lambda row: _megabytes(row["peak_bytes"])))
    columns.append(_Column("kept MB", lambda row: _megabytes(row["kept_bytes"])))
    if wide:
        columns.append(_Column("run s", lambda row: _number(row["seconds"], ".0f")))
    return columns


def _rate(row: Mapping[str, Any]) -> str:
    if not row["lr"]:
        return "–"
    return short_rate(row["lr"])


def _result(row: Mapping[str, Any]) -> str:
    """The metric on the test data, with its spread over the seeds."""
    if row["mean"] is None:
        return "failed" if row["error"] else "unfinished"
    if row["std"] is None:
        return f"{row['mean']:.3f}"
    return f"{row['mean']:.3f} ± {row['std']:.3f}"


def show(console: Console, made: Sequence[Mapping[str, Any]], said: Sequence[str], metric: str) -> None:
    """Print the table, with fewer columns where the terminal is narrow."""
    wide = console.width >= 110
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1 if wide else 0), pad_edge=False)
    columns = _columns(metric, wide)
    for column in columns:
        head = column.head if wide else column.head.replace(" ", "\n")
        side = "left" if column.head == "method" else "right"
        table.add_column(head, justify=side, no_wrap=True, vertical="bottom")
    if not wide:
        table.padding = (0, 1, 0, 0)
    for row in made:
        cells = [column.text(row) for column in columns]
        table.add_row(*cells, style="red" if row["mean"] is None else None)
    console.print(table)
    for note in said:
        console.print(note, markup=False, highlight=False, style="dim")


def write_csv(path: Path, made: Sequence[Mapping[str, Any]]) -> None:
    """All columns, full precision, bytes."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in made)
    _write(path, text.getvalue())


def write_markdown(
    path: Path, made: Sequence[Mapping[str, Any]], said: Sequence[str], metric: str, pictures: Sequence[str]
) -> None:
    """The table, the notes and the pictures."""
    columns = _columns(metric, wide=True)
    lines = [_line(column.head for column in columns), "|---|" + "---:|" * (len(columns) - 1)]
    for row in made:
        lines.append(_line(column.text(row) for column in columns))
    lines += [f"\n{note}" for note in said]
    lines += [f"\n![{Path(name).stem.replace('_', ' ')}]({name})" for name in pictures]
    _write(path, "\n".join(lines) + "\n")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _count(value: int | None) -> str:
    """A number of parameters in four characters or so.

    >>> _count(950), _count(339_845), _count(22_715_525)
    ('950', '340k', '22.7M')
    """
    if value is None or value < 1000:
        return "–" if value is None else str(value)
    return f"{value / 1e3:.3g}k" if value < 999_500 else f"{value / 1e6:.3g}M"


def _megabytes(value: int | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1e6:.2f}" if value < 1e7 else f"{value / 1e6:.0f}"
