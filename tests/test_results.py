"""The committed results: whole, redrawable, and quoted as they are."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments.tools.results import Config, main, wanted
from experiments.tools.results_table import COMPARISONS, REFERENCE, SHARED_MODEL, comparison, shared_model
from toolkit import UserError
from toolkit.runs.folder import Run, config_hash
from toolkit.runs.tables import MARK, fill

ROOT = Path(__file__).parent.parent


TABLES = sorted((ROOT / "results" / "tables").glob("*.json"))
WANTED = {run.folder: run for run in wanted(Config())}
MADE = [folder for folder in WANTED if (REFERENCE / folder).exists()]


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_the_readmes_quote_the_runs(name: str, tmp_path: Path) -> None:
    """Filled in anew from the runs, beside the same results, the text stays as it is; and the tables are not empty."""
    (tmp_path / "results").symlink_to(ROOT / "results") if "/" not in name else None
    place = tmp_path if "/" not in name else ROOT / "results"
    copy = place / f"{tmp_path.name}.md"
    try:
        copy.write_text((ROOT / name).read_text())
        assert not fill(copy), f"`toolkit table --into {name}` would change it"
        assert all(found[0].count("\n|") > 5 for found in MARK.finditer(copy.read_text()))
    finally:
        copy.unlink()


def test_no_table_is_forgotten() -> None:
    text = (ROOT / "results" / "README.md").read_text()
    assert len(TABLES) >= 3 and all(f"<!-- table: tables/{table.name}" in text for table in TABLES)


@pytest.mark.parametrize("folder", MADE)
def test_the_command_of_a_row_is_that_of_its_run(folder: str) -> None:
    """Every flag of the row's command stands in the run's configuration."""
    words, config = WANTED[folder].words[1:], Run(REFERENCE / folder).config
    for i, word in enumerate(words):
        if word.startswith("--no-"):
            assert config[word[5:].replace("-", "_")] is False
        elif word.startswith("--") and word != "--data-root":
            found, given = config[word[2:].replace("-", "_")], words[i + 1]
            assert str(found) == given or found == given.split(","), word
    assert config["experiment"] in WANTED[folder].words[0]


@pytest.mark.parametrize("folder", MADE)
def test_every_reference_run_is_whole(folder: str) -> None:
    run = Run(REFERENCE / folder)
    assert run.summary["config_hash"] == config_hash(run.config)
    assert run.summary["test"]["mean"] == pytest.approx(run.curve.mean().tolist(), abs=1e-6)
    assert run.summary["test"]["ci95"] == pytest.approx(run.curve.ci95().tolist(), abs=1e-6)
    assert run.summary["task_list_hash"] == run.curve.task_list_hash
    assert run.summary["git"] and run.metrics
    for name in ("adaptation.png", "adaptation.pdf", "training.png", "training.pdf"):
        assert (REFERENCE / folder / name).exists()


def test_the_runs_that_are_missing_are_made_and_those_that_fail_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = wanted(Config(match="glyphs"))
    assert [run.folder for run in runs] == [f"glyphs-seed{seed}" for seed in range(3)]
    (tmp_path / runs[0].folder).mkdir()
    (tmp_path / runs[0].folder / "summary.json").write_text("{}")
    made: list[list[str]] = []

    def run(command: list[str], **given: Any) -> Any:
        folder = Path(command[command.index("--out") + 1])
        made.append(command[1:])
        if folder.name.endswith("2"):
            return SimpleNamespace(returncode=1)
        folder.mkdir()
        result = {"test": {"metric": "accuracy", "mean": [0.2, 0.9]}, "inner_steps": 1, "cost": {"seconds": 60}}
        (folder / "summary.json").write_text(json.dumps(result))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("experiments.tools.results.subprocess.run", run)
    with pytest.raises(UserError, match=r"1 of 2 runs failed: glyphs-seed2 .*; mend the cause and start again"):
        main(Config(match="glyphs", out=tmp_path, jobs=1))
    ends = [["--seed", str(seed), "--out", str(tmp_path / f"glyphs-seed{seed}"), "--resume"] for seed in (1, 2)]
    assert made == [["experiments/quickstart.py", *end] for end in ends]
    assert [path.name for path in tmp_path.glob("*.log")] == ["glyphs-seed2.log"]


def test_how_long_all_runs_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten iterations of 2 s after ten slow ones, test tasks of 0.5 s, for a run of 300 iterations with three validations."""
    kept = {"iterations": 300, "validate_every": 100, "val_tasks": 40, "eval_tasks": 480}
    (tmp_path / "glyphs-seed0").mkdir()
    (tmp_path / "glyphs-seed0" / "config.json").write_text(json.dumps(kept))
    asked: list[list[str]] = []

    def run(command: list[str], **given: Any) -> Any:
        asked.append(command)
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        rows = [{"iteration": i + 1, "loss": 1.0, "seconds": 9.0 * min(i, 10) + 2.0 * max(0, i - 10)} for i in range(20)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (folder / "summary.json").write_text(json.dumps({"card": {"seconds_per_task": 0.5}}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("experiments.tools.results.subprocess.run", run)
    main(Config(match="glyphs", out=tmp_path, jobs=2, estimate=20))
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"{'glyphs':40} 3 x {(300 * 2 + 0.5 * (480 + 3 * 40)) / 60:6.1f} min", "3 runs, 2 at a time: 0.38 hours"
    ]  # fmt: skip
    (command,) = asked
    assert command[command.index("--iterations") + 1] == "20"
    with pytest.raises(UserError, match="has no configuration of omniglot-vinyals-seed0; let its run begin first"):
        main(Config(match="omniglot-vinyals", out=tmp_path, estimate=20))


def test_the_first_seeds_of_all_rows_come_first() -> None:
    seeds = [int(run.folder[-1]) if "-seed" in run.folder else 0 for run in wanted(Config())]
    assert seeds == sorted(seeds) and set(seeds) == {0, 1, 2}


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
            assert run.summary["config_hash"] == config_hash(run.config)
            assert row["method"] == run.config["preset"] or row["method"].startswith(run.config["algorithm"])
    assert comparison(folder) == (place / "table.md").read_text().strip()
    assert comparison(folder) in (ROOT / "results" / "README.md").read_text()


def test_the_shared_model_is_quoted_as_it_ran() -> None:
    assert shared_model() in (ROOT / "results" / "README.md").read_text()


def test_memory_and_scaling_are_quoted_as_they_were_measured() -> None:
    text = (ROOT / "results" / "README.md").read_text()
    assert (ROOT / "results" / "big_model" / "memory.md").read_text().split("\n\n")[0] in text
    rows = json.loads((ROOT / "results" / "scaling" / "scaling.json").read_text())["rows"]
    for row in rows:
        if row["processes"] == 2:
            assert f"{row['measured']:.2f} times" in text
            assert f"{row['measured']:.2f}" in (ROOT / "ARCHITECTURE.md").read_text()


def test_nothing_unlisted_is_committed() -> None:
    listed = {*WANTED, *COMPARISONS, SHARED_MODEL}
    assert {path.name for path in REFERENCE.iterdir() if path.is_dir()} <= listed
