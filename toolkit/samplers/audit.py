"""Tasks drawn to be looked at: where they fail, and what is wrong in each, without a Python loop over items."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from toolkit.task import IGNORED, Batch, Input, Padded, Task, TaskSampler, generators, stack

BATCH = 32  # tasks drawn at once
LONGEST = 300  # characters of an error's message
Facts = dict[str, Tensor]
Form = tuple[str, tuple[tuple[torch.dtype, tuple[int, ...]], ...]]


class FailedError(Exception):
    """Tasks that cannot be had: the name of the check that reports it, and its sentence."""

    def __init__(self, check: str, sentence: str) -> None:
        super().__init__(sentence)
        self.check, self.sentence = check, sentence


@dataclass(frozen=True)
class Stream:
    """The tasks of `sampler` in the stream (`seed`, `split`), drawn without the checks of `toolkit.task.draw`."""

    sampler: TaskSampler
    seed: int
    split: str

    @property
    def batched(self) -> bool:
        """Whether the sampler draws batches of its own."""
        return getattr(self.sampler, "draw_many", None) is not None

    def one(self, index: int) -> Task:
        """Task `index`. Raises FailedError when the sampler raises, or returns no task."""
        try:
            task = self.sampler(next(generators(self.seed, self.split, [index])))
        except (Exception, SystemExit) as error:
            raise FailedError("runs", f"{describe(error)}, in {self.replay(index)}") from error
        if problem := wrong_type(task):
            raise FailedError("type", f"{problem}, in {self.replay(index)}")
        return task

    def many(self, start: int, tasks: int) -> list[Task]:
        """Tasks `start` .. `start + tasks - 1` as batches: one, or one for each task when their forms differ.

        Raises FailedError as `one`, which names the first task that fails by itself."""
        indices = range(start, start + tasks)
        if not self.batched:
            drawn = [self.one(index) for index in indices]
            alike = len({form(task) for task in drawn}) == 1
            return [stack(drawn)] if alike else [stack([task]) for task in drawn]
        try:
            batch = self.sampler.draw_many(generators(self.seed, self.split, indices))  # type: ignore[attr-defined]
        except (Exception, SystemExit) as error:
            for index in indices:
                self.one(index)
            where = f"draw_many for tasks {start} to {start + tasks - 1}; replay it with {self._call(start, tasks)}"
            raise FailedError("runs", f"{describe(error)}, in {where}") from error
        problem = wrong_type(batch)
        if not problem and any(leaf.dim() == 0 or len(leaf) != tasks for leaf in leaves(batch)):
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves(batch))
            problem = f"draw_many returned tensors of shapes {shapes} for {tasks} generators, not one task for each"
        if problem:
            raise FailedError("type", f"{problem}, in {self._call(start, tasks)}")
        return [batch]

    def replay(self, index: int) -> str:
        """Which task it is, and how it is drawn again."""
        return f"task {index} (seed {self.seed}, split {self.split!r}); replay it with {self._call(index, 1)}"

    def _call(self, start: int, tasks: int) -> str:
        split = "" if self.split == "train" else f", split={self.split!r}"
        return f"draw(sampler, {tasks}, {self.seed}, start={start}{split})"


def describe(error: BaseException) -> str:
    """Type and message of an error, in one line of bearable length."""
    line = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


def wrong_type(task: object) -> str | None:
    """What is wrong with the type of what a sampler returned."""
    if not isinstance(task, Task):
        return f"the sampler returned a {type(task).__name__}, not Task(support=Batch(x, y), query=Batch(x, y))"
    for name, batch in task._asdict().items():
        if not isinstance(batch, Batch):
            return f"{name} is a {type(batch).__name__}, not Batch(x, y)"
        if not isinstance(batch.y, Tensor):
            return f"y of {name} is a {type(batch.y).__name__}, not a tensor"
        parts = batch.x if isinstance(batch.x, dict) else batch.x._asdict() if isinstance(batch.x, Padded) else {"": batch.x}
        if not parts:
            return f"x of {name} is an empty dict"
        for key, part in parts.items():
            if isinstance(part, Tensor) and part.layout != torch.strided:
                return f"x of {name} is a sparse tensor; make it dense"
            if not isinstance(part, Tensor) or not isinstance(key, str):
                what = f"x of {name} holds a {type(part).__name__} under {key!r}" if key else f"x of {name} is a {_of(part)}"
                return f"{what}; it must be a tensor, a dict of tensors by name, or Padded"
    return None


def _of(part: object) -> str:
    return f"{type(part).__name__} of {len(part)}" if isinstance(part, list | tuple) else type(part).__name__


def leaves(tasks: Any) -> list[Tensor]:
    """All tensors of a task or of several."""
    return pytree.tree_leaves(tasks)  # type: ignore[no-any-return]


def named(task: Task) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a task, with names such as "query.x['mask']"."""
    for path, leaf in pytree.tree_flatten_with_path(task)[0]:
        yield pytree.keystr(path).lstrip("."), leaf


def form(task: Task, skip: int = 0) -> Form:
    """Structure, dtypes and shapes of a task; with `skip` 1, of each task of a batch."""
    flat, spec = pytree.tree_flatten(task)
    return str(spec), tuple((leaf.dtype, tuple(leaf.shape[skip:])) for leaf in flat)


def hashes(rows: Tensor) -> Tensor:
    """A 64-bit hash of each row of `rows` (rows, ...), by its bytes: int64 of shape (rows,).

    Two projections of the 32-bit words of a row on random 64-bit numbers, of each of which the upper half is kept
    (multiply-shift hashing, Dietzfelbinger 1996): two rows that differ meet with a chance of about 2^-62.
    """
    words = _words(rows)
    high, low = (words @ multipliers for multipliers in _multipliers(words.shape[1]))
    return (high >> 32 << 32) | ((low >> 32) & 0xFFFFFFFF)


def _words(rows: Tensor) -> Tensor:
    raw = rows.detach().cpu().reshape(len(rows), rows[0].numel() if len(rows) else 0).contiguous().view(torch.uint8)
    return torch.nn.functional.pad(raw, (0, -raw.shape[1] % 4)).view(torch.int32).long()


@cache
def _multipliers(words: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    high, low = (torch.randint(-(2**63), 2**63 - 1, (words,), generator=generator) | 1 for _ in range(2))
    return high, low


def _rows(leaf: Tensor) -> Tensor:
    """A hash of each row of each task (tasks, rows), or of each task (tasks, 1) where there are no rows."""
    return hashes(leaf.flatten(0, 1)).view(leaf.shape[:2]) if leaf.dim() > 1 else hashes(leaf)[:, None]


def task_hashes(tasks: Task) -> Tensor:
    """A hash of all that each task of a batch holds."""
    parts = [_rows(leaf) for leaf in leaves(tasks) if leaf.numel()]
    return hashes(torch.cat(parts, 1)) if parts else torch.zeros(len(tasks.support.y), dtype=torch.int64)


def inputs(x: Input) -> list[Tensor]:
    """The tensors that describe items."""
    return [x.x] if isinstance(x, Padded) else list(x.values()) if isinstance(x, dict) else [x]


def item_hashes(x: Input) -> Tensor:
    """A hash of each item of the tasks of a batch, of shape (tasks, items)."""
    parts = torch.stack([_rows(tensor) for tensor in inputs(x)], 2)
    return parts[..., 0] if parts.shape[2] == 1 else hashes(parts.flatten(0, 1)).view(parts.shape[:2])


def fits(batch: Batch) -> bool:
    """Whether x and y of a batch of tasks have a row for each of as many items, one or more."""
    counts = {leaf.shape[1] if leaf.dim() > 1 else 0 for leaf in leaves(batch)}
    return len(counts) == 1 and 0 not in counts


def examine(tasks: Task) -> Facts:
    """What is wrong in each task of a batch, as tensors of shape (tasks,): bool, but for the hash and the counts of labels."""
    total = len(tasks.support.y)
    fit = fits(tasks.support) and fits(tasks.query)
    numbers = [leaf for leaf in leaves(tasks) if leaf.is_floating_point() and leaf.numel()]
    finite = [leaf.detach().cpu().isfinite().reshape(total, -1).all(1) for leaf in numbers]
    facts = {
        "ragged": torch.full((total,), not fit),
        "not finite": ~torch.stack(finite).all(0) if finite else torch.zeros(total, dtype=torch.bool),
    }
    if not fit:
        return facts | {"hash": task_hashes(tasks)}
    items = [item_hashes(batch.x) for batch in tasks]
    others = Task(*(Batch(batch.x.real if isinstance(batch.x, Padded) else {}, batch.y) for batch in tasks))
    facts["hash"] = hashes(torch.cat([*items, task_hashes(others)[:, None]], 1))
    return facts | overlaps(tasks, items) | (_labels(tasks) if labelled(tasks) else {})


def labelled(tasks: Task) -> bool:
    """Whether each item of a batch of tasks has one integer target."""
    return all(not y.is_floating_point() and y.dtype != torch.bool and y.dim() == 2 for y in (tasks.support.y, tasks.query.y))


def real(batch: Batch) -> Tensor:
    """Which items of the tasks of a batch are no filling, of shape (tasks, items)."""
    return batch.x.real.cpu().bool() if isinstance(batch.x, Padded) else torch.ones(batch.y.shape[:2], dtype=torch.bool)


def overlaps(tasks: Task, items: list[Tensor]) -> Facts:
    """Whether an item of the support set is again in the query set, and whether an item is twice in one of them, by a
    number for each item (`items`, of support and query)."""
    keys = torch.cat(items, 1)
    own = -1 - torch.arange(keys.shape[1])  # filling is no item, so each gets a key of its own
    found, places = torch.where(torch.cat([real(batch) for batch in tasks], 1), keys, own).sort(stable=True, dim=1)
    query = places >= tasks.support.y.shape[1]
    equal, across = found[:, 1:] == found[:, :-1], query[:, 1:] != query[:, :-1]
    return {"overlap": (equal & across).any(1), "repeated": (equal & ~across).any(1)}


def _labels(tasks: Task) -> Facts:
    sets = [batch.y.cpu().long() for batch in tasks]
    size = sum(y.shape[1] for y in sets)  # a support label beyond it leaves a gap; the last one stands for all beyond
    valid = [y != IGNORED for y in sets]
    support, query = (
        torch.zeros(len(y), size, dtype=torch.int64).scatter_add(1, y.clamp(0, size - 1), (v & (y >= 0)).long())
        for y, v in zip(sets, valid, strict=True)
    )
    top = torch.where(valid[0], sets[0], -1).amax(1)
    facts = {
        "negative": torch.cat([(y < 0) & v for y, v in zip(sets, valid, strict=True)], 1).any(1),
        "filling": torch.cat([v & ~real(batch) for v, batch in zip(valid, tasks, strict=True)], 1).any(1),
        "unjudged": ~valid[1].any(1),
        "gap": top + 1 != (support > 0).sum(1),
        "uncovered": ((query > 0) & (support == 0)).any(1),
        "ways": (support > 0).sum(1),
    }
    for name, counts in (("support", support), ("query", query)):
        facts[f"{name} most"] = counts.amax(1)
        facts[f"{name} least"] = torch.where(counts > 0, counts, size).amin(1)
    return facts
