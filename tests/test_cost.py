"""What a run costs: operations against closed forms and torch's own counter, memory from shapes against what is allocated,
bytes, energy; and the predictions of `toolkit plan --predict`."""

import json
import os
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import named
from tests.test_harness import TEST, TRAINING, VALIDATION, config, regression
from toolkit import Batch, Learner, Plan, Task, algorithms, cli, cost, predict
from toolkit.adapted import adapt
from toolkit.cost import Watch
from toolkit.energy import Counter, Energy, counters
from toolkit.engine import gradient_function
from toolkit.evaluate import calibrate, judge
from toolkit.experiment import run
from toolkit.models import conv4
from toolkit.models.surgery import lora
from toolkit.report import write as write_report
from toolkit.rules import SGD, Clip, Groups
from toolkit.runs import tables
from toolkit.runs.comparison import rows
from toolkit.runs.folder import Run
from toolkit.runs.summary import table
from toolkit.task import draw, take
from toolkit.tree import Params

SUPPORT, QUERY, WAYS = 6, 10, 2


def episode(shape: tuple[int, ...] = (3,), numbers: int = 0) -> Task:
    """One task of two classes."""
    generator = torch.Generator().manual_seed(0)

    def batch(n: int) -> Batch:
        x = (
            torch.randint(1, numbers, (n, *shape), generator=generator)
            if numbers
            else torch.randn(n, *shape, generator=generator)
        )
        return Batch(x, torch.arange(n) % WAYS)

    return Task(batch(SUPPORT), batch(QUERY))


def perceptron(*sizes: int) -> nn.Module:
    return nn.Sequential(*(layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())))[:-1]


def by_hand(first: int, others: int, steps: int, kind: str) -> int:
    """Operations of the meta-gradient from those of one forward pass of one example through the first layer and through all
    others, each layer being one product.

    An inner step runs the products forward (1), for the weights' slopes (1) and, but in the first layer, for the inputs' (1).
    Differentiated, each product gives two, one for each factor: the one for the weights' slopes in the first layer has data for
    a factor and gives one; forward ones give the slopes of weights (1) and, but in the first layer, of inputs (1).
    """
    once = {"first": 2, "others": 3}
    twice = {"first": 1 + 1, "others": 2 + 2 + 2}
    again = 1 if kind == "recompute" else 0
    inner = sum(
        size * ((1 + again) * once[layer] + (twice[layer] if kind != "first order" else 0))
        for layer, size in (("first", first), ("others", others))
    )
    return SUPPORT * steps * inner + QUERY * (2 * first + 3 * others)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", ["second order", "first order", "recompute"])
def test_the_operations_of_a_perceptron_are_those_counted_by_hand(steps: int, kind: str) -> None:
    learner = algorithms.maml(perceptron(3, 7, 5, 2), inner_steps=steps, order="first" if kind == "first order" else "second")
    expected = by_hand(2 * 3 * 7, 2 * (7 * 5 + 5 * 2), steps, kind)
    assert cost.of_meta_gradient(learner, episode(), "recompute" if kind == "recompute" else "unroll").operations == expected


@pytest.mark.parametrize("kind", ["second order", "first order", "recompute"])
def test_the_operations_of_convolutions_are_those_counted_by_hand(kind: str) -> None:
    """Also of one in groups and of one with strides."""
    network = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 4, 3, stride=2, groups=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(4 * 3 * 3, WAYS),
    )  # fmt: skip
    learner = algorithms.maml(network, inner_steps=2, order="first" if kind == "first order" else "second")
    first, second, head = 2 * (8 * 8) * 6 * 2 * 9, 2 * (3 * 3) * 4 * (6 // 2) * 9, 2 * 36 * WAYS
    seen = cost.of_meta_gradient(learner, episode((2, 8, 8)), "recompute" if kind == "recompute" else "unroll")
    assert seen.operations == by_hand(first, second + head, 2, kind)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_the_operations_of_an_adapted_task_are_those_counted_by_hand(steps: int) -> None:
    first, others = 2 * 3 * 7, 2 * (7 * 5 + 5 * 2)
    seen = cost.of_adapting(algorithms.maml(perceptron(3, 7, 5, 2)), episode(), steps)
    assert seen.operations == SUPPORT * steps * (2 * first + 3 * others) + QUERY * (first + others)


def real(learner: Learner, task: Task, memory: Any = "unroll") -> int:
    """The operations that torch's own counter sees in the engine's meta-gradient of a real task."""
    gradient, meta = gradient_function(learner, Plan("loop", memory=memory)), learner.init()
    batch = pytree.tree_map(lambda t: t[None], task)
    gradient(meta, batch)
    with FlopCounterMode(display=False) as counter:
        gradient(meta, batch)
    return int(counter.get_total_flops())


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    blocks = nn.TransformerEncoder(layer, 1)
    return nn.Sequential(OrderedDict(table=nn.Embedding(30, 8), blocks=blocks, flat=nn.Flatten(), head=nn.Linear(40, 2)))


CASES = {
    "maml": lambda: (algorithms.maml(conv4(2, size=8, width=4), inner_steps=1), episode((1, 8, 8))),
    "maml, pooled": lambda: (algorithms.maml(conv4(2, size=16, width=4, pool=True), inner_steps=2), episode((1, 16, 16))),
    "fomaml": lambda: (algorithms.fomaml(conv4(2, size=8, width=4), inner_steps=1), episode((1, 8, 8))),
    "anil": lambda: (algorithms.anil(conv4(2, size=8, width=4), inner_steps=1), episode((1, 8, 8))),
    "maml_plus_plus": lambda: (algorithms.maml_plus_plus(conv4(2, size=8, width=4), inner_steps=1), episode((1, 8, 8))),
    "imaml": lambda: (algorithms.imaml(perceptron(3, 4, 2), inner_steps=3), episode()),
    "protonet": lambda: (algorithms.protonet(named(body=nn.Linear(3, 4), head=nn.Linear(4, 2)).float()), episode()),
    "low rank": lambda: (algorithms.lora_maml(perceptron(3, 4, 2), inner_steps=2), episode()),
    "transformer": lambda: (algorithms.maml(transformer(), inner_steps=1), episode((5,), 30)),
    "recurrent": lambda: (algorithms.maml(Recurrent(), inner_steps=1), episode((5, 3))),
}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(x.shape[0], 4)
        for step in x.unbind(1):
            hidden = self.cell(step, hidden)
        return self.head(hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", CASES)
def test_shapes_alone_tell_the_operations_that_torch_counts_in_a_real_meta_gradient(case: str) -> None:
    learner, task = CASES[case]()
    for memory in ("unroll", "recompute") if case in ("maml", "anil", "transformer") else ("unroll",):
        assert cost.of_meta_gradient(learner, task, memory).operations == real(learner, task, memory) > 0, memory


@pytest.mark.parametrize("case", ["maml", "anil", "maml_plus_plus", "protonet", "transformer"])
def test_shapes_alone_tell_the_operations_of_evaluation(case: str) -> None:
    learner, task = CASES[case]()
    meta = calibrate(learner, learner.init(), lambda generator: task, tasks=2)
    batch, steps = pytree.tree_map(lambda t: t[None], task), learner.steps
    counted = []
    for points in range(steps + 1):  # the curve has a prediction at each
        score = judge(learner, Plan("loop"), points, 1)
        score(meta, batch)
        with FlopCounterMode(display=False) as counter:
            score(meta, batch)
        counted.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        own = replace(learner, training=False)
        own.predict(meta, next(iter(own.path(meta, task.support, 0))), task.query.x, task.support.x, 0)
    seen = cost.of_adapting(learner, task, steps, meta)
    if case == "anil":  # whose body runs once
        assert counted[-1] > seen.operations > 0.9 * counted[-1]
    else:
        start = 0 if case != "protonet" else counted[0] - counter.get_total_flops()
        predictions = (counted[0] - start) * steps
        assert seen.operations == counted[-1] - predictions
    assert cost.of_adapting(learner, task, steps).operations == seen.operations, "statistics count by their shapes"


MANY: dict[str, Callable[[], Learner]] = {
    "maml": lambda: algorithms.maml(perceptron(3, 4, 2), inner_steps=11),
    "fomaml": lambda: algorithms.fomaml(perceptron(3, 4, 2), inner_steps=11),
    "imaml": lambda: algorithms.imaml(perceptron(3, 4, 2), inner_steps=11),
    "anil": lambda: algorithms.anil(named(body=nn.Linear(3, 4), head=nn.Linear(4, 2)).float(), inner_steps=11),
    "rates of each step": lambda: algorithms.maml_plus_plus(perceptron(3, 4, 2), inner_steps=11),
    "some steps": lambda: algorithms.maml(perceptron(3, 4, 2), inner_steps=11, order="truncated:3"),
    "minibatches": lambda: algorithms.maml(perceptron(3, 4, 2), inner_steps=11, inner_batch=3),
}


@pytest.mark.parametrize(("case", "memory"), [*((case, "unroll") for case in MANY), ("maml", "recompute")])
def test_of_many_steps_a_few_tell_the_operations_of_all(case: str, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, task = MANY[case](), episode()
    traced, walked = list[int](), cost._traced

    def watched(own: Learner, *rest: Any) -> cost.Seen:
        traced.append(own.steps)
        return walked(own, *rest)

    monkeypatch.setattr(cost, "_traced", watched)
    assert cost.operations(learner, task, memory, 3) == 3 * cost.of_meta_gradient(learner, task, memory).operations
    all_steps = case in ("rates of each step", "some steps", "minibatches")
    assert (11 in traced[:-1]) == all_steps, "the last is the whole count of this test"
    meta = calibrate(learner, learner.init(), lambda generator: task, tasks=2)
    assert cost.adapting_operations(learner, task, 14, meta) == cost.of_adapting(learner, task, 14, meta).operations


class Fifths(SGD):
    """Does more at every fifth step, which a few in a row do not show."""

    def update(self, learned: Params, grads: Params, state: Params, fast: Params, k: int) -> tuple[Params, Params]:
        if k % 5 == 0:
            grads = {name: g + 0 * (g.reshape(-1, 1) @ g.reshape(1, -1)).sum() for name, g in grads.items()}
        return super().update(learned, grads, state, fast, k)


class Eleven(SGD):
    """Fits one number of steps, and fails in no sentence of ours."""

    def check(self, names: Any, steps: int) -> None:
        if steps != 11:
            raise ValueError("eleven")


@pytest.mark.parametrize("rule", [Fifths(0.1), Eleven(0.1), Clip(Fifths(0.1), 10.0), Groups(("*", Fifths(0.1)))])
def test_steps_of_a_rule_of_yours_are_all_counted(rule: Any) -> None:
    learner, task = replace(algorithms.maml(perceptron(3, 4, 2), inner_steps=11), rule=rule), episode()
    assert cost.operations(learner, task, "unroll") == cost.of_meta_gradient(learner, task).operations


def test_nothing_is_computed_and_nothing_is_changed() -> None:
    network = conv4(2, size=8, width=4)
    learner, before = algorithms.maml(network), {name: t.clone() for name, t in network.state_dict().items()}
    state = torch.get_rng_state()
    cost.of_meta_gradient(learner, episode((1, 8, 8)))
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(t.is_meta for t in (*network.parameters(), *learner.model.parameters()))


def test_what_looks_at_values_is_counted_in_a_real_meta_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x if x.sum() > 1e9 else x * 2)  # type: ignore[no-any-return]

    learner = algorithms.maml(Branching())
    with pytest.raises(RuntimeError, match="meta"):
        cost.of_meta_gradient(learner, episode())
    first = 2 * 3 * 2
    expected = by_hand(first, 0, 1, "second order")
    assert cost.operations(learner, episode(), "unroll", tasks=7) == 7 * expected
    assert cost.adapting_operations(learner, episode(), 1) == SUPPORT * 2 * first + QUERY * first
    broken = replace(learner, loss=lambda prediction, y: 1 / 0)
    assert cost.operations(broken, episode(), "unroll") is None, "a run must not fail for it"


def test_memory_is_what_was_held_at_most() -> None:
    kept = torch.ones(1000)
    with Watch([kept]) as watch:
        kept.view(10, 100).mul_(2)
        assert (watch.seen.peak, watch.live) == (0, 0), "neither a look at a tensor nor a change of it needs memory"
        torch.ones(2000)
        a, b = torch.ones(500), torch.ones(1000, dtype=torch.float64)
        del a
        torch.ones(250)
    assert watch.live == 8000 and watch.seen.peak == 2000 + 8000
    del b
    assert watch.live == 0


@pytest.mark.parametrize("case", ["maml", "fomaml", "transformer"])
def test_shapes_alone_tell_the_memory_of_real_tensors(case: str) -> None:
    learner, task = CASES[case]()
    if isinstance(task.support.x, Tensor) and task.support.x.dim() == 4:
        # From one channel all layouts look alike, and torch's convolution of shapes takes another than that of numbers.
        learner, task = replace(learner, model=conv4(2, 2, 8, width=4)), episode((2, 8, 8))
    for memory in ("unroll", "recompute") if learner.steps else ("unroll",):
        gradient, meta = gradient_function(learner, Plan("loop", memory=memory)), learner.init()  # type: ignore[arg-type]
        batch = pytree.tree_map(lambda t: t[None], task)
        gradient(meta, batch)
        with Watch((*pytree.tree_leaves((meta, batch)), *learner.model.parameters(), *learner.model.buffers())) as watch:
            gradient(meta, batch)
        assert cost.of_meta_gradient(learner, task, memory).peak == watch.seen.peak > 0  # type: ignore[arg-type]


MEASURE = """
import sys, torch
from toolkit.choose import peak
from toolkit.cost import of_meta_gradient
from toolkit.engine import gradient_function
from toolkit.plan import Plan
from torch.utils import _pytree as pytree
import toolkit.engine
toolkit.engine.keep_freed_memory = lambda: None  # so that the environment says when blocks go back
from tests.test_cost import large
torch.set_num_threads(1)
learner, task = large(sys.argv[1])
for memory in ("unroll", "recompute"):
    gradient, meta = gradient_function(learner, Plan("loop", memory=memory)), learner.init()
    batch = pytree.tree_map(lambda t: t[None], task)
    gradient(meta, batch)
    print(peak(lambda: gradient(meta, batch)), of_meta_gradient(learner, task, memory).peak)
"""


def large(name: str) -> tuple[Learner, Task]:
    """A learner and a task whose memory stands out from what torch needs besides."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5), torch.arange(5).repeat(3)
    if name == "bert":
        x = [torch.randint(1, 1000, (len(y), 32), generator=generator) for y in labels]
        network: nn.Module = Bert()
    else:
        size = 64 if name == "vit" else 42
        x = [torch.randn(len(y), 3, size, size, generator=generator) for y in labels]
        network = vision_transformer() if name == "vit" else conv4(5, 3, size, pool=True)
    return algorithms.maml(network, inner_steps=2, inner_lr=0.01), Task(Batch(x[0], labels[0]), Batch(x[1], labels[1]))


def vision_transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 8, 4, 4, 128, 512, num_classes=5)


class Bert(nn.Module):
    """A small one of transformers, with masks of its own, as the library's look at values."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        settings = transformers.BertConfig(vocab_size=1000, **sizes, **dropout)
        self.body = transformers.AutoModel.from_config(settings, attn_implementation="eager", add_pooling_layer=False)
        self.head = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[0], 1, 1, x.shape[1], device=x.device)
        return self.head(self.body(input_ids=x, attention_mask=mask).last_hidden_state.mean(1))  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is only known on Linux")
@pytest.mark.parametrize("name", ["conv4", "vit", "bert"])
def test_predicted_memory_is_what_a_process_holds(name: str) -> None:
    """Where its allocator gives freed blocks back, which tells the tensors' memory from gaps between them."""
    learner, task = large(name)
    assert cost.of_meta_gradient(learner, task).operations == real(learner, task)
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, name], capture_output=True, text=True, check=True, env=environment,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        held, predicted = map(int, line.split())
        # Convolutions ask for buffers that are never written, which a CPU never maps and a GPU has.
        assert 0.93 * held < predicted < (1.2 if name == "conv4" else 1.02) * held, line


@pytest.mark.slow  # of times, so on a quiet machine only
@pytest.mark.parametrize("name", ["conv4", "vit", "bert"])
def test_predicted_seconds_are_of_the_right_size(name: str) -> None:
    learner, task = large(name)
    gradient, meta, times = gradient_function(learner, Plan("loop")), learner.init(), list[float]()
    batch = pytree.tree_map(lambda t: t[None], task)
    gradient(meta, batch)
    while len(times) < 5:
        began = time.perf_counter()
        gradient(meta, batch)
        times.append(time.perf_counter() - began)
    found = next(predict.predictions(learner, task, task))
    assert min(times) / 2.5 < found.seconds < min(times) * 2.5


def test_bytes_to_store() -> None:
    layers = OrderedDict(body=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), head=nn.Linear(4, 2))
    learner = algorithms.maml(lora(nn.Sequential(layers).double(), rank=2), adapts="body.lora_*")
    adapters = 2 * 3 + 4 * 2
    assert cost.task_bytes(learner) == 8 * adapters
    everything = adapters + (2 * 4 + 2 * 2) + (3 * 4 + 4) + 2 * 4 + (4 * 2 + 2) + 2 * 4 + 1  # batch norm counts its batches too
    assert cost.model_bytes(learner) == 8 * everything
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    assert cost.model_bytes(algorithms.maml(tied)) == cost.task_bytes(algorithms.maml(tied)) == 4 * 9, "one tensor"


@pytest.mark.usefixtures("undrawn")
def test_a_run_says_what_it_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    spent: Iterator[float] = iter(range(0, 10_000, 50))
    monkeypatch.setattr("toolkit.experiment.counters", lambda device: [Counter("package-0", lambda: next(spent))])
    record = run(config(tmp_path / "run", tasks=3), "sinusoid", regression(inner_steps=2), TRAINING, VALIDATION, TEST)
    found = record.summary["cost"]
    first, others = 2 * 10, 2 * (100 + 10)
    step = (2 + 2) * first + (3 + 6) * others
    assert found["meta_gradient_operations"] == 3 * (5 * 2 * step + 6 * (2 * first + 3 * others))
    assert found["evaluation_operations"] == 5 * 2 * (2 * first + 3 * others) + 8 * (first + others)
    assert found["model_bytes"] == found["task_bytes"] == 4 * (10 + 10 + 100 + 10 + 10 + 1)
    assert found["joules"] % 50 == 0 and found["joules"] >= 50 and found["joules_of"] == "package-0"
    said = capsys.readouterr().out
    assert "cost: " in said and "GFLOP a meta-gradient" in said and "0.564 kB to store for a task" in said
    assert f"{found['joules']:.0f} J (package-0)" in said


@pytest.mark.usefixtures("undrawn")
def test_energy_goes_on_in_a_resumed_run_and_is_unknown_where_the_machine_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent: Iterator[float] = iter(range(0, 10_000, 50))
    monkeypatch.setattr("toolkit.experiment.counters", lambda device: [Counter("package-0", lambda: next(spent))])
    samplers = TRAINING, VALIDATION, TEST
    first = run(config(tmp_path / "run"), "sinusoid", regression(), *samplers).summary["cost"]["joules"]
    (tmp_path / "run" / "summary.json").unlink()
    again = run(config(tmp_path / "run", resume=True), "sinusoid", regression(), *samplers).summary["cost"]["joules"]
    assert again > first - 50 > 0, "the last checkpoint was written before the end"
    monkeypatch.setattr("toolkit.experiment.counters", lambda device: [])
    silent = run(config(tmp_path / "silent"), "sinusoid", regression(), *samplers).summary["cost"]
    assert silent["joules"] is None and silent["joules_of"] is None


def test_older_runs_are_read_as_before(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(config(folder), "sinusoid", regression(), TRAINING, VALIDATION, TEST)
    data = json.loads((folder / "summary.json").read_text())
    for key in ("meta_gradient_operations", "evaluation_operations", "model_bytes", "task_bytes", "joules", "joules_of"):
        del data["cost"][key]
    (folder / "summary.json").write_text(json.dumps(data))
    old = Run(folder)
    assert table(old.summary).splitlines()[-1] == f"cost: {data['cost']['peak_mb']:,.0f} MiB at most"
    assert "maml" in tables.markdown(tables.of_runs([old])) and rows({"maml": [old]})[0]["method"] == "maml"
    write_report([old], tmp_path / "report.html")
    assert "maml" in (tmp_path / "report.html").read_text()


def zones(root: Path, **energies: int) -> None:
    """RAPL's folders, as Linux has them, with these microjoules; they wrap at 1,000 J."""
    for i, (name, value) in enumerate(energies.items()):
        folder = root / f"intel-rapl:{i}"
        folder.mkdir(exist_ok=True)
        (folder / "name").write_text(f"{name.replace('_', '-')}\n")
        (folder / "max_energy_range_uj").write_text("1000000000\n")
        (folder / "energy_uj").write_text(f"{value}\n")


def test_energy_is_that_of_packages_and_memory_and_counters_may_begin_again(tmp_path: Path) -> None:
    zones(tmp_path, package_0=990_000_000, core=5, dram=7_000_000, psys=9)
    (tmp_path / "intel-rapl-mmio:0").mkdir()
    energy = Energy(counters("cpu", tmp_path), before=100.0)
    assert energy.names == "package-0, dram" and energy.joules() == 100.0
    zones(tmp_path, package_0=15_000_000, core=500_000_000, dram=9_500_000, psys=900_000_000)
    assert energy.end() == pytest.approx(100 + 25 + 2.5)
    (tmp_path / "intel-rapl:2" / "energy_uj").unlink()
    assert energy.joules() is None, "a part of the sum is no longer known"
    assert [counter.name for counter in counters("cpu", tmp_path)] == ["package-0"]
    assert Energy([]).end() is None and Energy(counters("cpu", tmp_path), before=None).end() is None
    assert counters("cpu", tmp_path / "nothing") == []


def test_a_counter_that_begins_again_between_two_looks_is_seen_by_the_thread() -> None:
    values = iter([0.0, 60.0, 20.0, 90.0, *[90.0] * 10_000])
    energy = Energy([Counter("package-0", lambda: next(values), 100.0)], period=0.001)
    deadline = time.monotonic() + 20
    while energy.total < 190 and time.monotonic() < deadline:
        time.sleep(0.002)
    assert energy.end() == 190.0, "60, then 60 to the end and past it to 20, then 70"


def test_energy_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spent, asked = iter([0, 1500, 4000, 4000]), []
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(spent),
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    energy = Energy(counters("cuda:0", tmp_path))
    assert energy.names == "cuda:0" and asked == ["GPU-1-2"] and energy.end() == 2.5
    library.nvmlInit = lambda: 1 / 0
    assert counters("cuda:0", tmp_path) == []


def started(monkeypatch: pytest.MonkeyPatch, words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["toolkit", *words.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_toolkit_plan_predicts_from_shapes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = "plan --predict --inputs 1,16,16 --model conv4 --tasks 4 --queries 2 --inner-steps 2 --flops-per-second 1e9"
    assert started(monkeypatch, words) == 0
    head, model, besides, _, *found = capsys.readouterr().out.splitlines()
    assert head == "maml of conv4, 4 tasks of examples of shape (1,16,16) a meta-gradient, from shapes alone"
    network = conv4(5, size=16)
    numbers = sum(p.numel() for p in network.parameters())
    stored = 4 * numbers + sum(b.numel() * b.element_size() for b in network.buffers())
    adapted = f"{numbers:,} adapt, {4 * numbers / 1e3:,.1f} kB to store for each task"
    assert model == f"model: {numbers:,} parameters, {stored / 1e6:.3g} MB; {adapted}"
    assert f"holds {4 * 4 * numbers / 1e6:.3g} MB" in besides, "weights and their best so far, two moments of Adam"
    ways = ["second order", "second order, steps recomputed", "first order", "adapt and predict"]
    assert [row[:44].strip() for row in found] == ways
    learner = algorithms.maml(network, inner_steps=2)
    task = predict.Blank(5, 1, 2, (1, 16, 16))(torch.Generator())
    seen, cells = cost.of_meta_gradient(learner, task), found[0][44:].split()
    assert cells[0] == f"{seen.operations / 1e9:,.4g}" and cells[1] == cells[0], "of a machine with 1 GFLOP/s"
    assert float(cells[2]) == pytest.approx(4 * float(cells[1]), rel=1e-3)
    assert float(cells[3]) == pytest.approx(seen.peak / 1e6, rel=0.01)
    assert float(cells[4]) == pytest.approx((stored + seen.peak + 16 * numbers) / 1e6, rel=0.01)
    assert len(found[3][44:].split()) == 4, "of evaluation there is no batch"


def test_toolkit_plan_predicts_for_tasks_of_a_sampler_by_runs_of_each_operation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert started(monkeypatch, "plan --predict --sampler sinusoid --model mlp --algorithm fomaml --tasks 2") == 0
    head, _, _, _, *found = capsys.readouterr().out.splitlines()
    assert head == "fomaml of mlp, 2 tasks of sinusoid a meta-gradient, from shapes alone"
    assert [row[:44].strip() for row in found] == ["first order", "first order, steps recomputed", "adapt and predict"]
    assert all(0 < float(row[44:].split()[1]) < 1 for row in found)


TOO_LARGE = """
import torch
from torch import nn

class Huge(nn.Module):
    "A language model of 15 billion weights, 60 GB."
    def __init__(self, outputs, width=32768, blocks=13):
        super().__init__()
        self.table = nn.Embedding(32000, width)
        self.blocks = nn.Sequential(*(layer for _ in range(blocks) for layer in (nn.Linear(width, width), nn.GELU())))
        self.head = nn.Linear(width, outputs)

    def forward(self, x):
        return self.head(self.blocks(self.table(x)).mean(1))

class Looking(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs[0], outputs)

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)
"""


def test_toolkit_plan_predicts_for_a_model_that_does_not_fit_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "huge.py").write_text(TOO_LARGE)
    model = f"--model {tmp_path / 'huge.py'}:Huge --algorithm lora_maml --algorithm.rank 4"
    assert started(monkeypatch, f"plan --predict --inputs 8 --numbers 32000 {model} --tasks 1 --flops-per-second 1e12") == 0
    said = capsys.readouterr().out
    weights = 32000 * 32768 + 13 * (32768 * 32768 + 32768) + 32768 * 5 + 5
    adapters = 13 * 4 * 2 * 32768
    parameters = int(said.split("model: ")[1].split()[0].replace(",", ""))
    assert weights + adapters <= parameters <= weights + adapters + 4 * (32768 + 5), "the head may have adapters too"
    assert "second order, steps recomputed" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--predict --inputs 3,x", "--inputs 3,x is no shape; give whole numbers from 1 up with commas between, as in 3,2"),
        ("--inputs 3,224", "--inputs 3,224 is for a prediction from shapes; add --predict, or leave it out"),
        ("--predict --inputs 3,0,4", "--inputs 3,0,4 is no shape"),
        ("--predict --inputs 8 --numbers 0", "--numbers is 0; give at least 1, so many different tokens"),
        ("--predict --numbers 9", "--numbers 9 says what --inputs hold; give the shape of an example with it"),
        ("--predict --inputs 8 --model HUGE:Looking", "shapes alone do not tell what the model does (Tensor.item() cannot be"),
    ],
)
def test_mistakes_are_a_sentence(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "huge.py").write_text(TOO_LARGE)
    assert started(monkeypatch, f"plan {words.replace('HUGE', str(tmp_path / 'huge.py'))}") == 2
    assert message in capsys.readouterr().err


def test_blank_tasks_have_a_shape_and_need_no_memory() -> None:
    sampler = predict.Blank(5, 2, 3, (1000, 1000), 7)
    tasks = draw(sampler, 4, 0)
    assert tasks.support.x.shape == (4, 10, 1000, 1000) and tasks.query.y.shape == (4, 15)  # type: ignore[union-attr]
    assert tasks.support.x.untyped_storage().nbytes() == 8 and not tasks.support.x.is_floating_point()  # type: ignore[union-attr]
    assert take(tasks, 1).query.y.tolist() == [0, 1, 2, 3, 4] * 3
    assert sampler(torch.Generator()).support.x.shape == (10, 1000, 1000)  # type: ignore[union-attr]


def test_a_memory_of_the_support_set_is_counted_as_large_as_it_is() -> None:
    learner = algorithms.matching_net(conv4(2, size=8, width=4))
    bytes_of = []
    for shots in (1, 3):
        support = Batch(torch.rand(2 * shots, 1, 8, 8), torch.arange(2 * shots) % 2)
        fast = adapt(learner, learner.init(), support)
        bytes_of.append(cost.task_bytes(learner, support))
        assert bytes_of[-1] == sum(tensor.numel() * tensor.element_size() for tensor in fast.values())
    assert bytes_of[1] == 3 * bytes_of[0]
