"""What a learner would cost here or on another machine, of a model that need not fit here: operations, seconds, memory."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from toolkit import cost
from toolkit.allocator import keep_freed_memory
from toolkit.cost import Kind, Seen
from toolkit.errors import UserError
from toolkit.learner import Learner
from toolkit.task import Batch, Task
from toolkit.tree import numel

# What takes more operations is not run here: it goes at the rate of a large product.
LARGEST = 20e9
RUNS = 3  # of each kind of operation, of which the fastest counts
CACHE = 2**24  # numbers, 64 MiB
ADAPTING = "adapt and predict"


@dataclass(frozen=True)
class Prediction:
    """A `way` to do something for one task: its operations, its seconds, and the bytes of tensors that it needs beyond what is
    there before."""

    way: str
    operations: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Blank:
    """A task sampler of shapes: classification tasks of zeros, for predictions. Examples have the shape `inputs`; they are
    feature or token numbers where there are `numbers` of these. Nothing is stored, whatever the size."""

    ways: int
    shots: int
    queries: int
    inputs: tuple[int, ...]
    numbers: int = 0

    def __call__(self, generator: torch.Generator) -> Task:
        """The one task that there is."""
        return pytree.tree_map(lambda t: t[0], self.draw_many([generator]))  # type: ignore[no-any-return]

    def draw_many(self, generators: Any) -> Task:
        """The same for each generator."""
        tasks = sum(1 for _ in generators)
        zero = torch.tensor(0 if self.numbers else 0.0)

        def batch(each: int) -> Batch:
            y = torch.arange(self.ways).repeat(each)
            return Batch(zero.expand(tasks, len(y), *self.inputs), y.expand(tasks, -1))

        return Task(batch(self.shots), batch(self.queries))


def shaped(inputs: str, numbers: int | None) -> dict[str, Any]:
    """The flags for tasks of examples of a shape, written as in "3,224,224"; of `numbers` below that many where it is given.
    Raises UserError for what is no shape."""
    sizes = [int(size) if size.strip().isdecimal() else 0 for size in inputs.split(",")]
    if min(sizes) < 1:
        raise UserError(f"--inputs {inputs} is no shape; give whole numbers from 1 up with commas between, as in 3,224,224")
    if numbers is not None and numbers < 1:
        raise UserError(f"--numbers is {numbers}; give at least 1, so many different tokens")
    settings = (f"inputs={tuple(sizes)}", *(() if numbers is None else (f"numbers={numbers}",)))
    return {"sampler": f"{__name__}:{Blank.__name__}", "sampler_args": settings}


def predictions(learner: Learner, training: Task, test: Task, rate: float | None = None) -> Iterator[Prediction]:
    """The meta-gradient of one `training` task as the learner says, then with its steps recomputed, and where it is of second
    order also of first order; then adapting to one `test` task by the steps of training and predicting its query set.

    `rate` says how many operations a machine does in a second. Without one every kind of operation is run here with tensors of
    its shapes, alone and with nothing in the cache; measured, their sum was within a factor of 1.6 of what a real meta-gradient
    takes (CPU, one thread, six networks). Raises UserError where shapes do not tell what a model does.
    """
    trained, by_kind, known = learner.pretrain or learner, rate is None, dict[Any, Kind]()
    exact, order = trained.steps > 0 and trained.order is None, trained.order
    timed = cache(lambda key: _seconds(known[key]))

    def row(way: str, work: Callable[[], Seen]) -> Prediction:
        try:
            seen = work()
        except (RuntimeError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [repr(error)])[0]
            raise UserError(
                f"shapes alone do not tell what the model does ({reason}); it may look at the values of its tensors, which "
                "`toolkit plan` without --predict can follow"
            ) from error
        known.update(seen.kinds)
        seconds = seen.operations / rate if rate else sum(kind.times * timed(key) for key, kind in seen.kinds.items())
        return Prediction(way, seen.operations, seconds, seen.peak)

    way = "second order" if exact else "first order" if order == 0 else f"second order in the last {order}"
    way = way if trained.steps else "no inner steps"
    yield row(way, lambda: cost.of_meta_gradient(trained, training, by_kind=by_kind))
    if trained.steps:
        yield row(f"{way}, steps recomputed", lambda: cost.of_meta_gradient(trained, training, "recompute", by_kind=by_kind))
    if exact:
        yield row("first order", lambda: cost.of_meta_gradient(replace(trained, order=0), training, by_kind=by_kind))
    yield row(ADAPTING, lambda: cost.of_adapting(learner, test, learner.steps, by_kind=by_kind))


def _seconds(kind: Kind) -> float:
    """What one such operation takes here, at best."""
    if kind.operations > LARGEST:
        return kind.operations / rate_here()
    keep_freed_memory()  # as the engine does
    arguments, keywords = pytree.tree_map(_real, (kind.arguments, kind.keywords))
    return _fastest(lambda: kind.function(*arguments, **keywords))


@torch.no_grad()
def _fastest(work: Callable[[], object]) -> float:
    times, other = list[float](), torch.zeros(CACHE)
    work()
    while len(times) < RUNS:
        other.add_(1)  # in a meta-gradient, too, what an operation reads has mostly left the cache
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def _real(leaf: Any) -> Any:
    """A tensor of ones, or of zeros for numbers and conditions, as a shape says it; every other argument as it is here."""
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    if not isinstance(leaf, Tensor):
        return leaf
    last = sum((size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True))
    filled = torch.ones if leaf.is_floating_point() else torch.zeros
    return filled(last + 1, dtype=leaf.dtype).as_strided(leaf.shape, leaf.stride())


@cache
def rate_here(size: int = 1024) -> float:
    """Operations per second of products of large float32 matrices on this CPU."""
    a = torch.ones(size, size)
    return 2 * size**3 / _fastest(lambda: a @ a)


def held_besides(learner: Learner) -> int:
    """The bytes that a training holds of what it learns besides the model: the meta-parameters, their best so far, and the
    moments of Adam where that is the outer optimiser."""
    params, learned, _ = learner.init()
    copies = 2 + 2 * (learner.outer.optimizer == "adam")
    return copies * cost.stored_bytes((*params.values(), *learned.values()))


def report(learner: Learner, found: Iterator[Prediction], tasks: int, support: Batch | None = None) -> Iterator[str]:
    """Predictions as text, line by line, for a meta-gradient of so many tasks."""
    model, besides, stored = cost.model_bytes(learner), held_besides(learner), cost.task_bytes(learner, support)
    every = sum({id(p): p.numel() for p in learner.model.parameters()}.values())
    adapted = numel(cost.own_weights(learner, support))
    yield f"model: {every:,} parameters, {_mb(model)} MB; {adapted:,} adapt, {stored / 1e3:,.1f} kB to store for each task"
    yield f"a training also holds {_mb(besides)} MB: meta-parameters, the best so far, the optimiser's state"
    yield f"{'one task':44} {'GFLOP':>12} {'seconds':>12} {'x ' + str(tasks) + ' tasks':>12} {'MB':>10} {'MB in all':>12}"
    for row in found:
        training = row.way != ADAPTING
        cells = f"{row.operations / 1e9:>12,.4g} {row.seconds:>12.4g}"
        many = f"{tasks * row.seconds:>12.4g}" if training else f"{'':>12}"
        yield f"{row.way:44} {cells} {many} {_mb(row.bytes):>10} {_mb(model + row.bytes + besides * training):>12}"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f}" if size >= 10**7 else f"{size / 1e6:.3g}"
