"""The committed results: whole, redrawable, and quoted as they are."""

from pathlib import Path

import pytest

from experiments.tools.results_table import REFERENCE, RUNS, SHORT, table
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


def test_nothing_unlisted_is_committed() -> None:
    assert sorted(path.name for path in REFERENCE.iterdir() if path.is_dir()) == sorted(RUNS)
