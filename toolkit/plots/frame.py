"""What the drawings share: the style, checks, names, numbers as text, and the title and legend around the axes."""

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from toolkit.errors import UserError
from toolkit.runs.folder import Run, names, result_step

STYLE = Path(__file__).with_name("toolkit.mplstyle")
WIDTH, LINE = 3.4, 0.16  # inch: one column, one line of text
CHARACTERS = 46  # on a line of text in one column
NAME = 28  # characters of a run's name

Numbers = np.ndarray[Any, np.dtype[np.float64]]
Test = dict[str, Any]  # summary["test"]
Keywords = dict[str, Any]
Legend = list[tuple[Any, str]]  # what `Figure.legend` takes: handles with their texts


@contextmanager
def styled() -> Iterator[None]:
    """The toolkit's style over matplotlib's defaults, whatever the user has set; in a `with`, or as a decorator."""
    with style.context(STYLE, after_reset=True):
        yield


def tests_of(runs: Sequence[Run], finished: bool = True) -> list[Test]:
    """The test results; of runs that need not be `finished` perhaps their metric alone. Raises UserError unless every run has
    one, and they can be drawn in one figure."""
    most = len(matplotlib.rcParams["axes.prop_cycle"])
    if not 1 <= len(runs) <= most:
        raise UserError(f"a figure holds 1 to {most} runs, not {len(runs)}; draw them in groups")
    tests = [(run.result if finished else run.known)["test"] for run in runs]
    if len({test["metric"] for test in tests}) > 1:
        metrics = ", ".join(f"{run.path}: {test['metric']}" for run, test in zip(runs, tests, strict=True))
        raise UserError(f"runs of different metrics ({metrics}) do not fit in one figure; draw them separately")
    return tests


def rows(run: Run, key: str) -> list[dict[str, float]]:
    """The rows of metrics.jsonl that hold `key`."""
    return [row for row in run.metrics if key in row]


def labels(runs: Sequence[Run]) -> list[str]:
    """What names each run in a legend: its algorithm, and the end of its folder's path that tells it from the others in
    brackets, shortened in the middle when long, as far as it still tells."""
    ends = names([run.path for run in runs])
    short = [end if len(end) <= NAME else f"{end[: NAME // 2]}…{end[1 - NAME // 2 :]}" for end in ends]
    methods = [str(run.known["algorithm"]) for run in runs]
    told = list(zip(methods, short, strict=True))
    shown = [end if told.count(one) > 1 else one[1] for one, end in zip(told, ends, strict=True)]
    return [method if name == method else f"{method} ({name})" for method, name in zip(methods, shown, strict=True)]


def heading(runs: Sequence[Run]) -> str:
    """What a figure shows: the samplers of the runs, each once, and the algorithm when there is one run."""
    samplers = distinct([run.known["sampler"] for run in runs])
    return samplers if len(runs) > 1 else f"{runs[0].known['algorithm']} on {samplers}"


def distinct(values: Sequence[Any]) -> str:
    """The values in their order, each once, separated by commas."""
    return ", ".join(dict.fromkeys(str(value) for value in values))


def count(tasks: Sequence[int]) -> str:
    """How many test tasks, in words; the runs may have unlike numbers of them."""
    return " or ".join(f"{n:,}" for n in sorted(set(tasks))) + f" test task{'s' * (max(tasks) > 1)}"


def band(text: str) -> tuple[Patch, str]:
    """The legend's entry for the bands of all curves."""
    return Patch(color="0.5", alpha=0.3, linewidth=0), text


def percent(test: Test) -> bool:
    """Whether the metric is drawn in percent."""
    return bool(test["metric"] == "accuracy")


def unit(test: Test) -> str:
    """The metric as an axis names it."""
    return "accuracy (%)" if percent(test) else str(test["metric"])


def column(values: Sequence[float | None], scale: float = 1.0) -> Numbers:
    """The values times `scale`; JSON has no NaN, so what was not finite comes as None."""
    return np.array([math.nan if value is None else value for value in values], dtype=float) * scale


def number(test: Test, k: int) -> str:
    """The mean at position k ± half its 95 % interval, to a tenth of a percent or to two digits of the interval."""
    mean, ci = column([test["mean"][k], test["ci95"][k]], 100.0 if percent(test) else 1.0)
    if percent(test):
        return f"{mean:.1f}" + (f" ± {ci:.1f}" if math.isfinite(ci) else "")
    if not (math.isfinite(ci) and ci > 0):
        return f"{mean:.3g}"
    places = max(0, 1 - math.floor(math.log10(ci)))
    return f"{mean:.{places}f} ± {ci:.{places}f}" if places <= 5 else f"{mean:.2e} ± {ci:.0e}"


def marked(run: Run, test: Test) -> list[int]:
    """The positions in the curve whose numbers are written out: the result and the last."""
    found, last = result_step(run.result), len(test["steps"]) - 1
    return sorted({last if found is None else found, last})


def numbers(run: Run, test: Test) -> str:
    """The numbers at the marked positions in words, for a legend: several runs leave no room for them in the plot."""
    texts = []
    for k in marked(run, test):
        median = "" if percent(test) else f" (median {column([test['median'][k]])[0]:.3g})"
        texts.append(f"{number(test, k)}{median} at {test['steps'][k]}".replace(" ", "\N{NO-BREAK SPACE}"))
    return "; ".join(texts)


def moving_mean(values: Numbers, width: int) -> Numbers:
    """The mean of the finite values in a centred window of odd width, narrower at both ends."""
    finite = np.isfinite(values)
    count = np.convolve(finite, np.ones(width))
    total = np.convolve(np.where(finite, values, 0.0), np.ones(width))
    mean = np.divide(total, count, out=np.full_like(total, math.nan), where=count > 0)
    return mean[width // 2 : width // 2 + len(values)]


def log_if_wide(axes: Axes, room: float = 0.05) -> None:
    """Log where the lines are positive and range over more than a factor of 10, with `room` (a fraction) at both ends.

    Only lines count: an interval that comes near 0 must not stretch the axis over many decades.
    """
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and (ratio := values.max() / values.min()) > 10:
        axes.set_yscale("log")
        axes.set_ylim(values.min() / ratio**room, values.max() * ratio**room)
        if ratio < 300:  # with so few powers of ten, numbers between them, and all in full
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())


def look(index: int) -> Keywords:
    """Colour, dashes and marker of the run at a place in the figure."""
    return dict(list(matplotlib.rcParams["axes.prop_cycle"])[index])


def finish(figure: Figure, title: str, runs: Legend, shared: Legend, panels_height: float) -> Figure:
    """Puts the title above and the legend below, and makes the figure so high that `panels_height` inches stay between.

    The legend names every entry of `runs`, also where two have one name, then each name of `shared` once. With several runs,
    what is drawn of one remembers its name (its text up to a colon or line's end), for the numbers beside the figure.
    """
    characters = int(CHARACTERS * figure.get_figwidth() / WIDTH)
    head = _wrap(title, characters)
    figure.suptitle(head)
    lines = head.count("\n") + 1
    entries = runs + [(handle, text) for text, handle in {text: handle for handle, text in shared}.items()]
    if entries:
        texts = [_wrap(text, characters - 4) for _, text in entries]
        columns = 2 if len(texts) > 2 and max(map(len, texts)) <= characters // 2 - 2 else 1
        handles = [handle for handle, _ in entries]
        figure.legend(handles, texts, loc="outside lower center", ncols=columns)
        lines += math.ceil(sum(text.count("\n") + 1 for text in texts) / columns) + 1
    for handle, text in runs if len(runs) > 1 else []:
        for artist in handle if isinstance(handle, tuple) else [handle]:
            if isinstance(artist, Artist):  # of error bars also tuples of caps
                artist.set_gid(re.split("[:\n]", text)[0])
    figure.set_figheight(panels_height + lines * LINE + 0.1)
    return figure


def _wrap(text: str, characters: int) -> str:
    """The text in lines; dollars are escaped because matplotlib would read them as formulas."""
    return "\n".join(textwrap.fill(line, characters) for line in text.splitlines()).replace("$", r"\$")
