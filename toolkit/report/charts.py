"""The curves of the page as plain data for `page.js`: numbers, and the words that stand beside a point."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from toolkit.report import words
from toolkit.report.view import Column, View, column, mapping, number, sequence

COLOURS, DASHES, MARKERS = 7, 6, 8  # in page.css and page.html; together they tell 168 runs apart
THIN = 150  # points of a training curve

Chart = dict[str, Any]


def look(index: int) -> dict[str, int]:
    """Colour, dashes and marker of a run on the page, by their numbers."""
    return {"colour": index % COLOURS, "dash": index % DASHES, "marker": index % MARKERS}


def charts(views: Sequence[View]) -> list[Chart]:
    """For each kind a chart of each metric that has one."""
    metrics = list(dict.fromkeys(view.metric for view in views))
    made = [_chart(kind, metric, views) for kind in KINDS for metric in metrics]
    return [chart for chart in made if chart["series"]]


def _chart(kind: str, metric: str, views: Sequence[View]) -> Chart:
    title, x, series_of = KINDS[kind]
    chosen = [(i, view) for i, view in enumerate(views) if view.metric == metric]
    series = [{"run": i} | made for i, view in chosen if (made := series_of(view))]
    percent = metric == "accuracy"
    chances = {chance for _, view in chosen if (chance := number(view.summary.get("chance")))}
    chances = chances if percent and kind != "calibration" else set()
    return {
        "id": f"{kind}-{list(dict.fromkeys(view.metric for view in views)).index(metric)}",
        "kind": kind,
        "title": title.format(metric=metric),
        "x": x,
        "y": f"{metric} (%)" if percent else metric,
        "percent": percent,
        "log": not percent and _wide(series),
        "chance": [[_scaled(c, True), f"chance, {100 * c:.3g} %"] for c in sorted(chances)],
        "series": series,
    }


def _adaptation(view: View) -> Chart:
    points = []
    for k, step in enumerate(view.steps):
        beside = [f"after {words.steps(step)}"]
        if view.median[k] is not None:
            beside.append(f"median {words.value(view.median[k], view.percent)}")
        if (finite := view.finite[k]) is not None and finite < 1:
            beside.append(f"{100 * finite:.1f} % of tasks are finite")
        points.append(_point(step, view.mean[k], view.ci95[k], view.percent, beside))
    return {"points": points, "mark": view.trained, "thin": []}


def _training(view: View) -> Chart | None:
    rows = [row for row in view.rows if number(row.get("iteration")) is not None]
    checked = [row for row in rows if number(row.get("val_metric")) is not None]
    selected = mapping(view.summary.get("selected")).get("iteration")
    points = []
    for row in checked:
        beside = [f"validation at iteration {row['iteration']:,}"]
        beside += ["selected checkpoint"] if row["iteration"] == selected else []
        mean, ci = number(row["val_metric"]), number(row.get("val_ci95"))
        points.append(_point(row["iteration"], mean, ci, view.percent, beside))
    mark = next((k for k, row in enumerate(checked) if row["iteration"] == selected), None)
    thin = _smooth([(row["iteration"], row["metric"]) for row in rows if number(row.get("metric")) is not None], view.percent)
    return {"points": points, "mark": mark, "thin": thin} if points or thin else None


def _calibration(view: View) -> Chart | None:
    """The bins of the card's reliability after the steps of training, which holds for each: its share of the queries, and the
    means over all queries of the confidence and of the right answers that fall into it."""
    tables = sequence(mapping(view.summary.get("card")).get("reliability"))
    bins = sequence(tables[view.trained]) if view.trained is not None and len(tables) == len(view.steps) else []
    if not view.percent or len(bins) != 3:
        return None
    points = []
    for share, confidence, right in zip(*(column(row, len(sequence(row))) for row in bins), strict=False):
        if share and confidence is not None and right is not None:
            beside = [
                f"right at a confidence of {words.value(confidence / share, True)}",
                f"{100 * share:.1f} % of the queries",
            ]
            points.append(_point(_scaled(confidence / share, True) or 0.0, right / share, None, True, beside))
    return {"points": points, "mark": None, "thin": []} if points else None


KINDS: dict[str, tuple[str, str, Callable[[View], Chart | None]]] = {
    "adaptation": ("Test {metric} against inner steps", "inner steps", _adaptation),
    "calibration": ("Calibration: accuracy against confidence", "confidence (%)", _calibration),
    "training": ("Validation {metric} against iterations", "iterations", _training),
}


def _point(x: float, mean: float | None, ci: float | None, percent: bool, beside: list[str]) -> dict[str, Any]:
    low, high = (None if mean is None or ci is None else _scaled(mean + sign * ci, percent) for sign in (-1, 1))
    said = " ".join(words.interval(mean, ci, percent)).strip()
    return {"x": x, "y": _scaled(mean, percent), "low": low, "high": high, "said": said, "beside": beside}


def _scaled(value: float | None, percent: bool) -> float | None:
    return None if value is None else float(f"{100 * value if percent else value:.6g}")


def _smooth(rows: list[tuple[float, float]], percent: bool) -> list[list[float | None]]:
    """A centred moving mean over a twentieth of the rows, at `THIN` places at most."""
    half, every = max(1, len(rows) // 20) // 2, max(1, math.ceil(len(rows) / THIN))
    thin: list[list[float | None]] = []
    for i in sorted({*range(0, len(rows), every), len(rows) - 1} - {-1}):
        near = [y for _, y in rows[max(0, i - half) : i + half + 1]]
        thin.append([rows[i][0], _scaled(sum(near) / len(near), percent)])
    return thin


def _wide(series: Sequence[Chart]) -> bool:
    """Whether a log axis is in place: all means positive, and over more than a factor of 10."""
    values: Column = [point["y"] for one in series for point in one["points"]]
    values += [y for one in series for _, y in one["thin"]]
    finite = [value for value in values if value is not None]
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) > 10
