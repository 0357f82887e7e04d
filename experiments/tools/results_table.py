"""Prints the tables of results/README.md and README.md from the committed runs, so that no number in it is typed by hand.

python -m experiments.tools.results_table
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from experiments.shared_model import Config
from experiments.shared_model import table as shared_model_table
from toolkit.runs.comparison import table as comparison_table

REFERENCE = Path(__file__).parents[2] / "results" / "reference"
# The runs in the order of the table: folder, title, command.
RUNS = (
    {
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
    | {
        f"cifar-fs-30-{method}-5w{shots}s": (
            f"CIFAR-FS with 30 % of the images, 5-way {shots}-shot",
            f"python experiments/cifar_fs.py --sampler cifar-fs-30 --data-root data --queries 5 --iterations 5000 "
            f"--algorithm {method} --shots {shots}",
        )
        for shots in (1, 5)
        for method in ("maml", "protonet")
    }
    | {
        f"intents-{method}-5w{shots}s": (
            f"CLINC150 intents of unseen domains, 5-way {shots}-shot",
            f"python experiments/intents.py --data-root data --eval-seed 1 --algorithm {method} --shots {shots}",
        )
        for shots in (1, 5)
        for method in ("maml", "protonet")
    }
)


# The comparisons: folder, title.
COMPARISONS = {
    "compare-sinusoid": "sinusoid, 10-shot",
    "compare-omniglot-5w1s": "Omniglot 5-way 1-shot",
    "compare-omniglot-20w1s": "Omniglot 20-way 1-shot",
}
SHARED_MODEL = "shared_model"
SHORT = ("tasks", "method", "as trained", "after 10 steps", "command")


def table(columns: tuple[str, ...] = ()) -> str:
    """A Markdown table with one row per run; all columns, or only those named. Intervals are 95 % over test tasks."""
    rows = [_row(folder, title, command) for folder, (title, command) in RUNS.items()]
    columns = columns or tuple(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comparison(folder: str) -> str:
    """The table of a comparison, anew from its committed rows."""
    rows: list[dict[str, Any]] = json.loads((REFERENCE / folder / "comparison.json").read_text())["rows"]
    return comparison_table(rows)


def shared_model() -> str:
    """The printed result of the committed run of `experiments/shared_model.py`."""
    folder = REFERENCE / SHARED_MODEL
    config, summary = (json.loads((folder / name).read_text()) for name in ("config.json", "summary.json"))
    known = {field.name for field in fields(Config)}
    return shared_model_table(Config(**{key: value for key, value in config.items() if key in known}), summary)


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
    print(table(), table(SHORT), *map(comparison, COMPARISONS), shared_model(), sep="\n\n")
