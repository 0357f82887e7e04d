"""The harness of a run: its journal, which checkpoint it chooses, what its summary says, signals, files on the disk."""

import json
import logging
import os
import signal
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments import omniglot, sinusoid
from tests.conftest import convolutional, dense, flat
from toolkit import Batch, Learner, Meta, Plan, Task, UserError, algorithms, evaluate, train
from toolkit.experiment import _better, _plan, _stop_signals, run
from toolkit.files import replace as replace_file
from toolkit.flags import launch
from toolkit.metrics import squared_error
from toolkit.models import mlp
from toolkit.runs import checkpoint
from toolkit.runs.folder import Run, config_hash, prepare, write_json
from toolkit.runs.journal import ROWS, Journal
from toolkit.samplers import Sinusoid
from toolkit.task import move
from toolkit.train import Record

TRAINING, VALIDATION, TEST = Sinusoid(5, 6), Sinusoid(5, 7), Sinusoid(5, 8)
META = algorithms.maml(dense()).init()


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures have tests of their own, and take most of the time of a short run."""
    monkeypatch.setattr("toolkit.plots.save.draw_run", lambda folder: None)


def config(out: Path, **changes: Any) -> sinusoid.Config:
    """A run of seven iterations with validations after 3, 6 and 7."""
    short = {
        "iterations": 7,
        "validate_every": 3,
        "tasks": 3,
        "val_tasks": 10,
        "eval_tasks": 6,
        "eval_steps": 3,
        "compile": False,
    }
    return sinusoid.Config(**short | {"out": out} | changes)


def regression(inner_steps: int = 1, **changes: Any) -> Learner:
    shared = {"loss": squared_error, "metric": squared_error, "inner_lr": 0.01, "inner_steps": inner_steps}
    return algorithms.maml(mlp((1, 10, 10, 1)), **shared | changes)


def points(generator: torch.Generator, shape: tuple[int, ...] = (3,)) -> Task:
    """A classification task of two classes that differ, float64."""

    def batch(n: int) -> Batch:
        y = torch.randint(2, (n,), generator=generator)
        x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
        return Batch(x + y.view(-1, *[1] * len(shape)), y)

    return Task(batch(4), batch(9))


def images(generator: torch.Generator) -> Task:
    return points(generator, (1, 8, 8))


def validations(record: Run) -> list[dict[str, float]]:
    return [row for row in record.metrics if "val_loss" in row]


def meta_after(flags: sinusoid.Config, learner: Learner, training: Any, iteration: int) -> Meta:
    *_, record = train(learner, training, iteration, flags.tasks, flags.meta_lr, flags.seed)
    return record.meta


def noted(iteration: int, loss: float, metric: float) -> Record:
    return Record(iteration, loss, metric, 0.1, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("iterations", [7, 2_500])
def test_rows_are_exact_means_of_windows_and_few(tmp_path: Path, iterations: int) -> None:
    journal = Journal(tmp_path / "metrics.jsonl", iterations)
    losses, found = [float(i * i % 37) for i in range(1, iterations + 1)], []
    for i, loss in enumerate(losses, 1):
        row = journal.add(noted(i, loss, -loss))
        assert (row is not None) == (i % journal.every == 0)
    journal.flush()
    assert journal.flush() is None
    found = Run(tmp_path).metrics
    assert (journal.every > 1) == (iterations > ROWS) and len(found) <= 1.25 * ROWS
    windows = [losses[i : i + journal.every] for i in range(0, iterations, journal.every)]
    assert [row["loss"] for row in found] == [sum(window) / len(window) for window in windows]
    assert [row["metric"] for row in found] == [-sum(window) / len(window) for window in windows]
    assert [row["iteration"] for row in found] == [
        min(i, iterations) for i in range(journal.every, iterations + journal.every, journal.every)
    ]


def test_the_clock_goes_on_where_it_stood(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path, 10, seconds=1_000.0)
    row = journal.add(noted(1, 1.0, 1.0))
    assert row is not None and 1_000 <= row["seconds"] <= journal.seconds + 0.001 < 1_060  # rows are rounded
    assert Journal(path, 10).seconds < 60


def test_rows_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path, 10)
    sizes = [(journal.add(noted(i, 1.0, 1.0)), journal.size)[1] for i in (1, 2, 3)]
    assert sizes[-1] == path.stat().st_size
    again = Journal(path, 10, size=sizes[1])
    again.add(noted(3, 5.0, 5.0))
    assert [(row["iteration"], row["loss"]) for row in Run(tmp_path).metrics] == [(1, 1.0), (2, 1.0), (3, 5.0)]
    assert Journal(path, 10).size == 0, "a run that starts anew has no rows"


def test_a_file_shorter_than_recorded_costs_a_warning_and_is_not_padded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    Journal(path, 10).add(noted(1, 1.0, 1.0))
    size = path.stat().st_size
    with caplog.at_level(logging.WARNING, "toolkit"):
        Journal(path, 10, size=size)
        assert not caplog.records
        journal = Journal(path, 10, size=10_000)
    assert "shorter than at the checkpoint" in caplog.text
    journal.add(noted(2, 2.0, 2.0))
    assert b"\0" not in path.read_bytes() and [row["iteration"] for row in Run(tmp_path).metrics] == [1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_left_out_of_its_row(tmp_path: Path, bad: float) -> None:
    path = tmp_path / "metrics.jsonl"
    Journal(path, 10).add(noted(1, 0.5, bad))
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    (row,) = Run(tmp_path).metrics
    assert row.keys() == {"iteration", "loss", "seconds"}


def test_the_tested_weights_are_those_of_the_best_validation(tmp_path: Path) -> None:
    flags, learner = config(tmp_path / "run", meta_lr=1.0, seed=2), regression()
    record = run(flags, "sinusoid", learner, TRAINING, VALIDATION, TEST)
    rows = validations(record)
    selected = record.summary["selected"]
    assert selected["iteration"] < 7, "validation must worsen, or this test proves nothing"
    assert selected == min(rows, key=lambda row: row["val_loss"])
    expected = meta_after(flags, learner, TRAINING, selected["iteration"])
    loaded = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert loaded is not None and torch.equal(flat(loaded[0]), flat(expected))
    assert torch.equal(flat(loaded[1]["meta"]), flat(meta_after(flags, learner, TRAINING, 7)._asdict()))
    assert torch.equal(record.curve.loss, evaluate(learner, expected, TEST, 6, 3).loss)


def test_validation_takes_its_own_tasks_the_training_steps_and_the_evaluation_seed(tmp_path: Path) -> None:
    flags, learner = config(tmp_path / "run", eval_seed=5), regression(inner_steps=2)
    record = run(flags, "sinusoid", learner, TRAINING, VALIDATION, TEST)
    rows = validations(record)
    assert [row["iteration"] for row in rows] == [3, 6, 7], "the last iteration is always validated"
    for row in rows:
        meta = meta_after(flags, learner, TRAINING, int(row["iteration"]))
        curve = evaluate(learner, meta, VALIDATION, 10, 2, seed=5, split="val")
        expected = {"val_loss": curve.mean(curve.loss), "val_metric": curve.mean(), "val_ci95": curve.ci95()}
        expected["val_finite"] = curve.finite()
        assert row == {"iteration": row["iteration"]} | {key: float(values[-1]) for key, values in expected.items()}
    curve = evaluate(
        learner, meta_after(flags, learner, TRAINING, int(record.summary["selected"]["iteration"])), TEST, 6, 3, seed=5
    )
    assert curve.task_list_hash == record.curve.task_list_hash and torch.equal(curve.loss, record.curve.loss)


def hits(prediction: Tensor, y: Tensor) -> Tensor:
    """A metric of which the harness does not know that more is better."""
    return (prediction.argmax(-1) == y).to(prediction.dtype).mean()


@pytest.mark.parametrize("metric", ["accuracy", "hits"])
def test_accuracy_chooses_by_its_maximum_and_any_other_metric_by_the_loss(tmp_path: Path, metric: str) -> None:
    flags = config(tmp_path / "run", meta_lr=0.3, validate_every=1, iterations=12, val_tasks=20)
    learner = algorithms.maml(dense(), inner_lr=0.1, **{"metric": hits} if metric == "hits" else {})
    record = run(flags, "points", learner, points, points, points, chance=0.5)
    rows = validations(record)
    by_metric, by_loss = max(rows, key=lambda row: row["val_metric"]), min(rows, key=lambda row: row["val_loss"])
    assert by_metric["iteration"] != by_loss["iteration"], "the two must disagree, or this test proves nothing"
    assert record.summary["selected"] == (by_metric if metric == "accuracy" else by_loss)
    assert record.summary["test"]["metric"] == metric and record.summary["chance"] == 0.5


def test_a_validation_row_is_better_by_finite_tasks_first_and_never_when_equal() -> None:
    accuracy, error = algorithms.maml(dense()), regression()
    high = {"val_metric": 0.9, "val_loss": 2.0, "val_finite": 1.0}
    low = {"val_metric": 0.1, "val_loss": 1.0, "val_finite": 1.0}
    assert _better(high, low, accuracy) and not _better(low, high, accuracy)
    assert _better(low, high, error) and not _better(high, low, error)
    for learner in (accuracy, error):
        assert _better(low, {}, learner) and not _better(low, low, learner)
        assert not _better(high | low | {"val_metric": 1.0, "val_loss": 0.0, "val_finite": 0.9}, high, learner)
        assert not _better({"val_finite": 1.0}, low, learner) and _better(low, {"val_finite": 1.0}, learner)


def test_every_seed_is_judged_on_the_same_tasks(tmp_path: Path) -> None:
    records = [
        run(config(tmp_path / str(seed), seed=seed, iterations=2), "sinusoid", regression(), TRAINING, VALIDATION, TEST)
        for seed in (0, 3)
    ]
    first, second = (record.summary for record in records)
    assert first["task_list_hash"] == second["task_list_hash"] == records[0].curve.task_list_hash
    assert (first["seed"], second["seed"]) == (0, 3) and first["config_hash"] != second["config_hash"]
    assert records[0].metrics[0]["loss"] != records[1].metrics[0]["loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {"map": "loop"},
        {"map": "threads", "chunk": 2, "memory": "recompute"},
        {"map": "vmap", "chunk": 2},
        {"memory": "recompute"},
    ],
    ids=str,
)
def test_the_summary_says_the_plan(tmp_path: Path, changes: dict[str, Any]) -> None:
    record = run(config(tmp_path / "run", iterations=2, **changes), "sinusoid", regression(), TRAINING, VALIDATION, TEST)
    plan = {"map": "vmap", "chunk": None, "memory": "unroll", "compile": False, "workers": None}
    assert record.summary["plan"] == plan | changes


def test_flags_and_model_decide_the_plan(tmp_path: Path) -> None:
    learner = algorithms.maml(convolutional())

    def plan(**changes: Any) -> Plan:
        return _plan(config(tmp_path, **changes), learner, images)

    assert plan() == Plan("threads", chunk=8)
    assert plan(chunk=2, memory="recompute") == Plan("threads", chunk=2, memory="recompute")
    assert plan(map="loop") == Plan("loop") and plan(map="threads") == Plan("threads")
    assert plan(compile=True) == Plan("vmap", chunk=32, compile=True)


@pytest.mark.parametrize("policy", ["batch", "support", "none"])
def test_the_summary_follows_from_curve_and_learner(tmp_path: Path, policy: str) -> None:
    batch_norm = {} if policy == "none" else {"batch_norm": policy}
    network = convolutional(lambda c: nn.GroupNorm(1, c)) if policy == "none" else convolutional()
    learner = algorithms.anil(network, adapts="5.*", inner_lr=0.1, **batch_norm)
    record = run(config(tmp_path / "run", iterations=2, eval_tasks=9), "images", learner, images, images, images)
    summary, curve = record.summary, record.curve
    for key, values in (
        ("mean", curve.mean()), ("ci95", curve.ci95()), ("median", curve.median()), ("q05", curve.quantile(0.05)),
        ("q95", curve.quantile(0.95)), ("loss", curve.mean(curve.loss)), ("finite", curve.finite()),
    ):  # fmt: skip
        assert summary["test"][key] == pytest.approx(values.tolist(), abs=1e-6), key
    assert (summary["test"]["tasks"], summary["test"]["steps"]) == (9, [0, 1, 2, 3])
    assert summary["batch_norm"] == ("no batch norm" if policy == "none" else policy)
    assert summary["transductive"] == (policy == "batch")
    assert summary["cost"]["adapted_parameters"] == 12 * 2 + 2
    assert summary["cost"]["parameters"] == sum(p.numel() for p in network.parameters())
    assert (summary["algorithm"], summary["inner_steps"], summary["chance"]) == ("anil", 1, None)
    assert summary["config_hash"] == config_hash(record.config)


class Branching(nn.Module):
    """Takes one of two ways by a number that it computes, which vmap cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        hidden = hidden.tanh() if hidden.mean() > 0 else hidden.sigmoid()
        return self.b(hidden)  # type: ignore[no-any-return]


def test_a_model_that_vmap_cannot_map_runs_under_a_loop(tmp_path: Path) -> None:
    learner = replace(regression(), model=Branching())
    record = run(config(tmp_path / "run", map="loop"), "sinusoid", learner, TRAINING, VALIDATION, TEST)
    assert record.curve.tasks == 6 and record.curve.loss.isfinite().all()


def test_json_with_nan_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "summary.json", {"loss": [1.0, bad]})
    assert not list(tmp_path.iterdir())
    write_json(tmp_path / "summary.json", {"loss": [0.1 + 0.2]})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"loss": [0.1 + 0.2]}


HARMLESS = {"out", "resume", "overwrite", "debug", "data_root", "download", "preset"}


@pytest.mark.parametrize("name", [field.name for field in fields(omniglot.Config)])
def test_the_configuration_hash_follows_every_flag_that_can_change_a_number(name: str) -> None:
    flags = {field.name: str(getattr(omniglot.Config(), field.name)) for field in fields(omniglot.Config)}
    changed = config_hash(flags | {name: "something else"}) != config_hash(flags)
    assert changed == (name not in HARMLESS)


def test_a_tuple_in_the_configuration_is_the_same_on_resuming(tmp_path: Path) -> None:
    flags = {"weights": (1.0, 2.0)}
    prepare(tmp_path / "run", flags, resume=False, overwrite=False)
    prepare(tmp_path / "run", flags, resume=True, overwrite=False)
    with pytest.raises(UserError, match="was made with --weights"):
        prepare(tmp_path / "run", {"weights": (1.0, 3.0)}, resume=True, overwrite=False)


def save(folder: Path, iteration: int) -> Path:
    """A checkpoint whose weights are all equal to its iteration."""
    meta = Meta({name: torch.full_like(t, iteration) for name, t in META.params.items()}, {})
    return checkpoint.save(folder, iteration, meta, {"iteration": iteration}, "a")


def test_the_newest_checkpoint_is_loaded(tmp_path: Path) -> None:
    for iteration in (9, 100):
        save(tmp_path, iteration)
        loaded = checkpoint.load_newest(tmp_path, "a")
        assert loaded is not None
        assert loaded[1] == {"iteration": iteration} and bool((flat(loaded[0]) == iteration).all())


def test_saving_an_iteration_twice_keeps_one_whole_checkpoint(tmp_path: Path) -> None:
    first = save(tmp_path, 3)
    weights = first / "weights.safetensors"
    made = weights.stat().st_ino
    assert save(tmp_path, 3) == first and weights.stat().st_ino == made, "a whole checkpoint is never touched"
    weights.write_bytes(b"damaged")
    assert save(tmp_path, 3) == first
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    loaded = checkpoint.load_newest(tmp_path, "a")
    assert loaded is not None and bool((flat(loaded[0]) == 3).all())


class Disk:
    """Notes, in order, what is synced (inode -> size then) and what is renamed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: dict[int, int] = {}
        self.before: list[tuple[str, dict[int, int]]] = []
        fsync, rename = os.fsync, os.replace

        def note_sync(handle: int) -> None:
            fsync(handle)
            self.synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size

        def note_replace(source: Any, target: Any) -> None:
            self.before.append((Path(target).name, dict(self.synced)))
            rename(source, target)
            self.synced.pop(Path(target).parent.stat().st_ino, None)  # the folder is to be synced again

        monkeypatch.setattr(os, "fsync", note_sync)
        monkeypatch.setattr(os, "replace", note_replace)


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    replace_file(tmp_path / "file", b"content")
    ((_, synced),) = disk.before
    assert synced[(tmp_path / "file").stat().st_ino] == len(b"content")


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    path = save(tmp_path, 1)
    ((name, synced),) = disk.before
    assert name == path.name and path.stat().st_ino in synced
    files = list(path.iterdir())
    assert len(files) == 3 and all(synced[file.stat().st_ino] == file.stat().st_size for file in files)
    assert tmp_path.stat().st_ino in disk.synced, "the name itself must be on the disk too"


def test_rows_are_on_the_disk_before_the_checkpoint_that_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    record = run(config(tmp_path / "run"), "sinusoid", regression(), TRAINING, VALIDATION, TEST)
    inode, saved = (tmp_path / "run" / "metrics.jsonl").stat().st_ino, dict(disk.before)
    sizes = [saved[f"step-{iteration:08d}"][inode] for iteration in (3, 6, 7)]
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert sizes == [sum(map(len, lines[:n])) for n in (4, 8, 10)] and len(record.metrics) == 10
    loaded = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert loaded is not None and loaded[1]["metrics_bytes"] == sizes[-1]


@pytest.fixture
def handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def now(numbers: dict[int, Any]) -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in numbers}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_collected_and_the_handlers_come_back(number: signal.Signals, handlers: dict[int, Any]) -> None:
    with _stop_signals() as received:
        assert received == [] and all(now(handlers)[each] != handler for each, handler in handlers.items())
        os.kill(os.getpid(), number)
        assert received == [number]
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [number, signal.SIGTERM], "only a second Ctrl-C interrupts"
    assert now(handlers) == handlers


def test_a_second_ctrl_c_interrupts_at_once_and_the_handlers_come_back(handlers: dict[int, Any]) -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), _stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
        os.kill(os.getpid(), signal.SIGINT)
    assert reached and now(handlers) == handlers


def test_signals_are_left_alone_outside_the_main_thread(handlers: dict[int, Any]) -> None:
    seen: list[Any] = []

    def work() -> None:
        with _stop_signals() as received:
            seen.append((received, now(handlers) == handlers))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [([], True)] and now(handlers) == handlers


class Stopping:
    """Sinusoid tasks; drawing one of them sends this process a signal."""

    def __init__(self, task: int, number: signal.Signals) -> None:
        self.left, self.number = task, number

    def __call__(self, generator: torch.Generator) -> Task:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return TRAINING(generator)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_exits_and_ends_like_the_unbroken_one(
    number: signal.Signals, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags, learner = config(tmp_path / "broken"), regression()
    # Task 17 of the sampler's life: three are drawn to choose the plan, then three for each of the iterations 1 to 5.
    with caplog.at_level(logging.INFO, "toolkit"), pytest.raises(SystemExit) as stop:
        run(flags, "sinusoid", learner, Stopping(17, number), VALIDATION, TEST)
    assert stop.value.code == 128 + number
    assert "stopped after iteration 5; the same command with --resume goes on" in caplog.text
    loaded = checkpoint.load_newest(tmp_path / "broken" / "checkpoints")
    assert loaded is not None and loaded[1]["iteration"] == 5
    broken = run(replace(flags, resume=True), "sinusoid", learner, TRAINING, VALIDATION, TEST)
    whole = run(config(tmp_path / "whole"), "sinusoid", learner, TRAINING, VALIDATION, TEST)
    assert torch.equal(broken.curve.loss, whole.curve.loss) and broken.summary["selected"] == whole.summary["selected"]
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in record.metrics] for record in (broken, whole)]
    assert rows[0] == rows[1]


def test_an_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def body(flags: sinusoid.Config) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as stop:
        launch(sinusoid.Config, body, {}, "A test.")
    assert stop.value.code == 130
    errors = capsys.readouterr().err
    assert "the same command with --resume goes on" in errors and "Traceback" not in errors


def test_a_resume_trains_on_the_device_of_the_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are read onto the CPU, so what is trained further must be moved first; seen here without a GPU."""
    flags = config(tmp_path / "run")
    run(flags, "x", regression(), TRAINING, VALIDATION, TEST)
    moved: list[Any] = []

    def spy(tree: Any, device: Any) -> Any:
        moved.append(tree)
        return move(tree, device)

    monkeypatch.setattr("toolkit.experiment.move", spy)
    run(replace(flags, resume=True), "x", regression(), TRAINING, VALIDATION, TEST)
    assert any(isinstance(tree, dict) and set(tree) == set(Meta._fields) for tree in moved)
