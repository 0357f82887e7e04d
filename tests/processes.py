"""What one of several processes does in tests/test_distributed.py: `python -m tests.processes CASE FOLDER`, with the variables
that torchrun sets. What it finds is written to FOLDER/RANK-of-SIZE.pt."""

import os
import sys
import threading
import time
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from tests.conftest import convolutional, task_batch
from toolkit import Batch, Plan, Task, UserError, algorithms, distributed, evaluate, processes, train
from toolkit.distributed import Group, here
from toolkit.engine import gradient_function
from toolkit.processes import join, leave, speak
from toolkit.rules import SGD
from toolkit.sharded import whole
from toolkit.task import take

TASKS = 5  # which no number of processes beyond one divides


class Pictures:
    """Tasks of random images: two classes, two shots, three queries, float32."""

    def __call__(self, generator: torch.Generator) -> Task:
        def batch(examples: int) -> Batch:
            y = torch.arange(examples) % 2
            return Batch(torch.randn(examples, 1, 12, 12, generator=generator) + y.view(-1, 1, 1, 1), y)

        return Task(batch(4), batch(6))


def small() -> nn.Module:
    """A convolution with batch norm and a head, float32."""
    torch.manual_seed(3)
    # Without a bias, whose gradient in front of batch norm is rounding and nothing else.
    layers = {"conv": nn.Conv2d(1, 4, 3, stride=2, bias=False), "norm": nn.BatchNorm2d(4), "act": nn.ReLU()}
    return nn.Sequential(OrderedDict(layers, flat=nn.Flatten(), head=nn.Linear(100, 2)))


def exact(group: Group) -> dict[str, Any]:
    """Meta-gradients in float64, fast: of five tasks by several methods and plans."""
    found, tasks = {}, task_batch(TASKS, shape=(1, 8, 8))
    part = group.part(TASKS, 1)
    own = take(tasks, slice(part.start, part.stop))
    for name in ("maml", "reptile", "imaml"):
        learner = algorithms.METHODS[name](convolutional(), inner_lr=0.2, inner_steps=2)
        for plan in (Plan("vmap"), Plan("threads", chunk=2), Plan("loop", memory="recompute")):
            share = distributed.Share(part.start, TASKS, group.fold, tasks)
            grads, metrics = gradient_function(learner, plan)(learner.init(), own, share)
            found[f"{name} {plan}"] = (*grads.params.values(), metrics.loss, metrics.task_loss, metrics.task_metric)
    return found


def ordered(group: Group) -> dict[str, Any]:
    """Fifty steps of Adam in float32, in order, and the evaluation after them."""
    torch.set_num_threads(1)
    group = Group(group.rank, group.size, ordered=True)
    found: dict[str, Any] = {}
    for name, plan, steps in (("as it is", None, 5), ("recorded", Plan("threads", chunk=1, workers=2, trace=True), 50)):
        learner = algorithms.maml(small(), inner_lr=0.2, inner_steps=1)
        *_, last = train(learner, Pictures(), steps, TASKS, 0.01, plan=plan, group=group)
        found[name] = (*last.meta.params.values(), torch.tensor([last.loss, last.metric]))
        curve = evaluate(learner, last.meta, Pictures(), 70, 3, group=group)
        measured = curve.card["nll"].mean()
        found[f"{name}, judged"] = curve.loss, curve.metric, measured, torch.tensor(int(curve.task_list_hash, 16) % 2**62)
    return found


def fast(group: Group) -> dict[str, Any]:
    """The same, fast: equal up to rounding."""
    learner = algorithms.maml(small().double(), inner_lr=0.2, inner_steps=1)

    def doubled(generator: torch.Generator) -> Task:
        support, query = Pictures()(generator)
        return Task(Batch(support.x.double(), support.y), Batch(query.x.double(), query.y))

    *_, last = train(learner, doubled, 10, TASKS, 0.01, group=group)
    curve = evaluate(learner, last.meta, doubled, 7, 3, group=group)
    return {"weights": tuple(last.meta.params.values()), "curve": (curve.loss, curve.metric)}


def in_parts(group: Group) -> dict[str, Any]:
    """Training with weights and optimiser in parts, stopped and gone on with, in order; what is learned of the rule is single
    numbers, which have no parts."""
    group = Group(group.rank, group.size, ordered=True, sharded=group.size > 1)
    learner = algorithms.maml(small(), rule=SGD(0.2, learn="tensor"), inner_steps=1)
    *_, half = train(learner, Pictures(), 3, TASKS, 0.01, group=group)
    kept = half.state._replace(optimizer=whole(half.state.optimizer))
    *_, last = train(learner, Pictures(), 6, TASKS, 0.01, group=group, start=kept)
    moments = whole(last.state.optimizer)["state"]
    parts = [tensor.to_local() for tensor in pytree.tree_leaves(last.state.optimizer) if isinstance(tensor, DTensor)]
    return {
        "weights": tuple(last.meta.params.values()),
        "moments": tuple(moments[i][key] for i in moments for key in ("exp_avg", "exp_avg_sq")),
        "kept": sum(part.numel() for part in parts),
    }


def everything(group: Group) -> dict[str, Any]:
    return {
        "exact": exact(group),
        "ordered": ordered(group),
        "fast": fast(group),
        "parts": in_parts(group),
        "talk": talk(group),
    }


def talk(group: Group) -> dict[str, Any]:
    """What processes tell each other, and how they disagree."""

    def refused() -> None:
        raise UserError("only process 0 knows why")

    said = []
    for attempt in (
        lambda: group.first(refused),
        lambda: group.agree({"--inner-lr": 0.4, "--seed": 7 if group.rank == 1 else 0}, "start them alike"),
        lambda: group.same({"weight": torch.full((3,), float(group.rank))}, 100),
        lambda: group.part(group.size - 1 or 0, 1) if group.size > 1 else None,
    ):
        try:
            attempt()
            said.append("")
        except UserError as error:
            said.append(str(error))
    return {
        "first": group.first(lambda: f"by {group.rank}"),
        "gathered": group.gathered(group.rank),
        "any": (group.any(group.rank == group.size - 1), group.any(False)),
        "said": said,
        "repeated": [processes.said_already(f"sentence {i}") for i in range(3)],
    }


def lost(group: Group) -> dict[str, Any]:
    """The last process dies in the middle of a training, the others notice."""
    began, learner = time.monotonic(), algorithms.maml(small())
    try:
        for record in train(learner, Pictures(), 10_000, TASKS, 0.01, group=group):
            if record.iteration == 3 and group.rank == group.size - 1:
                os._exit(9)
    except UserError as error:
        return {"said": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - began}
    return {}


def hung(group: Group) -> dict[str, Any]:
    """The last process stops without dying; the watch ends the others."""
    return stopping(group, group.size - 1)


def hung_first(group: Group) -> dict[str, Any]:
    """The first process does, which keeps the notes by which the watch would see it."""
    return stopping(group, 0)


def hung_within(group: Group) -> dict[str, Any]:
    """The first process is alive, but comes late; the others speak as those of an experiment."""
    speak()
    time.sleep(0.0 if group.rank else 5.0)
    group.gathered(0)
    return {}


def hung_left(group: Group) -> dict[str, Any]:
    """The first process stops without dying, and the others are done."""
    if not group.rank:
        os.kill(os.getpid(), 19)
    time.sleep(1)
    return {}


def stopping(group: Group, rank: int) -> dict[str, Any]:
    if group.rank == rank:
        os.kill(os.getpid(), 19)
    group.gathered(0)
    return {}


if __name__ == "__main__":
    case, folder = sys.argv[1], Path(sys.argv[2])
    if case == "absent":
        processes.ROLL_CALL = timedelta(seconds=1)
    join(*((0.3, 2.0) if case.startswith("hung") else ()))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    result = globals()[case](here())
    torch.save(result, folder / f"{rank}-of-{size}.pt")
    leave()
    assert all(thread.name != "watch" for thread in threading.enumerate()), "Python's end would abort in its thread"
