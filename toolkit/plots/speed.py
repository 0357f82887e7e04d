"""Bars of measured rates, side by side, from the rows of `experiments/speed.py`."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from toolkit.plots.frame import WIDTH, styled

OURS, DARK, PALE = ("toolkit", "experiments/", "sinusoid"), "0.25", "0.7"
BESIDE = 4  # points between a bar and its words


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@styled()
def bars(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """One group of bars per workload, one bar per subject, on a logarithmic scale, with whiskers from `low` to `high`; each bar
    names its subject and says how many times as good as the base it is. Ours are dark.

    A row has `workload`, `subject`, `value`, `unit`, `low`, `high` and `ratio`.
    """
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    figure = Figure(figsize=(2.5 * WIDTH, 0.17 * (len(rows) + len(workloads)) + 1.1), layout="constrained")
    axes, place, ticks, words = figure.subplots(), 0, list[float](), []
    for workload in workloads:
        group = [row for row in rows if row["workload"] == workload]
        ticks.append(place + (len(group) - 1) / 2)
        for row in group:
            axes.barh(
                place, row["value"], 0.85, color=DARK if row["subject"].startswith(OURS) else PALE,
                xerr=[[row["value"] - row["low"]], [row["high"] - row["value"]]],
                error_kw={"ecolor": "black", "elinewidth": 0.6, "capsize": 1.5}, label=f"{workload}: {row['subject']}",
            )  # fmt: skip
            ratio = "" if row["ratio"] is None else f" ({row['ratio']:.3g}×)"
            text = f"{row['subject'].removeprefix('toolkit: ')}  {number(row['value'])}{ratio}"
            look: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": "small"}
            words.append(axes.annotate(text, (row["high"], place), (BESIDE, 0), **look))
            place += 1
        place += 1
    left, high = min(row["low"] for row in rows) / 3, max(row["high"] for row in rows)
    axes.set_xscale("log")
    axes.set_xlim(left, high * 1e3)
    decades = range(math.ceil(math.log10(left)), math.floor(math.log10(high)) + 1)
    axes.set_xticks([10.0**k for k in decades[:: -(-len(decades) // 3)]])
    axes.minorticks_off()
    axes.set_yticks(ticks, workloads)
    axes.set_ylim(place - 1.3, -0.7)
    axes.set_xlabel(rows[0]["unit"])
    axes.set_title(title)
    figure.legend([Patch(color=DARK), Patch(color=PALE)], ["toolkit", "others"], loc="outside lower center", ncols=2)
    figure.draw_without_rendering()  # decides the layout, without which nobody knows how wide the words are
    for word in words:
        word.set_in_layout(False)
    wide, beside = axes.bbox.width, 2 * BESIDE * figure.dpi / 72
    room = [wide / max(wide - word.get_window_extent().width - beside, 0.2 * wide) for word in words]
    axes.set_xlim(left, left * math.exp(max(r * math.log(row["high"] / left) for r, row in zip(room, rows, strict=True))))
    return figure
