"""The part of the page on a single run: what it is, one of its tasks, the command that repeats it."""

import base64
from pathlib import Path

from toolkit.report import words
from toolkit.report.markup import Html, join, tag
from toolkit.report.tables import swatch
from toolkit.report.view import View, column, mapping, number, sequence

PICTURES = {
    "task.png": "One test task of {}: support images, then queries with the classes predicted for them.",
    "fits.png": "One test task of {}: the true curve, the support points, the predictions after some numbers of steps.",
}


def card(index: int, view: View) -> Html:
    """All that the page says of this run alone."""
    heading = tag("h3", swatch(index), view.name, id=f"run-{index}-heading")
    known = [(term, said) for term, said in _facts(view).items() if said is not None]
    facts = tag("dl", *(tag("div", tag("dt", term), tag("dd", said)) for term, said in known))
    beside = tag("div", facts, _command(view), class_="facts")
    body = tag("div", _picture(view), beside, class_="body")
    return tag("article", heading, body, id=f"run-{index}", aria_labelledby=f"run-{index}-heading")


def _facts(view: View) -> dict[str, object]:
    selected = mapping(view.summary.get("selected"))
    iteration = number(selected.get("iteration"))
    validated = words.interval(number(selected.get("val_metric")), number(selected.get("val_ci95")), view.percent)
    measured = mapping(view.summary.get("card"))
    brier = view.card("brier")
    versions = mapping(view.summary.get("versions"))
    seconds = number(measured.get("seconds_per_task"))
    worst = ", ".join(str(task) for task in sequence(measured.get("worst_tasks"))[:10])
    return {
        "Method": view.method,
        "Tasks": ", ".join(filter(None, view.tasks)),
        "Experiment": view.summary.get("experiment"),
        "Iterations": words.count(number(view.flag("iterations"))),
        "Checkpoint": None if iteration is None else f"iteration {iteration:,}, validation {' '.join(validated).strip()}",
        "Selection": view.summary.get("selection"),
        "Brier score": None if brier is None else f"{brier:.3f}",
        "By class": _by_class(view),
        "Worst tasks": f"number {worst}" if worst else None,
        "Time per task": None if seconds is None else f"{1000 * seconds:.3g} ms",
        "Parameters": words.count(view.cost("parameters")),
        "Git commit": tag("code", view.summary["git"]) if view.summary.get("git") else "unknown",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown",
    }


def _by_class(view: View) -> str | None:
    """The accuracy of each class after the steps of training, where they are few enough to be read."""
    rows = sequence(mapping(view.summary.get("card")).get("by_class"))
    if view.trained is None or len(rows) != len(view.steps):
        return None
    row = sequence(rows[view.trained])
    shown = [f"{100 * value:.1f}" for value in column(row, len(row)) if value is not None]
    return f"{', '.join(shown)}{words.SPACE}%" if 0 < len(shown) <= 20 else None


def _picture(view: View) -> Html:
    """The drawing of a task in the folder, as part of the page."""
    for name, alt in PICTURES.items():
        if (data := _png(view.path / name)) is not None:
            width, height = (int.from_bytes(data[at : at + 4]) for at in (16, 20))
            source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            return tag("figure", tag("img", src=source, alt=alt.format(view.name), width=width, height=height))
    return tag("p", "This run has no picture of a task; toolkit plot draws one where its tasks can be drawn.", class_="note")


def _png(path: Path) -> bytes | None:
    """The bytes of a PNG that is whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data if data.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in data[-12:] else None


def _command(view: View) -> Html:
    command = view.summary.get("command")
    if not isinstance(command, str):
        return tag("p", "The run is of an older version, which did not keep its command.", class_="note")
    return join(tag("h4", "Command"), tag("pre", tag("code", command), class_="command", tabindex=0))
