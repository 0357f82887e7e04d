"""One HTML page on finished runs, from their folders alone: it holds all it needs and opens without a network."""

import base64
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

import toolkit
from toolkit.errors import UserError
from toolkit.files import replace
from toolkit.report import cards, tables
from toolkit.report.charts import Chart, charts, look
from toolkit.report.markup import Html, embedded, join, tag
from toolkit.report.view import View, read
from toolkit.runs.folder import Run, names

HERE = Path(__file__).parent
log = logging.getLogger("toolkit")
FEW = 6  # runs that a sentence names


def write(runs: Sequence[Run], out: Path) -> Path:
    """Writes the page on `runs` to `out`, whole or not at all, and returns `out`. The same folders give the same bytes.

    A run given twice is shown once. What a folder lacks is said at the top of the page, and logged; UserError when none can be
    shown, or `out` cannot be written.
    """
    distinct = list({run.path.resolve(): run for run in runs}.values())
    views: list[View] = []
    missing: dict[str, str] = {}
    for run, name in zip(distinct, names([run.path for run in distinct]), strict=True):
        view, lacks = read(run, name)
        views += [view] if view else []
        missing |= {name: lacks} if lacks else {}
    if not views:
        reasons = "; ".join(f"{name}: {words}" for name, words in missing.items()) or "give the folder of a finished run"
        raise UserError(f"there is no run to report on: {reasons}")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out} is no name for a page; give one that ends in .html")
    for name, lacks in missing.items():
        log.warning("%s: %s", name, lacks)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace(out, _page(views, missing).encode(errors="replace"))  # JSON can hold halves of characters
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); give another file") from None
    return out


def _page(views: Sequence[View], missing: Mapping[str, str]) -> str:
    drawn = charts(views)
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    title = f"{views[0].method} on {views[0].tasks[0]}" if len(views) == 1 else f"{len(views)} meta-learning runs"
    data = {"runs": [{"name": view.name} | look(i) for i, view in enumerate(views)], "charts": drawn}
    return Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=join(title),
        lead=join(_lead(views)),
        missing=_missing(missing),
        runs=tables.runs(views),
        same=join(tables.same_tasks(views)),
        charts=join(*(_chart(chart, views) for chart in drawn)),
        differences=_differences(views),
        cards=join(*(cards.card(i, view) for i, view in enumerate(views))),
        version=join(toolkit.__version__),
        data=embedded(data),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _hash(text: str) -> str:
    """What the page's own policy lets in: nothing else on it may run, whatever a run folder says."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _lead(views: Sequence[View]) -> str:
    methods, sources = ({view.method: None for view in views}, {view.tasks[0]: None for view in views})
    return f"{', '.join(methods)} on {', '.join(sources)}" if len(views) > 1 else " ".join(filter(None, views[0].tasks))


def _missing(missing: Mapping[str, str]) -> Html | str:
    """A sentence on each run that lacks something; runs that lack the same share theirs."""
    if not missing:
        return ""
    lacking: dict[str, list[str]] = {}
    for name, words in missing.items():
        lacking.setdefault(words, []).append(name)
    sentences = []
    for words, of in lacking.items():
        if len(of) <= FEW:
            sentences.append(tag("li", tag("strong", ", ".join(of)), f": {words}."))
        else:
            short = tag("summary", tag("strong", f"{len(of)} runs"), f": {words}.")
            sentences.append(tag("li", tag("details", short, ", ".join(of))))
    heading = tag("h2", "What is missing", id="missing-heading")
    return tag("aside", heading, tag("ul", *sentences), class_="missing", aria_labelledby="missing-heading")


def _chart(chart: Chart, views: Sequence[View]) -> Html:
    """The place where the script draws, and the numbers as a table for those who read without it."""
    place = tag("div", tag("p", "The chart needs JavaScript.", class_="noscript"), class_="chart", id=chart["id"])
    notes = {
        "adaptation": "Mean over test tasks with its 95 % interval; a ring marks the steps of training.",
        "calibration": "Queries by confidence in the predicted class, after the steps of training; the diagonal is ideal.",
        "training": "Validation points with 95 % intervals; a ring marks the selected checkpoint. Thin: training, smoothed.",
    }
    heading = tag("h2", chart["title"], id=f"{chart['id']}-heading")
    note = tag("p", notes[chart["kind"]] + (" The axis is logarithmic." if chart["log"] else ""), class_="note")
    steps = chart["kind"] != "calibration" and any(one["points"] for one in chart["series"])
    table = tables.points(chart, views) if steps else None  # no two curves of calibration share a place
    return tag("section", heading, note, place, table, aria_labelledby=f"{chart['id']}-heading")


def _differences(views: Sequence[View]) -> Html | str:
    if len(views) < 2:
        return ""
    heading = tag("h2", "Differences between the configurations", id="flags-heading")
    return tag("section", heading, tables.differences(views), aria_labelledby="flags-heading")
