"""On a CUDA device: the same gradient and the same curve as in float64 on the CPU."""

import copy
import gc
import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from experiments import sinusoid
from experiments.tools.speed_steps import images
from tests.conftest import convolutional, dense, relative, stirred, task_batch
from tests.test_contract import trained, training_tasks
from tests.test_distributed import finished, start
from toolkit import Plan, algorithms, evaluate, meta_gradient
from toolkit.choose import choose
from toolkit.engine import gradient_function
from toolkit.experiment import run
from toolkit.health import checks
from toolkit.learner import Learner
from toolkit.metrics import squared_error
from toolkit.models import conv4, mlp
from toolkit.rules import Adam
from toolkit.runs.checkpoint import load_newest
from toolkit.samplers import Sinusoid
from toolkit.task import Task, move, take

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def on_gpu(learner: Learner) -> Learner:
    learner.model.to("cuda")
    return learner


@pytest.mark.parametrize("memory", ["unroll", "recompute"])
@pytest.mark.parametrize("model", ["dense", "convolutional"])
def test_the_gradient_equals_that_of_the_cpu(model: str, memory: str) -> None:
    build, shape = (dense, (3,)) if model == "dense" else (convolutional, (1, 8, 8))
    tasks = task_batch(shape=shape)
    exact, _ = meta_gradient(cpu := algorithms.maml(build(), rule=Adam(0.05, eps=1e-3), inner_steps=3), cpu.init(), tasks)
    learner = on_gpu(algorithms.maml(build(), rule=Adam(0.05, eps=1e-3), inner_steps=3))
    grads, _ = meta_gradient(learner, learner.init(), move(tasks, "cuda"), Plan("vmap", memory=memory))
    assert relative(move(grads, "cpu"), exact) < 1e-10


@pytest.mark.parametrize("trace", [False, True], ids=["", "recorded"])
@pytest.mark.parametrize("pool", [False, True], ids=["stride", "pooling"])
def test_float32_is_not_rounded_to_less(pool: bool, trace: bool) -> None:
    model, tasks = conv4(5, pool=pool), images(4, 3, 28, 1)()
    wide = pytree.tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tasks)
    cpu = algorithms.maml(copy.deepcopy(model).double(), inner_lr=0.4)
    exact, scores = meta_gradient(cpu, cpu.init(), wide, Plan("loop"))
    learner = algorithms.maml(model.to("cuda"), inner_lr=0.4)
    grads, found = meta_gradient(learner, learner.init(), move(tasks, "cuda"), Plan("vmap", trace=trace))
    assert relative(move(found.task_loss, "cpu").double(), scores.task_loss) < 1e-5
    assert relative(pytree.tree_map(Tensor.double, move(grads, "cpu")), exact) < 1e-3


@pytest.mark.parametrize("name", algorithms.METHODS)
def test_the_gradient_of_every_method_equals_that_of_the_cpu(name: str) -> None:
    learner, tasks = trained(name).at(0.4), training_tasks(name)
    meta = stirred(learner)
    exact, scores = meta_gradient(learner, meta, tasks, Plan("loop"))
    moved = replace(learner, model=learner.model.to("cuda"))
    for plan in (Plan("vmap"), Plan("vmap", memory="recompute")):
        grads, found = meta_gradient(moved, move(meta, "cuda"), move(tasks, "cuda"), plan)
        assert all(leaf.is_cuda for leaf in pytree.tree_leaves((grads, found)))
        assert relative(move(grads, "cpu"), exact) < 1e-8, plan
        assert relative(move(found.task_loss, "cpu"), scores.task_loss) < 1e-8, plan


def test_a_run_resumes_on_the_gpu(tmp_path: Path) -> None:
    def go(iterations: int, resume: bool) -> float:
        flags = sinusoid.Config(
            iterations=iterations, validate_every=3, val_tasks=5, eval_tasks=7, eval_steps=2, compile=False,
            out=tmp_path / "run", device="cuda", resume=resume, overwrite=not resume,
        )  # fmt: skip
        learner = algorithms.maml(mlp(), loss=squared_error, metric=squared_error, inner_lr=0.01)
        return run(flags, "sinusoid", learner, Sinusoid(10, 10), Sinusoid(10, 20), Sinusoid(10, 20)).summary["test"]["mean"][-1]

    mean = go(6, resume=False)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")  # so that the resume has three iterations to train
    assert go(6, resume=True) == pytest.approx(mean, rel=1e-6)
    loaded = load_newest(tmp_path / "run" / "checkpoints")
    assert loaded is not None
    on_cpu = algorithms.maml(mlp(), loss=squared_error, metric=squared_error, inner_lr=0.01)
    assert float(evaluate(on_cpu, loaded[0], Sinusoid(10, 20), 7, 2).mean()[-1]) == pytest.approx(mean, rel=1e-3)


class Recurrent(torch.nn.Module):
    """A recurrent network over the three numbers of an example."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.body, self.head = torch.nn.LSTM(1, 4, batch_first=True), torch.nn.Linear(4, 2)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x.unsqueeze(-1))[0][:, -1])  # type: ignore[no-any-return]


def test_recurrent_layers_are_differentiated_twice_without_cudnn() -> None:
    tasks = task_batch()
    exact, _ = meta_gradient(cpu := algorithms.maml(Recurrent(), inner_steps=2), cpu.init(), tasks, Plan("loop"))
    learner = on_gpu(algorithms.maml(Recurrent(), inner_steps=2))
    grads, _ = meta_gradient(learner, learner.init(), move(tasks, "cuda"), Plan("loop"))
    assert relative(move(grads, "cpu"), exact) < 1e-10
    curve = evaluate(learner, learner.init(), lambda generator: take(tasks, 0), tasks=1, steps=2, plan=Plan("loop"))
    assert bool(curve.loss.isfinite().all())


@pytest.mark.parametrize("name", algorithms.METHODS)
def test_a_recording_on_the_gpu_takes_other_tasks_and_other_weights(name: str) -> None:
    learner, tasks = trained(name).at(0.4), training_tasks(name)
    first = stirred(learner)
    second = pytree.tree_map(lambda leaf: 1.05 * leaf, first)
    others = pytree.tree_map(lambda leaf: leaf.flip(0).contiguous(), tasks)
    if learner.rehearse(take(tasks, 0)):
        pytest.skip("draws random numbers, so that it is not recorded")
    moved = replace(learner, model=copy.deepcopy(learner.model).to("cuda"))
    gradient = gradient_function(moved, Plan("vmap", trace=True))
    kept = [gradient(move(meta, "cuda"), move(batch, "cuda")) for meta, batch in ((first, tasks), (second, others))]
    for (grads, found), meta, batch in zip(kept, (first, second), (tasks, others), strict=True):
        exact, scores = meta_gradient(learner, meta, batch, Plan("loop"))
        assert relative(move(grads, "cpu"), exact) < 1e-8
        assert relative(move(found.task_loss, "cpu"), scores.task_loss) < 1e-8


def test_small_networks_run_as_one_graph(caplog: pytest.LogCaptureFixture) -> None:
    learner, tasks = on_gpu(algorithms.maml(convolutional(), inner_steps=2)), move(task_batch(shape=(1, 8, 8)), "cuda")
    with caplog.at_level("INFO"):
        gradient_function.__wrapped__(learner, Plan("vmap", trace=True))(learner.init(), tasks)
    assert not [record for record in caplog.records if "graph" in record.message or "failed" in record.message]
    layers = torch.nn.Sequential(convolutional()[:-1], Waiting(), convolutional()[-1])
    waits = on_gpu(algorithms.maml(layers, inner_steps=2))
    exact, _ = meta_gradient(waits, waits.init(), tasks, Plan("loop"))
    stream = torch.cuda.current_stream()
    with caplog.at_level("INFO"):
        grads, _ = gradient_function.__wrapped__(waits, Plan("vmap", trace=True))(waits.init(), tasks)
    assert torch.cuda.current_stream() == stream
    assert relative(grads, exact) < 1e-10
    assert any("one by one" in record.message or "failed" in record.message for record in caplog.records)


class Waiting(torch.nn.Module):
    """Adds a number that comes from the CPU each time, which no CUDA graph can hold."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(1, dtype=x.dtype).mul(0.5).to(x.device)


def test_compiled_on_the_gpu() -> None:
    tasks = task_batch()
    exact, _ = meta_gradient(cpu := algorithms.maml(dense(), inner_steps=2), cpu.init(), tasks, Plan("loop"))
    learner = on_gpu(algorithms.maml(dense(), inner_steps=2))
    grads, _ = meta_gradient(learner, learner.init(), move(tasks, "cuda"), Plan("vmap", compile=True))
    assert relative(move(grads, "cpu"), exact) < 1e-10


def test_evaluation_on_the_gpu_is_that_of_the_cpu() -> None:
    def sampler(generator: torch.Generator) -> Task:
        return take(task_batch(9, shape=(1, 8, 8)), int(torch.randint(9, (), generator=generator)))

    cpu, learner = algorithms.maml(convolutional(), inner_steps=2), on_gpu(algorithms.maml(convolutional(), inner_steps=2))
    exact = evaluate(cpu, cpu.init(), sampler, 9, 4)
    for trace in (False, True):
        curve = evaluate(learner, learner.init(), sampler, 9, 4, trace=trace)
        assert relative(curve.loss, exact.loss) < 1e-10 and curve.task_list_hash == exact.task_list_hash


class Attending(torch.nn.Module):
    """Attention over the three numbers of an example, with dropout if asked."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.enter, self.attend = torch.nn.Linear(1, 8), torch.nn.MultiheadAttention(8, 2, dropout, batch_first=True)
        self.head = torch.nn.Linear(8, 2)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.enter(x.unsqueeze(-1))
        return self.head(self.attend(rows, rows, rows, need_weights=False)[0].mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "plan", [Plan("vmap"), Plan("loop"), Plan("vmap", trace=True), Plan("vmap", memory="recompute")], ids=str
)
def test_attention_is_differentiated_twice(plan: Plan) -> None:
    tasks = task_batch()
    exact, _ = meta_gradient(cpu := algorithms.maml(Attending(), inner_steps=2), cpu.init(), tasks, Plan("loop"))
    learner = on_gpu(algorithms.maml(Attending(), inner_steps=2))
    grads, _ = meta_gradient(learner, learner.init(), move(tasks, "cuda"), plan)
    assert relative(move(grads, "cpu"), exact) < 1e-10


def test_dropout_is_repeated_by_its_seed() -> None:
    learner, tasks = on_gpu(algorithms.maml(Attending(0.3), inner_steps=2)), move(task_batch(), "cuda")
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(meta_gradient(learner, learner.init(), tasks, Plan("vmap"))[0])
    assert relative(found[0], found[1]) == 0 and relative(found[0], found[2]) > 1e-3


@pytest.mark.parametrize("trace", [False, True])
def test_the_chosen_plan_keeps_within_its_budget(trace: bool) -> None:
    learner = on_gpu(algorithms.maml(conv4(5, channels=3, size=84, width=32), inner_lr=0.01, inner_steps=5))
    tasks = move(images(16, 15, 84, 3)(), "cuda")
    plan = choose(learner, tasks, budget="2GB", trace=trace)
    assert plan.size(16) < 16 or plan.memory == "recompute", f"{plan}: the budget was no limit, so this shows nothing"
    gradient_function.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    function = gradient_function(learner, plan)
    for _ in range(2):
        function(learner.init(), tasks)
    if not trace:  # a recording is made with the memory of the function itself
        assert torch.cuda.max_memory_reserved() - before < 2.2e9, plan
    del function
    gradient_function.cache_clear()


def test_a_run_says_what_it_took_from_the_gpu(tmp_path: Path) -> None:
    flags = sinusoid.Config(
        iterations=200, validate_every=200, val_tasks=5, eval_tasks=70, eval_steps=2, out=tmp_path / "run", device="cuda"
    )
    learner = algorithms.maml(mlp(), loss=squared_error, metric=squared_error, inner_lr=0.01)
    summary = run(flags, "sinusoid", learner, Sinusoid(10, 10), Sinusoid(10, 20), Sinusoid(10, 20)).summary
    assert summary["cost"]["peak_mb"] > 0
    if importlib.util.find_spec("pynvml"):
        assert summary["cost"]["joules"] > 0 and "cuda" in summary["cost"]["joules_of"]


def test_the_doctor_looks_at_the_gpu(tmp_path: Path) -> None:
    found = {check.name: check for check in checks(tmp_path)}
    assert found["second order"].ok and "on cuda:0" in found["second order"].line, found["second order"]
    assert torch.cuda.get_device_name(0) in found["devices"].line


@pytest.mark.parametrize("more", [("--reduce", "fast"), ("--reduce", "ordered"), ("--reduce", "fast", "--shard")], ids=" ".join)
def test_two_processes_find_what_one_finds(more: tuple[str, ...], tmp_path: Path) -> None:
    shared_gpu = torch.cuda.device_count() == 1
    numbers = {"iterations": 30, "tasks": 5, "val-tasks": 5, "eval-tasks": 7, "eval-steps": 2, "validate-every": 15}
    flags = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    shared = ["experiments/sinusoid.py", "--device", "cuda", "--map", "vmap", "--no-compile", *flags, *more]
    for size in (1, 2):
        own = shared[:-1] if size == 1 and more[-1] == "--shard" else shared
        codes, _, errors = zip(*finished(start([*own, "--out", str(tmp_path / str(size))], size)), strict=True)
        if size == 2 and shared_gpu:
            assert "2 processes and 1 GPU:" in errors[0], errors
            if more[-1] == "--shard":
                assert codes == (2, 2) and "error: --shard keeps parts on GPUs of their own" in "".join(errors), errors
                return
        assert set(codes) == {0}, errors
    one, two = (load_newest(tmp_path / size / "checkpoints") for size in ("1", "2"))
    assert one is not None and two is not None
    off = relative(one[0].params, two[0].params)
    assert off == 0 if more[-1] == "ordered" else off < 1e-4, off
