"""How sure a method is, against how often it is right."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from toolkit.errors import UserError
from toolkit.plots import frame
from toolkit.runs.folder import Run, result_step

PANEL, STRIP = 2.1, 0.6  # inch
FEW = 0.002  # of all queries


@frame.styled()
def reliability(runs: Sequence[Run]) -> Figure:
    """Accuracy against confidence in bins, over all queries of all test tasks, and below it the share of queries in each bin.

    Bins with less than `FEW` of the queries are left out of the upper panel: what a handful of answers happened to be says
    nothing. One run is shown before adaptation and after its steps of training, with the gaps of the latter; several after
    theirs. The expected calibration error stands in the legend. Raises UserError for a run whose evaluation did not measure it.
    """
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
    labels = frame.labels(runs)
    shown = [(runs[0], k) for k in sorted({0, _trained(runs[0])})] if len(runs) == 1 else [(run, _trained(run)) for run in runs]
    shared: frame.Legend = [(axes.get_lines()[0], "as sure as right")]
    named: frame.Legend = []
    most = 0.0
    for index, (run, k) in enumerate(shown):
        diagram, error = _measured(run, k)
        most = max(most, float(np.nanmax(diagram[0], initial=0.0)))
        after = f"after {k} step{'s' * (k != 1)}"
        said = f"calibration error {100 * error:.1f} %" if np.isfinite(error) else "no finite prediction"
        line = _draw(axes, strip, diagram, index, after if len(runs) == 1 else labels[index])
        named.append((line, f"{after}: {said}" if len(runs) == 1 else f"{labels[index]}\n{said} {after}"))
    if len(runs) == 1:
        x, y = line.get_data()
        gaps = axes.vlines(x, x, y, colors=line.get_color(), linewidth=0.8)
        shared.append((gaps, "gap"))
    axes.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    strip.set(xlabel="confidence (%)", ylabel="share (%)", ylim=(0, 105 * (most or 1.0)))
    title = f"{frame.heading(runs)}\n{frame.count([run.result['test']['tasks'] for run in runs])}, bins of {FEW:.1%} or more"
    return frame.finish(figure, title, named, shared, PANEL + STRIP)


def _trained(run: Run) -> int:
    return result_step(run.result) or 0


def _measured(run: Run, k: int) -> tuple[frame.Numbers, float]:
    """The diagram after k steps, shape (3, bins), and its error; what was not finite is NaN."""
    try:
        card = run.summary["card"]
        diagram = np.stack([frame.column(row) for row in card["reliability"][k]])
        if diagram.shape[0] != 3:
            raise ValueError
        return diagram, float(frame.column([card["ece"][k]])[0])
    except (KeyError, IndexError, TypeError, ValueError):
        raise UserError(
            f"the reliability in {run.path / 'summary.json'} is damaged: it needs three rows of bins and an error after "
            f"{k} step{'s' * (k != 1)}; restore the file or measure it anew by `toolkit evaluate`"
        ) from None


def _draw(axes: Axes, strip: Axes, diagram: frame.Numbers, index: int, name: str) -> Line2D:
    share, confidence, right = diagram
    seen, look = (share >= FEW) & np.isfinite(diagram).all(0), frame.look(index)
    x, y = (100 * sums[seen] / share[seen] for sums in (confidence, right))
    # Where all answers of a bin are right, its mark stands on the edge; unclipped, a line without points has endless extent.
    (line,) = axes.plot(x, y, **look, label=f"{name}: accuracy", clip_on=not seen.any() or x.max() > 100, zorder=3)
    edges = np.linspace(0, 100, len(share) + 1)
    look = {"color": look["color"], "linestyle": look["linestyle"], "linewidth": 1.2}
    strip.stairs(100 * share, edges, **look, label=f"{name}: queries")
    return line


def measured(run: Run) -> bool:
    """Whether a run can be drawn."""
    return "reliability" in (run.summary.get("card") or {})
