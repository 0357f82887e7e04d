"""The outer loop, as a generator of records: whoever iterates decides when to validate, to save and to stop."""

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.utils import get_total_norm
from torch.utils import _pytree as pytree

from toolkit.distributed import ALONE, Group, Share
from toolkit.engine import GradientFunction, Metrics, gradient_function
from toolkit.errors import UserError
from toolkit.learner import Learner, Meta
from toolkit.plan import Plan, default_plan, ordered, out_of_memory, refuse_random, unmapped
from toolkit.randomness import kept
from toolkit.sharded import masters, publish, restored
from toolkit.task import Task, TaskSampler, count, draw, move, stream_seed, take

log = logging.getLogger("toolkit")
Gradient = Callable[[Learner, Plan], GradientFunction]
COMPARED_EVERY = 100  # iterations, after which processes compare their weights


class State(NamedTuple):
    """All that the outer loop needs to go on bit for bit: iterations done, meta-parameters, optimiser state (in a sharded group
    this process's parts of it; `sharded.whole` gathers them)."""

    iteration: int
    meta: Meta
    optimizer: dict[str, Any]


class Record(NamedTuple):
    """One iteration: its number (from 1), the mean query `loss` and `metric` over the meta-batch before the update, the
    seconds it took, the `state` after the update, and the `plan` it ran by. `state` and `meta` are live: copy what must survive
    the next one."""

    iteration: int
    loss: float
    metric: float
    seconds: float
    state: State
    plan: Plan

    @property
    def meta(self) -> Meta:
        """The meta-parameters after this iteration."""
        return self.state.meta


class NoMemory(UserError):
    """Memory ran out, and there is no smaller plan, or none that adds in the same order."""


class NotFinite(UserError):
    """The loss or the meta-gradient is no longer finite; the meta-parameters were not updated with it."""


def train(
    learner: Learner,
    sampler: TaskSampler,
    iterations: int,
    tasks: int,
    meta_lr: float,
    seed: int = 0,
    plan: Plan | None = None,
    start: State | None = None,
    gradient: Gradient = gradient_function,
    group: Group = ALONE,
) -> Iterator[Record]:
    """Meta-training by the learner's `outer`: iteration i takes tasks i * `tasks` .. (i + 1) * `tasks` - 1 of stream (`seed`,
    "train"). `meta_lr` is the peak of its rate.

    `gradient` computes the meta-gradient in place of our engine: (learner, plan) -> a function of (meta, tasks, share), where
    the share says which part of the meta-batch the tasks are. In a `group` of processes all call this alike, each computes its
    part of every meta-batch, and all get the same records; an ordered group cuts the batch into the plan's pieces, by default
    of one task.

    Continues from `start` when given, else from `learner.init()`; neither is changed. Runs on the device of these parameters,
    where the model must be too. Yields one record per iteration; the last holds the trained `meta`. Raises UserError at once
    for bad numbers, and NotFinite with the iteration and the task as soon as a loss or the meta-gradient is not finite.
    """
    if iterations < 1 or tasks < 1 or not 0 < meta_lr < float("inf"):
        raise UserError(f"{iterations} iterations of {tasks} tasks at meta lr {meta_lr}; each must be positive")
    return _records(learner, sampler, iterations, tasks, meta_lr, seed, plan, start, gradient, group)


def shared(learner: Learner, plan: Plan, tasks: int, group: Group, sample: Task) -> tuple[range, bool]:
    """The tasks of a meta-batch of `tasks` that are this process's, and whether the learner draws random numbers. Raises
    UserError where the group cannot share so few, or the plan or the group cannot repeat what is drawn. `sample` are some
    tasks."""
    part = group.part(tasks, plan.size(tasks) if group.ordered else 1)
    refuse_random(learner, plan, sample)
    random = learner.rehearse(task := take(sample, 0))
    learner.observe(task.support.x)  # for its warnings
    if random and group.ordered:
        raise UserError("the learner draws random numbers (dropout?), whose order is not that of the tasks; use --reduce fast")
    return part, random


def _records(
    learner: Learner,
    sampler: TaskSampler,
    iterations: int,
    tasks: int,
    meta_lr: float,
    seed: int,
    plan: Plan | None,
    start: State | None,
    gradient: Gradient,
    group: Group,
) -> Iterator[Record]:
    meta = pytree.tree_map(lambda tensor: tensor.detach().clone(), start.meta if start else learner.init())
    leaves = pytree.tree_leaves(meta)
    moved = masters(group, leaves)
    optimizer = learner.outer.build(moved, meta_lr, fused=not (group.sharded or group.ordered))
    if start:
        optimizer.load_state_dict(restored(group, copy.deepcopy(start.optimizer), leaves))
    try:
        for fraction, _ in learner.phases:  # each is made now, for its errors
            learner.at(fraction)
    except TypeError as error:
        raise UserError(f"a phase changes what a learner does not have ({error}); name its fields") from None
    device, first = leaves[0].device, start.iteration if start else 0
    sample = move(draw(sampler, tasks, seed, first * tasks), device)
    plan = plan or (ordered if group.ordered else lambda plan: plan)(default_plan(learner, sample))
    part, random = shared(learner, plan, tasks, group, sample)
    for i in range(first, iterations):
        if i == first or i % COMPARED_EVERY == 0:
            group.same(meta, i)
        began = time.perf_counter()
        whole = len(part) == tasks and i == first
        batch = sample if whole else move(draw(sampler, len(part), seed, i * tasks + part.start), device)
        share = Share(part.start, tasks, group.fold, sample if i == first else batch)
        noise = stream_seed(seed, f"dropout {group.rank}" if group.rank else "dropout", i)
        work = partial(gradient, learner.at(i / iterations)), (meta, batch, share)
        (grads, metrics), plan = _within_memory(*work, plan, noise if random else None, group.ordered)
        gradients = pytree.tree_leaves(grads)
        length = get_total_norm(gradients)
        if not torch.isfinite(metrics.loss + length):
            raise _not_finite(i, tasks, metrics.task_loss)
        if not i and not group.rank:
            _name_unmoved(learner, grads)
        if learner.outer.clip is not None:
            gradients = [g * (learner.outer.clip / length.clamp(min=learner.outer.clip)) for g in gradients]
        optimizer.param_groups[0]["lr"] = learner.outer.rate(meta_lr, i, iterations)
        for master, its in zip(moved, masters(group, gradients), strict=True):
            master.grad = its
        optimizer.step()
        publish(moved, leaves)
        state = State(i + 1, meta, optimizer.state_dict())
        yield Record(i + 1, metrics.loss.item(), metrics.metric.item(), time.perf_counter() - began, state, plan)


def _within_memory(
    gradient: Callable[[Plan], Any], work: tuple[Meta, Task, Share], plan: Plan, noise: int | None, fixed: bool
) -> tuple[tuple[Meta, Metrics], Plan]:
    """The meta-gradient, by a smaller plan when memory runs out, and the plan that was used. What is random is seeded with
    `noise` in each attempt; where the order of sums is `fixed`, pieces stay as they are."""
    while True:
        try:
            with nullcontext() if noise is None else kept(noise):
                return gradient(plan)(*work), plan
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                if said := unmapped(error, plan):
                    raise said from error
                raise
            tasks = count(work[1])
            smaller = plan.smaller(tasks)
            if fixed and plan.size(tasks) > 1:
                raise NoMemory(
                    f"out of memory by the plan '{plan}'; --reduce ordered adds in pieces of this size, whatever runs out, so "
                    f"begin anew with --chunk {plan.size(tasks) // 2}"
                ) from None
            if smaller is None:
                raise NoMemory(
                    f"out of memory by the plan '{plan}', which is the smallest; take fewer inner steps, shots or queries, a "
                    "smaller model, or freeze a part of it"
                ) from None
        # As an error, which each process says that it happens to, and not the first alone.
        log.error("out of memory by the plan '%s'; going on with '%s'", plan, smaller)
        plan = smaller


def _name_unmoved(learner: Learner, grads: Meta) -> None:
    unmoved = [name for tree in grads for name, g in tree.items() if not g.any()]
    if unmoved:
        so = "" if learner.phases else "; the outer loop leaves them as they are"
        log.info("%s: in the first iteration no gradient reaches %s%s", learner.name, ", ".join(unmoved), so)


def _not_finite(iteration: int, tasks: int, task_loss: torch.Tensor) -> NotFinite:
    bad = (~task_loss.isfinite()).nonzero().flatten().tolist()
    what = (
        f"the loss of task {iteration * tasks + bad[0]} is {task_loss[bad[0]].item()}"
        if bad
        else "the meta-gradient is not finite"
    )
    return NotFinite(f"iteration {iteration + 1}: {what}; lower --inner-lr or --meta-lr, or look at this task's data")
