"""Speed against the number of processes, measured and by a cost model: `experiments/scaling.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from toolkit.plots import frame

PANEL = 1.9  # inch


@frame.styled()
def scaling(rows: Sequence[dict[str, Any]], here: Mapping[str, Any], there: Mapping[str, Any]) -> Figure:
    """Left, times as fast as one process on this machine: points are measured (`rows` have `workload`, `processes`,
    `measured`), lines predicted by the costs `here`. Right, on the cluster `there`, up to one process a task. Costs have
    `tasks` and `speedup(processes)`."""
    figure = Figure(figsize=(2 * frame.WIDTH, 1))
    left, right = figure.subplots(1, 2)
    named: frame.Legend = []
    most = max(row["processes"] for row in rows)
    for index, (name, costs) in enumerate(here.items()):
        look = frame.look(index)
        # Hollow and of unlike sizes: points of two workloads often lie on one another.
        line_only = look | {"marker": "none"}
        points_only = look | {"linestyle": "none", "mfc": "none", "markersize": 4 + 3 * index}
        own = [row for row in rows if row["workload"] == name]
        numbers = range(1, most + 1)
        (line,) = left.plot(numbers, [costs.speedup(n) for n in numbers], **line_only, label=f"{name}, by the model")
        at, heights = ([row[key] for row in own] for key in ("processes", "measured"))
        (points,) = left.plot(at, heights, **points_only, label=f"{name}, measured")
        far = sorted({round(2 ** (i / 4)) for i in range(4 * there[name].tasks.bit_length() - 3)})
        right.plot(far, [there[name].speedup(n) for n in far], **line_only, label=name)
        named += [(points, f"{name}, measured"), (line, f"{name}, by the model")]
    widest = max(costs.tasks for costs in there.values())
    for axes, end, title in ((left, most, "this machine"), (right, widest, "a cluster (assumed)")):
        (ideal,) = axes.plot([1, end], [1, end], color="0.5", linewidth=0.9, linestyle=":", marker="none", label="ideal")
        axes.set(xlabel="processes", ylabel="times one process", title=title)
    right.set_xscale("log", base=2)
    right.set_yscale("log", base=2)
    left.set_xticks(range(1, most + 1))
    return frame.finish(figure, "Tasks shared over processes", [*named, (ideal, "ideal")], [], PANEL)
