"""What a task is, what a task sampler is, and how numbered tasks are drawn from one.

Task *i* of a stream is a pure function of (seed, split, *i*): every task has a generator of its own, seeded by a hash of
the three. So the meta-batch size, the number of processes and the point of a resume cannot change any task.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from toolkit.errors import UserError

T = TypeVar("T")
# The label of an example that counts in no loss and no metric: padding, or one without a label. (torch's own ignore_index.)
IGNORED = -100
GOLDEN = (math.sqrt(5) - 1) / 2


class Padded(NamedTuple):
    """Inputs of a task that was filled up to a common size: `x` of shape (examples, ...), and `real`, of shape (examples,) and
    dtype bool, False for the filling, which batch norm then leaves out. Its label must be `IGNORED`."""

    x: Tensor
    real: Tensor


Input = Tensor | Padded | dict[str, Tensor]


class Batch(NamedTuple):
    """Examples `x` (shape (examples, ...), or a dict of such) and their targets `y` (shape (examples, ...))."""

    x: Input
    y: Tensor


class Task(NamedTuple):
    """A `support` set to adapt on and a `query` set to be judged on.

    A batch of tasks has the same type; every tensor then has one more leading axis, the task axis.
    """

    support: Batch
    query: Batch


class TaskSampler(Protocol):
    """Any callable that makes one task, with all its randomness from `generator`.

    It may also offer `draw_many(generators) -> Task`, which returns a batch of tasks, one for each generator, equal to
    calling it on each. The generators must be used one after the other: each is only valid until the next is taken.
    """

    def __call__(self, generator: torch.Generator) -> Task: ...


def stream_seed(seed: int, split: str, index: int) -> int:
    """The 63-bit seed of task `index` of stream (`seed`, `split`): a hash, so that streams do not overlap."""
    digest = hashlib.blake2b(f"{seed}/{split}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generators(seed: int, split: str, indices: Iterable[int]) -> Iterator[torch.Generator]:
    """One generator after the other, seeded for each task index; the same object is reseeded, which is fast."""
    generator = torch.Generator()
    for index in indices:
        generator.manual_seed(stream_seed(seed, split, index))
        yield generator


def draw(sampler: TaskSampler, tasks: int, seed: int, start: int = 0, split: str = "train") -> Task:
    """Tasks `start` .. `start + tasks - 1` of the stream (`seed`, `split`) of `sampler`, as a batch of tasks.

    Raises UserError when the tasks of a plain sampler differ in shape and so cannot be stacked.
    """
    if tasks < 1:
        raise UserError(f"cannot draw {tasks} tasks; ask for at least 1")
    streams = generators(seed, split, range(start, start + tasks))
    many: Callable[[Iterator[torch.Generator]], Task] | None = getattr(sampler, "draw_many", None)
    if isinstance(sampler, type):
        raise UserError(f"{sampler.__name__} is a class; draw from an instance of it, {sampler.__name__}(...)")
    if many is not None:
        batch = _checked(many(streams))
        if count(batch) != tasks:
            raise UserError(
                f"draw_many of the sampler returned {count(batch)} tasks for {tasks} generators; return one for each"
            )
        return batch
    drawn = [_checked(sampler(generator)) for generator in streams]
    try:
        return stack(drawn)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"tasks {start} to {start + tasks - 1} of the sampler differ in shape and cannot be stacked ({error}); "
            "give every task the same ways, shots and queries"
        ) from None


def _checked(task: object) -> Task:
    if not isinstance(task, Task) or not all(isinstance(batch, Batch) for batch in task):
        raise UserError(f"the sampler returned a {type(task).__name__}; return Task(support=Batch(x, y), query=Batch(x, y))")
    for leaf in pytree.tree_leaves(tuple(task)):
        if not isinstance(leaf, Tensor):
            raise UserError(f"the sampler returned a task with a {type(leaf).__name__} in it; x and y must be tensors")
    return task


def stack(tasks: list[Task]) -> Task:
    """Tasks of equal shapes as one batch of tasks."""
    stacked: Task = pytree.tree_map(lambda *tensors: torch.stack(tensors), *tasks)
    return stacked


def take(tasks: T, index: int | slice) -> T:
    """One task (int) or some tasks (slice) of a batch of tasks."""
    taken: T = pytree.tree_map(lambda tensor: tensor[index], tasks)
    return taken


def count(tasks: Task) -> int:
    """The number of tasks in a batch of tasks."""
    return tasks.support.y.shape[0]


def move(tasks: T, device: torch.device | str) -> T:
    """The same tasks on `device`. Nobody waits for a copy to a GPU, where all later work queues behind it; of a copy from there
    the CPU would read what has not arrived yet."""
    moved: T = pytree.tree_map(lambda tensor: tensor.to(device, non_blocking=not tensor.is_cuda), tasks)
    return moved


def fingerprint(tasks: Task, digest: "hashlib._Hash") -> None:
    """Feeds the content of each task, in task order, to `digest`; how tasks were batched does not matter."""
    leaves = [tensor.cpu().contiguous() for tensor in pytree.tree_leaves(tasks)]
    for i in range(count(tasks)):
        for tensor in leaves:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape[1:])}".encode())
            digest.update(tensor[i].reshape(-1).view(torch.uint8).numpy().tobytes())


def minibatch(support: Batch, size: int | None, k: int) -> Batch:
    """The examples of inner step `k`: the next `size` in an order that visits each once before any returns.

    The order steps through the rows by about their golden section, so that a support set sorted by label comes well mixed.
    """
    if size is None:
        return support
    if isinstance(support.x, Padded):
        raise UserError(f"inner minibatches of {size} would mix filling with examples; leave inner_batch out for padded tasks")
    total = support.y.shape[0]
    if size >= total:
        return support
    ranked = sorted(range(total), key=lambda i: i * GOLDEN % 1)
    order = sorted(range(total), key=ranked.__getitem__)
    rows = [order[i % total] for i in range(k * size, (k + 1) * size)]
    return pytree.tree_map(lambda tensor: tensor[rows], support)  # type: ignore[no-any-return]
