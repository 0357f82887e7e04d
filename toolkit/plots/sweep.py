"""The result against the size of tasks."""

from collections import defaultdict
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from toolkit.errors import UserError
from toolkit.plots import frame
from toolkit.runs.comparison import Entry, entries
from toolkit.runs.folder import Run

PANEL = 1.95  # inch


@frame.styled()
def sweep(runs: Sequence[Run], over: str) -> Figure:
    """The metric after the steps of training against `over`, "shots" or "ways": a line for each method, with 95 % intervals;
    runs that differ in their seed only are one point. Raises UserError for runs without two values of it."""
    tests = frame.tests_of(runs[:1]) + [run.summary["test"] for run in runs[1:]]
    for run in runs:
        if over not in run.config:
            raise UserError(f"{run.path} has no {over} in its config.json; draw runs of few-shot tasks that differ in {over}")
    cells: dict[str, dict[int, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        cells[str(run.summary["algorithm"])][int(run.config[over])].append(run)
    values = sorted({value for points in cells.values() for value in points})
    if len(values) < 2:
        raise UserError(f"all runs have {values[0]} {over}; give runs of two or more numbers of {over}")
    if len({test["metric"] for test in tests}) > 1:
        raise UserError("the runs have different metrics; draw those of one metric")
    scale = 100.0 if frame.percent(tests[0]) else 1.0
    figure = Figure()
    axes, named = figure.subplots(), []
    for index, (method, points) in enumerate(cells.items()):
        at = sorted(points)
        means = [_entry(method, points[value]).mean() for value in at]
        height, half = (frame.column([pair[i] for pair in means], scale) for i in (0, 1))
        bars = axes.errorbar(at, height, yerr=half, **frame.look(index), capsize=2, elinewidth=0.9, label=method)
        named.append((bars, method))
    axes.set(xlabel=over, ylabel=f"test {frame.unit(tests[0])}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return frame.finish(figure, f"{frame.heading(runs[:1]) if len(cells) == 1 else _where(runs)}", named, [], PANEL)


def _entry(method: str, group: Sequence[Run]) -> Entry:
    return entries({method: sorted(group, key=lambda run: int(run.config.get("seed", 0)))})[0]


def _where(runs: Sequence[Run]) -> str:
    return frame.distinct([run.summary["sampler"] for run in runs])
