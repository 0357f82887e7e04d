"""Evaluation: loss and metric of many fixed tasks after 0, 1, ..., S inner steps."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from toolkit.curve import Curve
from toolkit.engine import Plan, default_plan, exact_attention, lift_for, runner
from toolkit.errors import UserError
from toolkit.learner import Learner, Meta, Score
from toolkit.task import Task, TaskSampler, count, draw, fingerprint, move

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
) -> Curve:
    """The adaptation curve over tasks 0 .. `tasks` - 1 of the stream (`seed`, `split`), the same for every method.

    Nothing is learned and nothing is kept: no graph, no change to the model, to `meta` or to any global random state; memory
    does not grow with `tasks`. `progress` is called with the number of tasks that were just finished.
    """
    if tasks < 1 or steps < 0:
        raise UserError(f"{tasks} evaluation tasks with {steps} steps; give at least 1 task and 0 steps")
    learner = replace(learner, training=False)
    device = next(iter(meta.params.values())).device
    digest, scores = hashlib.sha256(), list[Score]()
    work = run = None
    for start in range(0, tasks, DRAWN_AT_ONCE):
        drawn = draw(sampler, min(DRAWN_AT_ONCE, tasks - start), seed, start, split)
        fingerprint(drawn, digest)
        drawn = move(drawn, device)
        if run is None or work is None or plan is None:
            plan = plan or default_plan(learner, drawn)
            run, work = runner(learner, plan), partial(_walk, meta, steps, plan)
        with exact_attention():
            scores += run(work, plan.pieces(drawn))
        if progress:
            progress(count(drawn))
    loss, metric = (torch.cat(values).double().cpu() for values in zip(*scores, strict=True))
    return Curve(loss, metric, learner.metric_name, digest.hexdigest()[:16])


@torch.no_grad()
def _walk(meta: Meta, steps: int, plan: Plan, learner: Learner, tasks: Task) -> Score:
    """Query scores of shape (tasks, steps + 1)."""

    def walk(meta: Meta, task: Task) -> Score:
        scores = [learner.assess(meta, fast, task) for fast in learner.path(meta, task.support, steps)]
        return Score(*(torch.stack(values) for values in zip(*scores, strict=True)))

    scores: Score = lift_for(plan, tasks)(walk, (None, 0))(meta, tasks)
    return scores


@torch.no_grad()
def predictions(learner: Learner, meta: Meta, task: Task, steps: tuple[int, ...]) -> Tensor:
    """Query outputs of one task after each of these numbers of inner steps, shape (len(steps), queries, outputs)."""
    learner = replace(learner, training=False)
    shown = {}
    with exact_attention():
        for k, fast in enumerate(learner.path(meta, task.support, max(steps))):
            if k in steps:
                shown[k] = learner.predict({**meta.params, **fast}, task.query.x, task.support.x)
    return torch.stack([shown[k] for k in steps]).cpu()
