"""The result against the size of tasks."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from toolkit.errors import UserError
from toolkit.plots import frame
from toolkit.runs.comparison import Entry, entries, grouped
from toolkit.runs.folder import Run

PANEL = 1.95  # inch


@frame.styled()
def sweep(runs: Sequence[Run], over: str) -> Figure:
    """The metric after the steps of training against `over`, "shots" or "ways": a line for each method, with 95 % intervals;
    runs that differ in their seed only are one point.

    Raises UserError for runs without two values of it, runs of other tasks than these, and runs of one method and value that
    differ in more than the seed.
    """
    cells: dict[str, dict[int, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if not isinstance(run.config.get(over), int):
            raise UserError(f"{run.path} has no {over} in its config.json; draw runs of few-shot tasks that differ in {over}")
        cells[str(run.result["algorithm"])][run.config[over]].append(run)
    tests = frame.tests_of([next(iter(points.values()))[0] for points in cells.values()])
    for run in runs:
        frame.tests_of([run, runs[0]])
    values = sorted({value for points in cells.values() for value in points})
    if len(values) < 2:
        raise UserError(f"{over} is {values[0]} in all runs; give runs of two or more numbers of {over}")
    for key in ("sampler", "dataset", "shots", "ways"):
        if key != over and len(found := {str(run.config.get(key)) for run in runs}) > 1:
            raise UserError(f"the runs differ in {key} too ({', '.join(sorted(found))}); give those of one value of it")
    scale = 100.0 if frame.percent(tests[0]) else 1.0
    figure = Figure()
    axes, named = figure.subplots(), []
    for index, (method, points) in enumerate(cells.items()):
        at = sorted(points)
        made = [_entry(points[value], f"{over} {value}") for value in at]
        height, half = (frame.column([entry.mean()[i] for entry in made], scale) for i in (0, 1))
        seeds = sorted({len(entry.runs) for entry in made})
        bars = axes.errorbar(at, height, yerr=half, **frame.look(index), capsize=2, elinewidth=0.9, label=method)
        named.append((bars, f"{method}, {'-'.join(map(str, seeds))} seed{'s' * (seeds[-1] > 1)}, 95 % interval"))
    axes.set(xlabel=over, ylabel=f"test {frame.unit(tests[0])}")
    if min(b - a for a, b in pairwise(values)) >= 0.05 * (values[-1] - values[0]):
        axes.set_xticks(values)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    frame.log_if_wide(axes) if scale == 1.0 else None
    title = frame.heading(runs[:1]) if len(cells) == 1 else frame.heading(runs)
    return frame.finish(figure, f"{title}\n{frame.count([run.result['test']['tasks'] for run in runs])}", named, [], PANEL)


def _entry(group: Sequence[Run], place: str) -> Entry:
    made = grouped(group)
    if len(made) > 1:
        method, paths = group[0].result["algorithm"], ", ".join(str(run.path) for run in group)
        raise UserError(f"the runs of {method} with {place} differ in more than the seed ({paths}); give those of one setting")
    return entries(made)[0]
