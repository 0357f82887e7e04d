"""All methods of a comparison in one figure: a panel per family, its curves in colour before all the others in grey."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from toolkit.errors import UserError
from toolkit.plots import frame

PANEL = 2.1  # inch, the height of a panel


@frame.styled()
def comparison(rows: Sequence[dict[str, Any]], families: Mapping[str, Sequence[str]], title: str) -> Figure:
    """The metric after 0..S inner steps, mean over seeds and tasks with its 95 % interval over tasks, for `rows` as
    `toolkit.runs.comparison.rows` gives them; `families` names the methods of each panel. A ring marks the steps of training.
    Accuracy is in percent with chance as a dotted line, anything else on a log axis. Raises UserError when no row is named."""
    panels = {family: [row for row in rows if row["method"] in names] for family, names in families.items()}
    panels = {family: own for family, own in panels.items() if own}
    if not panels:
        raise UserError(f"no row of the comparison belongs to a family; the rows are {', '.join(r['method'] for r in rows)}")
    percent = rows[0]["metric"] == "accuracy"
    scale = 100.0 if percent else 1.0
    columns = 2 if len(panels) > 1 else 1
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(frame.WIDTH * columns, PANEL * lines + 0.4))
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (family, own) in zip(grid.flat, panels.items(), strict=False):
        for row in rows:
            axes.plot(range(len(row["mean"])), frame.column(row["mean"], scale), color="0.88", linewidth=0.8, marker="")
        for index, row in enumerate(own):
            _draw(axes, row, index, scale)
        if percent and rows[0]["chance"]:
            axes.axhline(scale * rows[0]["chance"], color="0.35", linestyle=":", linewidth=1.0)
        axes.set_title(family, fontsize="medium")
        axes.legend(loc="best", fontsize="small")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not percent:
        grid[0, 0].set_yscale("log")
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy (%)" if percent else f"test {rows[0]['metric']}")
    for column in range(columns):
        shown = [axes for axes in grid[:, column] if axes.get_visible()]
        shown[-1].set_xlabel("inner steps")
        shown[-1].tick_params(labelbottom=True)
    figure.suptitle(title)
    return figure


def _draw(axes: Axes, row: dict[str, Any], index: int, scale: float) -> None:
    mean, half = frame.column(row["mean"], scale), frame.column(row["ci95"], scale)
    look = frame.look(index) | {"markersize": 3}
    (line,) = axes.plot(range(len(mean)), mean, **look, label=row["method"])
    axes.fill_between(range(len(mean)), mean - half, mean + half, color=line.get_color(), alpha=0.2, linewidth=0)
    k = row["trained_steps"]
    if math.isfinite(mean[k]):
        axes.plot([k], [mean[k]], marker="o", markersize=9, mfc="none", mec="0.2", linestyle="")
