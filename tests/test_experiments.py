"""The experiments as a user meets them: flags, presets, errors of one sentence, and what a short run leaves."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import omniglot, quickstart, sinusoid
from toolkit import Batch, Task, UserError, algorithms, draw, evaluate, experiment
from toolkit.data.bank import ClassBank
from toolkit.distributed import Group
from toolkit.experiment import run
from toolkit.flags import launch
from toolkit.metrics import squared_error
from toolkit.models import mlp
from toolkit.processes import Lost
from toolkit.runs.folder import Run
from toolkit.samplers import Sinusoid

SHORT = [
    "--iterations",
    "8",
    "--validate-every",
    "4",
    "--val-tasks",
    "4",
    "--eval-tasks",
    "5",
    "--eval-steps",
    "3",
    "--tasks",
    "3",
]


def start(module: Any, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["experiment.py", *flags])
    presets = getattr(module, "PRESETS", {})
    launch(module.Config, module.main, presets, module.__doc__)


def tiny_bank(split: str, *_: Any, **__: Any) -> ClassBank:
    generator = torch.Generator().manual_seed(len(split))
    images = torch.randint(256, (6 * 20, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return ClassBank(images, torch.arange(7) * 20, tuple(f"class {i}" for i in range(6)), f"tiny {split}")


REFUSED: dict[str, tuple[Any, list[str], str]] = {
    "algorithm": (sinusoid, ["--algorithm", "mamml"], r"unknown algorithm 'mamml'; did you mean 'maml'\?"),
    "sampler": (quickstart, ["--sampler", "glyph"], "did you mean 'glyphs'"),
    "sampler of omniglot": (omniglot, ["--sampler", "omniglot"], "did you mean 'omniglot-"),
    "model": (omniglot, ["--model", "conv5"], "did you mean 'conv4'"),
    "preset": (sinusoid, ["--preset", "fast"], "unknown preset 'fast'.*known: default, quick"),
    "batch norm": (omniglot, ["--batch-norm", "suport"], "did you mean 'support'"),
    "ways": (omniglot, ["--ways", "7"], "7 ways need 7 classes, but tiny train has 6; use --ways 6 or fewer"),
    "queries": (omniglot, ["--queries", "20"], "1 shots and 20 queries need 21 images.*'class 0'.*has 20; use --queries 19"),
    "no shots": (sinusoid, ["--shots", "0"], "--shots is 0; give at least 1"),
    "no tasks": (sinusoid, ["--tasks", "0"], "--tasks is 0; give at least 1"),
    "steps": (sinusoid, ["--inner-steps", "-1"], "inner.steps is -1; give 0 or more"),
    "rate": (sinusoid, ["--inner-lr", "nan"], "--inner-lr is nan; give a positive number"),
    "outer rate": (sinusoid, ["--meta-lr", "0"], "--meta-lr is 0.0; give a positive number"),
    "device": (sinusoid, ["--device", "tpu"], "--device tpu is not usable here; use one of: cpu"),
    "chunk": (sinusoid, ["--chunk", "0", "--map", "vmap"], "chunk is 0"),
    "threads compiled": (sinusoid, ["--map", "threads", "--compile"], "cannot run in threads"),
    "classes for regression": (sinusoid, ["--algorithm", "protonet"], "protonet needs one integer class per example, but y is"),
    "pretraining for regression": (sinusoid, ["--algorithm", "fine_tune"], "fine_tune pretrains on all training classes"),
    "head": (omniglot, ["--algorithm", "r2d2", "--head", "top"], "head='top' names no linear layer of the model; it has head"),
    "head of anil": (omniglot, ["--algorithm", "anil", "--head", "top"], r"adapts='top.\*' matches no trained parameter; the"),
    "head of boil": (
        omniglot,
        ["--algorithm", "boil", "--head", "top"],
        "head='top' names no layer of the model; its linear layers are head",
    ),
    "rule pattern": (
        sinusoid,
        ["--rule", "neck: sgd 0.1; rest: adam 1e-3"],
        r"'\*neck\*' matches no parameter that adapts; these adapt: body.layer0.weight",
    ),
    "rule kind": (sinusoid, ["--rule", "sdg 0.1"], "unknown kind 'sdg'; did you mean 'sgd'"),
    "rule of a method with its own": (
        sinusoid,
        ["--algorithm", "meta_sgd", "--rule", "sgd 0.1"],
        "meta_sgd leaves no choice of rule",
    ),
    "rates per step": (sinusoid, ["--rule", "sgd 0.1 learned per-step=3"], "rates for 3 steps, but the learner takes 1 inner"),
    "setting": (
        sinusoid,
        ["--algorithm", "imaml", "--method", "lamb=1"],
        "--method lamb=1: imaml takes lam, cg_steps, damping",
    ),
    "no conjugate gradient": (
        sinusoid,
        ["--algorithm", "imaml", "--method", "cg_steps=0"],
        "0 steps of conjugate gradient give",
    ),
    "setting of another kind": (
        sinusoid,
        ["--algorithm", "imaml", "--method", "cg_steps=2.5"],
        "--method cg_steps=2.5: cg_steps is a whole number; give one",
    ),
    "plain descent at Adam's rate": (
        sinusoid,
        ["--algorithm", "reptile"],
        "reptile moves by plain descent, where --meta-lr 0.001",
    ),
    "order of a method with its own": (
        sinusoid,
        ["--algorithm", "maml_plus_plus", "--order", "first"],
        "maml_plus_plus leaves no choice of order",
    ),
    "learned loss in first order": (
        sinusoid,
        ["--algorithm", "metal", "--order", "first"],
        "a learned inner loss gets no gradient in first order; use order second",
    ),
    "order": (sinusoid, ["--order", "third"], "unknown order 'third'"),
    "truncated": (sinusoid, ["--order", "truncated:4"], "the last 4 of 1 inner steps cannot be of second order"),
    "annealed": (sinusoid, ["--order", "annealed:2"], "give the fraction of the training"),
    "implicit twice": (sinusoid, ["--algorithm", "imaml", "--order", "second"], "imaml leaves no choice of order"),
    "inner batch": (sinusoid, ["--inner-batch", "0"], "--inner-batch is 0; give at least 1"),
    "inner clip": (sinusoid, ["--inner-clip", "0"], "the inner gradient's longest length is 0.0"),
    "outer clip": (sinusoid, ["--meta-clip", "-1"], "the meta-gradient's longest length is -1.0"),
    "label orders": (sinusoid, ["--permutations", "4"], "--permutations 4 needs classes"),
    "backend": (sinusoid, ["--algorithm", "imaml", "--backend", "learn2learn"], "learn2learn cannot compute imaml"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_flags_cost_one_sentence_and_no_run_folder(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, flags, sentence = REFUSED[case]
    monkeypatch.setattr("toolkit.data.omniglot.omniglot", tiny_bank)
    monkeypatch.setattr("toolkit.data.glyphs.glyphs", tiny_bank)
    with pytest.raises(SystemExit) as stop:
        start(module, monkeypatch, *SHORT, "--no-compile", "--out", str(tmp_path / "run"), *flags)
    errors = capsys.readouterr().err
    assert stop.value.code == 2
    assert re.search(f"^error: .*{sentence}", errors, re.MULTILINE), errors
    assert "Traceback" not in errors and not (tmp_path / "run").exists()


def test_a_data_root_without_data_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        start(omniglot, monkeypatch, "--data-root", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run"))
    assert stop.value.code == 2
    assert re.search("^error: there is no .*nowhere.*--data-root, or add --download", capsys.readouterr().err)


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unknown algorithm"):
        start(sinusoid, monkeypatch, "--algorithm", "x", "--debug", "--out", str(tmp_path / "run"))


# Every method is run by the contract; here those are slow that leave nothing of their own.
LEAVES = ("maml", "maml_plus_plus", "protonet")
RUNS = [
    *(pytest.param(omniglot, name, marks=[] if name in LEAVES else pytest.mark.slow) for name in algorithms.METHODS),
    (sinusoid, "maml"),
    *(
        pytest.param(sinusoid, name, marks=pytest.mark.slow)
        for name in ("joint", "reptile", "cavia", "metal", "maml_plus_plus")
    ),
    *(pytest.param(quickstart, name, marks=pytest.mark.slow) for name in ("maml", "linear_probe")),
]


@pytest.mark.parametrize(("module", "algorithm"), RUNS)
def test_a_short_run_fills_its_folder(
    module: Any, algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("toolkit.data.omniglot.omniglot", tiny_bank)
    monkeypatch.setattr("toolkit.data.glyphs.glyphs", tiny_bank)
    out = tmp_path / "run"
    more = ["--meta-lr", "0.5"] if algorithm == "reptile" else []
    start(module, monkeypatch, *SHORT, "--no-compile", "--out", str(out), "--algorithm", algorithm, *more)
    picture = "fits" if module is sinusoid else "task"
    names = {path.name for path in out.iterdir()}
    assert ("rates.png" in names) == (algorithm in ("meta_sgd", "maml_plus_plus"))
    assert names >= {"config.json", "metrics.jsonl", "curve.json", "summary.json", "checkpoints", "example.safetensors"}
    assert names >= {f"{figure}.{kind}" for figure in ("adaptation", "training", picture) for kind in ("png", "pdf")}
    summary = Run(out).summary
    assert summary.keys() >= {
        "experiment", "algorithm", "sampler", "seed", "test", "cost", "versions", "config_hash", "task_list_hash", "batch_norm",
        "git",
    }  # fmt: skip
    assert summary["test"].keys() >= {"tasks", "steps", "metric", "mean", "ci95", "median", "loss"}
    assert summary["cost"].keys() >= {
        "seconds", "seconds_per_iteration", "tasks_per_second", "peak_mb", "parameters", "adapted_parameters",
    }  # fmt: skip
    curve = Run(out).curve
    assert (curve.tasks, curve.steps) == (5, 3) and summary["algorithm"] == algorithm
    assert summary["test"]["mean"] == pytest.approx(curve.mean().tolist(), abs=1e-6)
    assert "as trained" in capsys.readouterr().out


def test_the_test_curve_belongs_to_the_checkpoint_chosen_on_validation_tasks(tmp_path: Path) -> None:
    flags = sinusoid.Config(
        iterations=12, validate_every=3, val_tasks=20, eval_tasks=7, eval_steps=2, compile=False, out=tmp_path / "run"
    )
    learner = algorithms.maml(mlp(), loss=squared_error, metric=squared_error, inner_lr=0.01)
    test = Sinusoid(10, 20)
    record = run(flags, "sinusoid", learner, Sinusoid(10, 10), test, test)
    rows = [row for row in record.metrics if "val_metric" in row]
    best = min(rows, key=lambda row: row["val_metric"])
    assert record.summary["selected"]["iteration"] == best["iteration"]
    from toolkit.runs.checkpoint import load_newest

    loaded = load_newest(tmp_path / "run" / "checkpoints")
    assert loaded is not None
    curve = evaluate(learner, loaded[0], test, 7, 2)
    assert torch.equal(curve.loss, record.curve.loss) and curve.task_list_hash == record.curve.task_list_hash


def poisoned(bad_task: int) -> Callable[[torch.Generator], Task]:
    """Sinusoid tasks, of which one has a query label that is not a number."""
    plain, seen = Sinusoid(5, 5), draw(Sinusoid(5, 5), bad_task + 1, seed=0)
    mark = seen.support.x[bad_task]

    def sampler(generator: torch.Generator) -> Task:
        task = plain(generator)
        if torch.equal(task.support.x, mark):
            return Task(task.support, Batch(task.query.x, task.query.y * torch.nan))
        return task

    return sampler


def test_a_loss_that_is_not_finite_at_once_says_nothing_of_saving(tmp_path: Path) -> None:
    flags = sinusoid.Config(iterations=20, tasks=4, compile=False, out=tmp_path / "run", val_tasks=3, eval_tasks=3, map="loop")
    learner = algorithms.maml(mlp(), loss=squared_error, metric=squared_error, inner_lr=0.01)
    with pytest.raises(UserError, match=r"iteration 1: the loss of task 1 is nan; lower .*, or look at this task's data$"):
        run(flags, "sinusoid", learner, poisoned(1), Sinusoid(5, 5), Sinusoid(5, 5))


def test_a_loss_that_is_not_finite_stops_with_iteration_and_task_and_keeps_what_was_good(tmp_path: Path) -> None:
    flags = sinusoid.Config(iterations=20, tasks=4, compile=False, out=tmp_path / "run", val_tasks=3, eval_tasks=3)
    learner = algorithms.maml(mlp(), loss=squared_error, metric=squared_error, inner_lr=0.01)
    with pytest.raises(UserError, match=r"iteration 6: the loss of task 22 is nan; .*everything up to iteration 5 is saved"):
        run(flags, "sinusoid", learner, poisoned(22), Sinusoid(5, 5), Sinusoid(5, 5))
    from toolkit.runs.checkpoint import load_newest

    loaded = load_newest(tmp_path / "run" / "checkpoints")
    assert loaded is not None and loaded[1]["iteration"] == 5
    assert all(tensor.isfinite().all() for tensor in loaded[1]["meta"]["params"].values())


@pytest.mark.parametrize("last", [False, True])
def test_a_process_lost_within_a_validation_costs_no_validation(
    last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    """What is saved must be before it: a resume would take the validation for done, and the weights for not the best."""
    flags = sinusoid.Config(
        iterations=6, validate_every=3, tasks=4, compile=False, val_tasks=20, eval_tasks=7, eval_steps=1, meta_lr=0.1
    )
    learner = algorithms.maml(mlp(), loss=squared_error, metric=squared_error, inner_lr=0.01)
    parts = "sinusoid", learner, *[Sinusoid(5, 5)] * 3
    whole = run(replace(flags, out=tmp_path / "whole"), *parts)
    lost, real = iter([False] * last + [True]), experiment._validate

    def validate(*given: Any) -> Any:
        if next(lost, False):
            raise Lost("another of the 2 processes is gone")
        return real(*given)

    monkeypatch.setattr(experiment, "_validate", validate)
    broken = replace(flags, out=tmp_path / "broken")
    with pytest.raises(UserError, match=r"^another of the 2 processes is gone; the same command with --resume goes on from"):
        run(broken, *parts)
    again = run(replace(broken, resume=True), *parts)
    assert again.summary["selected"] == whole.summary["selected"]
    assert torch.equal(again.curve.loss, whole.curve.loss)
    strip = [[{k: v for k, v in row.items() if k != "seconds"} for row in found.metrics] for found in (again, whole)]
    assert strip[0] == strip[1]


def test_processes_compare_the_tasks_that_they_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> None:
    """Other data or another file of a sampler on one machine would add up gradients of other tasks, which no flag shows."""
    seen = list[dict[str, Any]]()
    monkeypatch.setattr(Group, "agree", lambda group, facts, advice: seen.append(facts))
    flags = sinusoid.Config(iterations=1, tasks=2, compile=False, val_tasks=2, eval_tasks=2, eval_steps=1)
    learner = algorithms.maml(mlp(), loss=squared_error, metric=squared_error)
    for i, shots in enumerate((5, 6, 6)):
        run(replace(flags, out=tmp_path / f"{i}"), "sinusoid", learner, *[Sinusoid(shots, 5)] * 3)
    five, six, again = (facts["task 0 of training"] for facts in seen if "task 0 of training" in facts)
    assert five != six == again


def test_a_changed_model_does_not_go_on_by_another_ones_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    flags = sinusoid.Config(iterations=4, tasks=4, compile=False, val_tasks=3, eval_tasks=3, eval_steps=1, out=tmp_path / "run")
    kinds = {"loss": squared_error, "metric": squared_error, "inner_lr": 0.01}
    samplers = [Sinusoid(5, 5)] * 3
    run(flags, "sinusoid", algorithms.maml(mlp(), **kinds), *samplers)
    (flags.out / "summary.json").unlink()
    smaller = algorithms.maml(mlp((1, 7, 1)), **kinds)
    with pytest.raises(UserError, match=r"does not fit this model: params/\S+ was \(40, 1\) and is \(7, 1\); resume with"):
        run(replace(flags, resume=True), "sinusoid", smaller, *samplers)
    monkeypatch.setattr(experiment, "source_hash", lambda: "other")
    run(replace(flags, resume=True), "sinusoid", algorithms.maml(mlp(), **kinds), *samplers)
    assert "the code has changed since the checkpoint" in caplog.text


@pytest.mark.parametrize("module", [sinusoid, omniglot, quickstart])
def test_presets_and_flags(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, values in getattr(module, "PRESETS", {}).items():
        caught: list[Any] = []
        monkeypatch.setattr(sys, "argv", ["x", f"--preset={name}", "--seed", "5"])
        launch(module.Config, caught.append, module.PRESETS, module.__doc__)
        assert caught[0].seed == 5 and all(getattr(caught[0], key) == value for key, value in values.items())


def test_config_json_holds_every_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    start(sinusoid, monkeypatch, *SHORT, "--no-compile", "--out", str(out), "--seed", "3")
    config = json.loads((out / "config.json").read_text())
    assert config["seed"] == 3 and config["experiment"] == "sinusoid"
    assert set(config) == {"experiment", "metric", *sinusoid.Config.__dataclass_fields__}


def test_help_names_the_shared_flags(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = (
        "algorithm sampler model shots queries inner-steps inner-lr meta-lr tasks iterations eval-tasks eval-steps seed device"
    )
    shared = [f"--{name}" for name in [*names.split(), "out", "resume", "compile", "no-compile", "debug"]]
    for name in ("sinusoid", "omniglot", "quickstart"):
        with pytest.raises(SystemExit):
            start(import_module(f"experiments.{name}"), monkeypatch, "--help")
        text = capsys.readouterr().out
        missing = [flag for flag in shared + (["--ways", "--data-root"] if name != "sinusoid" else []) if flag not in text]
        assert not missing, (name, missing)
