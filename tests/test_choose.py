"""Plans by measurement: within the memory budget, as predicted, and a run goes on when vmap or memory fails."""

import importlib
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import convolutional, dense, relative, task_batch
from tests.test_harness import config
from toolkit import Learner, Meta, Plan, Task, UserError, algorithms, choose, cli, meta_gradient, train
from toolkit.choose import candidates, measured, peak, predicted, size
from toolkit.distributed import Group
from toolkit.engine import gradient_function
from toolkit.experiment import run
from toolkit.metrics import squared_error
from toolkit.models import mlp
from toolkit.plan import out_of_memory
from toolkit.samplers import Sinusoid
from toolkit.task import count


class Unbatchable(nn.Module):
    """A model with an operation that vmap cannot batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = dense()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * x.sum().item() ** 0)  # type: ignore[no-any-return]


def wide() -> tuple[Learner, Task]:
    """A learner and tasks whose memory can be seen above the noise: about 5 MB a task."""
    network = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)).double()
    return algorithms.maml(network, inner_lr=0.1, inner_steps=2), task_batch(tasks=8, support=1200, query=1200)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8 * 10**9), ("500 MB", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("700", 700), (10, 10), ("2kb", 2000)],
)
def test_budgets_are_read(text: str | int, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "eight", "8 parsecs", "-1GB", "0", "1.2.3GB"])
def test_other_budgets_are_a_sentence(text: str) -> None:
    with pytest.raises(UserError, match=r"a memory budget of .*; give a positive number and a unit, as in 8GB or 500MB"):
        size(text)


def test_candidates_fit_the_model() -> None:
    images = task_batch(shape=(1, 8, 8))
    assert candidates(algorithms.maml(dense()), task_batch()) == [Plan("vmap"), Plan("vmap", trace=True)]
    threads = [Plan("threads", 8), Plan("threads", 8, trace=True), Plan("threads", 1, trace=True), Plan("loop", trace=True)]
    assert candidates(algorithms.maml(convolutional()), images) == threads
    assert candidates(algorithms.maml(convolutional()), images, compile=True) == [*threads, Plan("vmap", 32, compile=True)]
    assert candidates(algorithms.maml(dense()), task_batch(), trace=False) == [Plan("vmap")]
    dropping = algorithms.maml(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double())
    assert candidates(dropping, task_batch(), compile=True) == [Plan("vmap")], "masks cannot be recorded"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is only known on Linux")
def test_the_peak_is_what_was_held_at_most() -> None:
    def work() -> None:
        torch.ones(5_000_000)  # 20 MB, gone before the next
        torch.ones(10_000_000)

    for _ in range(2):
        assert 38e6 < peak(work) < 65e6
    assert peak(lambda: None) < 2e6


def test_a_plan_is_made_smaller_until_it_fits() -> None:
    learner, tasks = wide()
    meta, limit = learner.init(), int(0.6 * measured(learner, learner.init(), tasks, Plan("vmap")).bytes)
    row = predicted(learner, meta, tasks, Plan("vmap"), limit)
    assert row.cost is not None and row.cost.bytes <= limit
    assert row.plan.chunk is not None and row.plan.chunk < count(tasks)
    assert choose(learner, tasks, budget=limit).size(8) < 8
    assert choose(learner, tasks, budget="8GB").size(8) == 8


def test_a_budget_below_one_task_says_what_it_needs() -> None:
    learner, tasks = wide()
    with pytest.raises(UserError, match=r"one task needs [1-9]\d* MB and the budget is 0 MB; give a larger --budget"):
        choose(learner, tasks, budget="100kB")


def test_no_more_is_measured_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, tasks = wide()
    looked, module = list[tuple[int, Plan]](), importlib.import_module("toolkit.choose")

    def fast(learner: Learner, meta: Meta, tasks: Task, plan: Plan, *_: Any) -> module.Cost:
        looked.append((count(tasks), plan))
        return module.Cost(1.0, 10**6 * count(tasks))

    monkeypatch.setattr(module, "measured", fast)
    assert choose(learner, tasks, budget="20MB") == Plan("vmap")
    assert looked == [(1, Plan("vmap")), (8, Plan("vmap")), (8, Plan("vmap", trace=True))], "one task tells of both plans"
    looked.clear()
    assert choose(learner, tasks, budget="2MB", trace=False) == Plan("vmap", 2)
    assert looked == [(1, Plan("vmap")), (4, Plan("vmap", 4)), (2, Plan("vmap", 2))]
    looked.clear()
    with pytest.raises(UserError, match="one task needs 1 MB"):
        choose(learner, tasks, budget="100kB", trace=False)
    plans = (Plan("vmap"), Plan("vmap", 1, memory="recompute"), Plan("loop"), Plan("loop", memory="recompute"))
    assert looked == [(1, plan) for plan in plans], "smaller pieces cannot help when one task needs ten times the budget"


def test_what_takes_long_is_run_twice() -> None:
    learner, tasks = wide()
    runs = list[Task]()
    assert measured(learner, learner.init(), tasks, Plan("vmap"), lambda _, tasks: runs.append(tasks), patience=0).seconds >= 0
    assert len(runs) == 2, "once to warm up, once for its time and memory"


def test_a_short_training_takes_the_default_plan() -> None:
    learner, tasks = wide()
    assert choose(learner, tasks, iterations=3) == Plan("vmap")
    assert choose(learner, tasks, iterations=10**9) in candidates(learner, tasks)


def test_what_vmap_cannot_batch_is_named_and_goes_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    learner, tasks = algorithms.maml(Unbatchable()), task_batch()
    with caplog.at_level(logging.WARNING, "toolkit"):
        assert choose(learner, tasks, budget="8GB") == Plan("loop")
    assert "plan vmap is not possible: vmap cannot batch .item()" in caplog.text
    assert meta_gradient(learner, learner.init(), tasks, Plan("loop"))


def cases() -> dict[str, tuple[Learner, Task, Plan]]:
    learner, tasks = wide()
    return {
        "vmap": (learner, tasks, Plan("vmap")),
        "vmap by two": (learner, tasks, Plan("vmap", 2)),
        "vmap recorded": (learner, tasks, Plan("vmap", 4, trace=True)),
        "loop": (learner, tasks, Plan("loop")),
        "recompute": (learner, tasks, Plan("vmap", 4, memory="recompute")),
        "loop recorded": (learner, tasks, Plan("loop", trace=True)),
    }


@pytest.mark.slow  # of times, so on a quiet machine only
@pytest.mark.parametrize("case", ["vmap", "vmap by two", "vmap recorded", "loop", "recompute", "loop recorded"])
def test_predictions_are_within_a_fifth(case: str) -> None:
    learner, tasks, plan = cases()[case]
    meta = learner.init()
    row, cost = predicted(learner, meta, tasks, plan, 10**10), measured(learner, meta, tasks, plan, repeats=10)
    assert row.cost is not None and row.plan == plan
    assert row.cost.seconds == pytest.approx(cost.seconds, rel=0.2)
    assert row.cost.bytes == pytest.approx(cost.bytes, rel=0.2, abs=3e6)


def failing(above: int) -> Any:
    """The engine on a machine whose memory holds `above` tasks at once."""

    def gradient(learner: Learner, plan: Plan) -> Any:
        def run(meta: Meta, tasks: Task, share: Any = None) -> Any:
            if plan.size(count(tasks)) > above:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")
            return gradient_function(learner, plan)(meta, tasks, share)

        return run

    return gradient


def test_a_training_that_runs_out_of_memory_goes_on_with_smaller_pieces(caplog: pytest.LogCaptureFixture) -> None:
    learner = algorithms.maml(mlp(), loss=squared_error, metric=squared_error, inner_lr=0.01)
    with caplog.at_level(logging.WARNING, "toolkit"):
        *_, last = train(learner, Sinusoid(5, 5), 3, 8, 1e-3, plan=Plan("vmap"), gradient=failing(above=2))
    *_, expected = train(learner, Sinusoid(5, 5), 3, 8, 1e-3, plan=Plan("vmap", 2))
    assert last.plan == Plan("vmap", 2) and relative(last.meta, expected.meta) == 0
    assert caplog.text.count("out of memory by the plan") == 2, "8, 4, then 2 tasks; the next iterations begin with 2"


def test_memory_that_one_task_does_not_find_is_an_error() -> None:
    learner = algorithms.maml(mlp(), loss=squared_error, metric=squared_error, inner_lr=0.01)
    with pytest.raises(UserError, match=r"out of memory by the plan '.*steps recomputed', which is the smallest; take"):
        list(train(learner, Sinusoid(5, 5), 3, 8, 1e-3, plan=Plan("vmap"), gradient=failing(above=0)))


def test_sums_in_order_keep_their_pieces(caplog: pytest.LogCaptureFixture) -> None:
    """Smaller pieces would be another order than that of the other processes; one by one they stay the same."""
    learner = algorithms.maml(mlp(), loss=squared_error, metric=squared_error, inner_lr=0.01)
    work, ordered = (learner, Sinusoid(5, 5), 3, 8, 1e-3), Group(0, 1, ordered=True)
    with pytest.raises(UserError, match=r"out of memory by the plan 'vmap, 4 .*'; --reduce ordered .* anew with --chunk 2$"):
        list(train(*work, plan=Plan("vmap", 4), gradient=failing(above=2), group=ordered))
    *_, last = train(*work, plan=Plan("loop"), gradient=failing_once(), group=ordered)
    *_, expected = train(*work, plan=Plan("loop"), group=ordered)
    assert last.plan == Plan("loop", memory="recompute") and relative(last.meta, expected.meta) == 0
    assert [record.levelname for record in caplog.records if "out of memory" in record.message] == ["ERROR"]


def failing_once() -> Any:
    """The engine on a machine whose memory is taken by something else for a moment, after some of the work."""
    left = [1]

    def gradient(learner: Learner, plan: Plan) -> Any:
        def run(meta: Meta, tasks: Task, share: Any = None) -> Any:
            found = gradient_function(learner, plan)(meta, tasks, share)
            if left.pop() if left else 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return found

        return run

    return gradient


def test_an_iteration_that_is_tried_again_has_the_same_noise() -> None:
    layers = nn.Sequential(nn.Linear(1, 20), nn.Dropout(0.5), nn.Linear(20, 1))
    learner = algorithms.maml(layers, loss=squared_error, metric=squared_error, inner_lr=0.01, adapts="*")
    work = learner, Sinusoid(5, 5), 2, 4, 1e-3
    first, _ = train(*work, plan=Plan("vmap", 2), gradient=failing_once())
    expected, _ = train(*work, plan=Plan("vmap", 1))
    assert first.plan == Plan("vmap", 1) and first.loss == expected.loss


def test_only_a_lack_of_memory_is_one() -> None:
    assert out_of_memory(MemoryError()) and out_of_memory(torch.OutOfMemoryError("CUDA"))
    assert not out_of_memory(RuntimeError("shapes differ")) and not out_of_memory(ValueError("allocate memory"))


def test_plans_become_smaller_in_steps() -> None:
    plan: Plan | None = Plan("threads", 4, trace=True)
    seen = []
    while plan is not None:
        seen.append(plan)
        plan = plan.smaller(8)
    recorded = [Plan("threads", 2, trace=True), Plan("threads", 1, trace=True), Plan("threads", 1, trace=True, workers=1)]
    assert seen[1:] == [*recorded, Plan("threads", 1, "recompute", workers=1)]


@pytest.mark.usefixtures("undrawn")
def test_a_run_records_the_plan_that_memory_forced_and_a_resume_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("toolkit.experiment.backend", lambda name: failing(above=2))
    learner = algorithms.maml(mlp(), loss=squared_error, metric=squared_error, inner_lr=0.01)
    samplers = Sinusoid(5, 5), Sinusoid(5, 6), Sinusoid(5, 7)
    record = run(config(tmp_path / "run", tasks=4), "sinusoid", learner, *samplers)
    assert record.summary["plan"]["chunk"] == 2
    monkeypatch.setattr("toolkit.parts.choose", lambda *a: pytest.fail("a resumed run measures nothing"))
    (tmp_path / "run" / "summary.json").unlink()
    assert run(config(tmp_path / "run", tasks=4, resume=True), "sinusoid", learner, *samplers).summary["plan"]["chunk"] == 2
    (tmp_path / "run" / "plan.json").write_text("{")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(UserError, match=r"plan.json is damaged; delete it, and a plan is chosen anew"):
        run(config(tmp_path / "run", tasks=4, resume=True), "sinusoid", learner, *samplers)


def test_toolkit_plan_prints_what_it_predicts_and_measures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "toolkit plan --sampler sinusoid --model mlp --tasks 4 --shots 5 --queries 5 --inner-lr 0.01"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    head, _, *rows, end = capsys.readouterr().out.splitlines()
    assert head == "maml, 4 tasks of sinusoid a meta-gradient" and end.startswith("fastest: vmap")
    assert [row[:44].strip() for row in rows] == [
        "vmap", "vmap, recorded", "vmap, steps recomputed", "vmap, steps recomputed, recorded"
    ]  # fmt: skip
    assert all(float(cell) >= 0 for row in rows for cell in row[44:].split()) and len(rows[0][44:].split()) == 4


def test_toolkit_plan_says_what_one_task_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        sys, "argv", ["toolkit", "plan", "--sampler", "sinusoid", "--model", "mlp", "--tasks", "4", "--budget", "1B"]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "no plan fits; one task needs" in capsys.readouterr().err
