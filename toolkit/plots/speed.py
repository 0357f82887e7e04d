"""Bars of measured rates, side by side, from the rows of `experiments/speed.py`."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from toolkit.plots.frame import WIDTH, styled


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@styled()
def bars(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """One group of bars per workload, one bar per subject, on a logarithmic scale; each bar says how many times the base it is.

    A row has `workload`, `subject`, `value`, `unit`, `low`, `high` and `ratio`.
    """
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    height = 0.16 * len(rows) + 0.14 * len(workloads) + 0.9
    figure = Figure(figsize=(2 * WIDTH, height), layout="constrained")
    axes = figure.subplots()
    shades = [str(0.15 + 0.65 * i / max(1, len(subjects) - 1)) for i in range(len(subjects))]
    step = len(subjects) + 1
    for row in rows:
        kind = subjects.index(row["subject"])
        place = step * workloads.index(row["workload"]) + kind
        spread = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
        first = row["workload"] == workloads[0]
        axes.barh(place, row["value"], 0.85, color=shades[kind], label=row["subject"] if first else None)
        axes.errorbar(row["value"], place, xerr=spread, fmt="none", ecolor="black", elinewidth=0.6, capsize=1.5)
        axes.annotate(
            f"{number(row['value'])}  ({row['ratio']:.3g}×)",
            (row["high"], place),
            (4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_xscale("log")
    axes.set_yticks([step * i + (len(subjects) - 1) / 2 for i in range(len(workloads))], workloads)
    axes.invert_yaxis()
    axes.set_xlabel(rows[0]["unit"])
    axes.set_xlim(right=8 * max(row["high"] for row in rows))
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=min(2, len(subjects)))
    return figure
