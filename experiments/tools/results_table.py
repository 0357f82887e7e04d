"""Prints the tables of results/README.md and README.md from the committed runs, so that no number in it is typed by hand.

python -m experiments.tools.results_table
"""

import json
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).parents[2] / "results" / "reference"
# The runs in the order of the table: folder, title, command.
RUNS = {
    "quickstart": ("glyphs, 5-way 1-shot, unseen scripts", "make demo"),
    "sinusoid": ("sinusoid, 10-shot", "python experiments/sinusoid.py"),
    "omniglot-vinyals": (
        "Omniglot 5-way 1-shot, Vinyals split",
        "python experiments/omniglot.py --algorithm maml --ways 5 --shots 1 --data-root data",
    ),
    "omniglot-background": (
        "Omniglot 5-way 1-shot, background/evaluation split",
        "python experiments/omniglot.py --sampler omniglot-background --data-root data --iterations 12000 --map vmap "
        "--no-compile",
    ),
}


SHORT = ("tasks", "as trained", "after 10 steps", "command")


def table(columns: tuple[str, ...] = ()) -> str:
    """A Markdown table with one row per run; all columns, or only those named. Intervals are 95 % over test tasks."""
    rows = [_row(folder, title, command) for folder, (title, command) in RUNS.items()]
    columns = columns or tuple(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(folder: str, title: str, command: str) -> dict[str, str]:
    summary = json.loads((REFERENCE / folder / "summary.json").read_text())
    test = summary["test"]
    return {
        "tasks": title,
        "method": summary["algorithm"],
        "0 steps": _cell(test, 0),
        "as trained": _cell(test, summary["inner_steps"]),
        "after 10 steps": _cell(test, test["steps"][-1]),
        "test tasks": f"{test['tasks']:,}",
        "batch norm": f"{summary['batch_norm']}{' (transductive)' if summary['transductive'] else ''}",
        "training": f"{summary['cost']['seconds'] / 60:.1f} min",
        "command": f"`{command}`",
    }


def _cell(test: dict[str, Any], step: int) -> str:
    mean, half = test["mean"][step], test["ci95"][step]
    if test["metric"] == "accuracy":
        return f"{100 * mean:.2f} ± {100 * half:.2f} %"
    return f"{mean:.3f} ± {half:.3f} (median {test['median'][step]:.3f})"


if __name__ == "__main__":
    print(table(), table(SHORT), sep="\n\n")
