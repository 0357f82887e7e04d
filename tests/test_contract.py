"""The contract of every method: one row of `ROWS` per method, one test per promise, no exceptions.

A promise is a function that asserts it. The tests run it over all methods; `BUGS` runs some of them on learners that are broken
on purpose, where they must fail.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jacrev
from torch.utils import _pytree as pytree

from tests.conftest import Slopes, finite_differences, flat, mean_objective, named, relative, stirred, task_batch
from toolkit import Batch, Learner, Meta, Plan, State, Task, UserError, algorithms, draw, evaluate, meta_gradient, train
from toolkit.algorithms import METHODS, PRETRAINED
from toolkit.distributed import Share, added
from toolkit.engine import gradient_function
from toolkit.evaluate import calibrate
from toolkit.learner import Carry, Score
from toolkit.objectives import EveryStep, Implicit, with_gradient
from toolkit.rules import SGD, Adam, Rule
from toolkit.runs import checkpoint
from toolkit.task import take
from toolkit.tree import Params, detach, tree_map

CLASSES = 6  # of the pretraining tasks
Declared = Callable[[Learner, Meta, Task, dict[str, Any]], Meta]
LOSS = F.cross_entropy


# Gradients that are declared not to be exact, by hand and without the toolkit's path.


def logits(params: Params, x: Tensor) -> Tensor:
    """What `named()` computes."""
    return body(params, x) @ params["head.weight"].T + params["head.bias"]


def body(params: Params, x: Tensor) -> Tensor:
    return (x @ params["body.weight"].T + params["body.bias"]).tanh()


def descended(params: Params, support: Batch, steps: int, lr: float, lam: float = 0.0) -> list[Params]:
    """The points of plain descent on the support loss + lam / 2 |w - w_0|^2, by autograd."""
    points = [detach(params)]
    for _ in range(steps):
        here = {name: tensor.clone().requires_grad_() for name, tensor in points[-1].items()}
        slopes = torch.autograd.grad(LOSS(logits(here, support.x), support.y), list(here.values()))
        moved = {}
        for (name, tensor), slope in zip(points[-1].items(), slopes, strict=True):
            moved[name] = tensor - lr * (slope + lam * (tensor - params[name]))
        points.append(moved)
    return points


def query_slope(params: Params, task: Task) -> Params:
    return grad(lambda p: LOSS(logits(p, task.query.x), task.query.y))(params)


def mean_of(tasks: Task, of_task: Callable[[Task], Params]) -> Params:
    each = [of_task(take(tasks, i)) for i in range(tasks.support.y.shape[0])]
    return tree_map(lambda *values: torch.stack(values).mean(0), *each)


def first_order(learner: Learner, meta: Meta, tasks: Task, row: dict[str, Any]) -> Meta:
    """FOMAML: the query gradient at the adapted weights."""
    steps, lr = row["inner_steps"], row["inner_lr"]
    return Meta(mean_of(tasks, lambda t: query_slope(descended(meta.params, t.support, steps, lr)[-1], t)), {})


def start_minus_end(learner: Learner, meta: Meta, tasks: Task, row: dict[str, Any]) -> Meta:
    """Reptile: start minus end of the path."""
    ends = mean_of(tasks, lambda t: descended(meta.params, t.support, row["inner_steps"], row["inner_lr"])[-1])
    return Meta(tree_map(torch.sub, meta.params, ends), {})


def implicit(learner: Learner, meta: Meta, tasks: Task, row: dict[str, Any]) -> Meta:
    """Implicit MAML by a dense solve: (I + H / (lam + damping))^-1 times the query gradient."""

    def of_task(task: Task) -> Params:
        *_, end = descended(meta.params, task.support, row["inner_steps"], row["inner_lr"], row["lam"])

        def loss(vector: Tensor) -> Tensor:
            return LOSS(logits(cut(vector, end), task.support.x), task.support.y)

        curvature = jacrev(grad(loss))(flat(end)) / (row["lam"] + row["damping"])
        return cut(torch.linalg.solve(torch.eye(len(curvature)) + curvature, flat(query_slope(end, task))), end)

    return Meta(mean_of(tasks, of_task), {})


def cut(vector: Tensor, like: Params) -> Params:
    """A vector of all scalars as a tree; the inverse of `flat`."""
    parts = vector.split([tensor.numel() for tensor in like.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(like.items(), parts, strict=True)}


# The table.


@dataclass(frozen=True)
class Row:
    """A method in the tests: its builder's `arguments` beyond `COMMON`; the `declared` gradient, None for the exact one;
    whether it brings its `own_rule`; how it is trained, and after how many steps it is judged, in the test that it learns."""

    arguments: dict[str, Any] = field(default_factory=dict)
    declared: Declared | None = None
    own_rule: bool = False
    meta_lr: float = 0.05
    judged: int = 2


COMMON = {"inner_lr": 0.3, "inner_steps": 2}
ROWS = {
    "maml": Row(),
    "fomaml": Row(declared=first_order),
    "reptile": Row(declared=start_minus_end, meta_lr=0.5),
    "anil": Row(),
    "boil": Row(meta_lr=0.03),
    "meta_sgd": Row(own_rule=True),
    "maml_plus_plus": Row({"inner_steps": 3, "anneal": 0.5, "first_order": 0.25}, own_rule=True, judged=3),
    "imaml": Row({"inner_steps": 4, "cg_steps": 40, "lam": 1.5, "damping": 0.5}, declared=implicit, judged=4),
    "cavia": Row(),
    "proto_maml": Row(),
    "protonet": Row(own_rule=True, judged=0),
    "matching_net": Row(own_rule=True, judged=0),
    "r2d2": Row(own_rule=True, judged=0),
    "meta_curvature": Row(),
    "kfo": Row(),
    "warp_grad": Row(),
    "alfa": Row(),
    "metal": Row(),
    "unicorn_maml": Row(),
    "lora_maml": Row({"rank": 2, "peft": False}),
    "joint": Row(judged=0),
    "fine_tune": Row(judged=5),
    "linear_probe": Row(judged=5),
    "nearest_centroid": Row(own_rule=True, judged=0),
}
PLANS = {
    "vmap": Plan("vmap"),
    "vmap by two": Plan("vmap", chunk=2),
    "threads": Plan("threads", workers=2),
    "vmap recompute": Plan("vmap", memory="recompute"),
    "loop recompute": Plan("loop", memory="recompute"),
}
every_method = pytest.mark.parametrize("name", ROWS)


def arguments(name: str) -> dict[str, Any]:
    return COMMON | ROWS[name].arguments


def built(name: str, model: nn.Module | None = None, **changed: Any) -> Learner:
    """The learner that adapts and is evaluated."""
    return algorithms.build(name, model or named(), CLASSES, **(arguments(name) | changed))


def trained(name: str, model: nn.Module | None = None, **changed: Any) -> Learner:
    """The learner that the outer loop trains: the same one, or its `pretrain`."""
    learner = built(name, model, **changed)
    return learner.pretrain or learner


def training_tasks(name: str) -> Task:
    """Few-shot tasks, or for what is pretrained, of all classes."""
    return task_batch(ways=CLASSES if name in PRETRAINED else 2)


@dataclass(frozen=True)
class Blobs:
    """Tasks of `ways` of six classes, Gaussian blobs that differ along two of three axes while the third is loud noise; all
    six under their own labels when `ways` is None."""

    ways: int | None = 2

    def __call__(self, generator: torch.Generator) -> Task:
        centres = 1.5 * torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        centres[:, 2] = 0
        chosen = torch.randperm(CLASSES, generator=generator)[: self.ways] if self.ways else torch.arange(CLASSES)

        def batch(shots: int) -> Batch:
            y = torch.arange(len(chosen)).repeat(shots)
            noise = torch.randn(len(y), 3, generator=generator, dtype=torch.float64) * torch.tensor([0.5, 0.5, 3.0])
            return Batch(centres[chosen][y] + noise, y)

        return Task(batch(3), batch(4))


def training_sampler(name: str) -> Blobs:
    return Blobs(None if name in PRETRAINED else 2)


def test_every_method_has_a_row() -> None:
    assert set(ROWS) == set(METHODS)


# The promises.


def check_plans(learner: Learner, tasks: Task) -> None:
    """All plans give the same gradient and task losses."""
    meta = stirred(learner)
    expected, scores = meta_gradient(learner, meta, tasks, Plan("loop"))
    for plan in PLANS.values():
        grads, found = meta_gradient(learner, meta, tasks, plan)
        assert relative(grads, expected) < 1e-10, plan
        assert relative(found.task_loss, scores.task_loss) < 1e-10, plan


def check_gradient(learner: Learner, tasks: Task, declared: Declared | None, row: dict[str, Any]) -> None:
    """The gradient is the declared one, or that of the mean objective by finite differences."""
    meta = stirred(learner)
    grads, _ = meta_gradient(learner, meta, tasks)
    if declared:
        assert relative(grads, declared(learner, meta, tasks, row)) < 1e-9
    else:
        assert Slopes(mean_objective(learner, tasks), meta).off(grads) < 1e-6


def check_row(learner: Learner, name: str) -> None:
    check_gradient(learner, training_tasks(name), ROWS[name].declared, arguments(name))


def check_task_order(learner: Learner, tasks: Task) -> None:
    """Other task order, same mean gradient and the same losses in that order."""
    meta, order = stirred(learner), torch.tensor([2, 0, 1])
    expected, scores = meta_gradient(learner, meta, tasks)
    grads, found = meta_gradient(learner, meta, pytree.tree_map(lambda tensor: tensor[order], tasks))
    assert relative(grads, expected) < 1e-12
    assert relative(found.task_loss, scores.task_loss[order]) < 1e-12
    assert scores.task_loss.unique().numel() == 3


def check_start(learner: Learner) -> None:
    """No steps: the start; and the first column of an evaluation judges just that."""
    meta, own = stirred(learner), replace(learner, training=False)
    tasks = draw(Blobs(), 3, seed=0, split="test")
    curve = evaluate(learner, meta, Blobs(), tasks=3, steps=2, plan=Plan("loop"))
    for i in range(3):
        task = take(tasks, i)
        (only,) = learner.path(meta, task.support, steps=0)
        start = learner.start(learner, meta, task.support)
        assert list(only) == list(start) == list(next(learner.path(meta, task.support)))
        assert all(
            torch.equal(only[n], start[n]) and torch.equal(only[n], learner.begin(meta, task.support).fast[n]) for n in start
        )
        score = own.assess(meta, start, task, 0)
        assert torch.equal(curve.loss[i, 0], score.loss) and torch.equal(curve.metric[i, 0], score.metric)


def check_untouched(learner: Learner, *modules: nn.Module, tasks: Task | None = None) -> None:
    """Neither a meta-gradient nor an evaluation changes a bit of `meta`, of any module, or of the global random state."""
    meta = stirred(learner)

    def everything() -> list[Tensor]:
        parts = [pytree.tree_leaves(meta), *([*m.parameters(), *m.buffers()] for m in (learner.model, *modules))]
        return [tensor for part in parts for tensor in part] + [torch.get_rng_state()]

    def flags() -> list[Any]:
        return [(p.requires_grad, p.grad) for m in modules for p in m.parameters()] + [
            part.training for m in modules for part in m.modules()
        ]

    before, kept = [tensor.detach().clone() for tensor in everything()], flags()
    for plan in (Plan("loop"), Plan("vmap")):
        if tasks:
            meta_gradient(learner, meta, tasks, plan)
        else:
            evaluate(learner, meta, Blobs(), tasks=2, steps=2, plan=plan)
        assert all(torch.equal(a, b) for a, b in zip(everything(), before, strict=True)) and flags() == kept


def check_alone(learner: Learner, tasks: Task) -> None:
    """A task's scores are the same alone and in a batch, and the batch's gradient is the mean of the tasks' own, and the sum of
    what two processes compute of it."""
    meta = stirred(learner)
    alone = [meta_gradient(learner, meta, take(tasks, slice(i, i + 1))) for i in range(3)]
    for plan in (Plan("vmap"), Plan("loop")):
        grads, scores = meta_gradient(learner, meta, tasks, plan)
        assert relative(scores.task_loss, [own.task_loss for _, own in alone]) < 1e-12
        assert relative(flat(grads), torch.stack([flat(own) for own, _ in alone]).mean(0)) < 1e-12
        cuts = [(slice(0, 1), Share(0, 3, added, tasks)), (slice(1, 3), Share(1, 3, added, tasks))]
        parts = [gradient_function(learner, plan)(meta, take(tasks, own), share) for own, share in cuts]
        assert relative(flat(grads), sum(flat(part) for part, _ in parts)) < 1e-12
        assert relative(scores.task_loss, sum(found.task_loss for _, found in parts)) < 1e-12


def check_alone_when_evaluated(learner: Learner) -> None:
    """The curve of a task is the same alone and in a batch, and past the learner's own number of steps."""
    meta, own = stirred(learner), replace(learner, training=False)
    tasks = draw(Blobs(), 3, seed=0, split="test")
    curve = evaluate(learner, meta, Blobs(), tasks=3, steps=4, plan=Plan("vmap"))
    for i in (2, 0, 1):
        task = take(tasks, i)
        losses = [own.assess(meta, fast, task, k).loss for k, fast in enumerate(own.path(meta, task.support, 4))]
        assert relative(curve.loss[i], losses) < 1e-12


def check_towards_the_end(learner: Learner) -> None:
    """A small step of descent along the gradient brings the start nearer to the mean end."""
    meta, tasks, row = stirred(learner), task_batch(), arguments("reptile")
    ends = mean_of(tasks, lambda t: descended(meta.params, t.support, row["inner_steps"], row["inner_lr"])[-1])
    grads, _ = meta_gradient(learner, meta, tasks)
    stepped = flat(meta.params) - 0.1 * flat(grads.params)
    distance, before = (stepped - flat(ends)).norm(), (flat(meta.params) - flat(ends)).norm()
    assert distance < 0.95 * before


def check_prototypes(learner: Learner) -> None:
    """Logits are the negative squared distances to the class means, up to a constant per query."""
    meta, task = stirred(learner), take(task_batch(support=7, ways=3), 0)
    (fast,) = learner.path(meta, task.support, 0)
    found = learner.predict(meta, fast, task.query.x)
    features, queries = (body(meta.params, x) for x in (task.support.x, task.query.x))
    means = torch.stack([features[task.support.y == c].mean(0) for c in range(3)])
    expected = -torch.stack([(queries - mean).square().sum(1) for mean in means], 1)
    assert relative(found.diff(dim=1), expected.diff(dim=1)) < 1e-12
    assert relative(found.softmax(1), expected.softmax(1)) < 1e-12


def check_adapters(learner: Learner) -> None:
    """Only adapters move, and the weights under them stay as they were."""
    assert learner.adapted_names and all("lora_" in name for name in learner.adapted_names)
    check_untouched(learner)
    check_untouched(learner, tasks=task_batch())


def check_statistics(learner: Learner) -> None:
    """Calibrated statistics of point k are the means over tasks of what the batch norm sees there in the query sets."""
    meta = stirred(learner)
    stats = calibrate(learner, meta, Blobs(), tasks=5, seed=1).stats
    tasks, seen = draw(Blobs(), 5, seed=1), {k: list[tuple[Tensor, Tensor]]() for k in range(learner.steps + 1)}
    for i in range(5):
        task = take(tasks, i)
        for k, fast in enumerate(normed_path(meta, task.support, learner.steps)):
            hidden = task.query.x @ fast["body.weight"].T + fast["body.bias"]
            seen[k].append((hidden.mean(0), hidden.var(0, correction=0)))
    assert len(stats) == 2 * len(seen)
    for k, values in seen.items():
        mean, variance = (torch.stack(part).mean(0) for part in zip(*values, strict=True))
        assert relative(stats[f"point{k}/norm.running_mean"], mean) < 1e-12
        assert relative(stats[f"point{k}/norm.running_var"], variance) < 1e-12


# Each promise, kept by every method.


@every_method
def test_plans_agree(name: str) -> None:
    check_plans(trained(name), training_tasks(name))


@every_method
def test_the_gradient_is_the_declared_one(name: str) -> None:
    check_row(trained(name), name)


@every_method
def test_task_order_does_not_matter(name: str) -> None:
    check_task_order(trained(name), training_tasks(name))


@every_method
def test_no_steps_is_the_start(name: str) -> None:
    check_start(built(name))


@every_method
def test_meta_and_the_users_module_are_untouched(name: str) -> None:
    model = named()
    check_untouched(built(name, model), model)
    check_untouched(trained(name, model), model, tasks=training_tasks(name))


@every_method
def test_a_seed_is_a_result(name: str) -> None:
    """Whatever the global random state, also when the method builds its layers."""

    def weights(seed: int, outside: int) -> Tensor:
        torch.manual_seed(outside)
        records = train(trained(name), training_sampler(name), 3, 2, 0.01, seed)
        return torch.stack([flat(record.meta) for record in records])

    found = weights(1, 8)
    assert torch.equal(weights(1, 9), found) and not torch.equal(weights(2, 8), found)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_precision_stays(name: str, dtype: torch.dtype) -> None:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    learner, own = trained(name, named().to(dtype)), built(name, named().to(dtype))
    grads, metrics = meta_gradient(learner, learner.init(), pytree.tree_map(cast, training_tasks(name)))
    path = list(own.path(own.init(), take(pytree.tree_map(cast, task_batch()), 0).support, 2))
    leaves = pytree.tree_leaves((learner.init(), grads, metrics, own.init(), path))
    assert {leaf.dtype for leaf in leaves} == {dtype}


@every_method
def test_training_goes_on_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    learner, sampler = trained(name), training_sampler(name)
    records = train(learner, sampler, 3, 2, 0.01)
    next(records)
    state = next(records).state
    content = {"iteration": 2, "meta": state.meta._asdict(), "optimizer": state.optimizer}
    kept = copy.deepcopy(state.meta)
    checkpoint.save(tmp_path, 2, state.meta, content, "a")
    last = next(records)
    weights, saved = checkpoint.load_newest(tmp_path, "a")
    assert list(weights.params) == list(kept.params) and list(weights.learned) == list(kept.learned)
    assert torch.equal(flat(weights), flat(kept)) and not torch.equal(flat(kept), flat(last.meta))
    (again,) = train(learner, sampler, 3, 2, 0.01, start=State(saved["iteration"], Meta(**saved["meta"]), saved["optimizer"]))
    assert again[:3] == last[:3] and torch.equal(flat(again.meta), flat(last.meta))


@every_method
def test_an_older_checkpoint_without_statistics_opens(name: str, tmp_path: Path) -> None:
    learner = trained(name)
    meta = learner.init()
    older = {"params": meta.params, "learned": meta.learned}
    checkpoint.save(tmp_path, 1, Meta(**older), {"iteration": 1, "meta": older}, "a")
    weights, saved = checkpoint.load_newest(tmp_path, "a")
    assert Meta(**saved["meta"]).stats == weights.stats == {}
    found, expected = (meta_gradient(learner, m, training_tasks(name))[0] for m in (Meta(**saved["meta"]), meta))
    assert torch.equal(flat(found), flat(expected))


@every_method
def test_the_query_set_never_reaches_the_inner_loop(name: str) -> None:
    learner, tasks = built(name), take(task_batch(), slice(0, 1))
    poisoned = tasks._replace(query=Batch(torch.full_like(tasks.query.x, torch.nan), 1 - tasks.query.y))
    seen: list[Tensor] = []

    def spy(own: Learner, meta: Meta, path: Iterable[Params], task: Task) -> tuple[Tensor, Score]:
        points = list(path)
        seen.append(flat(points))
        score = own.assess(meta, points[-1], task)
        return score.loss, score

    losses = []
    for either in (tasks, poisoned):
        plan = Plan("loop", memory="recompute")
        losses.append(meta_gradient(replace(learner, objective=spy), stirred(learner), either, plan)[1].loss)
    assert losses[0].isfinite() and losses[1].isnan(), "the poison must reach the query loss, or this test proves nothing"
    assert seen[1].isfinite().all() and torch.equal(seen[1], seen[0])


@every_method
def test_an_unused_parameter_is_named_once_and_left_alone(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = named()
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    learner = trained(name, model)
    for plan in (Plan("vmap"), Plan("loop", memory="recompute")):
        grads, _ = meta_gradient(learner, learner.init(), training_tasks(name), plan)
        assert torch.equal(grads.params["unused"], torch.zeros(2, dtype=torch.float64))
    with caplog.at_level(logging.INFO, "toolkit"):
        records = list(train(learner, training_sampler(name), 3, 2, 0.01))
    (message,) = [text for text in caplog.messages if "no gradient reaches" in text]
    listed = message.partition("reaches ")[2].partition(";")[0].split(", ")
    assert listed.count("unused") == 1 and len(records) == 3


@every_method
def test_a_frozen_parameter_never_moves(name: str) -> None:
    model = named()
    model.get_parameter("body.bias").requires_grad_(False)
    for learner in (trained(name, model), built(name, model)):
        (frozen,) = [key for key, p in learner.model.named_parameters() if not p.requires_grad]
        before = learner.model.get_parameter(frozen).clone()
        meta = learner.init()
        assert frozen not in meta.params and frozen not in learner.adapted_names and len(meta.params) > 1
        (*_, end) = learner.path(meta, take(task_batch(), 0).support, 2)
        assert frozen not in end
        sampler = training_sampler(name) if learner.name.endswith("pretraining") else Blobs()
        (*_, record) = train(learner, sampler, 2, 2, 0.01)
        assert frozen not in record.meta.params and torch.equal(learner.model.get_parameter(frozen), before)


@every_method
def test_the_loss_falls(name: str) -> None:
    row, learner = ROWS[name], built(name)
    (*_, record) = train(learner.pretrain or learner, training_sampler(name), 60, 4, row.meta_lr)
    meta = learner.inherit(record.meta) if learner.pretrain else record.meta
    before, after = (evaluate(learner, m, Blobs(), 40, row.judged).loss.mean(0)[-1] for m in (learner.init(), meta))
    assert after < 0.95 * before


@every_method
@pytest.mark.parametrize("rule", [SGD(0.2, momentum=0.8), Adam(0.05, eps=1e-3)], ids=["momentum", "adam"])
def test_tasks_do_not_touch_each_other(name: str, rule: Rule) -> None:
    if ROWS[name].own_rule:
        with pytest.raises(UserError, match="leaves no choice of rule"):
            built(name, rule=rule)
    changed = {} if ROWS[name].own_rule else {"rule": rule}
    check_alone(trained(name, **changed), training_tasks(name))
    check_alone_when_evaluated(built(name, **changed))


# What single methods promise beyond.


def small_convolution() -> nn.Module:
    """From 4x4 images to two classes."""
    layers = {"body": nn.Conv2d(1, 2, 2, stride=2), "act": nn.Softplus(), "flat": nn.Flatten(), "head": nn.Linear(8, 2)}
    return named(**layers)


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("meta_curvature", "lora_maml", "alfa")]


@pytest.mark.parametrize("name", ["cavia", "kfo", "warp_grad", *SLOWER])
def test_convolutions_keep_the_contract(name: str) -> None:
    fewer = {"context": 6} if name == "cavia" else {}  # of a hundred numbers, each with derivatives of its own
    learner, tasks = built(name, small_convolution(), **fewer), take(task_batch(shape=(1, 4, 4)), slice(0, 2))
    check_gradient(learner, tasks, None, {})
    check_plans(learner, tasks)


def test_kfo_folds_a_kernel_to_two_axes_and_meta_curvature_to_three() -> None:
    sizes = {}
    for name in ("kfo", "meta_curvature"):
        learned = built(name, small_convolution()).init().learned
        sizes[name] = [tuple(tensor.shape) for key, tensor in learned.items() if key.endswith("body.weight")]
    assert sizes == {"kfo": [(2, 2), (4, 4)], "meta_curvature": [(2, 2), (1, 1), (4, 4)]}


def three_ways() -> nn.Module:
    return named(body=nn.Linear(3, 4), act=nn.Tanh(), head=nn.Linear(4, 3))


@pytest.mark.parametrize("name", ["protonet", "nearest_centroid", "proto_maml"])
def test_prototypes_are_distances(name: str) -> None:
    check_prototypes(built(name, three_ways()))


def test_matching_net_is_attention_by_cosine() -> None:
    learner, task = built("matching_net", three_ways()), take(task_batch(support=7, ways=3), 0)
    meta = stirred(learner)
    (fast,) = learner.path(meta, task.support, 0)
    expected = torch.zeros(6, 3, dtype=torch.float64)
    for i, query in enumerate(body(meta.params, task.query.x)):
        similar = torch.stack([query @ key / query.norm() / key.norm() for key in body(meta.params, task.support.x)])
        weights = (similar * meta.params["head.log_scale"].exp()).exp()
        for weight, label in zip(weights / weights.sum(), task.support.y, strict=True):
            expected[i, label] += weight
    assert relative(learner.predict(meta, fast, task.query.x).exp(), expected) < 1e-12


def test_r2d2_is_ridge_regression() -> None:
    learner, task = built("r2d2", three_ways()), take(task_batch(support=7, ways=3), 0)
    meta = stirred(learner)
    (fast,) = learner.path(meta, task.support, 0)
    lam, alpha, beta = (meta.learned[f"start/{key}"] for key in ("log_lambda", "log_alpha", "beta"))
    features, classes = body(meta.params, task.support.x), F.one_hot(task.support.y, 3).double()
    primal = torch.linalg.solve(features.T @ features + lam.exp() * torch.eye(4, dtype=torch.float64), features.T @ classes)
    expected = alpha.exp() * body(meta.params, task.query.x) @ primal + beta
    assert lam != 0 and alpha != 0 and beta != 0
    assert relative(learner.predict(meta, fast, task.query.x), expected) < 1e-12


@pytest.mark.parametrize(
    "name", ["maml", "fomaml", "reptile", "meta_sgd", "maml_plus_plus", "meta_curvature", "kfo", "warp_grad", "alfa", "metal"]
)
def test_what_is_learned_starts_as_plain_gradient_descent(name: str) -> None:
    learner, task = built(name), take(task_batch(), 0)
    meta = learner.init()
    expected = descended({n: p.detach() for n, p in named().named_parameters()}, task.support, learner.steps, 0.3)
    found = list(learner.path(meta, task.support))
    assert len(found) == len(expected) == learner.steps + 1 > 2
    for k, (fast, params) in enumerate(zip(found, expected, strict=True)):
        assert relative(learner.predict(meta, fast, task.query.x, k=k), logits(params, task.query.x)) < 1e-12


@pytest.mark.parametrize("name", ["unicorn_maml", "proto_maml", "protonet", "matching_net", "r2d2", "fine_tune"])
def test_other_names_for_the_classes_are_other_columns(name: str) -> None:
    """The labels' order cannot matter where no class has a weight of its own, as it does in MAML."""
    task, order = take(task_batch(support=7, ways=3), 0), torch.tensor([2, 0, 1])

    def outputs(name: str, y: Tensor) -> Tensor:
        learner = built(name, three_ways())
        meta, support = stirred(learner), task.support._replace(y=y)
        (*_, end) = learner.path(meta, support, ROWS[name].judged)
        return learner.predict(meta, end, task.query.x)

    y = task.support.y
    assert relative(outputs(name, order[y])[:, order], outputs(name, y)) < 1e-12
    assert relative(outputs("maml", order[y])[:, order], outputs("maml", y)) > 0.1


@pytest.mark.parametrize(
    ("name", "moving", "zero"),
    [
        ("anil", ["head.weight", "head.bias"], []),
        ("boil", ["body.weight", "body.bias"], []),
        ("cavia", ["body.context"], ["body.context"]),
        ("warp_grad", ["body.layer.weight", "body.layer.bias", "head.weight", "head.bias"], []),
        ("fine_tune", ["body.weight", "body.bias", "head.weight", "head.bias"], ["head.weight", "head.bias"]),
        ("linear_probe", ["head.weight", "head.bias"], ["head.weight", "head.bias"]),
    ],
)
def test_what_moves_and_what_starts_at_zero(name: str, moving: list[str], zero: list[str]) -> None:
    learner, task = built(name), take(task_batch(), 0)
    meta = stirred(learner)
    start, *_, end = learner.path(meta, task.support, 3)
    assert list(start) == moving and all((start[n] != end[n]).any() for n in moving)
    assert all(torch.equal(start[n], torch.zeros_like(start[n]) if n in zero else meta.params[n]) for n in moving)


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretraining_hands_over_all_but_the_wide_head(name: str) -> None:
    learner = built(name)
    assert learner.pretrain is not None
    first, given = learner.init(), stirred(learner.pretrain)
    assert given.params["head.weight"].shape == (CLASSES, 4)
    kept = learner.inherit(given).params
    assert list(kept) == list(first.params)
    for key, tensor in kept.items():
        assert torch.equal(tensor, (first if key.startswith("head.") else given).params[key])


def test_reptile_moves_the_start_towards_the_end() -> None:
    check_towards_the_end(trained("reptile"))


def test_lora_moves_adapters_only() -> None:
    check_adapters(trained("lora_maml"))


def minimum(meta: Meta, adapts: str, lam: float, support: Batch) -> Params:
    """The weights that minimise support loss + lam / 2 |w - w_0|^2 over those whose name starts with `adapts`, by Newton."""
    start = {name: tensor for name, tensor in meta.params.items() if name.startswith(adapts)}

    def inner(w: Tensor) -> Tensor:
        return LOSS(logits(meta.params | cut(w, start), support.x), support.y) + lam / 2 * (w - flat(start)).square().sum()

    w = flat(start)
    for _ in range(6):
        w = w - torch.linalg.solve(jacrev(grad(inner))(w), grad(inner)(w))
    assert grad(inner)(w).norm() < 1e-12
    return meta.params | cut(w, start)


@pytest.mark.parametrize("adapts", ["", "head."])
def test_imaml_is_the_total_derivative_at_the_minimum(adapts: str) -> None:
    """Of all weights, those that are shared and do not adapt too."""
    lam = 3.0
    learner = built("imaml", adapts=f"{adapts}*", inner_steps=80, lam=lam, cg_steps=40, damping=0.0, inner_lr=0.2)
    tasks, meta = take(task_batch(), slice(0, 2)), stirred(learner)

    def value(meta: Meta) -> Tensor:
        each = [take(tasks, i) for i in range(2)]
        return torch.stack([LOSS(logits(minimum(meta, adapts, lam, t.support), t.query.x), t.query.y) for t in each]).mean()

    grads, metrics = meta_gradient(learner, meta, tasks)
    expected = finite_differences(value, meta)
    assert abs(metrics.loss - value(meta)) < 1e-12
    assert relative(grads, expected) < 1e-6
    assert all(relative(grads.params[name], expected.params[name]) < 1e-6 for name in expected.params)


# MAML++: its phases, and batch norm per step.


def every_step_first_order(learner: Learner, meta: Meta, tasks: Task, row: dict[str, Any]) -> Meta:
    """The gradient of the weighted query losses when every inner slope counts as a constant. The weights are the phase's."""
    weights: tuple[float, ...] = row["weights"]

    def of_task(task: Task) -> Params:
        points, slopes = [detach(meta.params)], []
        for k in range(len(weights)):
            slopes.append(grad(lambda p: LOSS(logits(p, task.support.x), task.support.y))(points[-1]))
            points.append({n: p - meta.learned[f"step{k}/lr/{n}"] * slopes[-1][n] for n, p in points[-1].items()})
        queries = [tree_map(lambda g, w=w: w * g, query_slope(p, task)) for w, p in zip(weights, points[1:], strict=True)]
        after = [tree_map(lambda *values: torch.stack(values).sum(0), *queries[k:]) for k in range(len(weights))]
        rates = {f"step{k}/lr/{n}": -(slopes[k][n] * after[k][n]).sum() for k in range(len(weights)) for n in after[k]}
        return after[0] | {key: rates[key] for key in meta.learned}

    mean = mean_of(tasks, of_task)
    return Meta({n: mean[n] for n in meta.params}, {n: mean[n] for n in meta.learned})


def test_every_phase_of_maml_plus_plus() -> None:
    """First order for a quarter of the training, weights from equal to the last step in ten stages of its first half."""
    learner = trained("maml_plus_plus")
    tasks, stages = task_batch(), [0.5 * i / 10 for i in range(11)]
    assert [begin for begin, _ in learner.phases] == stages
    for i, begin in enumerate(stages):
        own = learner.at(begin)
        assert own is learner.at(begin + 0.04) and own is not learner.at(begin - 0.01 if i else 0.05)
        early = max((1 - i / 10) / 3, 0.01)
        weights = (early, early, 1 - 2 * early)
        assert own.order == (0 if i < 5 else None)
        assert own.objective.weights == pytest.approx(weights)
        check_gradient(own, tasks, every_step_first_order if i < 5 else None, {"weights": weights})
    assert learner.at(0.99) is learner.at(0.5)


def normed() -> nn.Module:
    return named(body=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), act=nn.Tanh(), head=nn.Linear(4, 2))


def normalised(meta: Meta, fast: Params, x: Tensor, k: int, mean: Tensor | None = None, var: Tensor | None = None) -> Tensor:
    """Logits of `normed` with the scale and shift of point `k`, and the batch's own statistics unless they are given."""
    hidden = x @ fast["body.weight"].T + fast["body.bias"]
    mean, var = hidden.mean(0) if mean is None else mean, hidden.var(0, correction=0) if var is None else var
    hidden = (hidden - mean) / (var + 1e-5).sqrt() * meta.learned[f"norm{k}/norm.weight"]
    return (hidden + meta.learned[f"norm{k}/norm.bias"]).tanh() @ fast["head.weight"].T + fast["head.bias"]


def normed_path(meta: Meta, support: Batch, own_steps: int, steps: int | None = None) -> list[Params]:
    """The points of the path of `normed`, by autograd; steps past the learner's own have the rates of its last one."""
    points = [{n: t for n, t in meta.params.items() if not n.startswith("norm.")}]
    for k in range(own_steps if steps is None else steps):
        here = {n: t.clone().requires_grad_() for n, t in points[-1].items()}
        loss = LOSS(normalised(meta, here, support.x, min(k, own_steps)), support.y)
        slopes = dict(zip(here, torch.autograd.grad(loss, list(here.values())), strict=True))
        rate = f"step{min(k, own_steps - 1)}/lr/"
        points.append({n: t - meta.learned[rate + n] * slopes[n] for n, t in points[-1].items()})
    return points


def test_batch_norm_per_step_keeps_the_contract() -> None:
    learner, tasks = trained("maml_plus_plus", normed()), task_batch()
    assert not any(name.startswith("norm.") for name in learner.adapted_names)
    check_gradient(learner, tasks, None, {})
    check_gradient(learner.at(0.3), tasks, None, {})
    for own in (learner, learner.at(0), learner.at(0.3)):
        check_plans(own, tasks)
        check_task_order(own, tasks)


def test_the_loss_of_every_step_is_judged_with_the_batch_norm_of_its_point() -> None:
    learner, tasks = trained("maml_plus_plus", normed()).at(0.3), task_batch()
    meta, expected = stirred(learner), torch.zeros((), dtype=torch.float64)
    for i in range(3):
        task = take(tasks, i)
        for k, fast in enumerate(normed_path(meta, task.support, 3)):
            weight = learner.objective.weights[k - 1] / 3 if k else 0
            expected += weight * LOSS(normalised(meta, fast, task.query.x, k), task.query.y)
    assert abs(mean_objective(learner, tasks)(meta) - expected) < 1e-12


def test_batch_norm_per_step_needs_calibration_and_has_the_statistics_of_each_point() -> None:
    learner = trained("maml_plus_plus", normed())
    with pytest.raises(UserError, match="has no statistics yet; evaluate with calibrate"):
        evaluate(learner, learner.init(), Blobs(), 2, 3)
    check_statistics(learner)


def test_batch_norm_per_step_is_evaluated_with_the_statistics_of_its_point() -> None:
    """Past the learner's own steps with those of its last point."""
    learner = trained("maml_plus_plus", normed())
    meta = calibrate(learner, stirred(learner), Blobs(), tasks=5)
    tasks, curve = draw(Blobs(), 4, 0, split="test"), evaluate(learner, meta, Blobs(), tasks=4, steps=5)
    for i in range(4):
        task = take(tasks, i)
        for k, fast in enumerate(normed_path(meta, task.support, 3, 5)):
            mean, var = (meta.stats[f"point{min(k, 3)}/norm.running_{kind}"] for kind in ("mean", "var"))
            loss = LOSS(normalised(meta, fast, task.query.x, min(k, 3), mean, var), task.query.y)
            assert abs(curve.loss[i, k] - loss) < 1e-12


def test_batch_norm_per_step_batch_is_evaluated_with_the_statistics_of_the_query_batch() -> None:
    """The scale and shift are those of the point; nothing is to be calibrated."""
    learner = trained("maml_plus_plus", normed(), batch_norm="per_step_batch")
    check_gradient(learner, task_batch(), None, {})
    meta = stirred(learner)
    assert calibrate(learner, meta, Blobs()) is meta
    tasks, curve = draw(Blobs(), 4, 0, split="test"), evaluate(learner, meta, Blobs(), tasks=4, steps=5)
    for i in range(4):
        task = take(tasks, i)
        for k, fast in enumerate(normed_path(meta, task.support, 3, 5)):
            loss = LOSS(normalised(meta, fast, task.query.x, min(k, 3)), task.query.y)
            assert abs(curve.loss[i, k] - loss) < 1e-12


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("point", [0, 1, 2, 3])
def test_scale_and_shift_of_a_point_are_its_own(point: int, order: str) -> None:
    """The query loss at one point teaches its own scale and shift; in second order also those of the support sets before."""
    learner = replace(trained("maml_plus_plus", normed()), order=0 if order == "first" else None)

    def there(own: Learner, meta: Meta, path: Iterable[Params], task: Task) -> tuple[Tensor, Score]:
        score = own.assess(meta, list(path)[point], task, point)
        return score.loss, score

    grads, _ = meta_gradient(replace(learner, objective=there, phases=()), stirred(learner), task_batch())
    reached = {k for k in range(4) for kind in ("weight", "bias") if grads.learned[f"norm{k}/norm.{kind}"].any()}
    assert reached == ({point} if order == "first" else set(range(point + 1)))
    assert not grads.params["norm.weight"].any()


def test_batch_norm_per_step_learns() -> None:
    learner = trained("maml_plus_plus", normed())
    (*_, record) = train(learner, Blobs(), 60, 4, 0.02)
    both = [calibrate(learner, meta, Blobs()) for meta in (learner.init(), record.meta)]
    before, after = (evaluate(learner, meta, Blobs(), 40, 3).loss.mean(0)[-1] for meta in both)
    assert after < 0.95 * before


def test_statistics_survive_a_checkpoint(tmp_path: Path) -> None:
    learner = trained("maml_plus_plus", normed())
    meta = calibrate(learner, learner.init(), Blobs(), tasks=3)
    checkpoint.save(tmp_path, 1, meta, {"meta": meta._asdict()}, "a")
    weights, saved = checkpoint.load_newest(tmp_path, "a")
    for found in (weights, Meta(**saved["meta"])):
        assert list(found.stats) == list(meta.stats) and torch.equal(flat(found), flat(meta))


# Bugs sown on purpose. Each promise must hold for the sound learner and fail for the broken one.


class Detached(Learner):
    """Second derivatives get lost."""

    def step(self, meta: Meta, carry: Carry, support: Batch, k: int) -> Carry:
        slopes = detach(grad(lambda fast: self.inner(self, meta, fast, support, k))(carry.fast))
        return Carry(*self.rule.update(meta.learned, slopes, carry.state, carry.fast, k))


class Late(Learner):
    """The path begins after the first step."""

    def path(self, meta: Meta, support: Batch, steps: int | None = None) -> Iterator[Params]:
        return iter(list(super().path(meta, support, (self.steps if steps is None else steps) + 1))[1:])


class Short(Learner):
    """The path has one step less."""

    def path(self, meta: Meta, support: Batch, steps: int | None = None) -> Iterator[Params]:
        return iter(list(super().path(meta, support, steps))[:-1])


class Unsquared(Learner):
    """Distances to the prototypes instead of their squares."""

    def predict(self, meta: Meta, fast: Params, x: Tensor, support_x: Tensor | None = None, k: int | None = None) -> Tensor:
        means = fast["head.weight"] / 2
        return -(self.embed(meta, fast, x).unsqueeze(1) - means).norm(dim=-1)


class MixedUp(Learner):
    """The statistics of a point are filed under the next one."""

    def observed(self, meta: Meta, fast: Params, x: Tensor, k: int) -> Params:
        found = super().observed(meta, fast, x, k)
        return {name.replace(f"point{k}/", f"point{(k + 1) % (self.steps + 1)}/"): value for name, value in found.items()}


class Merging(Learner):
    """The adapters end up in the weights below them, once a query set is judged outside of derivatives, as in evaluation."""

    def predict(self, meta: Meta, fast: Params, x: Any, support_x: Any = None, k: int | None = None) -> Tensor:
        result = super().predict(meta, fast, x, support_x, k)
        if support_x is not None and not torch._C._functorch.maybe_current_level():
            for layer in ("body", "head"):
                update = (fast[f"{layer}.lora_B.weight"] @ fast[f"{layer}.lora_A.weight"]).detach()
                self.model.get_parameter(f"{layer}.base_layer.weight").data.add_(update)
        return result


@dataclass(frozen=True)
class Remembering(SGD):
    """The velocity of the task before is the next one's first."""

    memory: Params = field(default_factory=dict)

    def init(self, fast: Params) -> Params:
        return dict(self.memory) or super().init(fast)

    def update(self, learned: Params, grads: Params, state: Params, fast: Params, k: int) -> tuple[Params, Params]:
        moved, state = super().update(learned, grads, state, fast, k)
        self.memory.update(detach(state))
        return moved, state


def away(learner: Learner, meta: Meta, path: Iterable[Params], task: Task) -> tuple[Tensor, Score]:
    """Reptile with end minus start."""
    points = list(path)
    score = learner.assess(meta, points[-1], task)
    return with_gradient(score.loss, points[0], tree_map(torch.sub, points[-1], points[0])), score


def turned(kind: type[Learner], learner: Learner) -> Learner:
    """The same learner as one of another class."""
    return kind(**{f.name: getattr(learner, f.name) for f in fields(learner) if f.init})


BUGS: dict[str, tuple[Callable[[], Learner], Callable[[Learner], Learner], Callable[[Learner], None]]] = {
    "second order detached": (
        partial(trained, "maml"), partial(turned, Detached), partial(check_row, name="maml")
    ),
    "momentum shared between tasks": (
        partial(trained, "maml", rule=SGD(0.2, momentum=0.8)),
        lambda own: replace(own, rule=Remembering(0.2, momentum=0.8)),
        partial(check_alone, tasks=task_batch()),
    ),
    "a path that begins after a step": (partial(trained, "maml"), partial(turned, Late), check_start),
    "a path of one step less": (partial(trained, "fomaml"), partial(turned, Short), partial(check_row, name="fomaml")),
    "wrong damping": (
        partial(trained, "imaml"),
        lambda own: replace(own, objective=Implicit(lam=1.5, cg_steps=40, damping=0.4)),
        partial(check_row, name="imaml"),
    ),
    "the system not solved": (
        partial(trained, "imaml"),
        lambda own: replace(own, objective=Implicit(lam=1.5, cg_steps=1, damping=0.5)),
        partial(check_row, name="imaml"),
    ),
    "distances unsquared": (
        lambda: built("protonet", three_ways()), partial(turned, Unsquared), check_prototypes
    ),
    "reptile backwards": (
        partial(trained, "reptile"), lambda own: replace(own, objective=away), check_towards_the_end
    ),
    "statistics mixed up": (
        lambda: trained("maml_plus_plus", normed()), partial(turned, MixedUp), check_statistics
    ),
    "adapters merged": (partial(trained, "lora_maml"), partial(turned, Merging), check_adapters),
    "the base adapts": (
        partial(trained, "lora_maml"), lambda own: replace(own, adapts="*"), check_adapters
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_breaks_the_promise(bug: str) -> None:
    sound, broken, check = BUGS[bug]
    check(sound())
    with pytest.raises(AssertionError):
        check(broken(sound()))


@pytest.mark.parametrize("weights", [(0.5, 0.6), (0.5, 0.4), (1.0, 1.0)])
def test_step_weights_that_do_not_sum_to_one_are_refused(weights: tuple[float, float]) -> None:
    with pytest.raises(UserError, match=r"sum to .*; make them sum to 1"):
        replace(trained("maml"), objective=EveryStep(weights))
    replace(trained("maml"), objective=EveryStep((0.5, 0.5)))
