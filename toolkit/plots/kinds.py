"""The figures of several runs, by name."""

from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.figure import Figure

from toolkit.plots.figures import adaptation
from toolkit.plots.pairs import pairs
from toolkit.plots.reliability import reliability
from toolkit.plots.seeds import training_seeds
from toolkit.plots.sweep import sweep
from toolkit.runs.folder import Run

KINDS: dict[str, Callable[[Sequence[Run]], Figure]] = {
    "adaptation": adaptation,
    "training": training_seeds,
    "pairs": pairs,
    "reliability": reliability,
    "shots": partial(sweep, over="shots"),
    "ways": partial(sweep, over="ways"),
}
