"""The committed results: whole, redrawable, and quoted as they are."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.tools.results_table import COMPARISONS, REFERENCE, RUNS, SHARED_MODEL, SHORT, comparison, shared_model, table
from toolkit.runs.folder import Run, config_hash

ROOT = Path(__file__).parent.parent


def test_the_readmes_quote_the_runs() -> None:
    assert table() in (ROOT / "results" / "README.md").read_text()
    assert table(SHORT) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("folder", RUNS)
def test_every_reference_run_is_whole(folder: str) -> None:
    run = Run(REFERENCE / folder)
    assert run.summary["config_hash"] == config_hash(run.config)
    assert run.summary["test"]["mean"] == pytest.approx(run.curve.mean().tolist(), abs=1e-6)
    assert run.summary["test"]["ci95"] == pytest.approx(run.curve.ci95().tolist(), abs=1e-6)
    assert run.summary["task_list_hash"] == run.curve.task_list_hash
    assert run.summary["git"] and run.metrics
    for name in ("adaptation.png", "adaptation.pdf", "training.png", "training.pdf"):
        assert (REFERENCE / folder / name).exists()


@pytest.mark.parametrize("folder", COMPARISONS)
def test_every_comparison_is_the_one_of_its_runs(folder: str) -> None:
    """The committed rows are the means over seeds of the committed summaries, and the tables are made of them."""
    place = REFERENCE / folder
    rows = json.loads((place / "comparison.json").read_text())["rows"]
    for row in rows:
        summaries = [Run(place / f"{row['method']}-seed{seed}").summary for seed in range(row["seeds"])]
        assert len({summary["task_list_hash"] for summary in summaries}) == 1
        means = np.array([summary["test"]["mean"] for summary in summaries], dtype=float).mean(0)
        whole = np.array([summary["test"]["finite"] for summary in summaries]).min(0) == 1
        assert whole[: row["trained_steps"] + 1].all(), "a result in the table lost a task"
        found = np.array(row["mean"], dtype=float)
        assert found[whole] == pytest.approx(means[whole], abs=2e-6, rel=1e-5)
        for seed in range(row["seeds"]):
            run = Run(place / f"{row['method']}-seed{seed}")
            assert run.summary["config_hash"] == config_hash(run.config) and row["method"].startswith(run.config["algorithm"])
    assert comparison(folder) == (place / "table.md").read_text().strip()
    assert comparison(folder) in (ROOT / "results" / "README.md").read_text()


def test_the_shared_model_is_quoted_as_it_ran() -> None:
    assert shared_model() in (ROOT / "results" / "README.md").read_text()


def test_nothing_unlisted_is_committed() -> None:
    listed = {*RUNS, *COMPARISONS, SHARED_MODEL}
    assert {path.name for path in REFERENCE.iterdir() if path.is_dir()} == listed
