"""Evaluation: loss and metric of many fixed tasks after 0, 1, ..., S inner steps."""

import hashlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, lru_cache, partial

import torch
from torch import Tensor

from toolkit.curve import Curve, Spread
from toolkit.distributed import ALONE, Group
from toolkit.engine import Runner, exact_layers, lift_for, precision, runner
from toolkit.errors import UserError
from toolkit.learner import Learner, Loss, Meta
from toolkit.metrics import MEASURES, is_of_ways, of_ways, within
from toolkit.plan import Plan, default_plan, refuse_random, unmapped
from toolkit.prefix import features, in_double, shortened, with_features
from toolkit.randomness import kept
from toolkit.recorded import Recorder
from toolkit.task import Task, TaskSampler, draw, fingerprint, move, stream_seed, take
from toolkit.tree import Params, tree_map

DRAWN_AT_ONCE = 64


def evaluate(
    learner: Learner,
    meta: Meta,
    sampler: TaskSampler,
    tasks: int = 600,
    steps: int = 10,
    seed: int = 0,
    split: str = "test",
    plan: Plan | None = None,
    progress: Callable[[int], object] | None = None,
    permutations: int = 1,
    trace: bool = False,
    measures: Mapping[str, Loss] | None = None,
    group: Group = ALONE,
) -> Curve:
    """The adaptation curve over tasks 0 .. `tasks` - 1 of the stream (`seed`, `split`), the same for every method.

    Nothing is learned and nothing is kept: no graph, no change to the model, to `meta` or to any global random state, and what
    is random in the model is so by the same numbers each time; memory does not grow with `tasks`. With `permutations` P > 1 a
    task's prediction is the mean probability of P adaptations, each with the class labels in another order (Ye & Chao 2022);
    classification only. `progress` is called with the number of tasks that were just finished, after each piece of the plan, in
    a group after each block. `trace` records the work where no plan is given, which pays from about a hundred tasks of images
    on. `measures` are more functions like a metric, of any shape, whose means over tasks become `Curve.card`: by default
    `metrics.MEASURES` for integer targets, none for others. A `group` of processes shares the tasks, and each gets the whole
    curve.
    """
    if tasks < 1 or steps < 0 or permutations < 1:
        raise UserError(
            f"{tasks} evaluation tasks, {steps} steps, {permutations} label orders; give at least 1 task, 0 steps and 1 order"
        )
    if not isinstance(meta, Meta) or not callable(sampler):
        wrong = f"meta is a {type(meta).__name__}; give a Meta, as record.meta is" if not isinstance(meta, Meta) else ""
        raise UserError(wrong or f"the sampler is a {type(sampler).__name__}; give a function of a generator")
    device = next(iter(meta.params.values())).device
    # Made at once: small results kept between large tasks would leave memory in pieces.
    digest, card, spent = hashlib.sha256(), dict[str, Spread](), list[float]()
    scores = {name: torch.empty(tasks, steps + 1, dtype=torch.float64) for name in ("loss", "metric")}
    # Few tasks are spread evenly; but what a piece holds decides about rounding, which an ordered group keeps as it is alone.
    size = DRAWN_AT_ONCE if group.ordered else min(DRAWN_AT_ONCE, -(-tasks // group.size))
    told = progress if group.size == 1 else None
    blocks = [range(tasks)[start : start + size] for start in range(0, tasks, size)]
    for mine in range(0, len(blocks), group.size):
        found: dict[str, Tensor] = {}
        for i, block in enumerate(blocks[mine : mine + group.size]):
            if group.rank and group.rank != i:
                continue  # process 0 sees all tasks, for their hash
            drawn = draw(sampler, len(block), seed, block.start, split)
            fingerprint(drawn, digest)
            if group.rank == i:
                drawn = move(drawn, device)
                with exact_layers(learner):
                    random = _judged(learner).rehearse(take(drawn, 0))
                plan = plan or replace(default_plan(_judged(learner), drawn), trace=trace and not random)
                refuse_random(_judged(learner), plan, drawn)
                more = measures_of(learner, drawn) if measures is None else tuple(measures.items())
                with kept(stream_seed(seed, f"dropout {split}", block.start)) if random else nullcontext():
                    try:
                        pieces, seconds = judge(learner, plan, steps, permutations, more)(meta, drawn, told)
                    except RuntimeError as error:
                        if said := unmapped(error, plan):
                            raise said from error
                        raise
                found = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
                spent.append(seconds / len(block))
        for block, results in zip(blocks[mine:], group.gathered(found), strict=False):
            for name, values in results.items():
                if name in scores:
                    scores[name][block.start : block.stop] = values
                else:
                    card[name] = card.get(name, Spread()).plus(values)
            if progress and not told:
                progress(len(block))
    # The first tasks also warm the caches, so the others tell what a task costs.
    seconds = statistics.median(spent[1:] or spent) if spent else 0.0
    first = group.gathered((digest.hexdigest()[:16], seconds))[0]
    return Curve(scores["loss"], scores["metric"], learner.metric_name, first[0], card, first[1])


def measures_of(learner: Learner, tasks: Task) -> tuple[tuple[str, Loss], ...]:
    """What is measured by default beside the loss and the metric of such tasks."""
    if tasks.query.y.is_floating_point() or tasks.query.y.dim() != 2:
        return ()
    return tuple((name, _fewer(function) if is_of_ways(learner.loss) else function) for name, function in MEASURES.items())


_fewer = cache(of_ways)


@lru_cache(maxsize=8)
def _judged(learner: Learner) -> Learner:
    return replace(learner, training=False)


@lru_cache(maxsize=8)
def judge(
    learner: Learner, plan: Plan, steps: int, permutations: int, measures: tuple[tuple[str, Loss], ...] = ()
) -> Callable[..., tuple[list[dict[str, Tensor]], float]]:
    """A function of (meta, tasks, progress=None) -> for each piece of them the loss, the metric and the measures by name, of
    shape (tasks, steps + 1, ...), and the seconds that this took; with its threads and recordings, whose making is not counted,
    kept for the next call. `progress` is called after each piece, with the number of its tasks."""
    judged = {"loss": learner.loss, "metric": learner.metric, **dict(measures)}

    @torch.no_grad()
    def walk(orders: list[Tensor], own: Learner, meta: Meta, piece: Task) -> dict[str, Tensor]:
        def of_task(meta: Meta, task: Task) -> dict[str, Tensor]:
            task = with_features(task, features(own, meta, task))
            points = _averaged(own, meta, task, steps, orders) if orders else _single(own, meta, task, steps)
            rows = [[function(prediction, task.query.y) for function in judged.values()] for prediction in points]
            return {name: torch.stack(values) for name, values in zip(judged, zip(*rows, strict=True), strict=True)}

        with precision(plan, piece):
            return lift_for(plan, piece)(of_task, (None, 0))(meta, piece)  # type: ignore[no-any-return]

    ready: list[tuple[Learner, Runner, Recorder]] = []

    def score(
        meta: Meta, tasks: Task, progress: Callable[[int], object] | None = None
    ) -> tuple[list[dict[str, Tensor]], float]:
        with exact_layers(learner):
            if not ready:
                own, one = _judged(learner), take(tasks, slice(0, 1))
                work = partial(walk, _label_orders(own, meta, take(tasks, 0), permutations))
                own = shortened(own, meta, one, steps, lambda each, meta, one: [work(each, meta, one)["loss"]])
                recorder = Recorder(work, False, partial(in_double, work), lambda out: [out["loss"], out["metric"]])
                ready.append((own, runner(own, plan), recorder))
                if plan.records:
                    recorder.prepare(own, meta, next(plan.pieces(tasks)))
            own, run, recorder = ready[0]
            began = time.perf_counter()
            pieces = []
            for found in run(lambda own, piece: recorder(own, meta, piece), plan.pieces(tasks)):
                pieces.append(tree_map(Tensor.cpu, found))  # a GPU is done when its numbers are here
                if progress:
                    progress(len(found["loss"]))
            return pieces, time.perf_counter() - began

    return score


def _single(learner: Learner, meta: Meta, task: Task, steps: int) -> Iterator[Tensor]:
    """The query predictions after 0..`steps` steps."""
    for k, fast in enumerate(learner.path(meta, task.support, steps)):
        yield learner.predict(meta, fast, task.query.x, task.support.x, k)


def _averaged(learner: Learner, meta: Meta, task: Task, steps: int, orders: list[Tensor]) -> Iterator[Tensor]:
    """The logarithms of the mean probabilities over label orders. An example without a label stays without, and with a loss
    `of_ways` a task's classes change places among themselves only."""
    given, fewer, total = task.support.y, is_of_ways(learner.loss), list[Tensor]()
    for order in orders:
        if fewer:
            beyond = torch.arange(len(order), device=order.device) > given.max()
            order = (order + len(order) * beyond).argsort().argsort()
        y = torch.where(given < 0, given, order[given.clamp(min=0)])
        points = _single(learner, meta, task._replace(support=task.support._replace(y=y)), steps)
        shares = [(within(p, given) if fewer else p).softmax(-1)[:, order] / len(orders) for p in points]
        total = [a + b for a, b in zip(total, shares, strict=True)] if total else shares
    return (share.clamp(min=torch.finfo(share.dtype).tiny).log() for share in total)


@torch.no_grad()
def _label_orders(learner: Learner, meta: Meta, task: Task, permutations: int) -> list[Tensor]:
    """The given order of classes and random others, the same for every task and plan; none for one permutation.

    Drawn once and outside of vmap, which would draw other ones for each task of a piece."""
    if permutations == 1:
        return []
    if task.support.y.is_floating_point():
        raise UserError("label orders are averaged for classes only, but y holds floats; use permutations=1")
    with exact_layers(learner):
        fast = next(iter(learner.path(meta, task.support, 0)))
        ways = learner.predict(meta, fast, task.query.x, task.support.x, 0).shape[-1]
    generator = torch.Generator().manual_seed(0)
    others = [torch.randperm(ways, generator=generator) for _ in range(permutations - 1)]
    return [order.to(task.support.y.device) for order in (torch.arange(ways), *others)]


@torch.no_grad()
def calibrate(
    learner: Learner, meta: Meta, sampler: TaskSampler, tasks: int = 100, seed: int = 0, split: str = "train"
) -> Meta:
    """`meta` with the statistics that batch norm "per_step" needs in evaluation: of every point of the path, the means over
    training tasks of what each batch norm sees in a query set. Other policies need none: `meta` comes back as it is."""
    if learner.batch_norm != "per_step":
        return meta

    def work(own: Learner, piece: Task) -> Params:
        def observe(meta: Meta, task: Task) -> Params:
            points = enumerate(own.path(meta, task.support))
            return {n: v for k, fast in points for n, v in own.observed(meta, fast, task.query.x, k).items()}

        return tree_map(lambda values: values.sum(0), lift_for(plan, piece)(observe, (None, 0))(meta, piece))

    learner, device = replace(learner, training=False), next(iter(meta.params.values())).device
    total: Params = {}
    for begin in range(0, tasks, DRAWN_AT_ONCE):
        drawn = move(draw(sampler, min(DRAWN_AT_ONCE, tasks - begin), seed, begin, split), device)
        plan = default_plan(learner, drawn)
        with exact_layers(learner):
            for part in runner(learner, plan)(work, plan.pieces(drawn)):
                total = tree_map(torch.add, total, part) if total else part
    return meta._replace(stats=tree_map(lambda values: values / tasks, total))


@torch.no_grad()
def predictions(learner: Learner, meta: Meta, task: Task, steps: tuple[int, ...]) -> Tensor:
    """Query outputs of one task after each of these numbers of inner steps, shape (len(steps), queries, outputs)."""
    learner = replace(learner, training=False)
    shown = {}
    with exact_layers(learner):
        for k, fast in enumerate(learner.path(meta, task.support, max(steps))):
            if k in steps:
                shown[k] = learner.predict(meta, fast, task.query.x, task.support.x, k)
    found = torch.stack([shown[k] for k in steps]).cpu()
    return found.float() if found.itemsize < 4 else found  # numpy and figures know no bfloat16
