"""The tables of the page: the runs, the points of a chart, the differences between configurations."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from toolkit.report import words
from toolkit.report.charts import Chart, look
from toolkit.report.markup import Html, join, tag
from toolkit.report.view import View, number
from toolkit.runs.folder import LATER, NOT_HASHED

MOST = 60  # rows of a table of points
NUMBER = {True: "number", False: None}
Cell = tuple[object, object]  # what is shown, and what it is sorted by: None where it is missing


def swatch(index: int) -> Html:
    """The line and the marker of a run, as in the charts."""
    style = look(index)
    line = tag("path", d="M1 7H31", class_=f"line d{style['dash']}")
    marker = tag("use", href=f"#m{style['marker']}", x=16, y=7, class_="marker")
    size = {"width": 32, "height": 14, "viewBox": "0 0 32 14"}
    return tag("svg", line, marker, class_=f"swatch c{style['colour']}", aria_hidden="true", **size)


def runs(views: Sequence[View]) -> Html:
    """One row for each run, with the value to sort by beside each cell."""
    several = len({view.metric for view in views}) > 1
    columns: list[tuple[str, bool, Callable[[View], Cell]]] = [
        ("Method", False, lambda view: (view.method, view.method)),
        ("Tasks", False, lambda view: (_two(*view.tasks), " ".join(view.tasks))),
        ("Seed", True, lambda view: _plain(view.summary.get("seed"))),
        *([("Metric", False, lambda view: (view.metric, view.metric))] if several else []),
        ("0 steps", True, lambda view: _result(view, view.steps.index(0) if 0 in view.steps else None)),
        ("As trained", True, lambda view: _result(view, view.trained, named=True)),
        ("Last step", True, lambda view: _result(view, len(view.steps) - 1, named=True)),
        ("Test tasks", True, lambda view: _count(view.summary["test"].get("tasks"))),
        ("NLL", True, lambda view: _number(view.card("nll"), ".3f")),
        ("ECE", True, lambda view: _metric(view.card("ece"), True)),
        ("Worst tenth", True, lambda view: _metric(_at(view.worst, view.trained), view.percent)),
        ("Batch norm", False, _batch_norm),
        ("Training (min)", True, lambda view: _minutes(view.cost("seconds"))),
        ("Peak memory (MiB)", True, lambda view: _count(view.cost("peak_mb"))),
        ("Adapted parameters", True, lambda view: _count(view.cost("adapted_parameters"))),
    ]
    heads = [tag("th", "Run", scope="col"), *(tag("th", head, scope="col", class_=NUMBER[n]) for head, n, _ in columns)]
    rows = []
    for i, view in enumerate(views):
        name = tag("th", _named(i, tag("a", view.name, href=f"#run-{i}")), scope="row", data_value=view.name)
        cells = []
        for _, numeric, cell in columns:
            shown, key = cell(view)
            cells.append(tag("td", shown, class_=NUMBER[numeric], data_value=key))
        rows.append(tag("tr", name, *cells, id=f"row-{i}"))
    caption = "Test results, mean over tasks ± half the 95 % interval"
    return framed("runs", caption, tag("thead", tag("tr", *heads)), tag("tbody", *rows), sortable=True)


def points(chart: Chart, views: Sequence[View]) -> Html:
    """The numbers of a chart: a row for each step or iteration, a column for each run."""
    series = [one for one in chart["series"] if one["points"]]
    places = sorted({point["x"] for one in series for point in one["points"]})
    every = -(-len(places) // MOST) or 1
    shown = places[::-every][::-1]
    said = [{point["x"]: point["said"] for point in one["points"]} for one in series]
    heads = [tag("th", chart["x"], scope="col", class_="number")]
    heads += [tag("th", views[one["run"]].name, scope="col", class_="number") for one in series]
    rows = []
    for x in shown:
        cells = [tag("td", one.get(x, words.NONE), class_="number") for one in said]
        rows.append(tag("tr", tag("th", f"{x:,}", scope="row", class_="number"), *cells))
    part = "" if every == 1 else f", one in {every}"
    table = framed(f"{chart['id']}-points", f"{chart['title']}{part}", tag("thead", tag("tr", *heads)), tag("tbody", *rows))
    return tag("details", tag("summary", "The numbers of this chart"), table)


def differences(views: Sequence[View]) -> Html:
    """The flags whose values differ between the runs, but for those that cannot change a number."""
    keys = [key for view in views for key in view.config if key not in NOT_HASHED]
    values = {key: [_flag(view, key) for view in views] for key in dict.fromkeys(keys)}
    values = {key: row for key, row in values.items() if len(set(row)) > 1}
    if not values:
        return tag("p", "The configurations do not differ in anything that can change a number.")
    names: list[object] = [_named(i, view.name) for i, view in enumerate(views)]
    if len(names) <= len(values):  # the longer side goes down the page
        return _grid("Flag", list(values), names, list(values.values()))
    return _grid("Run", names, list(values), list(zip(*values.values(), strict=True)))


def _grid(corner: str, rows: Sequence[object], columns: Sequence[object], cells: Sequence[Sequence[str]]) -> Html:
    heads = [tag("th", head, scope="col") for head in (corner, *columns)]
    body = []
    for row, line in zip(rows, cells, strict=True):
        body.append(tag("tr", tag("th", row, scope="row"), *(tag("td", value) for value in line)))
    return framed("flags", "Flags whose values differ", tag("thead", tag("tr", *heads)), tag("tbody", *body))


def same_tasks(views: Sequence[View]) -> str:
    """Whether the results can be compared task by task, in a sentence; nothing for one run."""
    hashes = {str(view.summary.get("task_list_hash")) for view in views}
    if len(views) < 2:
        return ""
    if "None" in hashes:
        return "Whether the runs were tested on the same tasks is not known."
    if len(hashes) == 1:
        return "All runs were tested on the same tasks."
    return f"The runs were tested on {len(hashes)} different lists of tasks; compare only those of the same list."


def framed(name: str, caption: str, *parts: Html, sortable: bool = False) -> Html:
    """A table in a frame that scrolls sideways where the page is narrow."""
    kind = "sortable" if sortable else None
    table = tag("table", tag("caption", caption, id=f"{name}-caption"), *parts, id=name, class_=kind)
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_labelledby=f"{name}-caption")


def _named(index: int, name: str) -> Html:
    return tag("span", swatch(index), tag("span", name), class_="run")


def _two(above: str, below: str) -> Html:
    return join(above, tag("small", below) if below else None)


def _at(column: Sequence[float | None], k: int | None) -> float | None:
    return None if k is None else column[k]


def _plain(value: Any) -> Cell:
    return (words.NONE, None) if value is None else (value, value)


def _number(value: float | None, form: str) -> Cell:
    return (words.NONE, None) if value is None else (format(value, form), value)


def _metric(value: float | None, percent: bool) -> Cell:
    return words.value(value, percent), None if value is None else 100 * value if percent else value


def _count(value: Any) -> Cell:
    return words.count(number(value)), number(value)


def _minutes(seconds: float | None) -> Cell:
    return (words.NONE, None) if seconds is None else (f"{seconds / 60:.{1 if seconds >= 60 else 2}f}", seconds)


def _result(view: View, k: int | None, named: bool = False) -> Cell:
    if k is None or view.mean[k] is None:
        return words.NONE, None
    mean, ci = words.interval(view.mean[k], view.ci95[k], view.percent)
    half = join(" ", tag("span", ci, class_="ci")) if ci else None
    below = tag("small", f"after {words.steps(view.steps[k])}") if named else None
    return join(mean, half, below), _metric(view.mean[k], view.percent)[1]


def _batch_norm(view: View) -> Cell:
    policy = view.summary.get("batch_norm")
    if policy is None:
        return words.NONE, None
    name = "none" if str(policy).startswith("no ") else str(policy)
    return _two(name, "transductive" if view.summary.get("transductive") else ""), name


def _flag(view: View, key: str) -> str:
    value = view.config[key] if key in view.config else LATER.get(key, words.NONE)
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
