"""Learned inner rates while a run trains."""

import re
from collections import defaultdict
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from toolkit.errors import UserError
from toolkit.plots import frame
from toolkit.runs.folder import Run

DASHES = ("-", "--", "-.", ":")  # that a print in grey tells from one another
GROUPS = 7  # at most, of tensors that have no step: a legend of every tensor would be higher than the plot


@frame.styled()
def learned_rates(run: Run) -> Figure:
    """Each learned inner rate against iteration, the mean where every weight has its own.

    Rates of several inner steps are coloured by step, others by tensor, or by the part of the model where there are too many
    tensors; where a colour has several rates, they are thin and their mean is bold. Raises UserError for a run that learned no
    rates.
    """
    found = [row for row in run.metrics if any(key.startswith("rate/") for key in row)]
    if not found:
        raise UserError(f"{run.path} has no learned inner rates; they are learned by methods such as meta_sgd")
    keys = list(dict.fromkeys(key for row in found for key in row if key.startswith("rate/")))
    at = [row["iteration"] for row in found]
    figure = Figure()
    axes = figure.subplots()
    groups = _groups(keys)
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(groups)))
    legend: frame.Legend = []
    for place, (colour, (group, own)) in enumerate(zip(colours, groups.items(), strict=True)):
        values = np.stack([frame.column([row.get(key) for row in found]) for key in own])
        look: frame.Keywords = {"color": colour, "linestyle": DASHES[place % len(DASHES)], "marker": "" if len(at) > 1 else "o"}
        if len(own) > 1:
            axes.plot(at, values.T, **look, linewidth=0.5, alpha=0.5, label=[key.removeprefix("rate/") for key in own])
        (line,) = axes.plot(at, values.mean(0), **look, linewidth=1.8 if len(own) > 1 else 1.2, label=group)
        legend.append((line, f"{group}, mean of {len(own)} tensors" if len(own) > 1 else group))
    axes.set(xlabel="iteration", ylabel="learned inner rate")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    title = f"{frame.heading([run])}\nlearned inner rates"
    return frame.finish(figure, title, legend, [], 1.95)


def _groups(keys: Sequence[str]) -> dict[str, list[str]]:
    """The keys of each legend entry: of a step, of a tensor, or of the tensors whose names begin alike."""
    steps: dict[str, list[str]] = defaultdict(list)
    tensors: dict[str, str] = {}
    for key in keys:
        if step := re.search(r"/step(\d+)/", key):
            steps[f"step {step[1]}"].append(key)
        else:
            tensors[key] = key.split("lr/", 1)[1]
    while len(set(tensors.values())) > GROUPS and any("." in name for name in tensors.values()):
        longest = max(name.count(".") for name in tensors.values())
        tensors = {k: name.rpartition(".")[0] if name.count(".") == longest else name for k, name in tensors.items()}
    parts: dict[str, list[str]] = defaultdict(list)
    for key, name in tensors.items():
        parts[name].append(key)
    return steps | parts
