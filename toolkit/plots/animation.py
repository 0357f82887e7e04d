"""Adaptation to one task as a moving picture, a frame for each number of inner steps."""

import io
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from toolkit.errors import UserError
from toolkit.files import replace
from toolkit.metrics import accuracy
from toolkit.plots import figures, frame
from toolkit.plots.frame import Keywords, Legend, Numbers
from toolkit.runs.folder import Run

FRAME, LAST = 500, 2000  # milliseconds that a frame stands, and the last one
DPI = 150
COLOURS = 128  # of a frame: what keeps a task of photographs below a megabyte


def animate(run_example: dict[str, Tensor], title: str, path: Path) -> Path:
    """Writes an example with its predictions (as in example.safetensors, after every step) as a GIF to `path`, whole or not at
    all, the same bytes for the same example; and returns `path`.

    Images of classes get the task card of each step with the accuracy over all queries, scalar regression the fit of each step
    with its error, beside those before and in front of the support points. Raises UserError for any other example.
    """
    kind = _cards if not run_example["query_y"].is_floating_point() else _fits
    frames = []
    with frame.styled():
        for figure in kind(run_example, title, path):
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DPI)
            frames.append(Image.open(buffer).convert("RGB"))
    # One palette for all, so that a frame holds only what changed.
    together = np.concatenate([np.asarray(picture) for picture in frames])
    palette = Image.fromarray(together).quantize(COLOURS, Image.Quantize.FASTOCTREE)
    frames = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in frames]
    durations = [FRAME] * (len(frames) - 1) + [LAST]
    # By Pillow itself: matplotlib's writer on top of it knows one duration for all frames.
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, buffer.getvalue())
    return path


def _cards(data: dict[str, Tensor], title: str, path: Path) -> Iterator[Figure]:
    opened = Run(path.parent)
    opened.__dict__["known"] = {"algorithm": "", "sampler": ""}
    for k, step in enumerate(data["steps"].tolist()):
        now = slice(k, k + 1)
        opened.__dict__["example"] = data | {"steps": data["steps"][now], "predictions": data["predictions"][now]}
        figure = figures.task_card(opened)
        right = float(accuracy(data["predictions"][k], data["query_y"]))
        told = f"after {_steps(step)}: {100 * right:.3g} % of {len(data['query_y'])} queries right"
        lines = _entitle(figure, title, f"{told}\nbelow a query: inner steps, predicted class")
        figure.set_figheight(figure.get_figheight() + (lines - 2) * frame.LINE)  # two lines are the card's own
        yield figure


def _fits(data: dict[str, Tensor], title: str, path: Path) -> Iterator[Figure]:
    if any(data[key].ndim != 2 or data[key].shape[1] != 1 for key in ("support_x", "support_y", "query_x", "query_y")):
        shape = tuple(data["query_x"].shape)
        raise UserError(f"an animation needs images of classes, or x and y of shape (n, 1); this task's x has shape {shape}")
    order = data["query_x"][:, 0].argsort()
    x, y = data["query_x"][order, 0].numpy(), data["query_y"][order, 0].numpy()
    fits = data["predictions"][:, order, 0].double().numpy()
    figure = Figure()
    axes = figure.subplots()
    plain: Keywords = {"linestyle": "-", "marker": ""}
    (true,) = axes.plot(x, y, **plain, color="0.75", linewidth=4)
    (first,) = axes.plot(x, fits[0], color="0.3", linestyle=":", marker="", linewidth=1.2)
    (now,) = axes.plot(x, fits[0], **plain, color="#0072B2", linewidth=1.8)
    dots: Keywords = {"linestyle": "", "marker": "o", "color": "black", "mec": "white", "markersize": 5, "zorder": 4}
    (points,) = axes.plot(data["support_x"][:, 0].numpy(), data["support_y"][:, 0].numpy(), **dots)
    legend: Legend = [(true, "true"), (points, "support"), (first, "before"), (now, "adapted")]
    axes.set(xlabel="x", ylabel="y", ylim=_limits(np.concatenate([y, data["support_y"][:, 0].numpy()]), fits))
    frame.finish(figure, f"{title}\n ", legend, [], figures.PANEL)
    for k, step in enumerate(data["steps"].tolist()):
        now.set_ydata(fits[k])
        error = float(np.square(fits[k] - y).mean())
        _entitle(figure, title, f"after {_steps(step)}: mean squared error {error:.3g}")
        yield figure


def _limits(true: Numbers, fits: Numbers) -> tuple[float, float]:
    """Room for all fits, unless one runs so far away that the truth would be a flat line."""
    span = float(true.max() - true.min()) or 1.0
    low, high = (float(np.nan_to_num(end)) for end in (fits.min(), fits.max()))
    low, high = max(min(low, true.min()), true.min() - span), min(max(high, true.max()), true.max() + span)
    return low - 0.05 * span, high + 0.05 * span


def _entitle(figure: Figure, title: str, told: str) -> int:
    """Puts both above the figure; returns the number of lines."""
    head = textwrap.fill(title, int(frame.CHARACTERS * figure.get_figwidth() / frame.WIDTH)).replace("$", r"\$")
    figure.suptitle(f"{head}\n{told}")
    return f"{head}\n{told}".count("\n") + 1


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"
