"""A run as text while it goes on."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from toolkit import UserError
from toolkit.files import alone_in
from toolkit.runs.folder import Run
from toolkit.runs.watch import WIDTH, follow, sparkline, view


def folder(path: Path, rows: list[dict[str, float]], torn: str = "") -> Path:
    (path / "config.json").write_text(json.dumps({"algorithm": "anil", "sampler": "glyphs", "iterations": 200}))
    if rows or torn:
        (path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + torn)
    return path


ROWS = [
    {"iteration": 40, "loss": 2.0, "metric": 0.2, "seconds": 60.0},
    {"iteration": 50, "loss": 1.0, "metric": 0.4, "seconds": 75.0},
    {"iteration": 50, "val_loss": 1.5, "val_metric": 0.3},
]


@pytest.mark.parametrize("torn", ["", '{"iteration": 60, "lo'])
def test_how_far_how_fast_how_good(tmp_path: Path, torn: str) -> None:
    lines = view(Run(folder(tmp_path, ROWS, torn))).splitlines()
    assert lines[0].endswith(": anil on glyphs")
    assert lines[1] == "█████░░░░░░░░░░░░░░░ 50 of 200 iterations, 1:15 min so far, about 3:45 min left"
    assert lines[2] == "stopped, as far as this machine sees; its command with --resume goes on with it"
    assert lines[3].split() == ["loss", "1", "█▁"] and lines[4].split() == ["metric", "0.4", "▁█"]
    assert lines[5].split() == ["metric", "on", "validation", "0.3", "▅"]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    assert view(Run(folder(tmp_path, []))).splitlines()[1] == "░░░░░░░░░░░░░░░░░░░░ 0 of 200 iterations"


def test_a_run_that_goes_on_is_not_called_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(folder(tmp_path, ROWS))
    with alone_in(tmp_path):
        assert "stopped" not in view(run)
    assert "stopped" in view(run)
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as where there are no such locks: nobody can tell
    assert "stopped" not in view(run)


def test_who_enters_waits_for_who_only_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.files.LOOK", 30.0)
    with ThreadPoolExecutor() as pool, ExitStack() as look:
        look.enter_context(alone_in(tmp_path))
        inside = pool.submit(lambda: ExitStack().enter_context(alone_in(tmp_path)))
        time.sleep(0.05)
        look.close()
        assert inside.result() is True


def test_hours_are_hours(tmp_path: Path) -> None:
    assert "2 h 00 min so far, about 6 h 00 min left" in view(
        Run(folder(tmp_path, [{"iteration": 50, "loss": 1.0, "seconds": 7200.0}]))
    )


def test_the_result_of_a_run_that_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path, ROWS)
    test = {"metric": "accuracy", "steps": [0, 1], "mean": [0.2, 0.9], "ci95": [0.1, None], "tasks": 6000}
    summary = {"algorithm": "anil", "sampler": "glyphs", "test": test, "inner_steps": 1}
    for name, steps, last, said in [
        ("accuracy", 0, 0.2, "20.00 ± 10.00 % after 0 steps"),
        ("accuracy", 0, 0.9, "90.00 ± not finite % after 1 step"),  # trained without steps, and adapts all the same
        ("accuracy", 1, 0.9, "90.00 ± not finite % after 1 step"),
        ("squared error", 0, 0.2, "0.2 ± 0.1 after 0 steps"),
    ]:
        changed = summary | {"test": test | {"metric": name, "mean": [0.2, last]}, "inner_steps": steps}
        (tmp_path / "summary.json").write_text(json.dumps(changed))
        follow(tmp_path)
        assert capsys.readouterr().out.splitlines()[-1] == f"tested: {name} {said}, 6,000 tasks"
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"weights_of": "some-run"}))
    (tmp_path / "metrics.jsonl").unlink()
    assert view(Run(tmp_path)).splitlines()[1:] == [
        "evaluation of some-run, which trains nothing", "tested: accuracy 90.00 ± not finite % after 1 step, 6,000 tasks"
    ]  # fmt: skip


def test_without_a_terminal_it_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    follow(folder(tmp_path, ROWS))
    assert capsys.readouterr().out.count("anil on glyphs") == 1


def test_a_run_that_ends_within_a_look_is_shown_with_its_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    test = {"metric": "accuracy", "steps": [0, 1], "mean": [0.2, 0.9], "ci95": [0.1, 0.1], "tasks": 6000}
    summary = json.dumps({"algorithm": "anil", "sampler": "glyphs", "test": test, "inner_steps": 1})

    def looked(run: Run) -> str:
        text = view(run)
        (tmp_path / "summary.json").write_text(summary)
        return text

    monkeypatch.setattr("toolkit.runs.watch.view", looked)
    monkeypatch.setattr("toolkit.runs.watch.EVERY", 0.0)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    follow(folder(tmp_path, ROWS))
    first, last = capsys.readouterr().out.split("\x1b[6F\x1b[J")
    assert "tested" not in first and last.splitlines()[-1] == "tested: accuracy 90.00 ± 10.00 % after 1 step, 6,000 tasks"


def test_a_course_is_no_wider_than_its_room_and_keeps_its_shape() -> None:
    line = sparkline([float(i) for i in range(1000)])
    assert len(line) == WIDTH and line[0] == "▁" and line[-1] == "█" and list(line) == sorted(line)
    assert sparkline([3.0, 3.0]) == "▅▅"


def test_a_damaged_journal_and_no_run_at_all(tmp_path: Path) -> None:
    folder(tmp_path, ROWS)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], "nonsense", *lines[1:]]))
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged \(line 2 is no row of a run"):
        view(Run(tmp_path))
    with pytest.raises(UserError, match="there is no run folder"):
        follow(tmp_path / "none")
