"""On a CUDA device: the same gradient and the same curve as in float64 on the CPU."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from experiments import sinusoid
from tests.conftest import convolutional, dense, relative, stirred, task_batch
from tests.test_contract import trained, training_tasks
from toolkit import Plan, algorithms, evaluate, meta_gradient
from toolkit.experiment import run
from toolkit.learner import Learner
from toolkit.metrics import squared_error
from toolkit.models import mlp
from toolkit.rules import Adam
from toolkit.runs.checkpoint import load_newest
from toolkit.samplers import Sinusoid
from toolkit.task import move, take

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
