"""Two pictures: the metric against what is trained, and how each method learns. matplotlib is imported here only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_peft.compare.comparison import Outcome
from lightning_peft.compare.plan import lower_is_better
from lightning_peft.replacing import replacing

#: eight inches at this resolution are 1600 pixels: sharp at the 800 of a README
_DPI = 200
_WIDTH = 8.0
_BLUE, _GREY = "#1f6fb2", "#8a8a8a"
#: where a label may stand, in points from its dot: near first
_PLACES = [
    (dx * far, dy * far)
    for far in (1.0, 2.2, 3.6, 5.2, 7.0, 9.0)
    for dx, dy in ((7, 0), (-7, 0), (5, 7), (-5, 7), (5, -7), (-5, -7), (0, 9), (0, -9))
]


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(folder: Path, outcomes: Sequence[Outcome], made: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """Write the pictures into a folder; returns their names, none if nothing was tested."""
    tested = [row for row in made if row["mean"] is not None and math.isfinite(row["mean"]) and row["trainable"]]
    if not tested:
        return []
    names = ["metric_and_parameters.png", "learning_curves.png"]
    _save(folder / names[0], _scatter(tested, metric))
    _save(folder / names[1], _curves(outcomes, [row["method"] for row in tested], metric))
    return names


def _figure(height: float, **options: Any) -> tuple[Any, Any]:
    """A figure of its own backend, so that a notebook's or an application's stays as it is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**options)


def _save(path: Path, figure: Any) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)


# ---- metric against parameters ------------------------------------------------------------------------------------
def _scatter(rows: Sequence[Mapping[str, Any]], metric: str) -> Any:
    """A labelled dot with its spread for each method; parameters on a logarithmic axis."""
    figure, axes = _figure(5.0)
    points = [(row["trainable"], row["mean"]) for row in rows]
    spreads = [row["std"] or 0.0 for row in rows]
    axes.set_xscale("log")
    counts = [count for count, _ in points]
    if min(counts) == max(counts):  # one method: the axis would have no length
        axes.set_xlim(counts[0] / 3, counts[0] * 3)
    axes.errorbar(*zip(*points, strict=True), yerr=spreads, fmt="o", ms=5, color=_BLUE, ecolor="#b9d2e8", lw=1.4)
    if metric in ("accuracy", "f1"):
        _spread_top(axes, min(y - s for (_, y), s in zip(points, spreads, strict=True)))
    full = next((row["mean"] for row in rows if row["method"] == "FullFineTuning"), None)
    if full is not None:
        axes.axhline(full, color=_GREY, lw=0.8, ls="--", zorder=0)
    axes.set_xlabel("trained parameters")
    axes.set_ylabel(f"test {metric}, mean over seeds")
    axes.margins(x=0.12, y=0.10)
    _plain(axes)
    figure.draw_without_rendering()
    axes.set_autoscale_on(False)
    _label(figure, axes, points, [row["method"] for row in rows])
    return figure


def _spread_top(axes: Any, lowest: float) -> None:
    """Space a share by its logarithm of errors: from 0.96 to 0.97 is as much as from 0.6 to 0.7."""
    import numpy as np

    ticks = [0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 1.0]
    most = 1.01  # keeps 1.0 on the axis
    axes.set_yscale("function", functions=(lambda y: -np.log10(np.clip(most - y, 1e-6, None)), lambda v: most - 10**-v))
    axes.set_yticks([t for t in ticks if t >= max((x for x in ticks if x <= lowest), default=0.0)])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def _label(figure: Any, axes: Any, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Write each name at the nearest place where it covers no dot and no other name."""
    dots = [axes.transData.transform(point) for point in points]
    taken = [(x - 9, y - 9, x + 9, y + 9) for x, y in dots]
    frame = axes.get_window_extent()
    for line in axes.lines[1:]:  # the level of full fine-tuning
        height = axes.transData.transform((1, line.get_ydata()[0]))[1]
        taken.append((frame.x0, height - 2, frame.x1, height + 2))
    for name, point in sorted(zip(names, points, strict=True), key=lambda item: -item[1][1]):
        text = axes.annotate(name, point, xytext=_PLACES[0], textcoords="offset points", fontsize=8)
        chosen, least = _PLACES[0], float("inf")
        for place in _PLACES:
            _put(text, place)
            box = text.get_window_extent().padded(2)
            cost = _covered(box.extents, taken) + (0 if frame.x0 < box.x0 and box.x1 < frame.x1 else 1e6)
            cost += 0 if frame.y0 < box.y0 and box.y1 < frame.y1 else 1e6
            if cost < least:
                chosen, least = place, cost
            if cost == 0:
                break
        _put(text, chosen)
        taken.append(tuple(text.get_window_extent().padded(2).extents))
        if max(map(abs, chosen)) > 10:  # too far from its dot to go without a line
            arrow = {"arrowstyle": "-", "color": _GREY, "lw": 0.6, "shrinkA": 1, "shrinkB": 3}
            axes.annotate("", point, xytext=chosen, textcoords="offset points", arrowprops=arrow, zorder=0)


def _put(text: Any, place: tuple[float, float]) -> None:
    text.set_position(place)
    text.set_horizontalalignment("left" if place[0] > 0 else "right" if place[0] < 0 else "center")
    text.set_verticalalignment("bottom" if place[1] > 0 else "top" if place[1] < 0 else "center")


def _covered(box: Sequence[float], taken: Sequence[Sequence[float]]) -> float:
    """Area of a box that others cover."""
    return sum(
        max(0.0, min(box[2], o[2]) - max(box[0], o[0])) * max(0.0, min(box[3], o[3]) - max(box[1], o[1])) for o in taken
    )


# ---- learning curves ----------------------------------------------------------------------------------------------
def _curves(outcomes: Sequence[Outcome], order: Sequence[str], metric: str) -> Any:
    """A small panel for each method, best first; full fine-tuning in grey behind each."""
    found = {o.label: _mean_curve(o, metric) for o in outcomes}
    columns = min(5, len(order))
    lines = -(-len(order) // columns)
    figure, panels = _figure(0.9 + 1.35 * lines, nrows=lines, ncols=columns, sharex=True, sharey=True, squeeze=False)
    behind = found.get("FullFineTuning")
    for i, axes in enumerate(panels.flat):
        if i >= len(order):
            axes.set_axis_off()
            continue
        if behind and order[i] != "FullFineTuning":
            axes.plot(*behind, color="#bdbdbd", lw=1.2)
        axes.plot(*found[order[i]], color=_BLUE, lw=1.6, marker="o", ms=2.5)
        axes.set_title(order[i], fontsize=8)
        axes.tick_params(labelsize=7)
        axes.tick_params(labelbottom=i + columns >= len(order))
        _plain(axes)
    figure.supxlabel("optimizer steps" + (" (grey: full fine-tuning)" if behind else ""), fontsize=9)
    better = "lower" if lower_is_better(metric) else "higher"
    figure.supylabel(f"validation {metric} ({better} is better)", fontsize=9)
    return figure


def _mean_curve(outcome: Outcome, metric: str) -> tuple[list[float], list[float]]:
    """Validation metric by step, averaged over the seeds of the chosen rate."""
    values: dict[float, list[float]] = {}
    for run in outcome.tested:
        for point in run["curve"]:
            values.setdefault(point["step"], []).append(point[metric])
    steps = sorted(values)
    return steps, [statistics.fmean(values[step]) for step in steps]


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)
