"""Drawings of finished runs. Every function takes runs, reads only their folders, and returns a matplotlib Figure."""

import math
from collections.abc import Callable, Sequence
from itertools import product

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from torch import Tensor

from toolkit.errors import UserError
from toolkit.plots import frame
from toolkit.plots.frame import Keywords, Legend, Test
from toolkit.runs.folder import Run, result_step

PANEL = 1.95  # inch, the height of one plot with its tick labels
RIGHT, WRONG = ("✓", "#0072B2"), ("✗", "#C24E00")
MAX_CLASSES, MAX_SHOTS, MAX_QUERIES = 10, 5, 3  # on a task card


@frame.styled()
def adaptation(runs: Sequence[Run]) -> Figure:
    """The test metric against inner steps: mean over tasks, 95 % interval, chance, the result as trained ringed.

    Accuracy is in percent. Any other metric gets its median too (open markers), and a log axis when mean and median
    range over more than a factor of 10. The numbers at the training step and at the last step stand in the plot for one
    run, in the legend for several. Raises UserError for no run, too many, one without test result, or unlike metrics.
    """
    tests = frame.tests_of(runs)
    percent = frame.percent(tests[0])
    figure = Figure()
    axes = figure.subplots()
    named: Legend = []
    shared: Legend = []
    for index, (run, test, label) in enumerate(zip(runs, tests, frame.labels(runs), strict=True)):
        name = f"{label}\n{frame.numbers(run, test)}" if len(runs) > 1 else "mean, 95 % interval over tasks"
        named += [(_curve(axes, test, index), name)]
        shared += _marks(axes, run, test, index, label if len(runs) > 1 else None)
    shared += [frame.band("95 % interval over tasks")] if len(runs) > 1 else []
    for chance in sorted({run.summary.get("chance") or 0.0 for run in runs} - {0.0}) if percent else []:
        line = axes.axhline(100 * chance, color="0.35", linestyle=":", linewidth=1.2, label="chance")
        shared += [(line, f"chance, {100 * chance:.3g} %")]
    axes.set(xlabel="inner steps", ylabel=f"test {frame.unit(tests[0])}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.2 if percent else 0.3)
    if percent:
        axes.set_ylim(bottom=max(-3.0, axes.get_ylim()[0]))
    else:
        frame.log_if_wide(axes, room=0.3)
    title = f"{frame.heading(runs)}\n{frame.count([test['tasks'] for test in tests])}"
    frame.finish(figure, title, named, shared, PANEL)
    if len(runs) == 1:
        _write_numbers(figure, axes, runs[0], tests[0])
    return figure


@frame.styled()
def training(runs: Sequence[Run]) -> Figure:
    """Training against iteration: logged values thin, a centred moving mean bold, validation points with 95 % bars.

    The upper panel holds the metric (accuracy in percent), with a star on the checkpoint that validation selected; the
    lower one the loss, left out where the metric is itself the loss. Runs may still go on. Raises UserError for no run, too
    many, unlike metrics, and a run without training rows.
    """
    tests = frame.tests_of(runs, finished=False)
    percent = frame.percent(tests[0])
    keys = ["metric", "loss"] if percent else ["metric"]
    figure = Figure()
    panels = figure.subplots(len(keys), sharex=True, squeeze=False)[:, 0]
    shared: Legend = []
    for key, axes in zip(keys, panels, strict=True):
        scale = 100.0 if percent and key == "metric" else 1.0
        named: Legend = []
        for index, (run, label) in enumerate(zip(runs, frame.labels(runs), strict=True)):
            name = label if len(runs) > 1 else "training, bold: mean over 1/20 of it"
            named += [(_training(axes, run, key, scale, index), name)]
            shared += _validation(axes, run, key, scale, index)
        axes.set_ylabel(frame.unit(tests[0]) if key == "metric" else "loss")
        if scale == 1.0:
            frame.log_if_wide(axes)
    panels[-1].set_xlabel("iteration")
    panels[-1].xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return frame.finish(figure, frame.heading(runs), named, shared, PANEL * len(keys))


@frame.styled()
def task_card(run: Run) -> Figure:
    """One classification task as a picture: a column per class with its support images, below them its queries.

    Under a query stand the classes predicted after the first and the last number of steps shown, each with a tick or a
    cross; the frame has the colour of the last. At most 10 classes, 5 shots and 3 queries per class are shown.
    Greyscale is drawn dark on white. Raises UserError when the images are not (n, 1 or 3, height, width).
    """
    data = run.example
    _check_images(run)
    classes = sorted(set(data["support_y"].tolist()))
    shown = classes[:MAX_CLASSES]
    support = [_of_class(data["support_y"], c)[:MAX_SHOTS] for c in shown]
    queries = [_of_class(data["query_y"], c)[:MAX_QUERIES] for c in shown]
    ends = sorted({0, len(data["steps"]) - 1})
    # All lengths are in columns: a picture and its margin are one wide.
    first_query, query = 0.45 + 1.08 * max(map(len, support)), 1.12 + 0.22 * len(ends)
    height = first_query + query * max(map(len, queries))
    inch = max(0.62, frame.WIDTH / (len(shown) + 0.4))
    figure = Figure(figsize=(inch * (len(shown) + 0.4), 1))
    axes = figure.subplots()
    axes.set(xlim=(-0.4, len(shown)), ylim=(height, 0), aspect="equal")
    axes.axis("off")
    axes.text(-0.2, first_query / 2 + 0.1, "support", rotation=90, ha="center", va="center")
    axes.text(-0.2, (first_query + height) / 2, "queries", rotation=90, ha="center", va="center")
    for i, c in enumerate(shown):
        axes.text(i + 0.5, 0.15, f"class {c}", ha="center", va="center")
        for j, n in enumerate(support[i]):
            _picture(axes, data["support_x"][n], i, 0.3 + 1.08 * j, "0.6", 0.6)
        for j, n in enumerate(queries[i]):
            colour = _verdicts(axes, run, n, ends, i + 0.5, first_query + query * j + 1.06)
            _picture(axes, data["query_x"][n], i, first_query + query * j, colour, 2.0)
    part = "" if shown == classes else f", {len(shown)} of {len(classes)} classes"
    title = f"{frame.heading([run])}{part}\nbelow a query: inner steps, predicted class"
    return frame.finish(figure, title, [], [], inch * height)


@frame.styled()
def fits(run: Run) -> Figure:
    """One regression task with scalar x and y: true queries, support points, the prediction after each step shown.

    The legend holds each curve's mean squared error over the queries. Raises UserError for other shapes.
    """
    data = run.example
    if any(data[key].ndim != 2 or data[key].shape[1] != 1 for key in ("support_x", "support_y", "query_x", "query_y")):
        raise UserError(f"fits need x and y of shape (n, 1), which the example task of {run.path} does not have")
    order = data["query_x"][:, 0].argsort()
    x, y = data["query_x"][order, 0].numpy(), data["query_y"][order, 0].numpy()
    figure = Figure()
    axes = figure.subplots()
    plain: Keywords = {"linestyle": "-", "marker": ""}
    legend: Legend = [(axes.plot(x, y, **plain, color="0.75", linewidth=4, label="true")[0], "true")]
    dots: Keywords = {"linestyle": "", "marker": "o", "color": "black", "mec": "white", "markersize": 5, "zorder": 4}
    points = axes.plot(data["support_x"][:, 0].numpy(), data["support_y"][:, 0].numpy(), **dots, label="support")
    legend += [(points[0], "support")]
    steps, dashes = data["steps"].tolist(), ["-", "--", "-.", ":"]
    colours = matplotlib.colormaps["viridis"](np.linspace(0.75, 0.0, max(len(steps), 2)))
    for i, predicted in enumerate(data["predictions"][:, order, 0].numpy()):
        plain["linestyle"] = dashes[(len(steps) - 1 - i) % len(dashes)]
        (line,) = axes.plot(x, predicted, **plain, color=colours[i], label=f"{steps[i]}")
        error = float(np.square(predicted - y).mean())
        legend += [(line, f"{steps[i]} step{'s' * (steps[i] != 1)}: {error:.3g}")]
    axes.set(xlabel="x", ylabel="y")
    title = f"{frame.heading([run])}\nin the legend: inner steps, mean squared error"
    return frame.finish(figure, title, legend, [], PANEL)


def example_kind(run: Run) -> str | None:
    """How the example task can be drawn: "task" (classes of images), "fits" (scalar x and y), or not at all."""
    x, y = run.example["support_x"], run.example["support_y"]
    if not y.is_floating_point():
        return "task" if x.ndim == 4 and x.shape[1] in (1, 3) else None
    return "fits" if x.ndim == y.ndim == 2 and x.shape[1] == y.shape[1] == 1 else None


def example(run: Run) -> Figure:
    """`task_card` where the example's labels are integers, else `fits`; raises UserError when it can be neither."""
    draw: Callable[[Run], Figure] = fits if run.example["support_y"].is_floating_point() else task_card
    return draw(run)


def _curve(axes: Axes, test: Test, index: int) -> object:
    """Mean and band of one run; returned as the pair that the legend shows in one entry."""
    mean, ci = (frame.column(test[key], 100.0 if frame.percent(test) else 1.0) for key in ("mean", "ci95"))
    (line,) = axes.plot(test["steps"], mean, **frame.look(index), label="mean")
    band = axes.fill_between(test["steps"], mean - ci, mean + ci, color=line.get_color(), alpha=0.2, linewidth=0)
    return band, line


def _marks(axes: Axes, run: Run, test: Test, index: int, owner: str | None) -> Legend:
    """The median, where the metric is no accuracy, and the ring around the steps used in training, as `owner`'s."""
    marks: Legend = []
    if not frame.percent(test):
        thin = frame.look(index) | {"linewidth": 0.9, "mfc": "white", "label": "median", "gid": owner}
        marks += [(axes.plot(test["steps"], frame.column(test["median"]), **thin)[0], "median (open)")]
    if (k := result_step(run.result)) is not None and run.summary["inner_steps"] <= test["steps"][-1]:
        height = frame.column(test["mean"], 100.0 if frame.percent(test) else 1.0)[k]
        ring: Keywords = {"marker": "o", "markersize": 10, "mfc": "none", "mec": "0.2", "linestyle": "", "gid": owner}
        marks += [(axes.plot([test["steps"][k]], [height], **ring, label="ring")[0], "as trained")]
    return marks


def _write_numbers(figure: Figure, axes: Axes, run: Run, test: Test) -> None:
    """The mean (below an accuracy, above any other) and the median at the marked steps, where they cover no curve."""
    figure.draw_without_rendering()  # decides the layout, without which no text has a place
    curves = np.concatenate([_pixels(line) for line in axes.get_lines() if line.get_label() != "chance"])
    taken: list[Bbox] = []
    for k in reversed(frame.marked(run, test)):  # the last has the least choice of place
        for key in ("mean",) if frame.percent(test) else ("mean", "median"):
            height = frame.column([test[key][k]], 100.0 if frame.percent(test) else 1.0)[0]
            if math.isfinite(height):
                text = frame.number(test, k) if key == "mean" else f"{height:.3g}"
                box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5}
                note = axes.annotate(text, (test["steps"][k], height), (0, 0), textcoords="offset points", bbox=box)
                note.set(zorder=6, in_layout=False)
                taken += [_place(note, axes, key == "mean" and not frame.percent(test), curves, taken)]


def _place(note: Annotation, axes: Axes, above: bool, curves: frame.Numbers, taken: list[Bbox]) -> Bbox:
    """Moves the note to the nearest free place around its point, or to the first where none is free."""
    places = list(product((9, 20, 32), (above, not above), ("left", "right", "center")))
    for away, up, side in [*places, places[0]]:
        note.xyann = (0, away if up else -away)
        note.set(va="bottom" if up else "top", ha=side)
        box = note.get_window_extent().padded(1)
        x, y = curves.T
        covers = ((box.x0 < x) & (x < box.x1) & (box.y0 < y) & (y < box.y1)).any()
        inside = axes.bbox.padded(3).contains(*box.p0) and axes.bbox.padded(3).contains(*box.p1)
        if inside and not covers and not box.count_overlaps(taken):
            break
    return box


def _pixels(line: Line2D) -> frame.Numbers:
    """Points of a drawn line in pixels, so dense that no text fits between two of them; without its gaps."""
    x, y = line.get_transform().transform(line.get_xydata()).T
    dense = np.linspace(0, len(x) - 1, 40 * len(x))
    points = np.stack([np.interp(dense, np.arange(len(x)), values) for values in (x, y)], axis=1)
    return np.asarray(points[np.isfinite(points).all(1)])


def _training(axes: Axes, run: Run, key: str, scale: float, index: int) -> object:
    rows = frame.rows(run, key)
    if not rows:
        raise UserError(f"{run.path / 'metrics.jsonl'} has no training rows to draw; train for at least one interval")
    line = frame.look(index) | {"marker": ""}
    iterations, values = [row["iteration"] for row in rows], frame.column([row[key] for row in rows], scale)
    axes.plot(iterations, values, **line | {"linestyle": "-"}, linewidth=0.6, alpha=0.4, label="raw")
    smooth = frame.moving_mean(values, max(1, len(rows) // 20) | 1)
    return axes.plot(iterations, smooth, **line, linewidth=1.8, label="smooth")[0]


def _validation(axes: Axes, run: Run, key: str, scale: float, index: int) -> Legend:
    marks: Legend = []
    if rows := frame.rows(run, f"val_{key}"):
        at, height = [row["iteration"] for row in rows], frame.column([row[f"val_{key}"] for row in rows], scale)
        bars = frame.column([row.get("val_ci95") if key == "metric" else None for row in rows], scale)
        point = frame.look(index) | {"linestyle": "", "mec": "black", "mew": 0.6, "ecolor": "black", "zorder": 4}
        point |= {"markersize": min(4.0, 120 / len(at)), "capsize": min(2.0, 40 / len(at))}  # many must not hide the line
        bar = axes.errorbar(at, height, yerr=bars, **point, elinewidth=0.8, label="validation")
        tasks = run.config.get("val_tasks")
        marks += [(bar, f"validation, 95 % interval over {tasks} tasks" if tasks else "validation")]
    if key == "metric" and "val_metric" in (chosen := run.known.get("selected") or {}):
        star: Keywords = {"marker": "*", "markersize": 11, "color": "white", "mec": "black", "linestyle": ""}
        spot = (chosen["iteration"],), frame.column([chosen["val_metric"]], scale)
        marks += [(axes.plot(*spot, **star, zorder=5, label="selected")[0], "selected on validation")]
    return marks


def _check_images(run: Run) -> None:
    shape = tuple(run.example["support_x"].shape)
    if len(shape) != 4 or shape[1] not in (1, 3):
        raise UserError(f"a task card needs images of shape (n, 1 or 3, height, width), but {run.path} holds {shape}")


def _of_class(labels: Tensor, chosen: int) -> list[int]:
    return [n for n, label in enumerate(labels.tolist()) if label == chosen]


def _verdicts(axes: Axes, run: Run, n: int, ends: list[int], x: float, top: float) -> str:
    """Writes what was predicted for query n, a line for each of `ends`; returns the colour of the last."""
    colour = ""
    for line, end in enumerate(ends):
        predicted = int(run.example["predictions"][end, n].argmax())
        mark, colour = RIGHT if predicted == int(run.example["query_y"][n]) else WRONG
        text = f"{int(run.example['steps'][end])}: {predicted} {mark}"
        axes.text(x, top + 0.22 * (line + 0.5), text, ha="center", va="center", color=colour)
    # Not to be seen: the numbers of the table beside the picture, which all steps have.
    label, shares = int(run.example["query_y"][n]), run.example["predictions"][:, n].softmax(-1)
    told = {"predicted class": shares.argmax(-1), f"probability of class {label}": shares[:, label]}
    for what, values in told.items():
        axes.plot(run.example["steps"], values, visible=False, label=f"query {n} of class {label}: {what}")
    return colour


def _picture(axes: Axes, image: Tensor, left: float, top: float, edge: str, linewidth: float) -> None:
    pixels = image.float().clamp(0, 1)
    shown = 1 - pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    box = (left + 0.04, left + 0.96, top + 0.98, top + 0.06)
    axes.imshow(shown.numpy(), extent=box, cmap="gray", vmin=0, vmax=1, aspect="equal")
    axes.add_patch(Rectangle((box[0], box[3]), 0.92, 0.92, fill=False, edgecolor=edge, linewidth=linewidth))
