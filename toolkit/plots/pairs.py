"""Two methods task by task."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from toolkit.errors import UserError
from toolkit.plots import frame
from toolkit.runs.comparison import Entry, difference, entries
from toolkit.runs.folder import Run

HEIGHT = 2.2  # inch
MOST, LEAST = 90.0, 6.0  # areas of marks, in points squared


@frame.styled()
def pairs(runs: Sequence[Run]) -> Figure:
    """Each test task as a point, the first run's metric across and the second's upwards, both after their steps of training; an
    area stands for the tasks that share a point. Beside it the histogram of the differences, with their mean and its 95 %
    interval. Raises UserError unless there are two runs of one metric, tested on the same tasks."""
    if len(runs) != 2:
        raise UserError(f"tasks are paired between two runs, not {len(runs)}; give two")
    tests = frame.tests_of(runs)
    names = [frame.label(run) for run in runs]
    names = [f"{name}, {letter}" if names[0] == names[1] else name for name, letter in zip(names, "AB", strict=True)]
    first, second = (entries({"runs": runs, name: [run]})[1] for name, run in zip(names, runs, strict=True))
    scale = 100.0 if frame.percent(tests[0]) else 1.0
    x, y = (scale * entry.values()[0].numpy() for entry in (first, second))
    figure = Figure(figsize=(2 * frame.WIDTH, HEIGHT))
    scatter, histogram = figure.subplots(1, 2)
    _scatter(scatter, x, y)
    scatter.set(xlabel=f"{names[0]}: {frame.unit(tests[0])}", ylabel=f"{names[1]}: {frame.unit(tests[0])}")
    shared = _histogram(histogram, first, second, y - x, scale)
    histogram.yaxis.set_major_locator(MaxNLocator(integer=True))
    histogram.set(xlabel=f"{names[1]} minus {names[0]}{' (points)' * (scale > 1)}", ylabel="tasks")
    return frame.finish(figure, f"{frame.heading(runs)}, the same {len(x)} test tasks", [], shared, HEIGHT)


def _scatter(axes: Axes, x: frame.Numbers, y: frame.Numbers) -> None:
    counts = Counter((a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True) if np.isfinite([a, b]).all())
    points, sizes = np.array(list(counts)).reshape(-1, 2), np.array(list(counts.values()))
    areas = LEAST + (MOST - LEAST) * (sizes - 1) / max(sizes.max(initial=1) - 1, 1)
    axes.scatter(points[:, 0], points[:, 1], s=areas, alpha=0.6, linewidth=0.4, edgecolor="black", label="tasks", zorder=3)
    low, high = (float(edge) for edge in (points.min(initial=np.inf), points.max(initial=-np.inf)))
    if np.isfinite([low, high]).all():
        axes.plot([low, high], [low, high], color="0.35", linestyle=":", label="equal", marker="")


def _histogram(axes: Axes, first: Entry, second: Entry, gaps: frame.Numbers, scale: float) -> frame.Legend:
    gaps = gaps[np.isfinite(gaps)]
    found = difference(second, first)
    heights, edges = np.histogram(gaps, bins=min(25, max(5, len(gaps) // 8)))
    bars = axes.bar(
        edges[:-1], heights, np.diff(edges), align="edge", color="0.75", edgecolor="0.4", linewidth=0.5, label="tasks"
    )
    mean, half = scale * found.mean, scale * found.ci95
    line = axes.axvline(mean, color="black", linewidth=1.4, label="mean")
    span = axes.axvspan(mean - half, mean + half, color="#0072B2", alpha=0.35, linewidth=0, label="95 % interval")
    axes.axvline(0, color="0.35", linestyle=":", linewidth=1.2, label="no difference")
    places = 2 if scale > 1 else 3
    said = f"mean difference {mean:+.{places}f} ± {half:.{places}f}; won {found.wins}, tied {found.ties}, lost {found.losses} "
    return [(bars, "tasks; a larger dot is several of them"), ((span, line), f"{said}(sign test p = {found.p_sign:.2g})")]
