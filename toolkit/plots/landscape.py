"""The path of adaptation on one task, over the losses around it."""

import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from toolkit.errors import UserError
from toolkit.landscape import Landscape
from toolkit.plots import frame
from toolkit.plots.frame import Keywords, Legend, Numbers

LEVELS = 13
DEPTH = 1000.0  # levels go down to so small a part of the highest loss
NUMBER = 8  # points: the height of a step's number
ENDS: tuple[Keywords, Keywords] = ({"marker": "s", "markersize": 5.5}, {"marker": "*", "markersize": 11})
QUERY: Keywords = {"colors": "0.45", "linewidths": 0.5}
SUPPORT: Keywords = {"colors": "black", "linewidths": 0.7, "linestyles": "--", "alpha": 0.55}


@frame.styled()
def landscape(path: Landscape, title: str = "") -> Figure:
    """The path's points, numbered by step where there is room, over contours of the query loss; dashed those of the support
    loss, which the steps descend. Both axes have one scale, so a step of plain descent starts at right angles to a dashed line.

    Levels stand at equal ratios where a loss is positive and ranges over more than a factor of 10. The legend holds the query
    loss of the path's own weights at both ends. Raises UserError where no loss around the path is finite.
    """
    u, v, points = path.u.numpy(), path.v.numpy(), path.points.numpy()
    figure = Figure()
    axes = figure.subplots()
    levels = levels_of(path.loss.numpy())
    below = bool(np.nanmin(path.loss.numpy()) < levels[0])
    # White where the loss is low, and never so dark that the black path could not be read on it.
    shades = matplotlib.colormaps["Blues"](np.linspace(0.0, 0.72, LEVELS - 1 + below))
    shown = np.ma.masked_invalid(path.loss.numpy())
    filled = axes.contourf(u, v, shown, levels, colors=shades, extend="min" if below else "neither")
    _lines(axes, path, path.loss.numpy(), 1, QUERY)
    _lines(axes, path, path.support_loss.numpy(), 2, SUPPORT)
    beside = axes.inset_axes((1.03, 0.0, 0.04, 1.0))
    gap = float(np.diff(levels[::2]).min())  # so many digits that no two labels are alike
    digits = max(3, 1 + math.ceil(math.log10(abs(levels).max() / gap)))
    figure.colorbar(filled, cax=beside, label="query loss", ticks=levels[::2], format=f"%.{digits}g")
    axes.set(xlim=(u[0], u[-1]), ylim=(v[0], v[-1]), aspect="equal")
    axes.grid(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    share = [f"{100 * part:.3g} % of variance" for part in path.explained.tolist()]
    axes.set_xlabel(f"direction 1: {share[0]}")
    axes.set_ylabel(f"direction 2: {share[1]}" if path.explained[1] > 0 else "slope across the path")
    (line,) = axes.plot(*points.T, color="black", linestyle="-", linewidth=1.1, marker="o", markersize=3, label="path")
    line.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    legend: Legend = []
    for k, mark in zip((0, len(points) - 1), ENDS, strict=True):
        look: Keywords = mark | {"mfc": "white", "mec": "black", "mew": 0.9, "linestyle": "", "zorder": 4}
        (end,) = axes.plot(*points[[k]].T, **look, label="end" if k else "start")
        legend.append((end, f"{f'end ({k})' if k else 'start'}, loss {path.path_loss[k]:.{digits}g}"))
    for name, given in (("query loss", QUERY), ("support loss", SUPPORT)):
        legend.append((Line2D([], [], **{key.removesuffix("s"): value for key, value in given.items()}), name))
    frame.finish(figure, title, legend, [], (frame.WIDTH - 1.15) * (v[-1] - v[0]) / (u[-1] - u[0]) + 0.4)
    figure.draw_without_rendering()  # decides the layout, without which nobody knows how wide the tick labels are
    spare = axes.get_position(original=True).height - axes.get_position().height
    figure.set_figheight(figure.get_figheight() * (1 - spare))
    _number(figure, axes, points)
    return figure


def levels_of(loss: Numbers) -> Numbers:
    """Where the contours of a loss stand; raises UserError where none of it is finite."""
    finite = loss[np.isfinite(loss)]
    if not finite.size:
        raise UserError("no loss around the path is finite, so it has no contours; draw fewer steps")
    low, high = finite.min(), finite.max()
    if low >= 0 and high > 10 * low:
        return np.asarray(np.geomspace(max(low, high / DEPTH), high, LEVELS))
    return np.asarray(np.linspace(low, high if high > low else low + 1.0, LEVELS))


def _lines(axes: Axes, path: Landscape, loss: Numbers, every: int, look: Keywords) -> None:
    finite = loss[np.isfinite(loss)]
    if finite.size and finite.min() < finite.max():
        levels = levels_of(loss)[every - 1 :: every]
        axes.contour(path.u.numpy(), path.v.numpy(), np.ma.masked_invalid(loss), levels, **look)


def _number(figure: Figure, axes: Axes, points: Numbers) -> None:
    """Writes the steps' numbers beside their points: the first, the last, and those between that find a place of their own."""
    figure.draw_without_rendering()  # decides the layout, without which no point has a place
    places = axes.transData.transform(points) * 72 / figure.dpi
    last, dense = len(places) - 1, np.linspace(0, len(places) - 1, 40 * len(places))
    line = np.stack([np.interp(dense, np.arange(len(places)), values) for values in places.T], 1)
    numbered, taken = list[Numbers](), list[Numbers]()
    for k in (0, last, *range(1, last)):
        if _nearest(places[k], numbered) < 1.1 * NUMBER:
            continue
        far = NUMBER + 2 * len(str(k))
        for angle in np.radians([90, 45, 135, 0, 180, -45, -135, -90]):
            away = far * np.array([np.cos(angle), np.sin(angle)])
            if _nearest(places[k] + away, [*line]) > 0.75 * far and _nearest(places[k] + away, taken) > 1.2 * far:
                numbered, taken = [*numbered, places[k]], [*taken, places[k] + away]
                look: Keywords = {"textcoords": "offset points", "ha": "center", "va": "center", "zorder": 6}
                note = axes.annotate(f"{k}", points[k], (away[0], away[1]), **look)
                note.set_path_effects([withStroke(linewidth=2, foreground="white")])
                note.set_in_layout(False)
                break


def _nearest(place: Numbers, others: list[Numbers]) -> float:
    return min((float(np.linalg.norm(place - other)) for other in others), default=np.inf)
