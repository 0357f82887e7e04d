"""The shared-model experiment in small: its sub-tasks, what a run leaves, and what it refuses."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import shared_model
from toolkit.data.bank import ClassBank
from toolkit.flags import launch
from toolkit.runs.folder import Run

ALPHABETS = {"train": {"Bb": 10, "Aa": 12, "Small": 9}, "val": {"Vv": 10}, "test": {"Cc": 11, "Dd": 10, "Ee": 10}}
TINY = [
    "--shots", "2", "--queries", "3", "--epochs", "12", "--batch", "50", "--joint-lr", "1e-2", "--iterations", "15",
    "--tasks", "3", "--inner-steps", "2", "--val-tasks", "3", "--eval-tasks", "6", "--eval-steps", "3", "--components", "3",
    "--trials", "3",
]  # fmt: skip


def fake(split: str, *_: Any, size: int, **__: Any) -> ClassBank:
    """Characters in no order; each is a random picture with a little noise in its drawings."""
    generator = torch.Generator().manual_seed(len(split))
    names = [f"{split}/{a}/character{c:02}" for a, n in ALPHABETS[split].items() for c in range(n, 0, -1)]
    pictures = torch.randint(200, (len(names), 1, 1, size, size), generator=generator)
    noise = torch.randint(50, (len(names), 20, 1, size, size), generator=generator)
    items = (pictures + noise).flatten(0, 1).to(torch.uint8)
    return ClassBank(items, torch.arange(len(names) + 1) * 20, tuple(names), f"fake {split}")


@pytest.fixture(autouse=True)
def fake_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_model, "omniglot", fake)
    monkeypatch.setattr(shared_model, "RATES", (0.1, 1.0))


def start(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["shared_model.py", *TINY, *flags])
    launch(shared_model.Config, shared_model.main, {}, shared_model.__doc__)


def test_a_sub_task_is_the_first_ten_characters_of_an_alphabet_that_has_them() -> None:
    found = shared_model.sub_tasks(shared_model.Config(), "train")
    assert list(found) == ["Aa", "Bb"]
    x, y = found["Aa"].dataset.tensors  # type: ignore[attr-defined]
    assert x.shape == (200, 1, 10, 10) and y.tolist() == [c for c in range(10) for _ in range(20)]
    bank = fake("train", size=10)
    third = bank.names.index("train/Aa/character03")
    assert torch.equal(x[40:60], bank.items[20 * third : 20 * third + 20].float() / 255)


def test_a_short_run_leaves_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    start(monkeypatch, "--out", str(folder), "--held-out", "2")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["sub_tasks"] == {"training": ["Aa", "Bb"], "validation": ["Vv"], "held out": ["Cc", "Dd"]}
    assert max(summary["joint_loss"].values()) < 2.0
    runs = {name: Run(folder / name) for name in ("random", "joint", "joint_body", "maml")}
    assert len({run.curve.task_list_hash for run in runs.values()}) == 1, "all starts have the same tasks"
    for name, run in runs.items():
        row = summary["starts"][name]
        assert row["mean"] == pytest.approx(run.curve.mean().tolist(), abs=1e-6)
        assert run.summary["test"]["mean"] == row["mean"] and run.curve.metric.shape == (6, 4)
        assert row["inner_lr"] == max(shared_model.RATES, key=lambda rate: row["validation"][str(rate)])
        assert run.summary["inner_steps"] == (2 if name == "maml" else None)
    paired = runs["maml"].curve.metric - runs["random"].curve.metric
    assert summary["maml_minus"]["random"]["mean"] == pytest.approx(paired.mean(0).tolist(), abs=1e-6)
    assert summary["mixture"]["sub_tasks"] == ["Cc", "Dd", "Ee"]
    for setting in ("one", "any"):
        found = summary["mixture"]["accuracy"][setting]
        assert tuple(found) == shared_model.METHODS
        assert found["oracle component"]["mean"] > found["one component at random"]["mean"] + 0.1
    one = summary["mixture"]["accuracy"]["one"]
    assert one["mixture, by likelihood"]["mean"] > one["one component at random"]["mean"] + 0.1
    assert (folder / "adaptation.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*runs, *shared_model.METHODS))

    with pytest.raises(SystemExit):
        start(monkeypatch, "--out", str(folder))
    assert "replace it with --overwrite, or choose --out" in capsys.readouterr().err


REFUSED = {
    "sub-tasks": (["--subtasks", "3"], "3 alphabets were asked for, but the train split has 2 of 10 characters"),
    "components": (["--components", "4"], "4 alphabets were asked for, but the test split has 3"),
    "held out": (["--held-out", "0"], "--held-out is 0; give at least 1"),
    "one component": (["--components", "1"], "--components is 1; give at least 2"),
    "shots": (
        ["--shots", "18"],
        "--shots 18, --queries 3 and --labelled 1 need 22 drawings of each character, but there are 20",
    ),
    "labelled": (["--labelled", "16"], "--shots 2, --queries 3 and --labelled 16 need 21 drawings"),
    "rate": (["--meta-lr", "nan"], "--meta-lr is nan; give a positive number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_costs_one_sentence_and_no_folder(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, sentence = REFUSED[case]
    with pytest.raises(SystemExit) as stop:
        start(monkeypatch, "--out", str(tmp_path / "run"), *flags)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
