"""The meta-gradient against truth: finite differences, closed forms, learn2learn, and itself under every plan."""

import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from tests.conftest import Slopes, convolutional, dense, finite_differences, flat, mean_objective, relative, task_batch
from toolkit import Batch, Learner, Meta, Metrics, Plan, Task, UserError, algorithms, draw, evaluate, meta_gradient, train
from toolkit.engine import gradient_function
from toolkit.learner import minibatch
from toolkit.metrics import cross_entropy, squared_error
from toolkit.objectives import EveryStep
from toolkit.rules import SGD, Adam, Clip, Groups, PerStep, Proximal, RMSprop, Rule
from toolkit.samplers import Linear
from toolkit.samplers.linear import adapted
from toolkit.task import take
from toolkit.tree import tree_map

RULES: dict[str, Rule] = {
    "sgd": SGD(0.3),
    "learned rates": SGD(0.3, learn="tensor"),
    "momentum": SGD(0.2, momentum=0.8),
    "nesterov": SGD(0.2, momentum=0.8, nesterov=True),
    "adam": Adam(0.05, eps=1e-3),
    "rmsprop": RMSprop(0.05, alpha=0.6, eps=1e-2),
    "rates per weight": SGD(0.3, learn="weight"),
    "rates per step": PerStep(SGD(0.3, learn="tensor")),
    "clip": Clip(SGD(0.5), 0.2),
    "proximal": Proximal(SGD(0.3), 0.7),
    "groups": Groups(("2.*", SGD(0.4, learn="tensor")), ("*bias", SGD(0.1)), ("*", Adam(0.02, eps=1e-3))),
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


def every_step(steps: int) -> EveryStep:
    """Weights that grow from step to step."""
    return EveryStep(tuple((0.1 + k) / (0.1 * steps + steps * (steps - 1) / 2) for k in range(steps)))


ALGORITHMS = {
    "maml": lambda steps, **more: algorithms.maml(dense(), inner_steps=steps, **more),
    "anil": lambda steps, **more: algorithms.anil(dense(), adapts="2.*", inner_steps=steps, **more),
    "every step": lambda steps, **more: replace(
        algorithms.maml(dense(), inner_steps=steps, **more), objective=every_step(steps)
    ),
}


def made(algorithm: str, rule: str, steps: int) -> Learner:
    """The learner of one cell of the tables; rules per step get as many values as it takes steps."""
    chosen = RULES[rule]
    chosen = replace(chosen, steps=steps) if isinstance(chosen, PerStep) else chosen
    learner: Learner = ALGORITHMS[algorithm](steps, rule=chosen)
    return learner


@pytest.mark.parametrize("steps", [1, 3, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_equals_finite_differences(algorithm: str, rule: str, steps: int) -> None:
    learner = made(algorithm, rule, steps)
    tasks, meta = task_batch(), learner.init()
    grads, _ = meta_gradient(learner, meta, tasks)
    assert Slopes(mean_objective(learner, tasks), meta).off(grads) < 1e-6


def test_a_few_directions_see_an_error_in_any_one_number() -> None:
    learner, tasks = algorithms.maml(dense(), inner_lr=0.5, inner_steps=2), task_batch()
    meta = learner.init()
    (grads, _), truth = meta_gradient(learner, meta, tasks), Slopes(mean_objective(learner, tasks), meta)
    assert relative(grads, finite_differences(mean_objective(learner, tasks), meta)) < 1e-6 > truth.off(grads)
    for i in range(len(flat(grads))):
        wrong = flat(grads)
        wrong[i] += 1e-5 * wrong.norm()
        assert truth.off(wrong) > 1e-6


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rule", [*RULES, "first order", "truncated", "in minibatches"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_plan_gives_the_same_gradient(algorithm: str, rule: str, plan: str) -> None:
    special = {"first order": {"order": "first"}, "truncated": {"order": "truncated:2"}, "in minibatches": {"inner_batch": 3}}
    learner = ALGORITHMS[algorithm](3, inner_lr=0.3, **special[rule]) if rule in special else made(algorithm, rule, 3)
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
    learner, tasks, expected = differences(norm, "batch")
    grads, _ = meta_gradient(learner, learner.init(), tasks, PLANS[plan])
    assert expected.off(grads) < 1e-6


@cache
def differences(norm: str, policy: str) -> tuple[Learner, Task, Slopes]:
    """A learner of a convolutional network, tasks, and the finite differences, which are slow and the same for all plans."""
    learner = algorithms.maml(convolutional(NORMS[norm]), inner_lr=0.5, inner_steps=2, batch_norm=policy)
    tasks = task_batch(shape=(1, 8, 8))
    return learner, tasks, Slopes(mean_objective(learner, tasks), learner.init())


@pytest.mark.parametrize("policy", ["batch", "support", "running"])
@pytest.mark.parametrize("plan", ["vmap", "loop", "vmap recompute"])
def test_batch_norm_policies_are_exact(policy: str, plan: str) -> None:
    learner, tasks, expected = differences("batch", policy)
    grads, _ = meta_gradient(learner, learner.init(), tasks, PLANS[plan])
    assert expected.off(grads) < 1e-6


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


def truncated_by_hand(steps: int, last: int, lr: float, tasks: Task) -> dict[str, torch.Tensor]:
    """torch.autograd with a graph of the inner gradient in the last so many steps only."""
    model = dense()
    start = dict(model.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        task, fast = take(tasks, i), start
        for k in range(steps):
            output = torch.func.functional_call(model, fast, task.support.x)
            loss = nn.functional.cross_entropy(output, task.support.y)
            slope = torch.autograd.grad(loss, list(fast.values()), create_graph=k >= steps - last)
            fast = {name: w - lr * g for (name, w), g in zip(fast.items(), slope, strict=True)}
        total = total + nn.functional.cross_entropy(torch.func.functional_call(model, fast, task.query.x), task.query.y) / 3
    return dict(zip(start, torch.autograd.grad(total, list(start.values())), strict=True))


@pytest.mark.parametrize("plan", ["vmap", "loop", "vmap recompute"])
@pytest.mark.parametrize("last", range(5))
def test_truncated_order_equals_autograd_by_hand(last: int, plan: str) -> None:
    tasks, learner = task_batch(), algorithms.maml(dense(), inner_lr=0.5, inner_steps=4, order=f"truncated:{last}")
    grads, _ = meta_gradient(learner, learner.init(), tasks, PLANS[plan])
    assert relative(grads.params, truncated_by_hand(4, last, 0.5, tasks)) < 1e-12
    for other in {0, 1, 2, 3, 4} - {last}:
        assert relative(grads.params, truncated_by_hand(4, other, 0.5, tasks)) > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_truncated_order_goes_from_first_to_second(rule: str) -> None:
    tasks, exact = task_batch(), made("maml", rule, 3)
    meta = exact.init()
    found = {k: meta_gradient(algorithms.with_order(exact, f"truncated:{k}"), meta, tasks)[0] for k in range(4)}
    assert relative(found[3], meta_gradient(exact, meta, tasks)[0]) == 0
    assert relative(found[0], meta_gradient(algorithms.with_order(exact, "first"), meta, tasks)[0]) == 0
    assert all(relative(found[k], found[k + 1]) > 1e-4 for k in range(3))


ORDERS = {
    "": "^no order was given; give one of annealed:0.3, first, implicit, second, truncated:2$",
    **dict.fromkeys(("third", "firsts", "truncated", "annealed", "truncated:", "second:2", "first:1", "implicit:1"),
                    r"^unknown order '.*\(known: annealed:0\.3, first, implicit, second, truncated:2\)$"),
    **dict.fromkeys(("truncated:-1", "truncated:1.5", "truncated:x"), "give the number of last inner steps .* as truncated:2$"),
    **dict.fromkeys(("annealed:-1", "annealed:1.5", "annealed:x", "annealed:nan"), r"give the fraction .* as annealed:0\.3$"),
}  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
def test_an_unknown_order_is_a_sentence(order: str) -> None:
    with pytest.raises(UserError, match=ORDERS[order]):
        algorithms.maml(dense(), inner_steps=3, order=order)


def test_more_steps_of_second_order_than_steps_are_refused() -> None:
    with pytest.raises(UserError, match="the last 4 of 3 inner steps cannot be of second order; give 0 to 3"):
        algorithms.maml(dense(), inner_steps=3, order="truncated:4")
    with pytest.raises(UserError, match="the last -1 of 1 inner steps"):
        replace(algorithms.maml(dense()), order=-1)


@pytest.mark.parametrize(("fraction", "first_order_for"), [("0", 0), ("0.4", 2), ("0.41", 3), ("1", 5)])
def test_annealed_order_is_first_for_its_fraction_and_then_exact(fraction: str, first_order_for: int) -> None:
    learner = algorithms.maml(dense(), inner_lr=0.5, inner_steps=3, order=f"annealed:{fraction}")
    exact = algorithms.maml(dense(), inner_lr=0.5, inner_steps=3)
    first = replace(exact, order=0)
    seen: list[tuple[float, float]] = []

    def watched(own: Learner, plan: Plan) -> object:
        def gradient(meta: Meta, tasks: Task, share: object) -> tuple[Meta, Metrics]:
            grads, metrics = gradient_function(own, plan)(meta, tasks)
            seen.append(tuple(relative(grads, meta_gradient(other, meta, tasks, plan)[0]) for other in (first, exact)))
            return grads, metrics

        return gradient

    for _ in train(learner, random_task, 5, 3, 0.01, plan=Plan("vmap"), gradient=watched):  # type: ignore[arg-type]
        pass
    assert all(a == 0 and b > 1e-3 for a, b in seen[:first_order_for])
    assert len(seen) == 5 and all(a > 1e-3 and b == 0 for a, b in seen[first_order_for:])
    orders = [learner.at(i / 5).order for i in range(5)]
    assert orders == [0] * first_order_for + [None] * (5 - first_order_for) and learner.order is None
    meta = learner.init()
    curves = [evaluate(either, meta, random_task, 4, 5) for either in (learner, exact)]
    assert torch.equal(curves[0].loss, curves[1].loss)


def random_task(generator: torch.Generator) -> Task:
    """A classification task of two classes, float64."""
    x = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (10,), generator=generator)
    return Task(Batch(x[:4], y[:4]), Batch(x[4:], y[4:]))


def rows(total: int, size: int, k: int) -> list[int]:
    """Which examples step `k` sees."""
    numbers = torch.arange(total)
    seen = minibatch(Batch({"a": 10 * numbers, "b": numbers.float().unsqueeze(1)}, numbers), size, k)
    assert torch.equal(seen.x["a"], 10 * seen.y) and torch.equal(seen.x["b"][:, 0], seen.y.float())
    return seen.y.tolist()


@pytest.mark.parametrize("total", [*range(2, 14), 25, 50, 75])
def test_minibatches_visit_each_example_once_before_any_returns(total: int) -> None:
    for size in {1, 2, 3, total // 2, total - 1} & set(range(1, total)):
        order = [row for k in range(3 * total) for row in rows(total, size, k)]
        assert len(order) == 3 * total * size
        for begin in range(0, len(order), total):
            assert sorted(order[begin : begin + total]) == list(range(total))
        assert all(len(set(rows(total, size, k))) == size for k in range(2 * total))


@pytest.mark.parametrize(("ways", "shots"), [(2, 3), (2, 5), (3, 2), (5, 2), (5, 4), (5, 5), (5, 8), (5, 15), (20, 5)])
@pytest.mark.parametrize("per_class", [1, 2])
def test_minibatches_mix_classes_that_come_sorted(ways: int, shots: int, per_class: int) -> None:
    """On average a batch holds no fewer classes than one that is drawn at random."""
    total, size = ways * shots, per_class * ways
    labels = [row // shots for row in range(total)]
    found = [len({labels[row] for row in rows(total, size, k)}) for k in range(total)]
    at_random = ways * (1 - math.comb(total - shots, size) / math.comb(total, size))
    assert sum(found) / total >= at_random - 1e-9


def test_minibatched_steps_descend_their_own_examples() -> None:
    learner = algorithms.maml(dense(), inner_lr=0.5, inner_steps=3, inner_batch=3)
    task = take(task_batch(support=7), 0)
    meta = learner.init()
    fast = dict(meta.params)
    for k, point in enumerate(learner.path(meta, task.support)):
        assert relative(point, fast) < 1e-14
        chosen = rows(7, 3, k)
        model, x, y = dense(), task.support.x[chosen], task.support.y[chosen]
        slope = torch.func.grad(lambda w, m=model, x=x, y=y: cross_entropy(torch.func.functional_call(m, w, x), y))(fast)
        fast = tree_map(lambda w, g: w - 0.5 * g, fast, slope)
    assert len({tuple(rows(7, 3, k)) for k in range(3)}) == 3


@pytest.mark.parametrize("size", [1, 2, 3])
def test_minibatches_are_exact(size: int) -> None:
    learner = algorithms.maml(dense(), inner_lr=0.5, inner_steps=3, inner_batch=size)
    tasks, meta = task_batch(), learner.init()
    grads, _ = meta_gradient(learner, meta, tasks)
    assert relative(grads, finite_differences(mean_objective(learner, tasks), meta)) < 1e-6
    assert relative(grads, meta_gradient(replace(learner, batch=None), meta, tasks)[0]) > 1e-2


@pytest.mark.parametrize("size", [4, 5, 1000])
def test_a_minibatch_of_the_whole_support_set_is_it(size: int) -> None:
    learner = algorithms.maml(dense(), inner_lr=0.5, inner_steps=3)
    tasks, meta = task_batch(), learner.init()
    grads, _ = meta_gradient(replace(learner, batch=size), meta, tasks)
    assert relative(grads, meta_gradient(learner, meta, tasks)[0]) == 0
    support = take(tasks, 0).support
    assert minibatch(support, size, 2) is support and minibatch(support, None, 2) is support


def test_a_minibatch_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="0 support examples per inner step; give at least 1"):
        algorithms.maml(dense(), inner_batch=0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tasks_do_not_touch_each_other(algorithm: str) -> None:
    """A task's scores and gradient are the same alone and in a batch, for a rule with state and in any plan."""
    learner = made(algorithm, "adam", 3)
    tasks, meta = task_batch(), learner.init()
    for plan in PLANS.values():
        whole, scores = meta_gradient(learner, meta, tasks, plan)
        alone = [meta_gradient(learner, meta, take(tasks, slice(i, i + 1)), plan) for i in range(3)]
        assert relative(scores.task_loss, [a[1].task_loss for a in alone]) < 1e-12
        mean = tree_map(lambda a, b, c: (a + b + c) / 3, *(a[0].params for a in alone))
        assert relative(whole.params, mean) < 1e-12


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_query_labels_never_reach_the_inner_loop(algorithm: str) -> None:
    learner = made(algorithm, "sgd", 3)
    learner = replace(learner, loss=squared_to_label, metric=squared_to_label)
    meta, task = learner.init(), take(task_batch(), 0)
    poisoned = Task(task.support, task.query._replace(y=torch.full(task.query.y.shape, torch.nan)))
    seen: list[dict[str, torch.Tensor]] = []

    def spy(own: Learner, meta: object, path: object, task: Task) -> object:
        fast = list(path)  # type: ignore[call-overload]
        seen.append({name: tensor.detach() for name, tensor in fast[-1].items()})
        return own.assess(meta, fast[-1], task).loss, own.assess(meta, fast[-1], task)  # type: ignore[arg-type]

    ends = []
    for either in (task, poisoned):
        batch = Task(*(type(b)(b.x[None], b.y[None]) for b in either))
        _, metrics = meta_gradient(replace(learner, objective=spy), meta, batch, Plan("loop", memory="recompute"))
        ends.append(seen[-1])
    assert metrics.loss.isnan(), "the poison must reach the query loss, or this test proves nothing"
    assert all(tensor.isfinite().all() for tensor in ends[1].values())
    assert relative(ends[1], ends[0]) == 0


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
import re, sys, torch
from pathlib import Path
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
# Not getrusage, whose most is that of the process that started this one, where that was larger.
held = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = held()
meta_gradient(learner, meta, tasks, Plan("vmap", memory=memory))
print(held() - before)
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
