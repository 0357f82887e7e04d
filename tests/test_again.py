"""A finished run opened again: other tasks, an exact repetition, a task's picture, and what cannot be done in one sentence."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import toolkit
from experiments import omniglot, quickstart, sinusoid
from toolkit import UserError, draw, evaluate, parts
from toolkit.again import differences, evaluated, opened, repeated, shown
from toolkit.flags import EpisodeFlags, Flags
from toolkit.plots import figures
from toolkit.plots.save import save
from toolkit.runs import checkpoint
from toolkit.runs.folder import Run, config_hash, write_json
from toolkit.task import take

SHORT: dict[str, Any] = {
    "iterations": 4, "validate_every": 2, "tasks": 3, "val_tasks": 4, "eval_tasks": 5, "eval_steps": 2, "compile": False,
}  # fmt: skip
MINE = """
import torch
from toolkit import Batch, Task

def lines(generator):
    x = torch.randn(20, 1, generator=generator)
    return Task(Batch(x[:10], 2 * x[:10]), Batch(x[10:], 2 * x[10:]))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Short runs, each made once and copied for each test."""
    place, made = tmp_path_factory.mktemp("runs"), dict[str, Path]()

    def run(tmp_path: Path, name: str = "glyphs", algorithm: str = "maml", **changed: Any) -> Run:
        key = f"{name}-{algorithm}-{sorted(changed.items())}"
        if key not in made:
            made[key] = place / f"run{len(made)}"
            kind, body = (sinusoid.Config, sinusoid.main) if name == "sinusoid" else (quickstart.Config, quickstart.main)
            given = {"queries": 1, "eval_queries": 2, "model": "conv4-32"} if kind is quickstart.Config else {}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("toolkit.plots.save.draw_run", lambda folder: [])  # figures have tests of their own
                body(kind(algorithm=algorithm, out=made[key], **SHORT | given | changed))  # type: ignore[arg-type]
        shutil.copytree(made[key], tmp_path / "run")
        return Run(tmp_path / "run")

    return run


def test_the_same_tasks_give_the_same_numbers(finished: Callable[..., Run], tmp_path: Path) -> None:
    run = finished(tmp_path)
    folder, summary = evaluated(run, [])
    again = Run(folder)
    assert torch.equal(again.curve.metric, run.curve.metric) and torch.equal(again.curve.loss, run.curve.loss)
    assert again.curve.task_list_hash == run.curve.task_list_hash
    same = ("algorithm", "inner_steps", "selected", "batch_norm", "chance", "config_hash", "selection")
    assert {key: summary[key] for key in same} == {key: run.summary[key] for key in same}
    assert summary["test"] == run.summary["test"] and summary["weights_of"] == "run"
    assert folder.parent == run.path / "evaluations" and (folder / "adaptation.png").exists()
    assert summary["command"] == "toolkit evaluate run"


def test_other_tasks_are_those_that_evaluate_sees(finished: Callable[..., Run], tmp_path: Path) -> None:
    """Fewer ways by the same head, more shots, another seed: as by hand with the run's weights."""
    run = finished(tmp_path)
    words = ["--ways", "3", "--shots", "2", "--eval-seed", "4", "--eval-tasks", "6", "--out", str(tmp_path / "out")]
    folder, summary = evaluated(run, words)
    flags = EpisodeFlags(
        sampler="glyphs", ways=3, train_ways=5, shots=2, eval_queries=2, model="conv4-32", algorithm="maml", inner_lr=0.4
    )
    _, learner, tasks = parts.assemble(flags)
    loaded = checkpoint.load_newest(run.path / "checkpoints")
    assert loaded is not None
    by_hand = evaluate(learner, loaded[0], tasks.test, tasks=6, steps=2, seed=4)
    assert folder == tmp_path / "out" and torch.allclose(Run(folder).curve.metric, by_hand.metric, atol=1e-6)
    assert summary["chance"] == pytest.approx(1 / 3) and Run(folder).config["ways"] == 3
    assert "--out" in summary["command"] and run.summary["command"].startswith("python experiments/quickstart.py")


def test_a_head_made_of_the_support_set_fits_more_ways(finished: Callable[..., Run], tmp_path: Path) -> None:
    folder, summary = evaluated(finished(tmp_path, algorithm="protonet"), ["--ways", "8"])
    assert Run(folder).curve.tasks == 5 and summary["chance"] == pytest.approx(1 / 8)


def test_weights_are_opened_beside_the_frozen_base_that_they_were_trained_around_only(
    finished: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint holds that base, so another file of the same name would go on in silence."""
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        model = parts.network("conv4-32", {"ways": 5, "channels": 1, "size": 28, "seed": seed})
        torch.save(model.state_dict(), f"base{seed}.pt")
    shutil.copy("base1.pt", "base.pt")
    changed = {"freeze": "base", "pretrained": "base.pt", "adapts": "head", "map": "loop", "trace": False}
    run = finished(tmp_path, **changed)
    numbers = run.curve.metric
    folder, _ = evaluated(run, [])
    assert torch.equal(Run(folder).curve.metric, numbers)
    again = {**SHORT, **changed, "queries": 1, "eval_queries": 2, "model": "conv4-32", "out": run.path}
    config = quickstart.Config(**again, resume=True)  # type: ignore[arg-type]
    shutil.copy("base2.pt", "base.pt")
    said = r"was trained around other frozen weights than the model has now, body\..* for one; give what it"
    for attempt in (lambda: evaluated(run, ["--ways", "4"]), lambda: shown(run, 0, [])):
        with pytest.raises(UserError, match=said):
            attempt()
    (run.path / "summary.json").rename(tmp_path / "kept.json")
    with pytest.raises(UserError, match=said):
        quickstart.main(config)
    (tmp_path / "kept.json").rename(run.path / "summary.json")
    folder, _ = evaluated(run, ["--pretrained", "base1.pt", "--overwrite"])
    assert torch.equal(Run(folder).curve.metric, numbers), "the file may lie elsewhere"
    weights, state = checkpoint.load_newest(run.path / "checkpoints") or pytest.fail("no checkpoint")
    assert state.pop("beside")
    shutil.rmtree(run.path / "checkpoints")  # then as versions before this wrote it
    checkpoint.save(run.path / "checkpoints", 4, weights, state, config_hash(run.config))
    evaluated(run, ["--ways", "4"])


def test_an_evaluation_that_fails_costs_nothing(
    finished: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tmp_path)
    folder, summary = evaluated(run, [])

    def fails(*_: Any) -> None:
        raise UserError("no memory")

    monkeypatch.setattr("toolkit.again.judged", fails)
    with pytest.raises(UserError, match="no memory"):
        evaluated(run, ["--overwrite"])
    assert Run(folder).summary == summary and [*folder.parent.iterdir()] == [folder]


def test_a_run_is_opened_to_adapt_to_other_tasks_and_keep_them(finished: Callable[..., Run], tmp_path: Path) -> None:
    run = finished(tmp_path)
    _, learner, weights, tasks = opened(run)
    task = take(draw(tasks.test, 1, 0, 0, "test"), 0)
    fast = toolkit.adapted.adapt(learner, weights, task.support, run.curve.steps)
    score = replace(learner, training=False).assess(weights, fast, task)
    assert float(score.loss) == pytest.approx(float(run.curve.loss[0, -1]), rel=1e-5)
    base = toolkit.adapted.fingerprint(learner, weights)
    toolkit.adapted.save(tmp_path / "kept", {"first": fast}, base)
    _, learner, weights, _ = opened(run, ["--eval-seed", "3"])
    again = toolkit.adapted.load(tmp_path / "kept", "first", toolkit.adapted.fingerprint(learner, weights))
    assert all(torch.equal(again[name], fast[name]) for name in fast)


def test_regression_is_tested_again(finished: Callable[..., Run], tmp_path: Path) -> None:
    run = finished(tmp_path, "sinusoid")
    folder, summary = evaluated(run, ["--shots", "5", "--eval-steps", "4"])
    assert Run(folder).curve.steps == 4 and summary["test"]["metric"] == "squared error"


def test_an_exact_repetition(finished: Callable[..., Run], tmp_path: Path) -> None:
    run = finished(tmp_path, "sinusoid")
    folder, differing = repeated(run, [])
    assert differing == [] and folder == tmp_path / "run-again"
    assert torch.equal(Run(folder).curve.loss, run.curve.loss)


def test_a_repetition_has_the_plan_of_the_run(finished: Callable[..., Run], tmp_path: Path) -> None:
    """Not the one that would be chosen now, whose rounding may differ."""
    run = finished(tmp_path, "sinusoid")
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["plan"]["map"] != "loop"
    (run.path / "summary.json").write_text(json.dumps(summary | {"plan": summary["plan"] | {"map": "loop", "trace": False}}))
    folder, _ = repeated(Run(run.path), [])
    assert Run(folder).summary["plan"]["map"] == "loop"


def test_a_repetition_of_other_numbers_says_so(finished: Callable[..., Run], tmp_path: Path) -> None:
    """Training rows, the test curve and versions, each changed in the first run's files."""
    run = finished(tmp_path, "sinusoid")
    shutil.copytree(run.path, tmp_path / "first")
    curve = json.loads((run.path / "curve.json").read_text())
    curve["metric"][2][1] += 0.25
    (tmp_path / "first" / "curve.json").write_text(json.dumps(curve))
    summary = json.loads((run.path / "summary.json").read_text())
    summary["versions"]["torch"] = "1.0"
    summary["git"] = "another"
    (tmp_path / "first" / "summary.json").write_text(json.dumps(summary))
    rows = (run.path / "metrics.jsonl").read_text().splitlines()
    first = json.loads(rows[0])
    (tmp_path / "first" / "metrics.jsonl").write_text("\n".join([json.dumps(first | {"loss": 9.0}), *rows[1:]]))
    found = differences(Run(tmp_path / "first"), run)
    assert found[0] == "the test metric differs by up to 0.25 on a task"
    assert found[1] == f"training differs from iteration {first['iteration']} on"
    assert found[2].startswith("torch was 1.0 and is ") and found[3].startswith("the code was another and is ")
    assert differences(run, run) == []


def test_a_task_is_drawn_with_its_own_predictions(finished: Callable[..., Run], tmp_path: Path) -> None:
    run = finished(tmp_path)
    before = (run.path / "example.safetensors").read_bytes()
    written = shown(run, 3, [])
    assert {path.name for path in written} >= {"task-3.png", "task-3.pdf"} and all(path.exists() for path in written)
    assert (run.path / "example.safetensors").read_bytes() == before
    of_folder = Run(run.path)
    of_folder.__dict__.update(known=run.result | {"sampler": "glyphs, task 0"})
    first = save(figures.example(of_folder), tmp_path / "first")[0].read_bytes()
    assert (run.path / "task-3.png").read_bytes() != first and shown(run, 0, [])[0].read_bytes() == first


def test_the_path_and_the_animation_of_a_task(
    finished: Callable[..., Run], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = {path.name for path in shown(finished(tmp_path, "sinusoid"), 2, [], path=True, gif=True)}
    assert names == {*(f"{n}-2.{s}" for n in ("task", "path") for s in ("png", "pdf", "csv")), "adaptation-2.gif"}
    without = finished(tmp_path / "other", algorithm="protonet")
    with caplog.at_level("WARNING", "toolkit"):
        names = {path.name for path in shown(without, 0, ["--out", str(tmp_path / "figures")], path=True, gif=True)}
    assert (
        {path.name for path in (tmp_path / "figures").iterdir()}
        == names
        == {"task-0.png", "task-0.pdf", "task-0.csv", "adaptation-0.gif"}
    )
    assert caplog.messages[-1].startswith("no path-0: ") and "protonet" in caplog.messages[-1]


def test_a_task_of_fewer_ways_is_drawn(finished: Callable[..., Run], tmp_path: Path) -> None:
    names = {path.name for path in shown(finished(tmp_path), 0, ["--ways", "3", "--out", str(tmp_path / "figures")])}
    assert "task-0.png" in names
    assert "class 2" in (tmp_path / "figures" / "task-0.csv").read_text()
    assert "class 3" not in (tmp_path / "figures" / "task-0.csv").read_text()


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    return str(caught.value)


def test_what_training_settled_cannot_be_asked_of_evaluation(finished: Callable[..., Run], tmp_path: Path) -> None:
    run = finished(tmp_path)
    said = refused(lambda: evaluated(run, ["--iterations", "9"]))
    assert said.startswith("--iterations belongs to training, which is over; `toolkit evaluate` takes --sampler, ")
    assert "another run than" in refused(lambda: repeated(run, ["--iterations", "9"]))


def test_tasks_that_do_not_fit(finished: Callable[..., Run], tmp_path: Path) -> None:
    said = refused(lambda: evaluated(finished(tmp_path), ["--ways", "8"]))
    assert "its head.weight is (5, 32), they want (8, 32); give tasks of the same inputs and at most as many ways" in said


def test_a_folder_that_is_there_is_not_overwritten(finished: Callable[..., Run], tmp_path: Path) -> None:
    run = finished(tmp_path, "sinusoid")
    evaluated(run, [])
    assert "exists; replace it with --overwrite, or choose another place with --out" in refused(lambda: evaluated(run, []))
    folder, _ = evaluated(run, ["--overwrite"])
    (folder / "summary.json").unlink()
    assert evaluated(run, [])[0] == folder, "an evaluation that was stopped is in nobody's way"
    other, _ = evaluated(run, ["--inner-lr", "0.5"])
    assert other != folder and other.name.endswith("-inner_lr-0.5")


def test_an_evaluation_never_takes_the_place_of_a_run(finished: Callable[..., Run], tmp_path: Path) -> None:
    run = finished(tmp_path, "sinusoid")
    for place in (run.path, run.path.parent):
        assert "is the run" in refused(lambda place=place: evaluated(run, ["--out", str(place), "--overwrite"]))
    other = finished(tmp_path / "other", "sinusoid")
    (other.path / "summary.json").unlink()
    assert "exists" in refused(lambda: evaluated(run, ["--out", str(other.path)])), "a training that goes on"
    assert (other.path / "metrics.jsonl").exists() and (run.path / "checkpoints").exists()


def test_a_protocol_needs_no_number_of_tasks(finished: Callable[..., Run], tmp_path: Path) -> None:
    _, summary = evaluated(finished(tmp_path, "sinusoid"), ["--protocol", "papers"])
    assert summary["test"]["tasks"] == 600


def test_an_evaluation_has_no_training_to_repeat(finished: Callable[..., Run], tmp_path: Path) -> None:
    run = finished(tmp_path, "sinusoid")
    folder, summary = evaluated(run, [])
    said = refused(lambda: repeated(Run(folder), []))
    assert f"is an evaluation of the weights of {run.path.name}" in said and summary["command"] in said
    assert "is an evaluation without weights; give the run" in refused(lambda: evaluated(Run(folder), []))


def test_what_cannot_be_repeated_is_said_before_training(finished: Callable[..., Run], tmp_path: Path) -> None:
    run = finished(tmp_path, "sinusoid")
    out, differing = repeated(run, [])
    assert not differing
    assert f"{out} is finished already; remove it" in refused(lambda: repeated(run, []))
    assert "is finished already" in refused(lambda: repeated(run, ["--out", str(run.path)]))
    (run.path / "curve.json").unlink()
    assert "has no curve.json" in refused(lambda: repeated(Run(run.path), ["--out", str(tmp_path / "new")]))
    assert not (tmp_path / "new").exists()


def test_every_number_of_a_repetition_counts(finished: Callable[..., Run], tmp_path: Path) -> None:
    run = finished(tmp_path, "sinusoid")
    edited = tmp_path / "edited"
    shutil.copytree(run.path, edited)
    assert differences(run, Run(edited)) == []
    (edited / "metrics.jsonl").write_text("\n".join((run.path / "metrics.jsonl").read_text().splitlines()[:-1]))
    summary = run.summary | {"test": run.summary["test"] | {"mean": [0.0] * len(run.summary["test"]["mean"])}}
    write_json(edited / "summary.json", summary | {"card": run.summary["card"] | {"seconds_per_task": 9.0}})
    rows = len(run.metrics)
    expected = [f"the journals of training have {rows} and {rows - 1} rows", "test mean in summary.json differs"]
    assert differences(run, Run(edited)) == expected


def test_older_weights_are_not_taken_for_those_that_were_tested(finished: Callable[..., Run], tmp_path: Path) -> None:
    run = finished(tmp_path, "sinusoid")
    _, new = sorted((run.path / "checkpoints").glob("step-*"))
    write_json(run.path / "summary.json", run.summary | {"selected": run.summary["selected"] | {"iteration": 4}})
    run = Run(run.path)
    (new / "weights.safetensors").write_bytes(b"half")
    assert f"that was tested is damaged, and older ones hold other weights; `toolkit rerun {run.path}`" in refused(
        lambda: evaluated(run, [])
    )


def test_a_run_without_weights(finished: Callable[..., Run], tmp_path: Path) -> None:
    run = finished(tmp_path, "sinusoid")
    shutil.rmtree(run.path / "checkpoints")
    said = refused(lambda: evaluated(run, []))
    assert said.endswith(f"has no checkpoint, only numbers; `toolkit rerun {run.path}` makes its weights anew")


@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        ("config.json", "tasks", "abc", r"config\.json is damaged \(tasks cannot be 'abc'\)"),
        ("config.json", "inner_lr", None, r"config\.json is damaged \(inner_lr cannot be None\)"),
        ("config.json", "algorithm", ["maml"], r"config\.json is damaged \(algorithm cannot be \('maml',\)\)"),
        ("config.json", "sampler", None, r"config\.json is damaged \(sampler cannot be None\)"),
        ("summary.json", "cost", [], r"summary\.json is damaged"),
        ("summary.json", "plan", None, r"summary\.json is damaged"),
        ("summary.json", "selected", None, r"of \S+ that was tested is damaged|summary\.json is damaged"),
    ],
)
def test_what_was_edited_by_hand_is_told_in_a_sentence(
    file: str, key: str, value: Any, said: str, finished: Callable[..., Run], tmp_path: Path
) -> None:
    run = finished(tmp_path, "sinusoid")
    write_json(run.path / file, json.loads((run.path / file).read_text()) | {key: value})
    assert re.search(said, refused(lambda: evaluated(Run(run.path), [])))


def test_a_run_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"seed": 0}')
    assert "has no algorithm in its config.json; only runs" in refused(lambda: evaluated(Run(tmp_path), []))


def test_no_such_task(finished: Callable[..., Run], tmp_path: Path) -> None:
    assert refused(lambda: shown(finished(tmp_path, "sinusoid"), -1, [])) == "task -1 is none; tasks are numbered from 0"


def test_code_named_in_a_run_folder_is_run_only_when_typed_again(
    finished: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    run = finished(tmp_path, "sinusoid", sampler="mine.py:lines")
    run.config["model"] = "mine.py:net"
    monkeypatch.setattr("toolkit.plugins.resolve", lambda *given: pytest.fail(f"{given} was resolved"))
    said = refused(lambda: evaluated(run, []))
    assert said.endswith(
        "was made with code, which runs only when its names are typed again; add --sampler mine.py:lines --model mine.py:net"
    )
    run.config["model"] = "mlp"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    _, summary = evaluated(run, ["--sampler", "mine.py:lines"])
    assert summary["task_list_hash"] == run.summary["task_list_hash"]


def test_the_flags_of_every_experiment_can_be_read_again() -> None:
    """The fields that only an experiment has are few defaults of shared ones, so the shared classes hold all that it wrote."""
    for kind, shared in ((omniglot.Config, EpisodeFlags), (quickstart.Config, EpisodeFlags), (sinusoid.Config, Flags)):
        assert set(kind.__dataclass_fields__) == set(shared.__dataclass_fields__)
