"""Figures as files, the same bytes for the same run; and the figures of a whole run folder."""

import io
import logging
from pathlib import Path

from matplotlib.figure import Figure

from toolkit.files import replace
from toolkit.plots import figures
from toolkit.plots.frame import styled
from toolkit.plots.rates import learned_rates
from toolkit.runs.folder import Run

log = logging.getLogger("toolkit")

# matplotlib writes its version into a PNG and the date into a PDF; without them equal drawings are equal files.
METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def save(figure: Figure, path: Path) -> list[Path]:
    """Writes `path`.png (200 dpi) and `path`.pdf, each whole or not at all, and clears the figure. Returns both paths.

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
    figure.clear()
    return written


def draw_run(path: Path) -> list[Path]:
    """Draws adaptation, training, learned rates where there are any, and the example task (task or fits) into the run folder
    `path`, from its files alone.

    An example that is no image classification and no scalar regression is left out with a log message. Nothing is
    written when a drawing fails. Raises UserError when the folder lacks a file or a test result.
    """
    run = Run(path)
    drawn = {"adaptation": figures.adaptation([run]), "training": figures.training([run])}
    if any(key.startswith("rate/") for row in run.metrics for key in row):
        drawn["rates"] = learned_rates(run)
    if not (path / "example.safetensors").exists():
        log.info("the tasks of %s have no picture: their inputs have several parts", path)
    elif kind := figures.example_kind(run):
        drawn[kind] = figures.example(run)
    else:
        log.info("the example task of %s has no picture: it is neither images nor scalar regression", path)
    return [file for name, figure in drawn.items() for file in save(figure, path / name)]
