"""Prints the tables of comparisons in results/README.md from the committed runs; those of single runs are filled in by
`toolkit table --into results/README.md README.md`. So no number in them is typed by hand.

python -m experiments.tools.results_table
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from experiments.compare_algorithms import SETTINGS
from experiments.shared_model import Config
from experiments.shared_model import table as shared_model_table
from toolkit.runs.comparison import table as comparison_table

REFERENCE = Path(__file__).parents[2] / "results" / "reference"
COMPARISONS = (
    "compare-sinusoid", "compare-omniglot-5w1s", "compare-omniglot-20w1s", "compare-intents-5w1s", "compare-intents-5w5s",
    "compare-intents-15w1s", "compare-intents-15w5s",
)  # fmt: skip
SHARED_MODEL = "shared_model"


def comparison(folder: str) -> str:
    """The table of a comparison, anew from its committed rows."""
    found: dict[str, Any] = json.loads((REFERENCE / folder / "comparison.json").read_text())
    return comparison_table(found["rows"], SETTINGS[found["setting"]].base)


def shared_model() -> str:
    """The printed result of the committed run of `experiments/shared_model.py`."""
    folder = REFERENCE / SHARED_MODEL
    config, summary = (json.loads((folder / name).read_text()) for name in ("config.json", "summary.json"))
    known = {field.name for field in fields(Config)}
    return shared_model_table(Config(**{key: value for key, value in config.items() if key in known}), summary)


if __name__ == "__main__":
    print(*map(comparison, COMPARISONS), shared_model(), sep="\n\n")
