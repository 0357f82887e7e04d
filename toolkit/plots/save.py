"""Figures as files, the same bytes for the same run; and the figures of a whole run folder."""

import csv
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.collections import FillBetweenPolyCollection, PathCollection
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

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

    `path` has no suffix: whatever stands behind a dot in its name is kept. Its folder is made when missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    with styled():
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
Row = tuple[int, str, float, float, float | str, float | str]


def numbers(figure: Figure) -> Iterator[Row]:
    """What is drawn, as numbers: for each panel, numbered from 0, its lines with their error bars, points and bars. `series` is
    the name of what was drawn (its label), with a number where several have one name; `low` and `high` are the ends of an
    interval; a bar's x is its middle. Lines across a whole panel, such as chance, are left out."""
    for panel, axes in enumerate(figure.axes):
        used: dict[str, int] = {}

        def name(label: Any, fallback: str, used: dict[str, int] = used) -> str:
            text = fallback if str(label).startswith("_") else str(label)
            used[text] = used.get(text, 0) + 1
            return text if used[text] == 1 else f"{text} {used[text]}"

        errors = {id(box.lines[0]): box for box in axes.containers if isinstance(box, ErrorbarContainer)}
        for line in axes.get_lines():
            if line.get_transform() != axes.transData or any(line in box.lines[1] for box in errors.values()):
                continue
            box = errors.get(id(line))
            series = name(box.get_label() if box else line.get_label(), "line")
            intervals = [np.ravel(segment)[1::2] for segment in box.lines[2][0].get_segments()] if box and box.has_yerr else []
            points = line.get_xydata()
            for i, (x, y) in enumerate(np.asarray(points, dtype=float).tolist()):
                low, high = (float(v) for v in intervals[i]) if i < len(intervals) and len(intervals[i]) == 2 else ("", "")
                yield panel, series, x, y, low, high
        for dots in axes.collections:
            if isinstance(dots, FillBetweenPolyCollection):
                series, ends = name(dots.get_label(), "band"), dict[float, list[float]]()
                for path in dots.get_paths():
                    for x, y in np.asarray(path.vertices, dtype=float)[:-1].tolist():
                        ends.setdefault(x, []).append(y)
                yield from ((panel, series, x, (min(ys) + max(ys)) / 2, min(ys), max(ys)) for x, ys in ends.items())
            elif isinstance(dots, PathCollection):
                series = name(dots.get_label(), "points")
                yield from ((panel, series, float(x), float(y), "", "") for x, y in np.asarray(dots.get_offsets()))
        for bars in axes.containers:
            if isinstance(bars, BarContainer):
                series = name(bars.get_label(), "bars")
                yield from ((panel, series, b.get_x() + b.get_width() / 2, b.get_height(), "", "") for b in bars)
        for stairs in axes.patches:
            if isinstance(stairs, StepPatch):
                heights, edges, _ = stairs.get_data()
                series = name(stairs.get_label(), "bars")
                middles = (edges[:-1] + edges[1:]) / 2
                yield from ((panel, series, float(x), float(y), "", "") for x, y in zip(middles, heights, strict=True))


def draw_run(path: Path) -> list[Path]:
    """Draws adaptation, training, learned rates where there are any, and the example task (task or fits) into the run folder
    `path`, from its files alone.

    An example that is no image classification and no scalar regression is left out with a log message. Nothing is
    written when a drawing fails. Raises UserError when the folder lacks a file or a test result.
    """
    run = Run(path)
    drawn = {"adaptation": figures.adaptation([run]), "training": figures.training([run])}
    if measured(run):
        drawn["reliability"] = reliability([run])
    if any(key.startswith("rate/") for row in run.metrics for key in row):
        drawn["rates"] = learned_rates(run)
    if not (path / "example.safetensors").exists():
        log.info("the tasks of %s have no picture: their inputs have several parts", path)
    elif kind := figures.example_kind(run):
        drawn[kind] = figures.example(run)
    else:
        log.info("the example task of %s has no picture: it is neither images nor scalar regression", path)
    return [file for name, figure in drawn.items() for file in save(figure, path / name)]
