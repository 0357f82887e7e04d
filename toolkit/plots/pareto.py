"""What models reach against what they cost: a panel per cost, with those marked that no other one beats."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from toolkit.errors import UserError
from toolkit.metrics import direction
from toolkit.plots import frame

PANEL = 2.0  # inch, the height of the axes of a panel
LEGEND = ("Pareto front of the panel", "on it: no model shown is as good for less", "not on it")


def front(values: Sequence[float | None], costs: Sequence[Sequence[float | None]]) -> list[bool]:
    """Which entries are on the Pareto front: no other has a value at least as large for costs at most as large, and one of
    these truly better. `values` is larger for what is better, `costs` has a row for each entry.

    Equal entries are on it or not together. One with a value or a cost that is unknown or not finite is not on it, and beats
    none.
    """
    points = [[math.nan if v is None else float(v) for v in (value, *row)] for value, row in zip(values, costs, strict=True)]
    known = [all(map(math.isfinite, point)) for point in points]

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        (value, *spent), (other, *others) = a, b
        at_least = value >= other and all(x <= y for x, y in zip(spent, others, strict=True))
        return at_least and (value > other or any(x < y for x, y in zip(spent, others, strict=True)))

    return [
        fine and not any(beats(other, point) for other, ok in zip(points, known, strict=True) if ok)
        for fine, point in zip(known, points, strict=True)
    ]


@frame.styled()
def pareto(rows: Sequence[dict[str, Any]], costs: Mapping[str, tuple[str, str]], title: str) -> Figure:
    """The metric after the steps of training with its 95 % interval against each of the `costs`, a key of the rows with the
    text and the unit of its axis, on a log scale. Models have numbers, in the order of the rows. In each panel those that no
    other beats there are filled and joined by steps.

    A row has `model`, `metric` (its name), `value` and `ci95`; accuracy is drawn in percent. Where a metric's name does not
    tell (`metrics.direction`), less is better. What is not known is left out. Raises UserError when nothing is left.
    """
    metric = str(rows[0]["metric"]) if rows else ""
    sign, scale = direction(metric) or -1, 100.0 if metric == "accuracy" else 1.0
    if not any(row["value"] is not None for row in rows):
        raise UserError("no model has a finite result; train longer, or with a smaller inner rate")
    columns = 2 if len(costs) > 1 else 1
    lines = math.ceil(len(costs) / columns)
    figure = Figure(figsize=(frame.WIDTH * columns, 1))
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(costs) :]:
        axes.set_visible(False)
    names = [(_number(i), _said(row, scale)) for i, row in enumerate(rows, 1)]
    shared: frame.Legend = []
    for axes, (key, (text, unit)) in zip(grid.flat, costs.items(), strict=False):
        shown = [(i, row) for i, row in enumerate(rows, 1) if row["value"] is not None and (row[key] or 0) > 0]
        best = front([sign * row["value"] for _, row in shown], [[row[key]] for _, row in shown])
        shared += _draw(axes, shown, best, key, scale)
        axes.set_xlabel(text)
        _across(axes, [row[key] for _, row in shown], unit)
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy (%)" if scale == 100 else f"test {rows[0]['metric']}")
    if scale == 1.0:
        frame.log_if_wide(grid[0, 0], 0.1)
    order = {text: place for place, text in enumerate(LEGEND)}
    shared.sort(key=lambda pair: order[pair[1]])
    return frame.finish(figure, title, names, shared, lines * (PANEL + 2 * frame.LINE))


def _across(axes: Axes, values: Sequence[float], unit: str) -> None:
    """A log axis over these values, with few ticks in words such as "200 kB", however many decades there are."""
    ratio = max(values) / min(values) if values else 1.0
    axes.set_xscale("log")
    axes.margins(0.12)
    axes.xaxis.set_major_locator(MaxNLocator(4) if ratio < 5 else LogLocator(10, (1, 2, 5) if ratio < 50 else (1,), numticks=6))
    axes.xaxis.set_major_formatter(EngFormatter(unit))
    axes.xaxis.set_minor_locator(NullLocator())


def _number(i: int) -> Line2D:
    return Line2D([], [], linestyle="", color="black", marker=f"${i}$", markersize=5 if i < 10 else 8, markeredgewidth=0)


def _said(row: dict[str, Any], scale: float) -> str:
    if row["value"] is None:
        return f"{row['model']}, not finite"
    digits = ".1f" if scale == 100 else ".3g"
    half = "" if row["ci95"] is None else f" ± {scale * row['ci95']:{digits}}"
    return f"{row['model']}, {scale * row['value']:{digits}}{half}"


def _draw(
    axes: Axes, shown: Sequence[tuple[int, dict[str, Any]]], best: Sequence[bool], key: str, scale: float
) -> frame.Legend:
    """One panel; its entries for the legend."""
    legend: frame.Legend = []
    line = sorted((row[key], scale * row["value"]) for (_, row), mark in zip(shown, best, strict=True) if mark)
    look: frame.Keywords = {"color": "0.45", "linestyle": "--", "marker": "", "drawstyle": "steps-post", "linewidth": 1.0}
    (steps,) = axes.plot(*zip(*line, strict=True), **look, label="front") if line else (None,)
    if steps:
        legend.append((steps, LEGEND[0]))
    for (i, row), mark in zip(shown, best, strict=True):
        value, half = frame.column([row["value"], row["ci95"]], scale)
        bar = axes.errorbar(
            [row[key]], [value], yerr=None if math.isnan(half) else [half], color="black", marker="o", markersize=5,
            markerfacecolor="black" if mark else "white", linestyle="", elinewidth=0.9, capsize=2, label=row["model"],
        )  # fmt: skip
        axes.annotate(str(i), (row[key], value), (4, 3), textcoords="offset points")
        legend.append((bar, LEGEND[1 if mark else 2]))
    return legend
