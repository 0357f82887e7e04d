"""The meta-gradient against truth: finite differences, closed forms, learn2learn, and itself under every plan."""

import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.conftest import convolutional, dense, finite_differences, mean_objective, relative, task_batch
from toolkit import Learner, Plan, Task, algorithms, draw, meta_gradient
from toolkit.metrics import cross_entropy, squared_error
from toolkit.objectives import EveryStep
from toolkit.rules import SGD, Adam, FirstOrder, Groups, Rule
from toolkit.samplers import Linear
from toolkit.samplers.linear import adapted
from toolkit.task import take
from toolkit.tree import tree_map

RULES: dict[str, Rule] = {
    "sgd": SGD(0.3),
    "learned rates": SGD(0.3, learn=True),
    "momentum": SGD(0.2, momentum=0.8),
    "nesterov": SGD(0.2, momentum=0.8, nesterov=True),
    "adam": Adam(0.05, eps=1e-3),
    "groups": Groups(("2.*", SGD(0.4, learn=True)), ("*bias", SGD(0.1)), ("*", Adam(0.02, eps=1e-3))),
}
PLANS = {
    "vmap": Plan("vmap"),
    "vmap by two": Plan("vmap", chunk=2),
    "loop": Plan("loop"),
    "threads": Plan("threads", workers=2),
    "threads by two": Plan("threads", chunk=2, workers=2),
    "vmap recompute": Plan("vmap", memory="recompute"),
    "loop recompute": Plan("loop", memory="recompute"),
    "threads recompute": Plan("threads", memory="recompute", workers=2),
}
ALGORITHMS = {
    "maml": lambda rule, steps: algorithms.maml(dense(), rule=rule, inner_steps=steps),
    "anil": lambda rule, steps: algorithms.anil(dense(), adapts="2.*", rule=rule, inner_steps=steps),
    "every step": lambda rule, steps: replace(
        algorithms.maml(dense(), rule=rule, inner_steps=steps), objective=EveryStep(tuple(0.1 + k for k in range(steps)))
    ),
}


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_equals_finite_differences(algorithm: str, rule: str, steps: int) -> None:
    learner = ALGORITHMS[algorithm](RULES[rule], steps)
    tasks, meta = task_batch(), learner.init()
    grads, _ = meta_gradient(learner, meta, tasks)
    assert relative(grads, finite_differences(mean_objective(learner, tasks), meta)) < 1e-6


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rule", [*RULES, "first order"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_plan_gives_the_same_gradient(algorithm: str, rule: str, plan: str) -> None:
    learner = ALGORITHMS[algorithm]({**RULES, "first order": FirstOrder(SGD(0.3))}[rule], 3)
    tasks, meta = task_batch(), learner.init()
    expected, scores = meta_gradient(learner, meta, tasks, Plan("loop"))
    grads, found = meta_gradient(learner, meta, tasks, PLANS[plan])
    assert relative(grads, expected) < 1e-10
    assert relative(found, scores) < 1e-12
    again, _ = meta_gradient(learner, meta, tasks, PLANS[plan])
    assert relative(again, grads) == 0


NORMS = {
    "batch": lambda c: nn.BatchNorm2d(c),
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
    "group": lambda c: nn.GroupNorm(1, c),
    "layer": lambda c: nn.LayerNorm([c, 4, 4]),
}


@pytest.mark.parametrize("plan", ["vmap", "loop", "threads", "vmap recompute"])
@pytest.mark.parametrize("norm", NORMS)
def test_normalisation_is_exact_to_second_order(norm: str, plan: str) -> None:
    """torch's own batch, layer and instance norm under vmap are off by about 1 % here."""
    learner = algorithms.maml(convolutional(NORMS[norm]), inner_lr=0.5, inner_steps=2)
    tasks, meta = task_batch(shape=(1, 8, 8)), learner.init()
    grads, _ = meta_gradient(learner, meta, tasks, PLANS[plan])
    assert relative(grads, finite_differences(mean_objective(learner, tasks), meta)) < 1e-6


@pytest.mark.parametrize("policy", ["batch", "support", "running"])
@pytest.mark.parametrize("plan", ["vmap", "loop", "vmap recompute"])
def test_batch_norm_policies_are_exact(policy: str, plan: str) -> None:
    learner = algorithms.maml(convolutional(), inner_lr=0.5, inner_steps=2, batch_norm=policy)
    tasks, meta = task_batch(shape=(1, 8, 8)), learner.init()
    grads, _ = meta_gradient(learner, meta, tasks, PLANS[plan])
    assert relative(grads, finite_differences(mean_objective(learner, tasks), meta)) < 1e-6


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_the_need_for_norms_of_our_own_is_still_there(norm: str) -> None:
    """When this fails, torch has mended its kernels and `toolkit.norms` may hand that layer back to them."""

    def loss(p: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
        scale, weight, bias = p
        if norm == "layer":
            return nn.functional.layer_norm(x * scale, (4,), weight, bias).tanh().square().sum()
        return nn.functional.batch_norm(x * scale, None, None, weight, bias, training=True).tanh().square().sum()

    def after_a_step(p: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
        fast = tuple(a - 0.1 * b for a, b in zip(p, torch.func.grad(loss)(p, x), strict=True))
        return loss(fast, x + 0.1)

    start, x = tuple(torch.randn(3, 4, dtype=torch.float64)), torch.randn(2, 5, 4, dtype=torch.float64)
    right = torch.func.grad(lambda p: after_a_step(p, x[0]) + after_a_step(p, x[1]))(start)
    mapped = torch.func.grad(lambda p: torch.func.vmap(after_a_step, (None, 0))(p, x).sum())(start)
    assert relative(mapped, right) > 1e-4


def linear_model() -> nn.Linear:
    return nn.Linear(3, 1).double()


@pytest.mark.parametrize("steps", [1, 4])
def test_equals_the_closed_form_on_linear_regression(steps: int) -> None:
    """The adapted weights are an affine map of the start, theta_K = M theta + v; so the meta-gradient is M' grad(theta_K)."""
    model, lr = linear_model(), 0.1
    learner = algorithms.maml(model, loss=squared_error, metric=squared_error, inner_lr=lr, inner_steps=steps)
    tasks, meta = draw(Linear(3, 5, 7), 4, seed=0), learner.init()
    theta = torch.cat([model.weight.T, model.bias[:, None]]).detach()
    expected = torch.zeros_like(theta)
    for i in range(4):
        task = take(tasks, i)
        adapted_theta = adapted(theta, task.support, lr, steps)
        design = torch.cat([task.query.x, torch.ones(7, 1, dtype=torch.float64)], 1)
        at_query = 2 * design.T @ (design @ adapted_theta - task.query.y) / 7
        support = torch.cat([task.support.x, torch.ones(5, 1, dtype=torch.float64)], 1)
        jacobian = torch.linalg.matrix_power(torch.eye(4, dtype=torch.float64) - lr * 2 * support.T @ support / 5, steps)
        expected += jacobian.T @ at_query / 4
    grads, _ = meta_gradient(learner, meta, tasks)
    found = torch.cat([grads.params["weight"].T, grads.params["bias"][:, None]])
    assert relative(found, expected) < 1e-12
    *_, fast = learner.path(meta, take(tasks, 0).support)
    assert (
        relative(torch.cat([fast["weight"].T, fast["bias"][:, None]]), adapted(theta, take(tasks, 0).support, lr, steps))
        < 1e-12
    )


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("model", ["dense", "convolutional"])
def test_equals_learn2learn(model: str, steps: int, first_order: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        l2l = pytest.importorskip("learn2learn", reason="learn2learn is not installed; see requirements-learn2learn.txt")
    network = dense() if model == "dense" else convolutional()
    tasks = task_batch() if model == "dense" else task_batch(shape=(1, 8, 8))
    learner = (algorithms.fomaml if first_order else algorithms.maml)(network, inner_lr=0.3, inner_steps=steps)
    grads, metrics = meta_gradient(learner, learner.init(), tasks)
    peer = l2l.algorithms.MAML(network, lr=0.3, first_order=first_order)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        task, clone = take(tasks, i), peer.clone()
        for _ in range(steps):
            clone.adapt(cross_entropy(clone(task.support.x), task.support.y))
        total = total + cross_entropy(clone(task.query.x), task.query.y) / 3
    total.backward()
    expected = {name: p.grad for name, p in network.named_parameters()}
    assert relative(grads.params, expected) < 1e-12
    assert abs(metrics.loss - total) < 1e-12


def test_first_order_drops_the_second_derivatives() -> None:
    """FOMAML's gradient is the query gradient at the adapted weights, and not MAML's."""
    tasks = task_batch()
    learner = algorithms.fomaml(dense(), inner_lr=0.5, inner_steps=3)
    meta = learner.init()
    expected = tree_map(torch.zeros_like, meta.params)
    for i in range(3):
        task = take(tasks, i)
        *_, fast = learner.path(meta, task.support)
        at_end = torch.func.grad(lambda p, task=task: learner.assess(meta, p, task).loss)(fast)
        expected = tree_map(lambda a, b: a + b.detach() / 3, expected, at_end)
    grads, _ = meta_gradient(learner, meta, tasks)
    assert relative(grads.params, expected) < 1e-12
    exact, _ = meta_gradient(algorithms.maml(dense(), inner_lr=0.5, inner_steps=3), meta, tasks)
    assert relative(grads, exact) > 1e-3


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tasks_do_not_touch_each_other(algorithm: str) -> None:
    """A task's scores and gradient are the same alone and in a batch, for a rule with state and in any plan."""
    learner = ALGORITHMS[algorithm](RULES["adam"], 3)
    tasks, meta = task_batch(), learner.init()
    for plan in PLANS.values():
        whole, scores = meta_gradient(learner, meta, tasks, plan)
        alone = [meta_gradient(learner, meta, take(tasks, slice(i, i + 1)), plan) for i in range(3)]
        assert relative(scores.task_loss, [a[1].task_loss for a in alone]) < 1e-12
        mean = tree_map(lambda a, b, c: (a + b + c) / 3, *(a[0].params for a in alone))
        assert relative(whole.params, mean) < 1e-12


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_query_labels_never_reach_the_inner_loop(algorithm: str) -> None:
    learner = ALGORITHMS[algorithm](RULES["sgd"], 3)
    learner = replace(learner, loss=squared_to_label, metric=squared_to_label)
    meta, task = learner.init(), take(task_batch(), 0)
    poisoned = Task(task.support, task.query._replace(y=torch.full(task.query.y.shape, torch.nan)))
    seen: list[dict[str, torch.Tensor]] = []

    def spy(own: Learner, meta: object, path: object, task: Task) -> object:
        fast = list(path)  # type: ignore[call-overload]
        seen.append({name: tensor.detach() for name, tensor in fast[-1].items()})
        return own.assess(meta, fast[-1], task).loss, own.assess(meta, fast[-1], task)  # type: ignore[arg-type]

    for either in (task, poisoned):
        batch = Task(*(type(b)(b.x[None], b.y[None]) for b in either))
        _, metrics = meta_gradient(replace(learner, objective=spy), meta, batch, Plan("loop", memory="recompute"))
    assert metrics.loss.isnan(), "the poison must reach the query loss, or this test proves nothing"
    assert all(tensor.isfinite().all() for tensor in seen[-1].values())
    assert relative(seen[-1], seen[0]) == 0


def squared_to_label(prediction: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (prediction[:, 0] - y).square().mean()


def test_unused_parameters_have_zero_gradient() -> None:
    model = dense()
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    learner = algorithms.maml(model, inner_steps=2)
    for plan in PLANS.values():
        grads, _ = meta_gradient(learner, learner.init(), task_batch(), plan)
        assert torch.equal(grads.params["unused"], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(5))
def test_adam_is_safe_where_a_gradient_is_zero(seed: int) -> None:
    """Dead ReLUs give gradients of exactly 0, where the root of Adam's second moment has no derivative."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2)).double()
    model[0].bias.data[:4] = -100
    learner = algorithms.maml(model, rule=Adam(0.01), inner_steps=3)
    grads, _ = meta_gradient(learner, learner.init(), task_batch())
    assert all(g.isfinite().all() for g in grads.params.values())


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    for memory in ("unroll", "recompute"):
        learner = algorithms.maml(dense(), rule=RULES["momentum"], inner_steps=2)
        tasks, meta = task_batch(), learner.init()
        expected, _ = meta_gradient(learner, meta, tasks)
        for _ in range(2):
            grads, _ = meta_gradient(learner, meta, tasks, Plan("vmap", memory=memory, compile=True))
            assert relative(grads, expected) < 1e-10


MEMORY_PROBE = """
import resource, sys, torch
from toolkit import Plan, algorithms, draw, meta_gradient
from toolkit.metrics import squared_error
from toolkit.models import mlp
from toolkit.samplers import Sinusoid
steps, memory = int(sys.argv[1]), sys.argv[2]
learner = algorithms.maml(mlp((1, 64, 64, 1)), loss=squared_error, metric=squared_error, inner_lr=0.01, inner_steps=steps)
tasks = draw(Sinusoid(shots=2000, queries=10), 8, seed=0)
meta = learner.init()
small = algorithms.maml(mlp(), loss=squared_error, metric=squared_error, inner_steps=1)
meta_gradient(small, small.init(), draw(Sinusoid(2, 2), 2, seed=0), Plan("vmap", memory=memory))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
meta_gradient(learner, meta, tasks, Plan("vmap", memory=memory))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_recompute_keeps_memory_flat_in_the_number_of_inner_steps() -> None:
    def peak(steps: int, memory: str) -> int:
        command = [sys.executable, "-c", MEMORY_PROBE, str(steps), memory]
        # Freed blocks go back to the system at once, so that the process's peak is that of the live tensors.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    assert peak(40, "recompute") < 1.5 * peak(5, "recompute")
    assert peak(40, "unroll") > 4 * peak(5, "recompute"), "unrolling must grow, or this test proves nothing"
