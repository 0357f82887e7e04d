"""The harness of a run: its journal, which checkpoint it chooses, what its summary says, signals, files on the disk."""

import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from experiments import omniglot, sinusoid
from tests.conftest import convolutional, dense, flat, named, task_batch
from toolkit import Batch, Learner, Meta, Outer, Plan, Task, UserError, algorithms, evaluate, experiment, parts, train
from toolkit.data.bank import ClassBank
from toolkit.distributed import Group
from toolkit.experiment import facts, run
from toolkit.files import replace as replace_file
from toolkit.flags import build, launch, settings
from toolkit.metrics import squared_error
from toolkit.models import mlp
from toolkit.objectives import Implicit
from toolkit.rules import SGD, Adam, Clip, Frozen, Groups, Proximal
from toolkit.runs import checkpoint, entry
from toolkit.runs.entry import prepare
from toolkit.runs.folder import LATER, Run, config_hash, write_json
from toolkit.runs.journal import ROWS, Journal, better
from toolkit.samplers import AllClasses, Episodes, Sinusoid
from toolkit.stopping import stop_signals
from toolkit.task import move, take
from toolkit.train import Record

pytestmark = pytest.mark.usefixtures("undrawn")
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
    return Record(iteration, loss, metric, 0.1, None, Plan())  # type: ignore[arg-type]


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


def test_a_window_that_was_open_goes_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl", 4 * ROWS)
    for i in range(1, 7):
        journal.add(noted(i, float(i), 0.0))
    again = Journal(journal.path, 4 * ROWS, size=journal.size, window=json.loads(json.dumps(journal.window)))
    for i in (7, 8):
        again.add(noted(i, float(i), 0.0))
    assert [(row["iteration"], row["loss"]) for row in Run(tmp_path).metrics] == [(4, 2.5), (8, 6.5)]


def test_a_file_shorter_than_recorded_costs_a_warning_and_is_not_padded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path, 10)
    journal.add(noted(1, 1.0, 1.0))
    size = path.stat().st_size
    journal.add(noted(2, 7.0, 7.0))
    path.write_bytes(path.read_bytes()[:-5])  # by a machine that lost its power: half a row must not spoil the next
    journal = Journal(path, 10, size=10_000)
    assert path.stat().st_size == size
    caplog.clear()
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
    accuracy, error = "accuracy", "squared error"
    high = {"val_metric": 0.9, "val_loss": 2.0, "val_finite": 1.0}
    low = {"val_metric": 0.1, "val_loss": 1.0, "val_finite": 1.0}
    assert better(high, low, accuracy) and not better(low, high, accuracy)
    assert better(low, high, error) and not better(high, low, error)
    for metric in (accuracy, error):
        assert better(low, {}, metric) and not better(low, low, metric)
        assert not better(high | low | {"val_metric": 1.0, "val_loss": 0.0, "val_finite": 0.9}, high, metric)
        assert not better({"val_finite": 1.0}, low, metric) and better(low, {"val_finite": 1.0}, metric)


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
    plan = {"map": "vmap", "chunk": None, "memory": "unroll", "compile": False, "workers": None, "autocast": None}
    assert record.summary["plan"] == plan | {"trace": "memory" not in changes} | changes
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == record.summary["plan"]


class Tuple(nn.Module):
    """Its outputs are no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.head(x), x


class Counting(nn.Module):
    """Looks at the value of a number, which vmap cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x * x.sum().item() ** 0)  # type: ignore[no-any-return]


def test_a_model_that_fails_on_its_tasks_is_a_sentence_and_leaves_no_folder(tmp_path: Path) -> None:
    learner = replace(regression(), model=Tuple())
    with pytest.raises(UserError, match=r"maml cannot take a step on these tasks with this model \(\w+: .*toolkit doctor"):
        run(config(tmp_path / "run"), "sinusoid", learner, TRAINING, VALIDATION, TEST)
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_mapped_is_trained_and_tested_one_by_one(tmp_path: Path) -> None:
    flags = config(tmp_path / "run", iterations=2)
    record = run(flags, "sinusoid", replace(regression(), model=Counting()), TRAINING, VALIDATION, TEST)
    assert record.summary["plan"]["map"] == "loop" and len(record.curve.metric) == flags.eval_tasks


def test_a_model_that_vmap_cannot_map_is_a_sentence_where_vmap_was_asked_for(tmp_path: Path) -> None:
    learner = replace(regression(), model=Counting())
    with pytest.raises(UserError, match=r"the tasks cannot be mapped by vmap with this model \(.*\); use --map loop$"):
        run(config(tmp_path / "run", iterations=2, map="vmap"), "sinusoid", learner, TRAINING, VALIDATION, TEST)


def test_a_logger_that_cannot_be_made_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    flags = config(tmp_path / "run", iterations=1, logger=("tensorboard",))
    with pytest.raises(UserError, match="--logger tensorboard needs a package"):
        run(flags, "sinusoid", regression(), TRAINING, VALIDATION, TEST)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_another_process_took_meanwhile_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(folder: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> AbstractContextManager[Run]:
        prepare(folder, settings | {"seed": 9}, resume=False, overwrite=False)
        return entry.entered(folder, settings, resume, overwrite)

    monkeypatch.setattr(experiment, "entered", late)
    with pytest.raises(UserError, match=r"the run folder .* exists; continue it with --resume, replace it with"):
        run(config(tmp_path / "run", iterations=1), "sinusoid", regression(), TRAINING, VALIDATION, TEST)
    assert Run(tmp_path / "run").config["seed"] == 9 and not (tmp_path / "run" / "plan.json").exists()


def test_a_slurm_job_that_was_put_in_line_again_goes_on_with_its_own_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Stopped(BaseException):
        """Slurm takes the machine."""

    caplog.set_level(logging.INFO, "toolkit")

    def job(number: int, restarts: int, validations: int = 9) -> Run:
        """The same command, stopped in the validation after so many."""
        drawn = iter(range(6 * validations))

        def validation(generator: torch.Generator) -> Task:
            if next(drawn, None) is None:
                raise Stopped
            return VALIDATION(generator)

        monkeypatch.setenv("SLURM_JOB_ID", str(number))
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        caplog.clear()
        flags = config(tmp_path / "run", overwrite=True, val_tasks=6)
        return run(flags, "sinusoid", regression(), TRAINING, validation, TEST)

    def of_job() -> tuple[str, bool]:
        """Whose run the folder holds, and whether that is finished."""
        return Run(tmp_path / "run").config["job"][0], (tmp_path / "run" / "summary.json").exists()

    before = job(6, 0).curve
    with monkeypatch.context() as killed:
        killed.setattr(entry, "settle", lambda path: None)
        with pytest.raises(Stopped):
            job(7, 0, validations=0)
    assert of_job() == ("7", False)
    with pytest.raises(Stopped):
        job(7, 1, validations=0)
    assert of_job() == ("6", True), "it had saved nothing, so what it was to replace is back"
    with pytest.raises(Stopped):
        job(7, 2, validations=1)
    assert of_job() == ("7", False) and "going on" not in caplog.text
    whole = job(7, 3)
    assert of_job() == ("7", True) and "going on after iteration 3" in caplog.text
    assert torch.equal(whole.curve.metric, before.metric)
    job(7, 4)
    assert "is finished already" in caplog.text
    job(7, 3)
    assert "is finished already" not in caplog.text, "given twice since it was put in line, a command means what it says"
    job(8, 0)
    assert of_job() == ("8", True) and "going on" not in caplog.text, "another job, or the first time of one, replaces it"


class Dropping(nn.Module):
    """A model of sinusoids that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5)), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def test_a_run_that_is_refused_does_not_cost_the_one_that_it_was_to_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(config(tmp_path / "run", iterations=1), "sinusoid", regression(), TRAINING, VALIDATION, TEST)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    dropping = replace(regression(), model=Dropping())

    def refused(learner: Learner = dropping, **changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            flags = config(tmp_path / "run", iterations=1, overwrite=True, **changes)
            run(flags, "sinusoid", learner, TRAINING, VALIDATION, TEST)
        return str(caught.value)

    assert "pip install tensorboard" in refused(regression(), logger=("tensorboard",))
    assert "use --map loop" in refused(replace(regression(), model=Counting()), map="vmap"), "in the first iteration"
    assert "threads, recompute and recorded" in refused(map="vmap", memory="recompute")
    assert "use --reduce fast" in refused(reduce="ordered", map="vmap", trace=False)
    monkeypatch.setattr(Group, "part", lambda *_: (_ for _ in ()).throw(UserError("2 processes cannot share 1 task")))
    assert "cannot share" in refused(regression())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files and first.summary


def test_processes_agree_on_what_they_send_each_other() -> None:
    """Sharded or not is no part of what makes the numbers, but processes that differ in it would wait for each other; whether a
    run is gone on with or replaced is for all to say."""
    said = {"shard": True, "resume": False, "overwrite": True, "seed": 1}
    assert facts(said).items() >= {f"--{key}": value for key, value in said.items()}.items()
    assert "--data-root" not in facts({"data_root": "data"})


def test_flags_and_model_decide_the_plan(tmp_path: Path) -> None:
    learner = algorithms.maml(convolutional())

    def plan(**changes: Any) -> Plan:
        return parts.plan(config(tmp_path, **changes), learner, images)

    assert plan() == Plan("threads", chunk=8), "so few iterations are not worth a measurement"
    assert plan(chunk=2, memory="recompute") == Plan("threads", chunk=2, memory="recompute"), "no recording"
    assert plan(map="loop") == Plan("loop", trace=True) and plan(map="threads", trace=False) == Plan("threads")
    assert plan(map="vmap", compile=True, chunk=3) == Plan("vmap", chunk=3, compile=True)
    assert plan(memory="recompute", compile=True) == Plan("vmap", chunk=32, memory="recompute", compile=True)
    assert plan(autocast="bfloat16").autocast == "bfloat16"
    assert parts.judging(config(tmp_path), Plan("threads", 8, trace=True)) is None, "evaluate knows its own tasks"
    assert parts.judging(config(tmp_path), Plan("loop")) == Plan("loop"), "whose model cannot be mapped otherwise"
    asked = Plan("vmap", 4, "recompute", compile=True, autocast="bfloat16")
    assert parts.judging(config(tmp_path, map="vmap"), asked) == Plan("vmap", 4, trace=True)
    dropping = algorithms.maml(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double())
    numbers = parts.plan(config(tmp_path, map="vmap"), dropping, lambda generator: take(task_batch(), 0))
    assert numbers == Plan("vmap"), "masks would repeat"


@pytest.mark.parametrize("policy", ["batch", "support", "per_step", "per_step_batch", "none"])
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
    assert summary["transductive"] == (policy in ("batch", "per_step_batch"))
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


HARMLESS = {"budget", "out", "resume", "overwrite", "debug", "data_root", "download", "preset", "logger", "protocol", "shard",
            "slurm"}  # fmt: skip


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
    with stop_signals() as received:
        assert received == [] and all(now(handlers)[each] != handler for each, handler in handlers.items())
        os.kill(os.getpid(), number)
        assert received == [number]
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [number, signal.SIGTERM], "only a second Ctrl-C interrupts"
    assert now(handlers) == handlers


def test_a_second_ctrl_c_interrupts_at_once_and_the_handlers_come_back(handlers: dict[int, Any]) -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
        os.kill(os.getpid(), signal.SIGINT)
    assert reached and now(handlers) == handlers


def test_the_handler_of_a_job_whose_time_is_up_is_called_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: calls.append(number))
    try:
        with stop_signals() as received:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert received == [signal.SIGUSR2] and not calls
        assert calls == [signal.SIGUSR2] and threading.active_count() == len(threading.enumerate())
        monkeypatch.setattr("toolkit.stopping.GRACE", 0.01)
        with stop_signals():
            os.kill(os.getpid(), signal.SIGUSR2)
            for _ in range(500):
                if len(calls) > 1:
                    break
                time.sleep(0.01)
            assert len(calls) == 2, "a block that takes too long does not cost the job its place in line"
        assert len(calls) == 2, "and it is put there once"
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_job_whose_time_is_up_saves_first(tmp_path: Path) -> None:
    saved: list[list[str]] = []

    def put_in_line(number: int, frame: Any) -> None:
        saved.append(sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")))
        raise SystemExit(-1)

    before = signal.signal(signal.SIGUSR2, put_in_line)
    try:
        with pytest.raises(SystemExit) as stop:
            sampler = Stopping(12, signal.SIGUSR2)
            run(config(tmp_path / "run", validate_every=7), "x", regression(), sampler, VALIDATION, TEST)
    finally:
        signal.signal(signal.SIGUSR2, before)
    (steps,) = saved
    assert stop.value.code == -1 and len(steps) == 1 and steps[0] < "step-00000007"


def test_signals_are_left_alone_outside_the_main_thread(handlers: dict[int, Any]) -> None:
    seen: list[Any] = []

    def work() -> None:
        with stop_signals() as received:
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
    # Task 19 of the sampler's life: two to rehearse, three to choose the plan, then three for each of the iterations 1 to 5.
    with caplog.at_level(logging.INFO, "toolkit"), pytest.raises(SystemExit) as stop:
        run(flags, "sinusoid", learner, Stopping(19, number), VALIDATION, TEST)
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
    (tmp_path / "run" / "summary.json").unlink()
    run(replace(flags, resume=True), "x", regression(), TRAINING, VALIDATION, TEST)
    assert any(isinstance(tree, dict) and set(tree) == set(Meta._fields) for tree in moved)


# Methods that the harness treats apart.


def vectors(seed: int) -> ClassBank:
    """Five classes of points with three coordinates, float64."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 3, generator=generator, dtype=torch.float64).repeat_interleave(12, 0)
    items = centres + 0.5 * torch.randn(60, 3, generator=generator, dtype=torch.float64)
    return ClassBank(items, torch.arange(6) * 12, tuple("abcde"), f"points {seed}")


EPISODES = [Episodes(vectors(seed), ways=2, shots=2, queries=4) for seed in (1, 2, 3)]
CLASSES = AllClasses(vectors(1), queries=12)


def metas(flags: sinusoid.Config, learner: Learner, training: Any) -> list[Meta]:
    """The meta-parameters after each iteration of the whole training."""
    records = train(learner, training, flags.iterations, flags.tasks, flags.meta_lr, flags.seed)
    return [pytree.tree_map(torch.clone, record.meta) for record in records]


def loaded(folder: Path) -> tuple[Meta, dict[str, Any]]:
    found = checkpoint.load_newest(folder / "checkpoints")
    assert found is not None
    return found


def untimed(record: Run) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in record.metrics]


def test_what_trains_without_steps_and_is_tested_with_some_is_chosen_and_shown_after_those(tmp_path: Path) -> None:
    """Joint training's loss without steps says nothing of what adapting makes of it, where classes have no fixed numbers."""
    flags = config(tmp_path / "run", meta_lr=0.05)
    learner = algorithms.joint(named(), inner_lr=0.1)
    record = run(flags, "points", learner, *EPISODES)
    trained = metas(flags, learner, EPISODES[0])
    for row in validations(record):
        curve = evaluate(learner, trained[int(row["iteration"]) - 1], EPISODES[1], 10, 3, flags.eval_seed, "val")
        assert row["val_metric"] == float(curve.mean()[3]) and flags.eval_steps == 3
    assert record.summary["card"]["worst_tasks"] == record.curve.worst_tasks()[:, 3].tolist()


@pytest.mark.parametrize("method", ["fine_tune", "linear_probe"])
def test_a_pretrained_method_trains_its_pretrain_and_is_judged_by_itself(tmp_path: Path, method: str) -> None:
    flags = config(tmp_path / "run", meta_lr=0.05)
    learner = algorithms.METHODS[method](named(), classes=5, inner_lr=0.1)
    record = run(flags, "points", learner, *EPISODES, pretraining=CLASSES)
    assert learner.pretrain is not None and learner.pretrain.name == f"{method} pretraining"
    trained = metas(flags, learner.pretrain, CLASSES)
    weights, state = loaded(tmp_path / "run")
    assert torch.equal(flat(state["meta"]), flat(trained[-1]._asdict()))
    assert state["meta"]["params"]["head.weight"].shape == (5, 4)
    rows = validations(record)
    assert [row["iteration"] for row in rows] == [3, 6, 7]
    for row in rows:
        own = learner.inherit(trained[int(row["iteration"]) - 1])
        curve = evaluate(learner, own, EPISODES[1], 10, 3, flags.eval_seed, "val")  # after the steps of the test: it has none
        assert (row["val_metric"], row["val_loss"]) == (float(curve.mean()[-1]), float(curve.mean(curve.loss)[-1]))
    best = learner.inherit(trained[int(record.summary["selected"]["iteration"]) - 1])
    assert torch.equal(flat(weights), flat(best)) and weights.params["head.weight"].shape == (2, 4)
    assert torch.equal(
        weights.params["body.weight"], trained[int(record.summary["selected"]["iteration"]) - 1].params["body.weight"]
    )
    assert torch.equal(record.curve.loss, evaluate(learner, best, EPISODES[2], 6, 3).loss)
    assert record.curve.loss[:, 0].tolist() == pytest.approx([0.6931471805599453] * 6), "a new head guesses"
    assert bool((record.curve.loss[:, 3] < record.curve.loss[:, 0]).all())
    assert (record.summary["algorithm"], record.summary["inner_steps"]) == (method, 0)


@pytest.mark.parametrize("method", ["fine_tune", "maml_plus_plus", "reptile", "metal"])
def test_a_run_of_any_kind_that_was_cut_off_ends_like_the_unbroken_one(tmp_path: Path, method: str) -> None:
    learner = algorithms.build(method, named(), 5, inner_lr=0.1, **{"inner_steps": 2} if method != "fine_tune" else {})
    whole, broken = (config(tmp_path / name, iterations=8, validate_every=4, meta_lr=0.03) for name in ("whole", "broken"))
    expected = run(whole, "points", learner, *EPISODES, pretraining=CLASSES)
    run(broken, "points", learner, *EPISODES, pretraining=CLASSES)
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "step-00000008")
    assert loaded(tmp_path / "broken")[1]["iteration"] == 4
    (tmp_path / "broken" / "summary.json").unlink()
    (tmp_path / "broken" / "curve.json").unlink()
    found = run(replace(broken, resume=True), "points", learner, *EPISODES, pretraining=CLASSES)
    assert torch.equal(found.curve.loss, expected.curve.loss) and untimed(found) == untimed(expected)
    assert found.summary["selected"] == expected.summary["selected"]
    states = [loaded(tmp_path / name) for name in ("broken", "whole")]
    assert torch.equal(flat(states[0][0]), flat(states[1][0]))
    assert torch.equal(flat(states[0][1]["meta"]), flat(states[1][1]["meta"]))


def test_a_pretrained_method_without_pretraining_tasks_is_refused(tmp_path: Path) -> None:
    learner = algorithms.fine_tune(named(), classes=5, inner_lr=0.1)
    with pytest.raises(
        UserError, match=r"^fine_tune pretrains on all training classes, but this experiment has none"
    ) as caught:
        run(config(tmp_path / "run"), "points", learner, *EPISODES)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_per_step_batch_norm_is_measured_saved_and_said(tmp_path: Path) -> None:
    short = asdict(config(tmp_path / "run"))
    flags = omniglot.Config(**{key: short[key] for key in short if key not in ("sampler", "model")})
    learner = algorithms.maml_plus_plus(convolutional(), inner_lr=0.1, inner_steps=2)
    record = run(flags, "images", learner, images, images, images)
    assert (record.summary["batch_norm"], record.summary["transductive"]) == ("per_step", False)
    assert flags.batch_norm is None and record.config["batch_norm"] == "per_step"
    weights, state = loaded(tmp_path / "run")
    assert set(weights.stats) == {f"point{k}/1.running_{kind}" for k in range(3) for kind in ("mean", "var")}
    assert all(tensor.shape == (3,) and tensor.any() for tensor in weights.stats.values())
    assert not state["meta"]["stats"], "statistics are measured for what is judged, never trained"
    assert {f"norm{k}/1.{kind}" for k in range(3) for kind in ("weight", "bias")} < set(weights.learned)
    assert torch.equal(evaluate(learner, weights, images, 6, 3).loss, record.curve.loss)
    again = run(replace(flags, resume=True), "images", learner, images, images, images)
    assert torch.equal(again.curve.loss, record.curve.loss)


@pytest.mark.parametrize("method", ["meta_sgd", "maml_plus_plus", "maml"])
def test_learned_rates_are_written_beside_each_validation(tmp_path: Path, method: str) -> None:
    shared = {"loss": squared_error, "metric": squared_error, "inner_lr": 0.01, "inner_steps": 2}
    flags, learner = config(tmp_path / "run", meta_lr=0.01), algorithms.METHODS[method](mlp((1, 6, 1)), **shared)
    record = run(flags, "sinusoid", learner, TRAINING, VALIDATION, TEST)
    rows = [row for row in record.metrics if any(key.startswith("rate/") for key in row)]
    if method == "maml":
        assert not rows
        return
    assert [row["iteration"] for row in rows] == [3, 6, 7]
    tensors = [name for name, _ in mlp((1, 6, 1)).named_parameters()]
    steps = [f"step{k}/" for k in range(2)] if method == "maml_plus_plus" else [""]
    names = [f"{step}lr/{name}" for step in steps for name in tensors]
    for row, meta in zip(rows, [metas(flags, learner, TRAINING)[i - 1] for i in (3, 6, 7)], strict=True):
        assert row == {"iteration": row["iteration"]} | {f"rate/{name}": float(meta.learned[name].mean()) for name in names}
    assert rows[0]["rate/" + names[0]] != rows[1]["rate/" + names[0]]


# From flags to a learner.


def learner_of(**flags: Any) -> Learner:
    return build(sinusoid.Config(**flags), mlp((1, 6, 1)), loss=squared_error, metric=squared_error)


def test_settings_of_a_method_reach_its_learner() -> None:
    learner = learner_of(algorithm="imaml", method=("lam=0.5", "cg_steps=3"))
    assert learner.objective == Implicit(0.5, 3, 0.0) and learner.rule == Proximal(SGD(0.01), 0.5)
    plain = learner_of(algorithm="imaml")
    assert plain.objective == Implicit(2.0, 5, 0.0) and plain.rule == Proximal(SGD(0.01), 2.0)
    assert learner_of(algorithm="cavia", method=("context=7",)).init().params["body.layer0.context"].shape == (7,)
    adapters = learner_of(algorithm="lora_maml", method=("rank=2", "peft=False")).init().params
    assert {tuple(p.shape) for name, p in adapters.items() if "lora_A" in name} == {(2, 1), (2, 6)}


@pytest.mark.parametrize(
    ("name", "pairs", "found"),
    [
        ("imaml", ("lam=0.5", "cg_steps=3"), {"lam": 0.5, "cg_steps": 3}),
        ("lora_maml", ("layers=body*", "peft=False"), {"layers": "body*", "peft": False}),
        ("cavia", ("layer=None",), {"layer": None}),
        ("lora_maml", ("layers=('a', 'b=c')",), {"layers": ("a", "b=c")}),
        ("maml", (), {}),
    ],
)
def test_settings_are_read_as_python_values_or_as_text(name: str, pairs: tuple[str, ...], found: dict[str, Any]) -> None:
    assert settings(name, pairs) == found


@pytest.mark.parametrize(
    ("name", "pair", "sentence"),
    [
        ("imaml", "lamb=0.5", r"^--method lamb=0\.5: imaml takes lam, cg_steps, damping, as key=value$"),
        ("imaml", "lam", "^--method lam: imaml takes lam, cg_steps, damping, as key=value$"),
        ("imaml", "inner_lr=0.1", "^--method inner_lr=0.1: imaml takes lam"),
        ("maml", "lam=0.5", r"^--method lam=0\.5: maml takes none$"),
        ("fine_tune", "classes=7", "^--method classes=7: fine_tune takes none$"),
        ("mamml", "lam=0.5", "^unknown algorithm 'mamml'"),
    ],
)
def test_settings_that_a_method_does_not_have_are_refused(name: str, pair: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        learner_of(algorithm=name, method=(pair,))
    with pytest.raises(UserError, match=sentence):
        settings(name, (pair,))


def test_the_order_of_the_flags_is_that_of_the_learner() -> None:
    assert learner_of(inner_steps=3).order is None
    assert learner_of(inner_steps=3, order="first").order == 0
    assert learner_of(inner_steps=3, order="truncated:2").order == 2
    annealed = learner_of(inner_steps=3, order="annealed:0.4")
    assert [annealed.at(progress).order for progress in (0, 0.39, 0.4, 1)] == [0, 0, None, None] and annealed.order is None
    implicit = learner_of(inner_steps=3, order="implicit")
    assert (implicit.order, implicit.objective, implicit.rule) == (0, Implicit(), Proximal(SGD(0.01)))
    assert learner_of(algorithm="fomaml").order == 0 and learner_of(algorithm="fomaml", order="second").order is None


def test_rule_inner_batch_and_clips_of_the_flags_are_those_of_the_learner() -> None:
    assert learner_of().rule == SGD(0.01) and learner_of().batch is None
    assert learner_of(rule="adam 1e-3").rule == Adam(1e-3)
    groups = learner_of(rule="head: sgd 0.2 learned; rest: frozen").rule
    assert isinstance(groups, Groups) and groups.rules == (("*head*", SGD(0.2, learn="tensor")), ("*", Frozen()))
    assert learner_of(inner_batch=4).batch == 4
    assert learner_of(inner_clip=1.5).rule == Clip(SGD(0.01), 1.5)
    assert learner_of(rule="adam 1e-3", inner_clip=2.0).rule == Clip(Adam(1e-3), 2.0)


def test_the_outer_loop_of_the_flags_takes_the_place_of_the_methods_own_field_by_field() -> None:
    assert learner_of().outer == Outer()
    chosen = {"meta_optimizer": "sgd", "meta_schedule": "cosine", "meta_clip": 0.5}
    assert learner_of(**chosen).outer == Outer("sgd", "cosine", 0.5)
    reptile = {"algorithm": "reptile", "meta_lr": 0.5}
    assert learner_of(**reptile).outer == Outer("sgd", "linear")
    assert learner_of(**reptile, meta_clip=0.5).outer == Outer("sgd", "linear", 0.5)
    assert learner_of(**reptile, meta_schedule="constant").outer == Outer("sgd", "constant")
    assert learner_of(algorithm="maml_plus_plus", meta_optimizer="adam").outer == Outer("adam", "cosine")


def test_what_pretrains_has_the_outer_loop_of_the_flags_too() -> None:
    flags = omniglot.Config(algorithm="linear_probe", head="5", meta_clip=0.5, meta_schedule="cosine")
    assert build(flags, convolutional(), classes=7).pretrain.outer == Outer("adam", "cosine", 0.5)


def test_batch_norm_and_head_of_the_flags_are_those_of_the_learner() -> None:
    def policy(**flags: Any) -> str:
        return build(omniglot.Config(**flags), convolutional()).batch_norm

    assert (policy(), policy(batch_norm="support")) == ("batch", "support")
    assert (policy(algorithm="maml_plus_plus"), policy(algorithm="maml_plus_plus", batch_norm="batch")) == ("per_step", "batch")
    assert build(omniglot.Config(algorithm="anil", head="5"), convolutional()).adapted_names == ("5.weight", "5.bias")


def test_label_orders_change_the_test_of_a_learner_that_depends_on_them_and_are_recorded(tmp_path: Path) -> None:
    learner = algorithms.maml(named(), inner_lr=0.3)
    once, thrice = (run(config(tmp_path / str(n), permutations=n), "points", learner, *EPISODES, chance=0.5) for n in (1, 3))
    assert (once.config["permutations"], thrice.config["permutations"]) == (1, 3)
    assert once.summary["config_hash"] != thrice.summary["config_hash"]
    assert torch.equal(flat(loaded(tmp_path / "1")[0]), flat(loaded(tmp_path / "3")[0])), "training is the same"
    assert once.summary["task_list_hash"] == thrice.summary["task_list_hash"]
    assert not torch.allclose(once.curve.loss, thrice.curve.loss)
    expected = evaluate(learner, loaded(tmp_path / "3")[0], EPISODES[2], 6, 3, permutations=3)
    assert torch.equal(thrice.curve.loss, expected.loss)
    even = algorithms.protonet(named())
    pair = [run(config(tmp_path / f"even{n}", permutations=n), "points", even, *EPISODES) for n in (1, 3)]
    assert torch.allclose(pair[0].curve.loss, pair[1].curve.loss)


# Files of the first version, which had neither the later flags nor statistics.


def test_a_run_of_the_first_version_goes_on(tmp_path: Path) -> None:
    def flags(name: str, **changes: Any) -> omniglot.Config:
        short = asdict(config(tmp_path / name, iterations=8, validate_every=4))
        return omniglot.Config(**{key: short[key] for key in short if key not in ("sampler", "model")} | changes)

    learner = algorithms.maml(convolutional(), inner_lr=0.1)
    expected = run(flags("whole"), "images", learner, images, images, images)
    run(flags("old"), "images", learner, images, images, images)
    folder = tmp_path / "old"
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    recorded = Run(folder).config
    assert recorded["batch_norm"] == "batch" and LATER.keys() <= recorded.keys()
    write_json(folder / "config.json", {key: value for key, value in recorded.items() if key not in LATER})
    weights, state = loaded(folder)
    shutil.rmtree(folder / "checkpoints")
    state["meta"] = {part: state["meta"][part] for part in ("params", "learned")}
    checkpoint.save(folder / "checkpoints", 4, weights, state, config_hash(Run(folder).config))
    with pytest.raises(UserError, match="was made with --order None, not first; resume with the same flags") as caught:
        run(flags("old", resume=True, order="first"), "images", learner, images, images, images)
    assert "\n" not in str(caught.value)
    found = run(flags("old", resume=True), "images", learner, images, images, images)
    assert torch.equal(found.curve.loss, expected.curve.loss) and untimed(found) == untimed(expected)
    assert found.summary["config_hash"] == expected.summary["config_hash"]


def test_a_finished_run_is_not_tested_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = run(config(tmp_path / "run"), "x", regression(), TRAINING, VALIDATION, TEST)
    before = (first.path / "summary.json").read_bytes()
    caplog.set_level(logging.INFO, "toolkit")
    again = run(config(tmp_path / "run", resume=True), "x", regression(), TRAINING, VALIDATION, TEST)
    assert "is finished already" in caplog.text and (again.path / "summary.json").read_bytes() == before


def test_what_is_refused_is_refused_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other.txt").touch()
    monkeypatch.setattr("toolkit.experiment._plan", lambda *given: pytest.fail("measures before it refuses"))
    with pytest.raises(UserError, match="is not a run folder"):
        run(config(tmp_path / "run"), "x", regression(), TRAINING, VALIDATION, TEST)
    with pytest.raises(UserError, match="logger"):
        run(config(tmp_path / "new", logger=("tensorbord",)), "x", regression(), TRAINING, VALIDATION, TEST)
    assert not (tmp_path / "new").exists()
