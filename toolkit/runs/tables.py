"""Tables of results in Markdown and LaTeX, made from run folders, so that no number in them is typed by hand.

A table file is JSON, {"rows": [...]}; a row says `tasks` (words), `folder` (of its run, beside the table in ../reference unless
"runs" names another place), `seeds` (how many runs FOLDER-seed0, FOLDER-seed1, ... it has; null: the folder itself is the run),
`command` and `published` (words, or null). Rows whose runs are not there yet are left out.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.errors import UserError, unknown
from toolkit.files import replace
from toolkit.metrics import direction
from toolkit.runs.comparison import Entry, difference, entries, grouped
from toolkit.runs.folder import Run, size_words

COLUMNS = (
    "tasks", "method", "before", "as trained", "at the end", "seeds", "test tasks", "batch norm", "training", "published",
    "command",
)  # fmt: skip
MARK = re.compile(r"(<!-- table: (?P<files>[^|>]+?)(?: \| (?P<columns>[^>]+?))? -->\n)(?:.*?\n)??(<!-- end -->)", re.DOTALL)
TEX = {sign: rf"\{sign}" for sign in "&%$#_{}"} | {
    "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of a table: a method on some tasks, its runs by seed."""

    tasks: str
    entry: Entry
    command: str
    published: str | None


def read(path: Path) -> list[Row]:
    """The rows of a table file whose runs are there. Raises UserError for a file that is none."""
    try:
        data = json.loads(path.read_text())
        rows, place = data["rows"], path.parent / data.get("runs", "../reference")
        wanted = [
            (row["tasks"], _folders(place, row["folder"], row["seeds"]), row["command"], row["published"]) for row in rows
        ]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no table {path}; give a table file (JSON with rows) or run folders") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no table of results ({error!r}); its rows need tasks, folder, seeds, command, published"
        ) from None
    found = []
    for tasks, folders, command, published in wanted:
        there = [Run(folder) for folder in folders if (folder / "summary.json").exists()]
        if there:
            (entry,) = entries({str(there[0].summary["algorithm"]): there})
            found.append(Row(tasks, entry, command, published))
    return found


def of_runs(runs: Sequence[Run]) -> list[Row]:
    """A row for each method among finished runs."""
    found = []
    for name, group in grouped(runs).items():
        (entry,) = entries({name: group})
        config, summary = group[0].config, group[0].summary
        size = f", {' '.join(words)}" if (words := size_words(config, summary)) else ""
        found.append(Row(str(summary["sampler"]) + size, entry, str(summary.get("command", "")), None))
    return found


def _folders(place: Path, folder: str, seeds: int | None) -> list[Path]:
    return [place / folder] if seeds is None else [place / f"{folder}-seed{seed}" for seed in range(seeds)]


def cells(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The rows as words by column. "**" stands around the best result "as trained" of its tasks, where its paired difference to
    every other row of these tasks excludes 0 (`intervals.paired`); so nowhere when test tasks differ, not around a result
    without those of some tasks, and not for a metric of which nobody knows what is better (`metrics.direction`)."""
    best = [_best([row for row in rows if row.tasks == one.tasks]) is one for one in rows]
    return [_cells(row, bold) for row, bold in zip(rows, best, strict=True)]


def _best(rows: Sequence[Row]) -> Row | None:
    sign = direction(rows[0].entry.curve.metric_name)
    if not sign or any(_cut(row.entry) for row in rows):
        return None
    best = max(rows, key=lambda row: sign * row.entry.mean()[0])
    for other in rows:
        if other is best:
            continue
        try:
            entries({"best": best.entry.runs, "other": other.entry.runs})
            gap = difference(best.entry, other.entry)
        except UserError:
            return None
        if not (gap.clear and sign * gap.mean > 0) or gap.lost_a:
            return None
    return best if len(rows) > 1 else None


def _cut(entry: Entry) -> bool:
    """Whether the test stopped before the steps of training."""
    return entry.curve.steps < entry.inner_steps


def _cells(row: Row, bold: bool) -> dict[str, str]:
    entry, summary = row.entry, row.entry.runs[0].summary
    result = _result(entry, entry.trained_steps)
    cut = f" (after {entry.curve.steps} of {entry.inner_steps} steps)" if _cut(entry) else ""
    minutes = entry.cost("seconds") / 60
    return {
        "tasks": row.tasks,
        "method": entry.method,
        "before": _result(entry, 0),
        "as trained": f"**{result}**" if bold else result + cut,
        "at the end": _result(entry, entry.curve.steps),
        "seeds": str(len(entry.runs)),
        "test tasks": f"{entry.curve.tasks:,}",
        "batch norm": f"{summary['batch_norm']}{' (transductive)' if summary['transductive'] else ''}",
        "training": f"{minutes:.1f} min",
        "published": row.published or "-",
        "command": f"`{row.command}`" if row.command else "-",
    }


def _result(entry: Entry, step: int) -> str:
    mean, half = entry.mean(step)
    if mean - mean != 0:
        return "not finite"
    percent, finite = entry.curve.metric_name == "accuracy", entry.values(step).isfinite().all(0)
    known = f"{100 * half:.2f}" if percent else f"{half:.3f}"
    text = f"{100 * mean:.2f}" if percent else f"{mean:.3f}"
    text += f" ± {known if math.isfinite(half) else '?'}"
    text += "" if percent else f" (median {entry.curve.median()[step]:.3f})"
    return text if bool(finite.all()) else f"{text}, {1 - float(finite.double().mean()):.1%} of tasks lost"


def markdown(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> str:
    """The table in Markdown; accuracy in percent."""
    lines = [list(columns), ["---"] * len(columns), *([_cell(row[column]) for column in columns] for row in cells(rows))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def latex(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> str:
    """The table in LaTeX, for the package booktabs; accuracy in percent."""
    lines = [" & ".join(map(_tex, columns)) + r" \\", r"\midrule"]
    lines += [" & ".join(_tex(row[column]) for column in columns) + r" \\" for row in cells(rows)]
    head = rf"\begin{{tabular}}{{{'l' * len(columns)}}}"
    return "\n".join([head, r"\toprule", *lines, r"\bottomrule", r"\end{tabular}"])


def _tex(text: str) -> str:
    bold = text.startswith("**")
    code = text.startswith("`")
    text = "".join(TEX.get(sign, sign) for sign in text.strip("*`"))
    return rf"\textbf{{{text}}}" if bold else rf"\texttt{{{text}}}" if code else text


def fill(file: Path) -> bool:
    """Writes into a Markdown file the tables that it asks for: between `<!-- table: FILE ... | COLUMN, ... -->` (files named
    from where it lies; all columns without the second part) and `<!-- end -->`. Returns whether that changed the file. Raises
    UserError where it asks for none, or for a column that there is not."""
    if not file.is_file():
        raise UserError(f"there is no file {file}; give Markdown files that ask for tables")
    try:
        old = file.read_text()
    except UnicodeDecodeError:
        raise UserError(f"{file} is no text; give Markdown files that ask for tables") from None

    def table(found: re.Match[str]) -> str:
        columns = [name.strip() for name in (found["columns"] or ", ".join(COLUMNS)).split(",")]
        rows = [row for name in found["files"].split() for row in read(file.parent / name)]
        return found[1] + markdown(rows, checked(columns)) + "\n" + found[4]

    if not MARK.search(old):
        raise UserError(f"{file} asks for no table; put <!-- table: FILE --> and <!-- end --> on lines of their own")
    if (new := MARK.sub(table, old)) != old:
        replace(file, new.encode())
    return new != old


def checked(columns: Sequence[str]) -> Sequence[str]:
    """The columns. Raises UserError for one that there is not."""
    for column in columns:
        if column not in COLUMNS:
            raise unknown("column", column, COLUMNS)
    return columns
