"""Figures as files, the same bytes for the same run; and the figures of a whole run folder."""

import csv
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import FillBetweenPolyCollection, PathCollection
from matplotlib.container import BarContainer, Container, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle, StepPatch

from toolkit.errors import UserError
from toolkit.files import replace
from toolkit.plots import figures
from toolkit.plots.frame import styled
from toolkit.plots.rates import learned_rates
from toolkit.plots.reliability import measured, reliability
from toolkit.runs.folder import Run

log = logging.getLogger("toolkit")

# matplotlib writes its version into a PNG and the date into a PDF; without them equal drawings are equal files.
METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def save(figure: Figure, path: Path) -> list[Path]:
    """Writes `path`.png (200 dpi), `path`.pdf and, where curves, points or bars are drawn, the numbers of these as `path`.csv,
    each whole or not at all, and clears the figure. Returns the paths.

    `path` has no suffix: whatever stands behind a dot in its name is kept. Its folder is made when missing. Raises UserError
    for a path that names a folder only.
    """
    if path.name in ("", ".."):
        raise UserError(f"{path} is a folder; name the figure in it, as in {path / 'curves'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name in a script that the font lacks
        for suffix, metadata in METADATA.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=200, metadata=metadata)
            written.append(path.with_name(f"{path.name}.{suffix}"))
            replace(written[-1], buffer.getvalue())
    if rows := list(numbers(figure)):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
        written.append(path.with_name(f"{path.name}.csv"))
        replace(written[-1], text.getvalue().encode())
    figure.clear()
    return written


COLUMNS = ("panel", "series", "x", "y", "low", "high")
Value = float | str  # "" where there is none
Row = tuple[int, str, Value, Value, Value, Value]


def numbers(figure: Figure) -> Iterator[Row]:
    """What is drawn, as numbers: for each panel, numbered from 0, its lines with their error bars, bands, points and bars.

    `series` is the name of what was drawn (its label, after the run's where there are several), with a number where several
    have one name. `low` and `high` are the ends of an interval; a bar's x is its middle, and that of a lying bar is its length.
    A line across a whole panel, such as chance, has one of x and y, and a band across it has an x and its ends.
    """
    for panel, axes in enumerate(figure.axes):
        used: dict[str, int] = {}
        for fallback, artist, points in _drawn(axes):
            series = _name(artist, fallback)
            used[series] = used.get(series, 0) + 1
            series = series if used[series] == 1 else f"{series} {used[series]}"
            yield from ((panel, series, *point) for point in points)


def _drawn(axes: Axes) -> Iterator[tuple[str, Any, list[tuple[Value, Value, Value, Value]]]]:
    boxes = [box for box in axes.containers if isinstance(box, ErrorbarContainer)]
    errors, caps = {id(box.lines[0]): box for box in boxes}, {id(cap) for box in boxes for cap in box.lines[1]}
    for line in axes.get_lines():
        if id(line) not in caps:
            box = errors.get(id(line))
            yield "line", box or line, _of_line(axes, line, box)
    for dots in axes.collections:
        if isinstance(dots, FillBetweenPolyCollection):
            yield "band", dots, _of_band(dots)
        elif isinstance(dots, PathCollection):
            yield "points", dots, [(x, y, "", "") for x, y in np.asarray(dots.get_offsets(), dtype=float).tolist()]
    for bars in axes.containers:
        if isinstance(bars, BarContainer) and bars.orientation == "vertical":
            yield "bars", bars, [(b.get_x() + b.get_width() / 2, float(b.get_height()), "", "") for b in bars]
        elif isinstance(bars, BarContainer):
            whiskers = bars.errorbar.lines[2][0].get_segments() if bars.errorbar else []
            ends: list[tuple[Value, Value]] = [(float(start[0]), float(end[0])) for start, end in whiskers]
            ends = ends or [("", "")] * len(bars)
            places = ((float(b.get_width()), b.get_y() + b.get_height() / 2) for b in bars)
            yield "bars", bars, [(*place, *pair) for place, pair in zip(places, ends, strict=True)]
    for patch in axes.patches:
        if isinstance(patch, StepPatch):
            heights, edges, _ = patch.get_data()
            middles = ((edges[:-1] + edges[1:]) / 2).tolist()
            yield "bars", patch, [(x, y, "", "") for x, y in zip(middles, heights.tolist(), strict=True)]
        elif isinstance(patch, Rectangle) and patch.get_data_transform() != axes.transData:  # a span from bottom to top
            low, high = float(patch.get_x()), float(patch.get_x() + patch.get_width())
            yield "span", patch, [((low + high) / 2, "", low, high)]


def _name(artist: Any, fallback: str) -> str:
    label, owner = str(artist.get_label()), str((artist[0] if isinstance(artist, Container) else artist).get_gid() or "")
    label = fallback if label.startswith("_") else label
    return label if owner.startswith((f"{label} (", f"{label},")) or label.startswith(owner) else f"{owner}: {label}"


def _of_line(axes: Axes, line: Line2D, box: ErrorbarContainer | None) -> list[tuple[Value, Value, Value, Value]]:
    points = np.asarray(line.get_xydata(), dtype=float).tolist()
    if line.get_transform() != axes.transData:
        (x, y), (other, _) = points[0], points[-1]
        return [(x, "", "", "") if x == other else ("", y, "", "")]
    intervals = [np.ravel(segment)[1::2].tolist() for segment in box.lines[2][0].get_segments()] if box and box.has_yerr else []
    ends = [(*pair,) if len(pair) == 2 else ("", "") for pair in intervals] or [("", "")] * len(points)
    return [(x, y, low, high) for (x, y), (low, high) in zip(points, ends, strict=True)]


def _of_band(band: FillBetweenPolyCollection) -> list[tuple[Value, Value, Value, Value]]:
    ends: dict[float, list[float]] = {}
    for path in band.get_paths():
        for x, y in np.asarray(path.vertices, dtype=float)[:-1].tolist():
            ends.setdefault(x, []).append(y)
    return [(x, (min(ys) + max(ys)) / 2, min(ys), max(ys)) for x, ys in ends.items()]


def draw_run(path: Path) -> list[Path]:
    """Draws adaptation, training, reliability where it was measured, learned rates where there are any, and the example task
    (task or fits) into the run folder `path`, from its files alone, and returns the files.

    Of a run that goes on or was stopped there are training and rates, and a log message; an example that is no image
    classification and no scalar regression is left out with one. An evaluation has no training. Raises UserError when the
    folder lacks a file or has a damaged one; the figures that do not need it are drawn all the same.
    """
    run = Run(path)
    drawn: dict[str, Figure] = {}
    problems: list[UserError] = []

    def attempt(draw: Callable[[], Mapping[str, Figure]]) -> None:
        try:
            drawn.update(draw())
        except UserError as error:
            problems.append(error)

    if finished := (path / "summary.json").exists():
        attempt(lambda: {"adaptation": figures.adaptation([run])})
        attempt(lambda: {"reliability": reliability([run])} if measured(run) else {})
    elif not (path / "metrics.jsonl").exists():
        _ = run.result  # which says what is missing
    else:
        log.info("%s is not finished: only its training can be drawn", path)
    if not problems and not (finished and "weights_of" in run.summary):
        attempt(lambda: {"training": figures.training([run])})
        attempt(lambda: {"rates": learned_rates(run)} if any(key.startswith("rate/") for r in run.metrics for key in r) else {})
    attempt(lambda: _example(run) if finished else {})
    written = [file for name, figure in drawn.items() for file in save(figure, path / name)]
    if problems:
        also = f" (drawn without it: {', '.join(drawn)})" if drawn else ""
        raise UserError("; ".join(dict.fromkeys(map(str, problems))) + also)
    return written


def _example(run: Run) -> dict[str, Figure]:
    if not (run.path / "example.safetensors").exists():
        log.info("the tasks of %s have no picture: their inputs have several parts", run.path)
    elif kind := figures.example_kind(run):
        return {kind: figures.example(run)}
    else:
        log.info("the example task of %s has no picture: it is neither images nor scalar regression", run.path)
    return {}
