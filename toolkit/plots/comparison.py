"""All methods of a comparison in one figure: a panel per family, its curves in colour before all the others in grey."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from toolkit.errors import UserError
from toolkit.plots import frame

PANEL = 1.5  # inch, the height of the axes of a panel
ROOM = 10  # how far above the worst start the log axis goes: what diverges further leaves the panel
NEAR = 0.5  # where the methods as trained lie within this part of the way from chance to the best, the axis shows it alone


@frame.styled()
def comparison(rows: Sequence[dict[str, Any]], families: Mapping[str, Sequence[str]], title: str) -> Figure:
    """The metric after 0..S inner steps, mean over seeds and tasks with its 95 % interval over tasks (each averaged over
    seeds), for `rows` as `toolkit.runs.comparison.rows` gives them; `families` names the methods of each panel. A ring marks
    the result as trained. Accuracy is in percent with chance as a dotted line; where all methods end up close together far
    above chance, the axis is of where they differ, and curves that begin at chance come in from below. Anything else is on a
    log axis, which a curve that diverges leaves at the top. Raises UserError when no row is named."""
    panels = {family: [row for row in rows if row["method"] in names] for family, names in families.items()}
    panels = {family: own for family, own in panels.items() if own}
    if not panels:
        raise UserError(f"no row of the comparison belongs to a family; the rows are {', '.join(r['method'] for r in rows)}")
    percent = rows[0]["metric"] == "accuracy"
    scale = 100.0 if percent else 1.0
    columns = 2 if len(panels) > 1 else 1
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(frame.WIDTH * columns, 1))
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    shared: frame.Legend = []
    zoom = _zoom(rows) if percent else None
    for axes, (family, own) in zip(grid.flat, panels.items(), strict=False):
        for row in (row for row in rows if row not in own):
            values = frame.column(row["mean"], scale)
            plain: frame.Keywords = {"color": "0.75", "linestyle": "-", "linewidth": 0.7, "marker": "", "gid": row["method"]}
            (grey,) = axes.plot(values, **plain, label="in grey")
            shared.append((grey, "other methods"))
        for index, row in enumerate(own):
            shared += _draw(axes, row, index, scale)
        if percent and (chance := rows[0]["chance"]):
            dots = axes.axhline(scale * chance, color="0.35", linestyle=":", linewidth=1.0, label="chance")
            shared.append((dots, f"chance, {scale * chance:.3g} %" + (", below the axis" if zoom else "")))
        # Above the axes, with the family as its title: within them it would cover one curve or another.
        handles = [line for line in axes.get_lines() if line.get_label() in {row["method"] for row in own}]
        axes.legend(handles=handles, title=family, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not percent:
        _log(grid[0, 0], rows)
    if zoom:
        grid[0, 0].set_ylim(*zoom)
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy (%)" if percent else f"test {rows[0]['metric']}")
    for column in range(columns):
        shown = [axes for axes in grid[:, column] if axes.get_visible()]
        shown[-1].set_xlabel("inner steps")
        shown[-1].tick_params(labelbottom=True)
    groups = list(panels.values())
    names = sum(max(math.ceil(len(own) / 2) for own in groups[i : i + columns]) for i in range(0, len(groups), columns))
    return frame.finish(figure, title, [], shared, lines * (PANEL + 2 * frame.LINE) + (names + 3) * frame.LINE)


def _draw(axes: Axes, row: dict[str, Any], index: int, scale: float) -> frame.Legend:
    mean, half = frame.column(row["mean"], scale), frame.column(row["ci95"], scale)
    look = frame.look(index) | {"markersize": 3}
    (line,) = axes.plot(mean, **look, label=row["method"])
    # An interval wider than its mean says that some tasks diverge; on a log axis it would paint the whole panel.
    drawn = np.ones_like(mean, dtype=bool) if scale != 1.0 else half < mean
    band: frame.Keywords = {"color": line.get_color(), "alpha": 0.2, "linewidth": 0}
    band |= {"label": f"{row['method']}: 95 % interval"}
    axes.fill_between(range(len(mean)), mean - half, mean + half, where=drawn.tolist(), **band)
    k = row["trained_steps"]
    told = [frame.band(f"95 % interval over tasks{', where less than the mean' if scale == 1.0 else ''}")]
    if not math.isfinite(mean[k]):
        return told
    look = {"marker": "o", "markersize": 8, "mfc": "none", "mec": "0.2", "linestyle": "", "gid": row["method"]}
    (ring,) = axes.plot([k], [mean[k]], **look, label="ring")
    return [*told, (ring, "as trained")]


def _zoom(rows: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """The ends of an accuracy axis, in percent, that shows where methods differ as trained; None where that is most of it."""
    k = [row["trained_steps"] for row in rows]
    mean, half = (
        np.array([frame.column(row[key], 100.0)[at] for row, at in zip(rows, k, strict=True)]) for key in ("mean", "ci95")
    )
    drawn = np.isfinite(mean) & np.isfinite(half)
    if not drawn.any():
        return None
    low, high = float((mean - half)[drawn].min()), float((mean + half)[drawn].max())
    if high - low > NEAR * (high - 100 * (rows[0]["chance"] or 0.0)):
        return None
    room = 0.15 * (high - low)
    return low - room, high + room


def _log(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """A log axis by the means alone, so that an interval that comes near 0 stretches nothing; none without a positive mean."""
    values = np.stack([frame.column(row["mean"]) for row in rows])
    starts, positive = values[:, 0][np.isfinite(values[:, 0])], values[np.isfinite(values) & (values > 0)]
    if positive.size:
        axes.set_yscale("log")
        low, high = positive.min(), positive.max()
        high = max(min(high, ROOM * starts.max()), low) if starts.size and starts.max() > 0 else high
        axes.set_ylim(low / 1.3, high * 1.3)
