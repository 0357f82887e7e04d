"""Ordinary DataLoaders as sub-tasks: few-shot tasks drawn from them, and plain joint training of one model on all of them."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, SubsetRandomSampler

from toolkit.errors import UserError
from toolkit.metrics import cross_entropy
from toolkit.randomness import kept
from toolkit.task import Batch, Task, move, stream_seed, take
from toolkit.tree import Params, detach

PIECE = 1_000  # examples read at a time for their labels alone


@dataclass(frozen=True, eq=False)
class MetaTask:
    """One sub-task: the examples of `data_loader` and, for joint training, the shared `model` with the loss that it has here,
    `loss_fn(prediction, y)`, the mean over examples."""

    data_loader: DataLoader[Any]
    model: nn.Module | None = None
    loss_fn: Callable[[Tensor, Tensor], Tensor] = cross_entropy


@dataclass(frozen=True, eq=False)
class Loaders:
    """Tasks from DataLoaders: each takes a sub-task uniformly and draws disjoint support and query examples from it.

    `shots` and `queries` count the examples of a task, or, with `per_class`, those of each class of the sub-task (integer
    targets; ordered by label). `permute` deals a sub-task's labels anew to its classes in every task. A learner brings its own
    model and loss, so those of a `MetaTask` do not matter here.

    Task i must not depend on what was drawn before, so a loader is never iterated: its dataset is indexed and collated by its
    `collate_fn`; batch size, order and workers do not matter. Examples are all of the dataset, or those of a
    `SubsetRandomSampler`. A dataset of at most `keep` examples is read once, when the first task comes from it, and kept;
    torch's random numbers in it (augmentation) then stay as drawn, while in a larger one they follow the task's generator.

    Raises UserError for datasets without length and index (`IterableDataset`), loaders whose choice of examples cannot be
    followed, batches that are no pair (x, y) of tensors, and too few examples; the last two when a task is drawn.
    """

    tasks: Sequence[MetaTask | DataLoader[Any]]
    shots: int = 1
    queries: int = 15
    per_class: bool = False
    permute: bool = False
    keep: int = 100_000
    sources: tuple["_Source", ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if min(self.shots, self.queries) < 1:
            raise UserError(f"{self.shots} shots and {self.queries} queries: each must be at least 1")
        sources = tuple(_Source(i, loader, self.keep) for i, loader in enumerate(_loaders(self.tasks)))
        for source in sources:
            self._check_enough(source.name, len(source.rows))
        object.__setattr__(self, "sources", sources)

    def __call__(self, generator: torch.Generator) -> Task:
        source = self.sources[int(torch.randint(len(self.sources), (), generator=generator))]
        groups, each = [torch.arange(len(source.rows))], self.shots + self.queries
        if self.permute or self.per_class:
            values, members = source.classes
            order = torch.randperm(len(values), generator=generator) if self.permute else torch.arange(len(values))
        if self.per_class:
            groups = [members[c] for c in order.tolist()]
            for value, group in zip(values[order].tolist(), groups, strict=True):
                self._check_enough(f"class {value} of {source.name}", len(group))
        places = torch.stack([group[torch.randperm(len(group), generator=generator)[:each]] for group in groups])
        batch = source.read(torch.cat([places[:, : self.shots].flatten(), places[:, self.shots :].flatten()]), generator)
        if self.permute:
            names = torch.empty_like(values)
            names[order] = values
            batch = batch._replace(y=names[torch.searchsorted(values, batch.y)])
        cut = self.shots * len(groups)
        return Task(take(batch, slice(cut)), take(batch, slice(cut, None)))

    def _check_enough(self, name: str, size: int) -> None:
        if self.shots + self.queries > size:
            raise UserError(
                f"{self.shots} shots and {self.queries} queries need {self.shots + self.queries} examples, but {name} has "
                f"{size}; take fewer"
            )


class _Source:
    """The examples of one loader, read by their place among them."""

    def __init__(self, number: int, loader: DataLoader[Any], keep: int) -> None:
        self.name, self.loader, self.keep = f"sub-task {number}", loader, keep
        self.rows = self._rows()

    def read(self, places: Tensor, generator: torch.Generator) -> Batch:
        if self._whole:
            return take(self._whole, places)  # type: ignore[arg-type]
        return self._fetch(places.tolist(), int(torch.randint(2**62, (), generator=generator)))

    @cached_property
    def classes(self) -> tuple[Tensor, list[Tensor]]:
        """The labels in increasing order, and the places of each one's examples."""
        total = len(self.rows)
        pieces = (range(i, min(i + PIECE, total)) for i in range(0, total, PIECE))
        y = self._whole.y if self._whole else torch.cat([self._fetch(piece, 0).y for piece in pieces])
        if y.is_floating_point() or y.dim() != 1:
            raise UserError(
                f"classes need one integer target per example, but y of {self.name} is {y.dtype} of shape {tuple(y.shape)}; "
                "use per_class=False and permute=False"
            )
        values = y.unique()
        return values, [(y == value).nonzero().flatten() for value in values]

    @cached_property
    def _whole(self) -> Batch | None:
        return self._fetch(range(len(self.rows)), 0) if len(self.rows) <= self.keep else None

    def _fetch(self, places: Iterable[int], seed: int) -> Batch:
        with kept(seed, devices=False):
            examples = [self.loader.dataset[self.rows[place]] for place in places]
            batch = _pair(self.loader.collate_fn(examples), self.name)
        if {len(leaf) for leaf in pytree.tree_leaves(batch)} != {len(examples)}:
            raise UserError(
                f"collate_fn of {self.name} makes x of {_shapes(batch.x)} and y of {_shapes(batch.y)} from {len(examples)} "
                "examples; give every example one row"
            )
        return batch

    def _rows(self) -> Sequence[int]:
        sampler = getattr(self.loader.batch_sampler, "sampler", None)
        if isinstance(sampler, SubsetRandomSampler):
            return list(sampler.indices)
        if not isinstance(sampler, RandomSampler | SequentialSampler):
            chooser = type(sampler or self.loader.batch_sampler).__name__
            raise UserError(
                f"the loader of {self.name} chooses its examples by a {chooser}, which a task cannot follow; "
                "give it a batch size and, for a part of the data, a torch.utils.data.Subset"
            )
        return range(len(self.loader.dataset))  # type: ignore[arg-type]


class Epoch(NamedTuple):
    """One epoch of joint training: its number (from 1), the mean loss of each sub-task during it, and the trained `model`,
    which is live: copy what must survive the next epoch."""

    epoch: int
    losses: tuple[float, ...]
    model: nn.Module

    @property
    def params(self) -> Params:
        """The model's weights after this epoch."""
        return detach(dict(self.model.named_parameters()))


def joint_epochs(tasks: Sequence[MetaTask], epochs: int = 100, lr: float = 1e-3, seed: int = 0) -> Iterator[Epoch]:
    """Trains a copy of the model that all `tasks` share on the mean of their losses, by Adam.

    Every step takes the next batch of each loader; an epoch ends when the longest is through, and shorter ones begin again.
    The loaders' order and random layers follow `seed` (a loader with a generator of its own follows that) and leave the
    global random state alone. Raises UserError at once for sub-tasks that share no model, and when a loss is not finite.
    """
    loaders = _loaders(tasks)
    if epochs < 1 or not 0 < lr < math.inf:
        raise UserError(f"{epochs} epochs at rate {lr}; each must be positive")
    models = [task.model for task in tasks if isinstance(task, MetaTask)]
    if len(models) < len(tasks) or models[0] is None or any(model is not models[0] for model in models):
        raise UserError("joint training needs one model that all sub-tasks share; give the same one to every MetaTask")
    if not any(p.requires_grad for p in models[0].parameters()):
        raise UserError("every weight of the model is frozen; leave requires_grad=True on those to be trained")
    for i, loader in enumerate(loaders):
        if not len(loader):
            raise UserError(f"the loader of sub-task {i} has no batch; give it examples, or leave out drop_last")
    return _epochs(tasks, loaders, copy.deepcopy(models[0]), epochs, lr, seed)


def _epochs(
    tasks: Sequence[MetaTask], loaders: list[DataLoader[Any]], model: nn.Module, epochs: int, lr: float, seed: int
) -> Iterator[Epoch]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, device, steps = torch.optim.Adam(trained, lr=lr), trained[0].device, max(map(len, loaders))
    for epoch in range(epochs):
        totals, counts = [0.0] * len(tasks), [0] * len(tasks)
        with kept(stream_seed(seed, "joint", epoch)):
            for batches in zip(*(islice(chain.from_iterable(repeat(loader)), steps) for loader in loaders), strict=True):
                losses = []
                for i, (task, drawn) in enumerate(zip(tasks, batches, strict=True)):
                    x, y = move(_pair(drawn, f"sub-task {i}"), device)
                    losses.append(task.loss_fn(model(**x) if isinstance(x, dict) else model(x), y))
                    totals[i] += losses[-1].item() * len(y)
                    counts[i] += len(y)
                    if not math.isfinite(totals[i]):
                        raise UserError(f"epoch {epoch + 1}: the loss of sub-task {i} is {losses[-1].item()}; lower the rate")
                optimizer.zero_grad()
                torch.stack(losses).mean().backward()
                optimizer.step()
        yield Epoch(epoch + 1, tuple(total / n for total, n in zip(totals, counts, strict=True)), model)


def _loaders(tasks: Sequence[MetaTask | DataLoader[Any]]) -> list[DataLoader[Any]]:
    if not tasks:
        raise UserError("no sub-tasks were given; give at least one DataLoader or MetaTask")
    loaders = [task.data_loader if isinstance(task, MetaTask) else task for task in tasks]
    for i, loader in enumerate(loaders):
        if not isinstance(loader, DataLoader):
            raise UserError(f"sub-task {i} is a {type(loader).__name__}; give a DataLoader, or a MetaTask with one")
        if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
            raise UserError(
                f"the dataset of sub-task {i} is a {type(loader.dataset).__name__} without length and index; "
                "give one with __len__ and __getitem__, such as a list of its examples"
            )
    return loaders


def _pair(batch: Any, name: str) -> Batch:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        kind = f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, tuple | list | dict) else ''}"
        raise UserError(f"a batch of {name} is a {kind}; make it a pair (x, y)")
    x, y = batch
    for part, value in (("x", list(x.values()) if isinstance(x, dict) else [x]), ("y", [y])):
        for leaf in value:
            if not isinstance(leaf, Tensor) or not leaf.dim():
                kind = "tensor without rows" if isinstance(leaf, Tensor) else type(leaf).__name__
                allowed = "a tensor or a dict of tensors" if part == "x" else "a tensor"
                raise UserError(f"{part} of {name} is or holds a {kind}; make it {allowed} with a row per example")
    return Batch(x, y)


def _shapes(x: Any) -> str:
    return ", ".join(str(tuple(leaf.shape)) for leaf in pytree.tree_leaves(x))
