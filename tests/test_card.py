"""The evaluation card: what is measured beside loss and metric, against scipy, numpy and values by hand."""

import importlib
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import dense
from toolkit import Batch, Curve, Learner, Plan, UserError, algorithms, draw, evaluate
from toolkit.curve import Spread
from toolkit.flags import EpisodeFlags, checked
from toolkit.metrics import BINS, MEASURES, accuracy, brier, by_class, cross_entropy, ece, of_ways, reliability, squared_error
from toolkit.models import mlp
from toolkit.recorded import Recorder
from toolkit.runs.summary import Outcome, card, command, summarise
from toolkit.samplers import Sinusoid
from toolkit.task import Task, take

LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.5]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, -100])


def stream(generator: torch.Generator) -> Task:
    def batch(n: int) -> Batch:
        x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        return Batch(x, torch.arange(n) % 2)

    return Task(batch(4), batch(6))


def one_class(generator: torch.Generator) -> Task:
    return Task(*(batch._replace(y=batch.y * 0) for batch in stream(generator)))


def learner() -> Learner:
    return algorithms.maml(dense(), inner_lr=0.3, inner_steps=1)


def probabilities() -> np.ndarray:
    powers = np.exp(LOGITS[:3].numpy())
    return powers / powers.sum(1, keepdims=True)


def test_brier_by_hand_without_what_has_no_label() -> None:
    by_hand = ((probabilities() - np.eye(3)) ** 2).sum(1).mean()
    assert float(brier(LOGITS, LABELS)) == pytest.approx(by_hand, rel=1e-12)


def test_accuracy_of_each_class_position() -> None:
    assert by_class(LOGITS, LABELS).tolist() == [1.0, 1.0, 0.0]
    assert by_class(LOGITS[:2], LABELS[:2])[2].isnan()


def test_calibration_error_by_hand() -> None:
    p = probabilities()
    confidence, right = p.max(1), p.argmax(1) == LABELS[:3].numpy()
    places = np.clip(np.ceil(confidence * BINS), 1, BINS)
    gaps = [abs(right[places == b].sum() - confidence[places == b].sum()) / 3 for b in range(1, BINS + 1)]
    assert float(ece(reliability(LOGITS, LABELS))) == pytest.approx(sum(gaps), rel=1e-12)


def test_who_is_as_sure_as_right_is_calibrated() -> None:
    """Three of four right, each with probability 3/4; and one bin's place, at its upper edge."""
    logits = torch.tensor([0.75, 0.25], dtype=torch.float64).log().expand(4, 2)
    diagram = reliability(logits, torch.tensor([0, 0, 0, 1]))
    assert float(ece(diagram)) < 1e-12
    assert diagram[0].tolist() == [float(b == math.ceil(0.75 * BINS) - 1) for b in range(BINS)]


def test_a_diverged_task_is_left_out_of_a_diagram_as_a_whole() -> None:
    diverged = LOGITS.clone()
    diverged[0, 0] = math.nan
    diagrams = torch.stack([reliability(logits, LABELS) for logits in (LOGITS, diverged, LOGITS)])
    assert torch.allclose(Spread().plus(diagrams).mean(), diagrams[0])


@pytest.mark.parametrize("plan", [Plan("vmap"), Plan("loop", trace=True), Plan("threads", chunk=3)], ids=str)
def test_the_card_is_the_mean_over_tasks_of_each_measure(plan: Plan) -> None:
    own = learner()
    curve = evaluate(own, own.init(), stream, tasks=70, steps=2, plan=plan)
    judged, tasks = replace(own, training=False), draw(stream, 70, 0, split="test")
    for name, function in MEASURES.items():
        rows = []
        for i in range(70):
            task = take(tasks, i)
            path = judged.path(judged.init(), task.support, 2)
            points = [judged.predict(judged.init(), fast, task.query.x, task.support.x, k) for k, fast in enumerate(path)]
            rows.append(torch.stack([function(prediction, task.query.y) for prediction in points]))
        by_hand = torch.stack(rows).detach().numpy()
        assert np.allclose(curve.card[name].mean(), np.nanmean(by_hand, 0), atol=1e-10, equal_nan=True), name
    assert torch.allclose(curve.card["nll"].mean(), curve.mean(curve.loss), atol=1e-12)
    assert torch.allclose(curve.card["nll"].ci95(), curve.ci95(curve.loss), atol=1e-10)


def test_tasks_of_fewer_classes_are_measured_on_their_own() -> None:
    """The last outputs belong to no class of any task, so no probability may go there."""
    own = learner()
    fewer = replace(own, loss=of_ways(cross_entropy), metric=of_ways(accuracy))
    curve = evaluate(fewer, fewer.init(), one_class, tasks=5, steps=1)
    assert torch.allclose(curve.card["nll"].mean(), curve.mean(curve.loss), atol=1e-12)
    assert curve.card["by_class"].mean()[:, 1:].isnan().all()


def test_own_measures_take_the_place_of_ours_and_regression_has_none() -> None:
    own = learner()

    def top(prediction: Tensor, y: Tensor) -> Tensor:
        return prediction.max()

    assert set(evaluate(own, own.init(), stream, 3, 1, measures={"top": top}).card) == {"top"}
    sine = algorithms.maml(mlp(), loss=squared_error, metric=squared_error)
    assert evaluate(sine, sine.init(), Sinusoid(shots=5), 3, 1).card == {}


def test_a_spread_in_parts_equals_the_whole_and_leaves_out_what_is_not_finite() -> None:
    values = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values[3, 1] = math.nan
    spread = Spread().plus(values[:20]).plus(values[20:])
    whole = Curve(values, values, "accuracy")
    assert torch.allclose(spread.mean(), whole.mean(), atol=1e-12)
    assert torch.allclose(spread.ci95(), whole.ci95(), atol=1e-10)


@pytest.mark.parametrize("metric", ["accuracy", "squared error"])
def test_the_worst_tasks(metric: str) -> None:
    values = torch.arange(20.0, dtype=torch.float64)[:, None].expand(20, 2).clone()
    curve = Curve(values, values, metric)
    worst = [0, 1] if metric == "accuracy" else [19, 18]
    assert curve.worst_tasks()[:, 1].tolist() == worst
    assert curve.worst().tolist() == [sum(worst) / 2] * 2
    values[7] = math.nan
    assert int(Curve(values, values, metric).worst_tasks()[0, 0]) == 7


@pytest.mark.parametrize(("name", "tasks"), [("papers", 600), ("claims", 10_000)])
def test_a_protocol_says_how_many_tasks(name: str, tasks: int) -> None:
    assert checked(EpisodeFlags(protocol=name)).eval_tasks == tasks  # type: ignore[arg-type]


def test_a_protocol_against_a_number_is_refused() -> None:
    with pytest.raises(UserError, match="claims means 10,000 test tasks, but --eval-tasks is 50"):
        checked(EpisodeFlags(protocol="claims", eval_tasks=50))


def test_the_command_holds_what_differs_from_the_defaults() -> None:
    flags = EpisodeFlags(algorithm="anil", method=("lam=1", "a=2 b"), compile=True, trace=False, resume=True, shots=5)
    words = "--algorithm anil --shots 5 --method lam=1 'a=2 b' --no-trace --compile"
    assert command(flags, "omniglot") == f"python experiments/omniglot.py {words}"


def test_the_time_of_a_task_leaves_out_what_the_first_ones_pay_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tasks are drawn at once: the first took 10 s with all that is made for them, the other six 0.6 s."""
    clock = iter([0.0, 10.0, 10.0, 10.6])
    module = importlib.import_module("toolkit.evaluate")
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    own = learner()
    assert evaluate(own, own.init(), stream, 70, 0).seconds_per_task == pytest.approx(0.1)


def test_the_time_of_a_task_leaves_the_making_of_a_recording_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all tasks are drawn at once."""
    seconds = [0.0]
    module = importlib.import_module("toolkit.evaluate")
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    prepare = Recorder.prepare

    def slow(self: Recorder, *arguments: Any) -> None:
        seconds[0] += 100.0
        prepare(self, *arguments)

    monkeypatch.setattr(Recorder, "prepare", slow)
    own = learner()
    curve = evaluate(own, own.init(), stream, 5, 1, plan=Plan("vmap", trace=True))
    assert seconds[0] == 100.0 and curve.seconds_per_task == 0.0


CHILD = "from toolkit.runs.summary import peak_mb; print(peak_mb('cpu'))"
PARENT = f"""
import subprocess, sys
held = b"x" * 2**30
print(subprocess.run([sys.executable, "-c", {CHILD!r}], capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="where there is no such account, it is what getrusage says")
def test_the_peak_of_a_run_is_not_that_of_who_started_it() -> None:
    found = int(subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, check=True).stdout)
    assert 50 < found < 1000


def test_the_card_of_a_summary_is_that_of_the_curve() -> None:
    own = learner()
    curve = evaluate(own, own.init(), stream, 30, 2)
    found = card(curve, 1)
    assert found["ece"] == pytest.approx(ece(curve.card["reliability"].mean()).tolist(), abs=1e-6)
    assert found["nll"] == pytest.approx(curve.mean(curve.loss).tolist(), abs=1e-6)
    assert found["brier_ci95"] == pytest.approx(curve.card["brier"].ci95().tolist(), abs=1e-6)
    assert found["worst_tasks"] == curve.worst_tasks()[:, 1].tolist() and len(found["worst_tasks"]) == 3


@pytest.fixture
def evaluated() -> Callable[[int], Curve]:
    own = learner()
    return lambda tasks: evaluate(own, own.init(), stream, tasks, 1)


def test_the_loss_has_the_statistics_of_the_metric() -> None:
    own = learner()
    curve = evaluate(own, own.init(), stream, 7, 2)
    config = {"iterations": 1, "tasks": 1, "experiment": "x", "sampler": "y", "seed": 0}
    test = summarise(config, own, curve, Outcome(own.init(), {}, 1.0, Plan("loop"), 1), 0.5, False, 0, {})["test"]
    values = curve.loss.numpy()
    assert test["loss_median"] == pytest.approx(np.median(values, 0), abs=1e-6)
    assert test["loss_q05"] == pytest.approx(np.quantile(values, 0.05, 0), abs=1e-6)
    assert test["loss_q95"] == pytest.approx(np.quantile(values, 0.95, 0), abs=1e-6)
    assert test["loss_ci95"] == pytest.approx(curve.ci95(curve.loss).numpy(), abs=1e-6)


def test_a_cards_size_does_not_grow_with_tasks(evaluated: Callable[[int], Curve]) -> None:
    for name, spread in evaluated(100).card.items():
        assert spread.mean().shape == evaluated(2).card[name].mean().shape
    assert evaluated(100).seconds_per_task > 0
