"""Two methods task by task."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from toolkit.errors import UserError
from toolkit.intervals import Difference, paired
from toolkit.metrics import direction
from toolkit.plots import frame
from toolkit.runs.comparison import entries
from toolkit.runs.folder import Run

HEIGHT = 2.2  # inch
LEAST, MOST, ALL = 4.0, 90.0, 4000.0  # areas of marks, in points squared: of one, and of all together where they are many
NAME = 10  # characters of a name that fits along an axis, twice
BINS = 25


@frame.styled()
def pairs(runs: Sequence[Run]) -> Figure:
    """Each test task as a point, the first run's metric across and the second's upwards, both after their steps of training;
    the size of a mark says how many tasks share the point. Beside it the histogram of the differences, second minus first,
    with their mean and its 95 % interval over tasks, of these two trained models.

    Errors that range over more than a factor of 10 are on log axes. Raises UserError unless there are two runs of one metric,
    tested on the same tasks, of which at least one has a finite value in both.
    """
    if len(runs) != 2:
        raise UserError(f"tasks are paired between two runs, not {len(runs)}; give two")
    tests = frame.tests_of(runs)
    first, second = entries({"A": runs[:1], "B": runs[1:]})
    found = paired(second.values()[0], first.values()[0])
    scale = 100.0 if frame.percent(tests[0]) else 1.0
    points = scale * np.stack([entry.values()[0].numpy() for entry in (first, second)], axis=1)
    points = points[np.isfinite(points).all(1)]
    if not len(points):
        raise UserError(
            f"no test task has a finite {tests[0]['metric']} in both {runs[0].path} and {runs[1].path}; give others"
        )
    names = [str(run.result["algorithm"]) for run in runs]
    short = names[0] != names[1] and max(map(len, names)) <= NAME
    names = names if short else ["A", "B"]
    figure = Figure(figsize=(2 * frame.WIDTH, HEIGHT))
    scatter, histogram = figure.subplots(1, 2)
    shared = _scatter(scatter, points, scale == 1.0)
    scatter.set(xlabel=f"{names[0]}: {frame.unit(tests[0])}", ylabel=f"{names[1]}: {frame.unit(tests[0])}")
    shared += _histogram(histogram, points[:, 1] - points[:, 0], found, scale)
    histogram.set(xlabel=f"{names[1]} minus {names[0]}{' (points)' * (scale > 1)}", ylabel="tasks")
    lost = f", {found.lost} left out without a finite value" if found.lost else ""
    head = [f"{frame.heading(runs)}, the same {first.curve.tasks} test tasks{lost}"]
    head += [] if short else ["A: {}, B: {}".format(*frame.labels(runs))]
    sign, score = direction(str(tests[0]["metric"])), (found.wins, found.ties, found.losses)
    words = ("better", "worse") if sign else ("above", "below")
    up, ties, down = reversed(score) if sign < 0 else score
    head += [f"{names[1]} {words[0]} in {up}, equal in {ties}, {words[1]} in {down}; sign test p = {found.p_sign:.2g}"]
    return frame.finish(figure, "\n".join(head), [], shared, HEIGHT)


def _scatter(axes: Axes, points: frame.Numbers, errors: bool) -> frame.Legend:
    """A collection for each number of tasks that share a point, the rarest point on top; and the diagonal."""
    counts = Counter(map(tuple, points.tolist()))
    numbers, legend = sorted(set(counts.values())), frame.Legend()
    most = min(MOST, max(20.0, ALL / len(counts)))
    for n in numbers:
        area = LEAST + (most - LEAST) * math.log(n) / max(math.log(numbers[-1]), 1.0)
        place = zip(*sorted(point for point, count in counts.items() if count == n), strict=True)
        mark: frame.Keywords = {
            "s": area,
            "linewidth": 0.4,
            "edgecolor": "black",
            "facecolor": frame.look(0)["color"],
            "alpha": 0.6,
        }
        dots = axes.scatter(*place, **mark, label=f"{n} task{'s' * (n != 1)}", zorder=4 - n / numbers[-1])
        if n in (numbers[0], numbers[len(numbers) // 2], numbers[-1]):
            legend += [(dots, str(dots.get_label()))]
    low, high = float(points.min()), float(points.max())
    if errors and low > 0 and high > 10 * low:
        axes.set(xscale="log", yscale="log")
        ends = low / (high / low) ** 0.05, high * (high / low) ** 0.05
    else:
        room = 0.05 * (high - low) or 1.0
        ends = low - room, high + room
    axes.set(xlim=ends, ylim=ends)
    (line,) = axes.plot(ends, ends, color="0.35", linestyle=":", linewidth=1.2, marker="", label="equal")
    return [*legend, (line, "equal")]


def _histogram(axes: Axes, gaps: frame.Numbers, found: Difference, scale: float) -> frame.Legend:
    heights, edges = np.histogram(gaps, bins=_edges(gaps))
    axes.bar(edges[:-1], heights, np.diff(edges), align="edge", color="0.8", edgecolor="0.4", linewidth=0.5, label="tasks")
    mean, half = scale * found.mean, scale * found.ci95
    line = axes.axvline(mean, color="black", linewidth=1.4, label="mean")
    span = axes.axvspan(mean - half, mean + half, color="#0072B2", alpha=0.35, linewidth=0, label="95 % interval")
    axes.axvline(0, color="0.35", linestyle=":", linewidth=1.2, label="equal")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    places = 2 if scale > 1 else max(0, 1 - math.floor(math.log10(half))) if half > 0 else 3
    interval = f" ± {half:.{places}f} (95 %)" if math.isfinite(half) else ""  # of one task there is none
    return [((span, line), f"mean difference {mean:+.{places}f}{interval}")]


def _edges(gaps: frame.Numbers) -> frame.Numbers:
    """Edges of at most about `BINS` equal bins, one of them around 0. Accuracies come in steps, so a bin is as wide as an odd
    number of steps: none falls on an edge, and ties stand around 0."""
    low, high = min(float(gaps.min()), 0.0), max(float(gaps.max()), 0.0)
    if low == high:
        return np.array([-0.5, 0.5])
    steps = np.diff(np.sort(np.append(gaps, 0.0) / (high - low)))
    steps = steps[steps > 1e-4]  # what is less is rounding
    step = steps.min() if steps.size else 1 / BINS
    width = (high - low) * step * (math.ceil(1 / (BINS * step)) | 1)
    return np.asarray((np.arange(round(low / width), round(high / width) + 2) - 0.5) * width)
