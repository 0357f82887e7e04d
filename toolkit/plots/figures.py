"""Drawings of finished runs. Every function takes runs, reads only their folders, and returns a matplotlib Figure."""

import math
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from toolkit.errors import UserError
from toolkit.runs.folder import Run

STYLE = Path(__file__).with_name("toolkit.mplstyle")
WIDTH = 3.4  # inch, one column
LINE = 0.16  # inch, one line of text
CHARACTERS = 48  # that fit on a line of text
RIGHT, WRONG = ("✓", "#0072B2"), ("✗", "#C24E00")
MAX_CLASSES, MAX_SHOTS, MAX_QUERIES = 10, 5, 3


def styled() -> AbstractContextManager[None]:
    """The toolkit's style over matplotlib's defaults, whatever the user has set; as a decorator or in a `with`."""
    return style.context(STYLE, after_reset=True)


@styled()
def adaptation(runs: Sequence[Run]) -> Figure:
    """The test metric against inner steps: mean over tasks, its 95 % interval, chance, the steps used in training ringed.

    Accuracy is in percent. Any other metric gets its median too (dotted, open markers), and a log axis when mean and median
    range over more than a factor of 10. The numbers at the training step and at the last step stand in the plot for one run,
    in the legend for several. Raises UserError for no run, too many, one without test result, or differing metrics.
    """
    tests = _tests(runs)
    figure = _figure(runs, "test tasks")
    axes = figure.subplots()
    percent = tests[0]["metric"] == "accuracy"
    handles: dict[str, Artist] = {}
    for index, (run, test) in enumerate(zip(runs, tests, strict=True)):
        ring = _adaptation_of(axes, run, test, percent, index)
        name = "mean, 95 % interval" if len(runs) == 1 else f"{label(run)}: {_numbers(run, test)}"
        handles[name if name not in handles else f"{name} [{index + 1}]"] = axes.get_lines()[-1 - (ring is not None) - (not percent)]
        if ring:
            handles_ring = ring
