"""Choosing a model: the Pareto rule, what is drawn, and an experiment that goes on where it stopped."""

import csv
import json
import math
import random
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments import choose_model
from experiments.choose_model import COSTS, Config, One, affordable, folder, rows
from tests.test_experiments import tiny_bank
from toolkit import UserError, parts
from toolkit.curve import Curve
from toolkit.flags import launch
from toolkit.models import dense
from toolkit.plots.pareto import LEGEND, front, pareto
from toolkit.plots.save import numbers
from toolkit.runs.folder import Run

SMALL = {"iterations": 4, "validate_every": 2, "tasks": 2, "val_tasks": 4, "eval_tasks": 6, "eval_steps": 2, "queries": 2}


@pytest.mark.parametrize(
    ("values", "costs", "expected"),
    [
        ([0.9, 0.8, 0.7], [[3.0], [2.0], [1.0]], [True, True, True]),
        ([0.9, 0.8, 0.7], [[1.0], [2.0], [3.0]], [True, False, False]),
        ([0.9, 0.8], [[1.0], [1.0]], [True, False]),  # as much for a worse value
        ([0.9, 0.9], [[1.0], [2.0]], [True, False]),  # the same value for more
        ([0.9, 0.9], [[1.0], [1.0]], [True, True]),  # equal in all
        ([0.5], [[7.0]], [True]),
        ([], [], []),
        ([math.nan, 0.1], [[1.0], [2.0]], [False, True]),  # what is not known beats none
        ([None, 0.1], [[1.0], [2.0]], [False, True]),
        ([0.9, 0.1], [[None], [2.0]], [False, True]),
        ([math.inf, 0.1], [[1.0], [2.0]], [False, True]),
        ([0.9, 0.8, 0.8], [[2.0, 2.0], [1.0, 3.0], [3.0, 3.0]], [True, True, False]),  # each cost may decide
        ([0.9, 0.9, 0.9], [[1.0, 2.0], [2.0, 1.0], [2.0, 2.0]], [True, True, False]),
        ([0.3, 0.2], [[], []], [True, False]),  # without costs the best alone
    ],
)
def test_the_pareto_front_of_known_cases(values: list[Any], costs: list[list[Any]], expected: list[bool]) -> None:
    assert front(values, costs) == expected


def test_who_is_not_on_the_front_is_beaten_by_one_who_is() -> None:
    generator = random.Random(0)
    for _ in range(50):
        values = [generator.randrange(4) for _ in range(8)]
        costs = [[generator.randrange(4), generator.randrange(4)] for _ in range(8)]
        marks = front(values, costs)
        points = [(-value, *row) for value, row in zip(values, costs, strict=True)]

        def less(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
            return a != b and all(x <= y for x, y in zip(a, b, strict=True))

        best = [point for point, mark in zip(points, marks, strict=True) if mark]
        assert best and not any(less(a, b) for a in best for b in best)
        assert all(any(less(a, b) for a in best) for b, mark in zip(points, marks, strict=True) if not mark)


def row(model: str, value: float | None, cost: float, ci95: float | None = 0.01, metric: str = "accuracy") -> dict[str, Any]:
    costs = {"parameters": 1e6 * cost, "task_seconds": cost / 100, "peak_bytes": 1e9 * cost, "task_bytes": 4e6 / cost}
    return {"model": model, "metric": metric, "value": value, "ci95": ci95} | costs


def drawn(found: list[dict[str, Any]]) -> dict[tuple[int, str], list[tuple[Any, ...]]]:
    table: dict[tuple[int, str], list[tuple[Any, ...]]] = {}
    for panel, series, *point in numbers(pareto(found, COSTS, "title")):
        table.setdefault((panel, series), []).append(tuple(point))
    return table


def test_the_figure_shows_the_numbers_of_the_rows() -> None:
    found = [row("large", 0.8, 3.0), row("middle", 0.7, 2.0, None), row("worse", 0.6, 2.5), row("small", 0.5, 1.0)]
    points = drawn(found)
    for panel, key in enumerate(COSTS):
        for each in found:
            ((x, y, low, high),) = points[panel, each["model"]]
            assert (x, y) == (each[key], pytest.approx(100 * each["value"]))
            expected = ("", "") if each["ci95"] is None else (pytest.approx(y - 1), pytest.approx(y + 1))
            assert (low, high) == expected
    steps = [(x, pytest.approx(y)) for x, y, *_ in points[0, "front"]]
    assert [(x, y) for x, y in steps] == [(1e6, 50.0), (2e6, 70.0), (3e6, 80.0)], "by rising cost, without the one beaten"
    assert [x for x, *_ in points[3, "front"]] == [4e6 / 3.0], "where the best needs least, it is the front"


def test_marks_say_who_is_on_the_front_without_colour() -> None:
    figure = pareto([row("large", 0.8, 3.0), row("worse", 0.6, 3.5), row("small", 0.5, 1.0)], COSTS, "title")
    axes = figure.axes[0]
    faces = {bar.get_label(): bar.lines[0].get_markerfacecolor() for bar in axes.containers}
    assert faces == {"large": "black", "worse": "white", "small": "black"}
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "large, 80.0 ± 1.0", "worse, 60.0 ± 1.0", "small, 50.0 ± 1.0", *LEGEND
    ]  # fmt: skip
    assert [a.get_xlabel() for a in figure.axes] == [text for text, _ in COSTS.values()]
    figure.draw_without_rendering()
    assert "1 MB" in [tick.get_text() for tick in figure.axes[3].get_xticklabels()] or len(figure.axes[3].get_xticks()) > 1
    assert all(a.get_xscale() == "log" for a in figure.axes)


def test_what_is_not_known_is_left_out_of_the_figure_and_named() -> None:
    figure = pareto([row("fine", 0.8, 3.0), row("diverged", None, 1.0, None)], COSTS, "title")
    assert {series for _, series, *_ in numbers(figure)} == {"fine", "front"}
    assert "diverged, not finite" in [text.get_text() for text in figure.legends[0].get_texts()]
    with pytest.raises(UserError, match="no model has a finite result"):
        pareto([row("diverged", None, 1.0)], COSTS, "title")
    alone = dict.fromkeys(COSTS) | {"parameters": 5.0}
    points = drawn([row("fine", 0.8, 3.0), row("odd", 0.9, 1.0) | alone])
    assert (0, "odd") in points and (1, "odd") not in points


def test_of_errors_less_is_better() -> None:
    points = drawn([row("good", 0.1, 1.0, 0.01, "squared error"), row("bad", 0.9, 2.0, 0.01, "squared error")])
    assert points[0, "front"] == [(1e6, 0.1, "", "")] and points[0, "bad"][0][1] == 0.9


class Here:
    """In place of a process of its own."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def tiny(inputs: tuple[int, ...], outputs: int, seed: int) -> nn.Module:
    """A small model."""
    return dense(inputs, outputs, seed, width=8, depth=1)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, undrawn: None) -> None:
    monkeypatch.setattr("toolkit.data.glyphs.glyphs", tiny_bank)
    monkeypatch.setattr(choose_model, "ProcessPoolExecutor", Here)


def start(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str, **changes: Any) -> None:
    flags = [word for key, value in (SMALL | changes).items() for word in (f"--{key.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", ["choose_model.py", *flags, "--out", str(out), *words])
    launch(Config, choose_model.main, {}, "")


@pytest.mark.usefixtures("here")
def test_models_are_compared_on_the_same_tasks_and_finished_runs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, tiny_model = tmp_path / "out", f"{__name__}:tiny"
    words = ("--models", "mlp", tiny_model, "--seeds", "2")
    start(monkeypatch, out, *words)
    said = capsys.readouterr().out
    runs = {model: [Run(out / f"{folder(model)}-seed{seed}") for seed in range(2)] for model in ("mlp", tiny_model)}
    found = json.loads((out / "models.json").read_text())["rows"]
    assert found == json.loads(json.dumps(rows(runs))) and {each["model"] for each in found} == set(runs)
    for each in found:
        group = runs[each["model"]]
        values = torch.stack([run.curve.metric[:, 1] for run in group])
        assert each["value"] == pytest.approx(float(values.mean())) and each["seeds"] == 2 and each["iterations"] == 4
        assert each["task_bytes"] == group[0].summary["cost"]["task_bytes"]
        assert each["parameters"] == group[0].summary["cost"]["model_parameters"]
        assert each["peak_bytes"] == pytest.approx(2**20 * sum(run.summary["cost"]["peak_mb"] for run in group) / 2, abs=1)
    best, other = found
    assert best["value"] >= other["value"] and best["difference"] is None and best["front"]
    assert other["difference"][0] == pytest.approx(other["value"] - best["value"])
    assert runs["mlp"][0].config["model"] == "mlp" and runs["mlp"][1].config["seed"] == 1
    command = runs["mlp"][0].summary["command"]
    assert command.startswith("python experiments/choose_model.py") and "--model mlp" in command and "--iterations 4" in command
    with (out / "models.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["value"]) for line in table] == [each["value"] for each in found]
    assert (out / "models.md").read_text() in said and said.count("| `mlp` |") == 1
    assert {f"models-figure.{kind}" for kind in ("png", "pdf", "csv")} <= {path.name for path in out.iterdir()}

    made = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(choose_model, "_train", lambda *_: pytest.fail("a finished run is not done again"))
    start(monkeypatch, out, *words)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == made
    with pytest.raises(SystemExit):
        start(monkeypatch, out, *words, iterations=5)
    assert "was made with --iterations 4, not 5; resume with the same flags, or choose another" in capsys.readouterr().err


CHANGED = [("--inner-lr", "0.3"), ("--meta-lr", "0.1"), ("--adapts", "head.*"), ("--lora", "2"), ("--queries", "3")]
CHANGED += [("--batch-norm", "support"), ("--sampler.noise", "1")]


@pytest.mark.usefixtures("here")
def test_finished_runs_of_other_flags_are_not_taken_for_those_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(monkeypatch, tmp_path / "out", "--models", "mlp")
    monkeypatch.setattr(choose_model, "_train", lambda *_: pytest.fail("nothing is trained"))
    start(monkeypatch, tmp_path / "out", "--models", "mlp")
    for flag, value in CHANGED:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            start(monkeypatch, tmp_path / "out", "--models", "mlp", flag, value)
        assert f"mlp-seed0 was made with {flag.partition('.')[0]}" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_a_model_may_have_flags_and_settings_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, wide = tmp_path / "out", "mlp width=8 lora=2 inner_lr=0.1"
    start(monkeypatch, out, "--models", "mlp", wide, "conv4 width=4 adapts=head.*")
    found = {each["model"]: each for each in json.loads((out / "models.json").read_text())["rows"]}
    assert set(found) == {"mlp", wide, "conv4 width=4 adapts=head.*"}
    config = Run(out / "mlp-width=8-lora=2-inner_lr=0.1-seed0").config
    assert (config["model"], config["model_args"], config["lora"], config["inner_lr"]) == ("mlp", ["width=8"], 2, 0.1)
    assert found[wide]["adapted"] < found["mlp"]["adapted"] and found[wide]["parameters"] < found["mlp"]["parameters"]
    for words, message in (
        (("mlp lora=much",), "lora is a number, not 'much'; give one"),
        (("mlp lora",), "unknown model 'mlp lora'; did you mean 'mlp'"),
        (("mlp width=wide",), "width is a whole number; give one"),
        (("mlp", "mlp widht=3"), "unknown setting of mlp 'widht'; did you mean 'width'"),
        (("mlp inner_lr=-1",), "--inner-lr is -1.0; give a positive number"),
        (("mlp adapts='*norm*",), "cannot be read (No closing quotation); write NAME key=value"),
        (("mlp adapts=*bias", "mlp adapts=?bias"), "two of --models would share a folder"),
        (("",), "no model was given; give one of"),
        (("a/conv.py:Net", "b/conv.py:Net"), "there is no file a/conv.py"),
    ):
        with pytest.raises(SystemExit):
            start(monkeypatch, tmp_path / "none", "--models", *words)
        assert message in capsys.readouterr().err and not (tmp_path / "none").exists()


@pytest.mark.usefixtures("here")
def test_a_budget_in_seconds_is_measured_once_and_a_stopped_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words = tmp_path / "out", ("--models", "mlp", "--seconds-per-model", "60")
    monkeypatch.setattr(choose_model, "affordable", lambda *_: 5)
    start(monkeypatch, out, *words)
    first = Run(out / "mlp-seed0")
    assert (first.config["iterations"], first.config["validate_every"]) == (5, 2)
    assert json.loads((out / "models.json").read_text())["rows"][0]["front"], "one model is its own front"
    (out / "mlp-seed0" / "summary.json").unlink()
    monkeypatch.setattr(choose_model, "affordable", lambda *_: pytest.fail("the number of iterations was settled"))
    start(monkeypatch, out, *words)
    again = Run(out / "mlp-seed0")
    assert again.config["iterations"] == 5 and torch.equal(again.curve.metric, first.curve.metric)


@pytest.mark.usefixtures("here")
def test_the_seconds_of_the_first_iterations_tell_how_many_go_into_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.train import train

    def slow(*arguments: Any) -> Any:
        for record in train(*arguments):
            yield record._replace(seconds=0.5 if record.iteration > 1 else 100.0)  # the first also records

    monkeypatch.setattr(choose_model, "train", slow)
    flags, learner, tasks = parts.assemble(One(model="mlp", tasks=2, queries=2, map="loop"))
    assert affordable(flags, learner, tasks, 160.0) == 121 and affordable(flags, learner, tasks, 0.01) == 1


@pytest.mark.usefixtures("here")
def test_a_model_that_fails_does_not_keep_the_others_from_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        start(monkeypatch, tmp_path / "out", "--models", "mlp", "bag")
    caught = capsys.readouterr()
    assert "1 of 2 runs failed, bag: --model bag takes feature numbers" in caught.err
    assert "| `mlp` |" in caught.out and "`bag`" not in caught.out
    for words, message in (
        (("--models", "mlp", "conv5"), "unknown model 'conv5'; did you mean 'conv4'?"),
        (("--models", "mlp", "mlp"), "--models has mlp twice; give each once"),
        (("--models", "mlp", "--seconds-per-model", "-1"), "give 1 seed or more, and positive seconds"),
        (("--models", "mlp", "--seeds", "0"), "give 1 seed or more, and positive seconds"),
    ):
        with pytest.raises(SystemExit):
            start(monkeypatch, tmp_path / "none", *words)
        assert message in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_folders_are_called_as_files_can_be() -> None:
    assert folder("tv:resnet18") == "tv-resnet18" and folder("/a/b/mine.py:Net") == "mine-Net"
    assert folder("tv:vit_b_16 lora=8 pretrained=/a/b.pth") == "tv-vit_b_16-lora=8-pretrained=b.pth"


def test_a_diverged_model_is_last_and_has_no_front(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(values: list[float]) -> Any:
        curve = Curve(torch.zeros(3, 2).double(), torch.tensor([values] * 2).double().T.contiguous(), "accuracy", "same")
        cost = {"model_parameters": 1, "adapted_parameters": 1, "peak_mb": 1, "task_bytes": 1, "model_bytes": 1, "seconds": 1}
        work = {"meta_gradient_operations": None, "evaluation_operations": None}
        summary = {"algorithm": "maml", "inner_steps": 1, "cost": cost | work, "card": {"seconds_per_task": 1.0}}
        run = Run(Path("nowhere"))
        run.__dict__.update(curve=curve, summary=summary, result=summary, config={"seed": 0, "iterations": 1})
        return run

    found = rows({"lost": [of([math.nan] * 3)], "fine": [of([0.1, 0.2, 0.3])]})
    assert [(each["model"], each["front"]) for each in found] == [("fine", True), ("lost", False)]
    assert found[1]["value"] is None and found[1]["difference"] == [None, None]
    assert choose_model.cells(found)[1][1:4] == ["not finite", "not finite", "no"]


@pytest.mark.slow
def test_each_model_has_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch, tmp_path / "out", "--models", "mlp", f"{__name__}:tiny", iterations=2)
    assert len(json.loads((tmp_path / "out" / "models.json").read_text())["rows"]) == 2
