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
    """One group of bars per workload, one bar per subject, on a logarithmic scale; each bar names its subject and says how many
    times as good as the base it is. Ours are dark.

    A row has `workload`, `subject`, `value`, `unit`, `low`, `high` and `ratio`.
    """
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    figure = Figure(figsize=(2 * WIDTH, 0.17 * (len(rows) + len(workloads)) + 0.9), layout="constrained")
    axes, place, ticks = figure.subplots(), 0, list[float]()
    for workload in workloads:
        group = [row for row in rows if row["workload"] == workload]
        ticks.append(place + (len(group) - 1) / 2)
        for row in group:
            spread = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
            axes.barh(place, row["value"], 0.85, color="0.25" if row["subject"].startswith("toolkit") else "0.7")
            axes.errorbar(row["value"], place, xerr=spread, fmt="none", ecolor="black", elinewidth=0.6, capsize=1.5)
            ratio = "" if row["ratio"] is None else f" ({row['ratio']:.3g}×)"
            text = f"{row['subject']}  {number(row['value'])}{ratio}"
            axes.annotate(text, (row["high"], place), (4, 0), textcoords="offset points", va="center", fontsize="small")
            place += 1
        place += 1
    axes.set_xscale("log")
    axes.set_yticks(ticks, workloads)
    axes.set_ylim(place - 1.3, -0.7)
    axes.set_xlabel(rows[0]["unit"])
    left, high = min(row["low"] for row in rows) / 3, max(row["high"] for row in rows)
    axes.set_xlim(left, high * (high / left) ** 1.2)  # more than half of the width for the words
    axes.set_title(title)
    return figure
