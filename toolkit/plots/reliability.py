"""How sure a method is, against how often it is right."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolkit.errors import UserError
from toolkit.plots import frame
from toolkit.runs.folder import Run

PANEL, STRIP = 2.1, 0.6  # inch


@frame.styled()
def reliability(runs: Sequence[Run]) -> Figure:
    """Accuracy against confidence in bins, over all queries of all test tasks, and below it the share of queries in each bin.
    One run is shown before adaptation and after its steps of training, several after theirs. The expected calibration error
    stands in the legend. Raises UserError for a run whose evaluation did not measure it."""
    frame.tests_of(runs)
    for run in runs:
        if not measured(run):
            raise UserError(
                f"{run.path} has no reliability in its summary.json: it is of an older version, or no classification; "
                "`toolkit evaluate` measures it for a run that has its checkpoint"
            )
    figure = Figure()
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=(PANEL, STRIP))
    axes.plot([0, 100], [0, 100], color="0.35", linestyle=":", marker="", label="as sure as right")
    shown = [(runs[0], k) for k in sorted({0, _trained(runs[0])})] if len(runs) == 1 else [(run, _trained(run)) for run in runs]
    named: frame.Legend = []
    for index, (run, k) in enumerate(shown):
        after = f"after {k} step{'s' * (k != 1)}"
        name = after if len(runs) == 1 else f"{frame.label(run)}, {after}"
        line = _draw(axes, strip, np.array(run.summary["card"]["reliability"][k], dtype=float), index)
        named.append((line, f"{name}: calibration error {100 * run.summary['card']['ece'][k]:.1f} %"))
    axes.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    strip.set(xlabel="confidence (%)", ylabel="queries (%)", ylim=(0, None))
    return frame.finish(figure, frame.heading(runs), named, [(axes.get_lines()[0], "as sure as right")], PANEL + STRIP)


def _trained(run: Run) -> int:
    return min(int(run.summary.get("inner_steps") or 0), len(run.summary["test"]["steps"]) - 1)


def _draw(axes: Axes, strip: Axes, diagram: frame.Numbers, index: int) -> object:
    share, confidence, right = diagram
    seen = share > 0
    look = frame.look(index)
    (line,) = axes.plot(100 * confidence[seen] / share[seen], 100 * right[seen] / share[seen], **look, label="accuracy")
    edges = np.linspace(0, 100, len(share) + 1)
    strip.stairs(100 * share, edges, color=look["color"], linestyle=look["linestyle"], linewidth=1.2, label="queries")
    return line


def measured(run: Run) -> bool:
    """Whether a run can be drawn."""
    return "reliability" in run.summary.get("card", {})
