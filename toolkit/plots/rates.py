"""Learned inner rates while a run trains."""

from collections import defaultdict

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from toolkit.errors import UserError
from toolkit.plots import frame
from toolkit.runs.folder import Run


@frame.styled()
def learned_rates(run: Run) -> Figure:
    """Each learned inner rate against iteration, the mean where every weight has its own.

    Rates of several inner steps are coloured by step, thin ones for the tensors and a bold one for their mean; otherwise each
    tensor has its colour. Raises UserError for a run that learned no rates.
    """
    found = [row for row in run.metrics if any(key.startswith("rate/") for key in row)]
    if not found:
        raise UserError(f"{run.path} has no learned inner rates; they are learned by methods such as meta_sgd")
    keys = [key for key in found[0] if key.startswith("rate/")]
    groups: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        name = key.removeprefix("rate/")
        groups[name.split("/")[0] if name.startswith("step") else name.split("lr/")[-1]].append(key)
    at = [row["iteration"] for row in found]
    figure = Figure()
    axes = figure.subplots()
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(groups)))
    legend: frame.Legend = []
    for colour, (group, own) in zip(colours, groups.items(), strict=True):
        values = np.stack([frame.column([row.get(key) for row in found]) for key in own])
        many = len(own) > 1
        if many:
            axes.plot(at, values.T, color=colour, linewidth=0.5, alpha=0.5, marker="")
        (line,) = axes.plot(at, values.mean(0), color=colour, linewidth=1.8 if many else 1.2, marker="")
        label = f"{group.replace('step', 'step ')}, mean of {len(own)} tensors" if many else group
        legend.append((line, label))
    axes.set(xlabel="iteration", ylabel="learned inner rate")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    title = f"{frame.heading([run])}\nlearned inner rates"
    return frame.finish(figure, title, legend, [], 1.95)
