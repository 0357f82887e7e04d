"""Evaluation: the curve against a loop by hand, its statistics against numpy and scipy, and what it must leave alone."""

import copy
import importlib
import json
import os
import random
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.conftest import convolutional, dense, relative, task_batch
from toolkit import Batch, Curve, Learner, Meta, Plan, Task, UserError, algorithms, draw, evaluate
from toolkit.evaluate import predictions
from toolkit.metrics import squared_error
from toolkit.rules import SGD, Adam
from toolkit.samplers import Linear
from toolkit.starts import inherited
from toolkit.task import take
from toolkit.tree import Params

PLANS = {
    "vmap": Plan("vmap"),
    "vmap by three": Plan("vmap", chunk=3),
    "loop": Plan("loop"),
    "threads": Plan("threads", workers=2),
    "threads by three": Plan("threads", chunk=3, workers=2),
}


def random_tasks(generator: torch.Generator, shape: tuple[int, ...] = (3,)) -> Task:
    """A classification task of two classes, float64."""

    def batch(n: int) -> Batch:
        x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
        return Batch(x, torch.randint(2, (n,), generator=generator))

    return Task(batch(4), batch(6))


def images(generator: torch.Generator) -> Task:
    return random_tasks(generator, (1, 8, 8))


def learner_of(steps: int = 2) -> Learner:
    return algorithms.maml(dense(), inner_lr=0.3, inner_steps=steps)


def by_hand(model: nn.Module, tasks: Task, steps: int, optimizer: Callable[..., torch.optim.Optimizer]) -> Curve:
    """Every task on a copy of the model, by torch.optim and plain autograd."""
    losses, hits = [], []
    for i in range(len(tasks.support.y)):
        task, own = take(tasks, i), copy.deepcopy(model)
        moving, row = optimizer(own.parameters()), []
        for step in range(steps + 1):
            with torch.no_grad():
                output = own(task.query.x)
            right = (output.argmax(1) == task.query.y).double().mean()
            row.append((nn.functional.cross_entropy(output, task.query.y), right))
            if step < steps:
                moving.zero_grad()
                nn.functional.cross_entropy(own(task.support.x), task.support.y).backward()
                moving.step()
        losses.append([float(loss) for loss, _ in row])
        hits.append([float(hit) for _, hit in row])
    return Curve(exact(losses), exact(hits), "accuracy")


def exact(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_equals_a_loop_by_hand_under_every_plan(rule: str, plan: str) -> None:
    model = dense()
    learner = algorithms.maml(model, rule=SGD(0.3) if rule == "sgd" else Adam(0.1), inner_steps=1)
    optimizer = partial(torch.optim.SGD, lr=0.3) if rule == "sgd" else partial(torch.optim.Adam, lr=0.1)
    expected = by_hand(model, draw(random_tasks, 10, 5, split="val"), 4, optimizer)
    curve = evaluate(learner, learner.init(), random_tasks, 10, 4, seed=5, split="val", plan=PLANS[plan])
    assert curve.loss.shape == curve.metric.shape == (10, 5)
    assert curve.loss.dtype == curve.metric.dtype == torch.float64
    assert relative(curve.loss, expected.loss) < 1e-12
    assert relative(curve.metric, expected.metric) < 1e-12
    assert (curve.metric_name, curve.steps, curve.tasks) == ("accuracy", 4, 10)
    assert curve.loss[:, 0].std() > 1e-3 and (curve.loss[:, 4] - curve.loss[:, 0]).abs().min() > 1e-6


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_gives_the_same_curve_for_a_convolutional_network(plan: str) -> None:
    learner = algorithms.maml(convolutional(), inner_lr=0.3, batch_norm="support")
    expected = evaluate(learner, learner.init(), images, 7, 2, plan=Plan("loop"))
    curve = evaluate(learner, learner.init(), images, 7, 2, plan=PLANS[plan])
    assert relative(curve.loss, expected.loss) < 1e-12
    assert torch.equal(curve.metric, expected.metric)
    assert curve.task_list_hash == expected.task_list_hash
    default = evaluate(learner, learner.init(), images, 7, 2)
    assert relative(default.loss, expected.loss) < 1e-12


@pytest.mark.parametrize("at_once", [1, 7, 64])
@pytest.mark.parametrize("plan", ["vmap", "loop", "threads by three", "default"])
def test_the_number_drawn_at_once_changes_neither_curve_nor_hash(
    plan: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_of()
    expected = evaluate(learner, learner.init(), random_tasks, 23, 2, plan=Plan("loop"))
    monkeypatch.setattr(importlib.import_module("toolkit.evaluate"), "DRAWN_AT_ONCE", at_once)
    finished: list[int] = []
    curve = evaluate(learner, learner.init(), random_tasks, 23, 2, plan=PLANS.get(plan), progress=finished.append)
    blocks = [min(at_once, 23 - start) for start in range(0, 23, at_once)]
    size = {"loop": 1, "threads by three": 3}.get(plan, 64)
    assert finished == [min(size, block - start) for block in blocks for start in range(0, block, size)]
    assert relative(curve.loss, expected.loss) < 1e-12
    assert torch.equal(curve.metric, expected.metric)
    assert curve.task_list_hash == expected.task_list_hash


def test_the_hash_names_the_tasks_and_nothing_else() -> None:
    def hash_of(learner: Learner, tasks: int = 5, steps: int = 1, seed: int = 0, split: str = "test") -> str:
        return evaluate(learner, learner.init(), random_tasks, tasks, steps, seed, split).task_list_hash

    learner = learner_of()
    same = {hash_of(learner), hash_of(learner, steps=3), hash_of(algorithms.anil(dense(), adapts="2.*"))}
    others = {hash_of(learner, tasks=6), hash_of(learner, seed=1), hash_of(learner, split="val")}
    assert len(same) == 1 and len(others) == 3 and not same & others
    assert all(len(text) == 16 for text in same)


def test_fewer_tasks_and_fewer_steps_are_a_part_of_the_longer_curve() -> None:
    learner = learner_of()
    meta = learner.init()
    whole = evaluate(learner, meta, random_tasks, 70, 3)
    part = evaluate(learner, meta, random_tasks, 9, 1)
    assert relative(part.loss, whole.loss[:9, :2]) < 1e-12
    assert evaluate(learner, meta, random_tasks, 3, 0).loss.shape == (3, 1)


def test_the_metric_is_named_and_judges_the_given_weights() -> None:
    model = nn.Linear(3, 1).double()
    learner = algorithms.maml(model, loss=squared_error, metric=squared_error, inner_lr=0.1)
    meta = learner.init()._replace(params={name: p.detach() + 1 for name, p in model.named_parameters()})
    curve = evaluate(learner, meta, Linear(3, 5, 7), 4, 1)
    tasks = draw(Linear(3, 5, 7), 4, seed=0, split="test")
    expected = (tasks.query.x @ (model.weight + 1).T + model.bias + 1 - tasks.query.y).square().mean((1, 2))
    assert relative(curve.loss[:, 0], expected) < 1e-12
    assert torch.equal(curve.metric, curve.loss)
    assert curve.metric_name == "squared error"


class Dropping(nn.Module):
    """A network with every kind of state: dropout, batch norm with running statistics, a part already in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Linear(8, 2), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("plan", [*PLANS, "default"])
@pytest.mark.parametrize("policy", ["batch", "support", "running"])
def test_model_meta_and_random_states_are_left_alone(policy: str, plan: str) -> None:
    model = Dropping().double()
    model.head.eval()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7)
    learner = algorithms.maml(model, inner_lr=0.3, batch_norm=policy)
    meta = learner.init()

    def state() -> list[Tensor]:
        tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters()), torch.get_rng_state()]
        own = [*learner.model.state_dict().values()]
        return [t.clone() for t in (*tensors, *own, *pytree.tree_leaves(meta))]

    def modes() -> list[bool]:
        return [m.training for m in (*model.modules(), *learner.model.modules())]

    before, kept_modes, python_state, numpy_state = state(), modes(), random.getstate(), np.random.get_state()
    curve = evaluate(learner, meta, random_tasks, 5, 2, plan=PLANS.get(plan))
    shown = predictions(learner, meta, take(task_batch(), 0), (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert kept_modes == modes() and model.training and not model.head.training
    assert random.getstate() == python_state
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert not (curve.loss.requires_grad or curve.metric.requires_grad or shown.requires_grad)
    assert torch.is_grad_enabled()


class Counting(nn.Module):
    """A network that writes into a buffer at every forward pass, and uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dense()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) * self.calls  # type: ignore[no-any-return]


@pytest.mark.parametrize("plan", PLANS)
def test_a_module_that_updates_a_buffer_carries_nothing_from_pass_to_pass(plan: str) -> None:
    model = Counting()
    learner, still = (algorithms.maml(own, inner_lr=0.3) for own in (model, dense()))
    curve = evaluate(learner, learner.init(), random_tasks, 5, 2, plan=PLANS[plan])
    assert relative(curve.loss, evaluate(still, still.init(), random_tasks, 5, 2, plan=PLANS[plan]).loss) < 1e-12
    predictions(learner, learner.init(), take(task_batch(), 0), (0, 2))
    assert model.calls == 0


def test_no_graph_is_kept_even_when_meta_asks_for_gradients() -> None:
    learner = learner_of()
    meta = pytree.tree_map(lambda t: t.requires_grad_(), learner.init())
    for plan in PLANS.values():
        curve = evaluate(learner, meta, random_tasks, 4, 2, plan=plan)
        assert not (curve.loss.requires_grad or curve.metric.requires_grad)
    assert not predictions(learner, meta, take(task_batch(), 0), (2,)).requires_grad
    assert all(t.grad is None for t in meta.params.values())


@pytest.mark.parametrize("plan", PLANS)
def test_dropout_is_off(plan: str) -> None:
    model = dense()
    dropping = nn.Sequential(model[0], nn.Tanh(), model[2])
    dropping.insert(2, nn.Dropout(0.9))
    still = nn.Sequential(model[0], nn.Tanh(), nn.Identity(), model[2])
    curves = []
    for network in (dropping, still):
        learner = algorithms.maml(network, inner_lr=0.3)
        assert learner.training
        curves.append(evaluate(learner, learner.init(), random_tasks, 6, 2, plan=PLANS[plan]))
        curves.append(evaluate(learner, learner.init(), random_tasks, 6, 2, plan=PLANS[plan]))
    assert all(torch.equal(curve.loss, curves[0].loss) for curve in curves)
    shown = [predictions(own, own.init(), take(task_batch(), 0), (1,)) for own in map(algorithms.maml, (dropping, still))]
    assert torch.equal(*shown)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -(10**9)])
def test_query_labels_do_not_reach_predictions(poison: float) -> None:
    learner, task = learner_of(), take(task_batch(), 0)
    poisoned = Task(task.support, task.query._replace(y=torch.full(task.query.y.shape, poison)))
    clean = predictions(learner, learner.init(), task, (0, 1, 5))
    assert torch.equal(clean, predictions(learner, learner.init(), poisoned, (0, 1, 5)))
    other = Task(task.support._replace(y=1 - task.support.y), task.query)
    assert relative(predictions(learner, learner.init(), other, (1,)), clean[1:2]) > 1e-2


def test_predictions_are_what_the_curve_scores() -> None:
    learner = learner_of()
    meta, tasks = learner.init(), draw(random_tasks, 3, seed=0, split="test")
    curve = evaluate(learner, meta, random_tasks, 3, 4)
    for i in range(3):
        task = take(tasks, i)
        shown = predictions(learner, meta, task, (4, 0, 2))
        assert shown.shape == (3, 6, 2)
        for row, k in enumerate((4, 0, 2)):
            assert abs(nn.functional.cross_entropy(shown[row], task.query.y) - curve.loss[i, k]) < 1e-12


def test_predictions_of_a_model_in_half_precision_can_be_drawn() -> None:
    learner = algorithms.maml(dense().bfloat16(), inner_lr=0.1, inner_steps=1)
    task = take(draw(random_tasks, 1, seed=0, split="test"), 0)
    task = task._replace(
        support=task.support._replace(x=task.support.x.bfloat16()), query=task.query._replace(x=task.query.x.bfloat16())
    )
    shown = predictions(learner, learner.init(), task, (0, 1))
    assert shown.dtype == torch.float32 and shown.isfinite().all()


def widest_change(policy: str, change: Callable[[Tensor], Tensor], kept: list[int]) -> float:
    """How far predictions for some queries move when the query set is changed around them. `kept` are their new places."""
    learner = algorithms.maml(convolutional(), inner_lr=0.3, batch_norm=policy)
    task = take(task_batch(shape=(1, 8, 8)), 0)
    other = Task(task.support, Batch(change(task.query.x), change(task.query.y)))
    before, after = (predictions(learner, learner.init(), some, (0, 2)) for some in (task, other))
    return float((after[:, kept] - before[:, [0, 1, 2]]).abs().max())


@pytest.mark.parametrize("policy", ["support", "running"])
def test_a_prediction_does_not_depend_on_the_other_queries(policy: str) -> None:
    assert widest_change(policy, lambda t: t[:3], [0, 1, 2]) < 1e-12, "dropped"
    assert widest_change(policy, lambda t: t[[5, 2, 4, 0, 3, 1]], [3, 5, 1]) < 1e-12, "permuted"
    assert widest_change(policy, lambda t: torch.cat([t[:3], 5 * t[3:]]), [0, 1, 2]) < 1e-12, "changed"


def test_the_batch_policy_is_transductive() -> None:
    assert widest_change("batch", lambda t: t[:3], [0, 1, 2]) > 1e-3
    assert widest_change("batch", lambda t: torch.cat([t[:3], 5 * t[3:]]), [0, 1, 2]) > 1e-3
    assert widest_change("batch", lambda t: t[[5, 2, 4, 0, 3, 1]], [3, 5, 1]) < 1e-12, "a sum over the same queries"


@pytest.mark.parametrize("policy", ["support", "running"])
def test_scores_of_a_query_do_not_depend_on_the_other_queries(policy: str) -> None:
    """The same through `evaluate`: the loss over all queries is the mean of the losses of each query alone."""
    learner = algorithms.maml(convolutional(), inner_lr=0.3, batch_norm=policy)

    def only(i: int) -> Callable[[torch.Generator], Task]:
        def sampler(generator: torch.Generator) -> Task:
            task = images(generator)
            return Task(task.support, take(task.query, slice(i, i + 1)))

        return sampler

    whole = evaluate(learner, learner.init(), images, 3, 2)
    each = torch.stack([evaluate(learner, learner.init(), only(i), 3, 2).loss for i in range(6)])
    assert relative(each.mean(0), whole.loss) < 1e-12


def three_classes(generator: torch.Generator) -> Task:
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (20,), generator=generator)
    return Task(Batch(x[:8], y[:8]), Batch(x[8:], y[8:]))


def three_way() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def averaged_by_hand(model: nn.Module, task: Task, steps: int, orders: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and accuracy after 0..`steps` steps of mean probabilities; the column of class c is where its label went."""
    total = torch.zeros(steps + 1, len(task.query.y), 3, dtype=torch.float64)
    for order in orders:
        own = copy.deepcopy(model)
        moving = torch.optim.SGD(own.parameters(), lr=0.5)
        for k in range(steps + 1):
            with torch.no_grad():
                shares = own(task.query.x).softmax(1)
            for c in range(3):
                total[k, :, c] += shares[:, int(order[c])] / len(orders)
            moving.zero_grad()
            relabelled = torch.tensor([int(order[label]) for label in task.support.y])
            nn.functional.cross_entropy(own(task.support.x), relabelled).backward()
            moving.step()
    right = total[:, torch.arange(len(task.query.y)), task.query.y]
    return -right.log().mean(1), (total.argmax(2) == task.query.y).double().mean(1)


@pytest.mark.parametrize("count", [2, 4])
def test_label_orders_are_averaged_as_by_hand(count: int) -> None:
    model, seen = three_way(), list[Tensor]()

    def start(own: Learner, meta: Meta, support: Batch) -> Params:
        seen.append(support.y)
        return inherited(own, meta, support)

    learner = algorithms.maml(model, inner_lr=0.5)
    task = take(draw(three_classes, 1, 0, split="test"), 0)
    watched = replace(learner, start=start)
    curve = evaluate(watched, watched.init(), three_classes, 1, 3, plan=Plan("loop"), permutations=count)
    seen = seen[-count:]  # a pass before may find out how many classes there are
    orders = [torch.stack([labels[task.support.y == c][0] for c in range(3)]) for labels in seen]
    assert len(orders) == count and orders[0].tolist() == [0, 1, 2], "the given order comes first"
    assert all(torch.equal(order[task.support.y], labels) for order, labels in zip(orders, seen, strict=True))
    assert all(sorted(order.tolist()) == [0, 1, 2] for order in orders) and len({tuple(o.tolist()) for o in orders}) > 1
    loss, metric = averaged_by_hand(model, task, 3, orders)
    assert relative(curve.loss[0], loss) < 1e-12 and relative(curve.metric[0], metric) < 1e-12
    plain = evaluate(learner, learner.init(), three_classes, 1, 3)
    assert relative(curve.loss, plain.loss) > 1e-3


@pytest.mark.parametrize("plan", PLANS)
def test_averages_over_label_orders_do_not_depend_on_plan_or_batch(plan: str) -> None:
    learner = algorithms.maml(three_way(), inner_lr=0.5)
    meta = learner.init()
    expected = evaluate(learner, meta, three_classes, 7, 2, plan=Plan("loop"), permutations=3)
    curve = evaluate(learner, meta, three_classes, 7, 2, plan=PLANS[plan], permutations=3)
    assert relative(curve.loss, expected.loss) < 1e-12 and torch.equal(curve.metric, expected.metric)
    fewer = evaluate(learner, meta, three_classes, 2, 2, plan=PLANS[plan], permutations=3)
    assert relative(fewer.loss, expected.loss[:2]) < 1e-12
    assert curve.task_list_hash == evaluate(learner, meta, three_classes, 7, 2).task_list_hash


@pytest.mark.parametrize("plan", PLANS)
def test_one_label_order_is_the_plain_curve(plan: str) -> None:
    learner = algorithms.maml(three_way(), inner_lr=0.5)
    plain, once = (
        evaluate(learner, learner.init(), three_classes, 7, 2, plan=PLANS[plan], **more) for more in ({}, {"permutations": 1})
    )
    assert torch.equal(plain.loss, once.loss) and torch.equal(plain.metric, once.metric)


def test_label_orders_leave_the_random_state_alone_and_repeat() -> None:
    learner = algorithms.maml(three_way(), inner_lr=0.5)
    curves = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        curves.append(evaluate(learner, learner.init(), three_classes, 5, 2, permutations=3).loss)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*curves)


def test_a_head_that_treats_classes_alike_gains_nothing_from_label_orders() -> None:
    learner = algorithms.protonet(nn.Sequential(OrderedDict(body=nn.Linear(3, 4), head=nn.Linear(4, 3))).double())
    plain = evaluate(learner, learner.init(), three_classes, 5, 0)
    curve = evaluate(learner, learner.init(), three_classes, 5, 0, permutations=4)
    assert relative(curve.loss, plain.loss) < 1e-12


def test_label_orders_need_classes() -> None:
    learner = algorithms.maml(nn.Linear(3, 1).double(), loss=squared_error, metric=squared_error)
    with pytest.raises(UserError, match=r"label orders are averaged for classes only, but y holds floats; use permutations=1"):
        evaluate(learner, learner.init(), Linear(3, 5, 7), 4, 1, permutations=2)


@pytest.mark.parametrize("permutations", [0, -1])
def test_no_label_order_at_all_is_a_user_error(permutations: int) -> None:
    learner = learner_of()
    with pytest.raises(UserError, match=f"5 evaluation tasks, 3 steps, {permutations} label orders; .* and 1 order"):
        evaluate(learner, learner.init(), random_tasks, 5, 3, permutations=permutations)


@pytest.mark.parametrize(("tasks", "steps"), [(0, 3), (-1, 3), (5, -1)])
def test_nothing_to_evaluate_is_a_user_error(tasks: int, steps: int) -> None:
    learner = learner_of()
    with pytest.raises(UserError, match=f"{tasks} evaluation tasks, {steps} steps"):
        evaluate(learner, learner.init(), random_tasks, tasks, steps)


def random_curve(tasks: int, steps: int, seed: int = 0) -> Curve:
    g = torch.Generator().manual_seed(seed)
    loss, metric = (torch.randn(tasks, steps + 1, generator=g, dtype=torch.float64) for _ in range(2))
    return Curve(loss.exp(), metric, "squared error", "0123456789abcdef")


def holed_curve() -> Curve:
    curve = random_curve(12, 3)
    curve.metric[2, 1], curve.metric[5, 1], curve.metric[7, 3] = torch.nan, torch.inf, -torch.inf
    curve.loss[0, 3], curve.loss[7, 3] = torch.nan, torch.inf
    return curve


@pytest.mark.parametrize("curve", [random_curve(12, 3), holed_curve()], ids=["finite", "with holes"])
@pytest.mark.parametrize("which", ["metric", "loss"])
def test_statistics_equal_numpy_and_scipy_over_the_finite_tasks(curve: Curve, which: str) -> None:
    values = curve.loss if which == "loss" else curve.metric
    given = (values,) if which == "loss" else ()
    for k in range(4):
        column = values[:, k].numpy()
        column = column[np.isfinite(column)]
        assert float(curve.mean(*given)[k]) == pytest.approx(column.mean(), rel=1e-12)
        assert float(curve.median(*given)[k]) == pytest.approx(np.median(column), rel=1e-12)
        for q in (0.0, 0.1, 0.25, 0.9, 1.0):
            assert float(curve.quantile(q, *given)[k]) == pytest.approx(np.quantile(column, q), rel=1e-12)
        low, high = scipy.stats.t.interval(0.95, len(column) - 1, column.mean(), scipy.stats.sem(column))
        assert float(curve.ci95(*given)[k]) == pytest.approx((high - low) / 2, rel=1e-12)


def test_the_finite_fraction_counts_tasks_whose_loss_and_metric_are_finite() -> None:
    assert random_curve(12, 3).finite().tolist() == [1, 1, 1, 1]
    assert holed_curve().finite().tolist() == pytest.approx([1, 10 / 12, 1, 10 / 12])


def test_statistics_of_no_finite_task_are_nan() -> None:
    curve = Curve(exact([[1, torch.nan], [2, torch.inf]]), exact([[1, torch.nan], [2, torch.inf]]), "accuracy")
    for statistic in (curve.mean(), curve.median(), curve.quantile(0.1), curve.ci95()):
        assert statistic.isfinite().tolist() == [True, False] and bool(statistic[1].isnan())
    assert curve.finite().tolist() == [1, 0]


def test_the_interval_of_one_task_is_nan() -> None:
    assert random_curve(1, 2).ci95().isnan().all()
    learner = learner_of()
    curve = evaluate(learner, learner.init(), random_tasks, 1, 2)
    assert curve.ci95().isnan().all() and curve.ci95(curve.loss).isnan().all()
    assert curve.mean().isfinite().all() and torch.equal(curve.median(), curve.metric[0])
    half = Curve(exact([[1, 1], [2, torch.nan]]), exact([[1, 1], [2, torch.nan]]), "accuracy")
    assert half.ci95().isnan().tolist() == [False, True], "one finite task is one task"


@pytest.mark.parametrize("tasks", [30, 100])
def test_the_interval_covers_the_true_mean_in_95_of_100_cases(tasks: int) -> None:
    """Every column is one repetition of an experiment with normal scores of mean 3."""
    values = 3 + 2 * torch.randn(tasks, 2000, generator=torch.Generator().manual_seed(tasks), dtype=torch.float64)
    curve = Curve(values, values, "squared error")
    assert 0.935 <= ((curve.mean() - 3).abs() <= curve.ci95()).double().mean() <= 0.965


@pytest.mark.parametrize("single", [False, True])
def test_json_round_trip_keeps_every_bit(single: bool) -> None:
    curve = random_curve(12, 3)
    if single:
        curve = replace(curve, loss=curve.loss.float().double(), metric=curve.metric.float().double())
    text = json.dumps(curve.to_json(), allow_nan=False)
    assert curve.to_json()["single"] == single and (len(text) < 1400) == single
    back = Curve.from_json(json.loads(text))
    assert torch.equal(back.loss, curve.loss) and torch.equal(back.metric, curve.metric)
    assert back.loss.dtype == back.metric.dtype == torch.float64
    assert (back.metric_name, back.task_list_hash) == (curve.metric_name, curve.task_list_hash)


def test_json_of_values_that_are_not_finite_comes_back_as_nan() -> None:
    curve = holed_curve()
    back = Curve.from_json(json.loads(json.dumps(curve.to_json(), allow_nan=False)))
    for before, after in ((curve.loss, back.loss), (curve.metric, back.metric)):
        assert torch.equal(after.isnan(), ~before.isfinite())
        assert torch.equal(after[before.isfinite()], before[before.isfinite()])
    assert torch.equal(back.finite(), curve.finite()) and torch.equal(back.ci95(), curve.ci95())


def test_diverged_tasks_are_counted_and_left_out() -> None:
    """Every other task or so has inputs so large that one step overflows."""
    linear = Linear(3, 5, 7)

    def sampler(generator: torch.Generator) -> Task:
        task = linear(generator)
        scale = 1e100 if task.support.x[0, 0] > 0 else 1
        return Task(*(Batch(batch.x * scale, batch.y) for batch in task))

    learner = algorithms.maml(nn.Linear(3, 1).double(), loss=squared_error, metric=squared_error, inner_lr=0.01)
    curve = evaluate(learner, learner.init(), sampler, 20, 1)
    small = draw(sampler, 20, seed=0, split="test").support.x.abs().amax((1, 2)) < 1e50
    assert 3 < small.sum() < 17
    assert curve.finite().tolist() == [1, float(small.double().mean())]
    assert torch.equal(curve.loss[:, 1].isfinite(), small)
    assert torch.allclose(curve.mean()[1], curve.metric[small, 1].mean(), rtol=1e-12, atol=0)


PEAKS = """
from toolkit import algorithms, evaluate
from toolkit.choose import peak
from toolkit.metrics import squared_error
from toolkit.models import mlp
from toolkit.samplers import Sinusoid
learner = algorithms.maml(mlp(), loss=squared_error, metric=squared_error, inner_lr=0.01)
meta, sampler = learner.init(), Sinusoid(50, 500)
evaluate(learner, meta, sampler, 64, 2)
print(*(peak(lambda: evaluate(learner, meta, sampler, tasks, 2)) for tasks in (1280, 5120)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is only known on Linux")
def test_memory_does_not_grow_with_the_number_of_tasks() -> None:
    """With one thread and one arena, as what threads leave in arenas of their own differs from run to run."""
    alone = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True, env=alone)
    few, many = map(int, done.stdout.split())
    assert few > 5e6, "else this test could not fail"
    assert many < few + 25e6, "it was 48 to 189 MB more in 8 runs when small results lay between the tasks"
