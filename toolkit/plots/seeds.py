"""Training of several methods over several seeds."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from toolkit.errors import UserError
from toolkit.plots import frame
from toolkit.runs.comparison import grouped
from toolkit.runs.folder import Run

PANEL = 2.2  # inch


@frame.styled()
def training_seeds(runs: Sequence[Run]) -> Figure:
    """The metric on validation tasks against iteration: each run thin, the mean of a method's seeds bold, over the iterations
    at which all of them were validated. Raises UserError for a run without validations, and for unlike metrics."""
    groups = grouped(runs)
    tests = frame.tests_of([group[0] for group in groups.values()])
    scale = 100.0 if frame.percent(tests[0]) else 1.0
    figure = Figure()
    axes, named = figure.subplots(), []
    for index, (method, group) in enumerate(groups.items()):
        courses = [_course(run, scale) for run in group]
        look = frame.look(index)
        for course in courses:
            axes.plot(
                *zip(*sorted(course.items()), strict=True), **look | {"marker": ""}, linewidth=0.7, alpha=0.6, label="one seed"
            )
        common = sorted(set.intersection(*(set(course) for course in courses)))
        means = [float(np.mean([course[at] for course in courses])) for at in common]
        (line,) = axes.plot(common, means, **look, linewidth=2.0, markevery=max(1, len(common) // 8), label=f"{method}, mean")
        named.append((line, f"{method}, mean of {len(group)} seed{'s' * (len(group) > 1)}"))
    axes.set(xlabel="iteration", ylabel=f"validation {frame.unit(tests[0])}")
    frame.log_if_wide(axes) if scale == 1.0 else None
    return frame.finish(figure, frame.heading(runs), named, [], PANEL)


def _course(run: Run, scale: float) -> dict[int, float]:
    found = {int(row["iteration"]): scale * row["val_metric"] for row in run.metrics if "val_metric" in row}
    if not found:
        raise UserError(f"{run.path / 'metrics.jsonl'} has no validation rows; train for at least one --validate-every")
    return found
