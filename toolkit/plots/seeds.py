"""Training of several methods over several seeds."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from toolkit.errors import UserError
from toolkit.plots import frame
from toolkit.runs.comparison import grouped
from toolkit.runs.folder import Run

PANEL = 2.2  # inch


@frame.styled()
def training_seeds(runs: Sequence[Run]) -> Figure:
    """The metric on validation tasks against iteration: each run thin, the mean of a method's seeds bold, over the iterations
    at which all of them were validated. A method of one seed is one bold line. Runs may still go on.

    Raises UserError for a run without validations, seeds without an iteration in common, and unlike metrics.
    """
    groups = grouped(runs)
    tests = frame.tests_of([group[0] for group in groups.values()], finished=False)
    scale = 100.0 if frame.percent(tests[0]) else 1.0
    figure = Figure()
    axes, named = figure.subplots(), []
    for index, (method, group) in enumerate(groups.items()):
        courses = [_course(run, scale) for run in group]
        common = sorted(set.intersection(*(set(course) for course in courses)))
        if not common:
            raise UserError(f"the seeds of {method} were validated at no common iteration; give runs of one --validate-every")
        look = frame.look(index)
        faint = look | {"marker": "", "linewidth": 0.7, "alpha": 0.6}
        for run, course in zip(group, courses, strict=True) if len(group) > 1 else []:
            axes.plot(list(course), list(course.values()), **faint, label=f"{method}, seed {run.config['seed']}")
        means = [float(np.mean([course[at] for course in courses])) for at in common]
        name = f"{method}, mean of {len(group)} seeds" if len(group) > 1 else f"{method}, one seed"
        (line,) = axes.plot(common, means, **look, linewidth=2.0, markevery=max(1, len(common) // 8), label=name)
        named.append((line, name))
    thin: frame.Legend = [(Line2D([], [], color="0.4", linewidth=0.7), "single seeds")] if len(runs) > len(groups) else []
    axes.set(xlabel="iteration", ylabel=f"validation {frame.unit(tests[0])}")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    frame.log_if_wide(axes) if scale == 1.0 else None
    return frame.finish(figure, frame.heading(runs), named, thin, PANEL)


def _course(run: Run, scale: float) -> dict[int, float]:
    rows = sorted(frame.rows(run, "val_metric"), key=lambda row: row["iteration"])
    if not rows:
        raise UserError(f"{run.path / 'metrics.jsonl'} has no validation rows; train for at least one --validate-every")
    values = frame.column([row["val_metric"] for row in rows], scale).tolist()
    return {int(row["iteration"]): value for row, value in zip(rows, values, strict=True)}
