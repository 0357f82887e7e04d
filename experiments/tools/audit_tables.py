"""The figures of `experiments.tools.audit` as Markdown, and the page that they stand on."""

from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parents[2] / "results"
FIGURES, PAGE = RESULTS / "datasets.json", RESULTS / "datasets.md"
BEGIN, END = "<!-- made by experiments.tools.audit: do not edit below -->", "<!-- end of what it makes -->"
SPLITS = ("train", "val", "test")
LISTED = 40  # pairs of equal items that are written out
# The columns of the tables: title, and key in the figures.
INSIDE = {
    "data set": "dataset",
    "split": "split",
    "classes": "classes",
    "items": "items",
    "equal, one class": "same class",
    "equal, two classes": "two classes",
    "turned": "turned",
    "itself turned": "itself",
}
SAMPLERS = {
    "sampler": "sampler",
    "of": "dataset",
    "split": "split",
    "tasks": "tasks",
    "faults": "faults",
    "overlap by identity": "identity",
    "overlap by content": "content",
    "twice in a set": "twice",
    "tasks/s": "tasks/s",
}


class Pair(NamedTuple):
    """Two items that are equal: split and class of each, and how: "equal", "turned" (one equals the other when turned) or
    "itself" (a drawing that equals its own turn, so that two classes hold it)."""

    dataset: str
    kind: str
    one: tuple[str, str]
    other: tuple[str, str]


def tables(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    machine, datasets = found["machine"], found["datasets"]
    about = (
        f"Made by `{found['command']}` on {found['date']}: {machine['processor']}, {machine['processes']} processes of one "
        f"thread beside other work, Python {machine['python']}, torch {machine['torch']}, toolkit {machine['toolkit']}; "
        f"{found['seconds'] / 60:.0f} minutes."
    )
    pairs = [Pair(p["dataset"], p["kind"], tuple(p["one"]), tuple(p["other"])) for p in found["pairs"]]
    turned = {row["dataset"] for row in datasets if row["turns"]}
    ways = {
        f"{' and '.join(two)}{', turned' * (kind == 'turned')}": (kind, two)
        for kind in ("equal", "turned")
        for two in combinations(SPLITS, 2)
    }
    across = [
        [name, *(_count(pairs, name, *way) if way[0] == "equal" or name in turned else None for way in ways.values())]
        for name in dict.fromkeys(row["dataset"] for row in datasets)
    ]
    listed = [[p.dataset, p.kind, *(f"{name} ({split})" for split, name in (p.one, p.other))] for p in pairs]
    more = f"\n\n{len(listed) - LISTED} more are in {FIGURES.name}." if len(listed) > LISTED else ""
    within = [row if row["turns"] else row | {"turned": None, "itself": None} for row in datasets]
    return "\n\n".join(
        [
            about,
            "### Equal items within a split",
            _table(list(INSIDE), [[row[key] for key in INSIDE.values()] for row in within]),
            "### Equal items across splits",
            _table(["data set", *ways], across),
            "### Every pair of equal items",
            _table(["data set", "kind", "one", "other"], listed[:LISTED]) + more,
            "### Audit of samplers",
            _table(list(SAMPLERS), [_sampler(row) for row in found["samplers"]]),
        ]
    )


def _sampler(row: dict[str, Any]) -> list[Any]:
    cells = row | {"sampler": f"`{row['sampler']}`", "faults": ", ".join(row["faults"]) or "none"}
    if row["by design"]:
        cells |= {key: f"{row[key]:,} (by design)" for key in ("identity", "content", "twice") if row[key]}
    return [cells[key] for key in SAMPLERS.values()]


def _count(pairs: list[Pair], dataset: str, kind: str, splits: tuple[str, str]) -> int:
    return sum(p.dataset == dataset and p.kind == kind and {p.one[0], p.other[0]} == set(splits) for p in pairs)


def _table(columns: list[str], rows: list[list[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def page(text: str, made: str) -> str:
    """The page `text` with what is made put between its two markers."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}"


def made_part(text: str) -> str:
    """What stands between the two markers of a page."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()
