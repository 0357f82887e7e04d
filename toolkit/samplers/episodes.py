"""N-way K-shot episodes from a class bank."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.data.bank import ClassBank
from toolkit.errors import UserError
from toolkit.task import Batch, Task, take


@dataclass(frozen=True)
class Episodes:
    """Classification tasks of `ways` classes with `shots` support and `queries` query items per class.

    Classes, their order (which is the label order) and the items are drawn without replacement, so support and query are
    disjoint. Per task: support x (ways * shots, ...) and y (ways * shots,), query likewise, ordered by label. uint8 items
    become float32 in [0, 1].

    Raises UserError when the bank has too few classes, or a class too few items.
    """

    bank: ClassBank
    ways: int = 5
    shots: int = 1
    queries: int = 15

    def __post_init__(self) -> None:
        if min(self.ways, self.shots, self.queries) < 1:
            raise UserError(f"{self.ways} ways, {self.shots} shots, {self.queries} queries: each must be at least 1")
        if self.ways > self.bank.classes:
            raise UserError(
                f"{self.ways} ways need {self.ways} classes, but {self.bank.source} has {self.bank.classes}; "
                f"use --ways {self.bank.classes} or fewer"
            )
        smallest = int(self.bank.sizes.argmin())
        size = int(self.bank.sizes[smallest])
        if self.shots + self.queries > size:
            fewer = f"use --queries {size - self.shots} or fewer (--eval-queries in validation and test)"
            advice = fewer if size > self.shots else f"use fewer shots than {size}"
            raise UserError(
                f"{self.shots} shots and {self.queries} queries need {self.shots + self.queries} images per class, but "
                f"class {self.bank.names[smallest]!r} of {self.bank.source} has {size}; {advice}"
            )

    def __call__(self, generator: torch.Generator) -> Task:
        return take(self.draw_many(iter([generator])), 0)

    def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
        """One task per generator, stacked; equal to calling the sampler on each."""
        each = self.shots + self.queries
        numbers = self.ways + self.ways * each
        noise = torch.stack([torch.rand(numbers, generator=g, dtype=torch.float64) for g in generators])
        classes = distinct(noise[:, : self.ways], torch.tensor(self.bank.classes))
        inside = distinct(noise[:, self.ways :].view(-1, self.ways, each), self.bank.sizes[classes])
        entries = self.bank.first[classes][..., None] + inside
        return Task(self._batch(entries[..., : self.shots]), self._batch(entries[..., self.shots :]))

    def _batch(self, entries: Tensor) -> Batch:
        tasks, ways, count = entries.shape
        x = self.bank.read(entries.reshape(tasks, ways * count))
        return Batch(as_input(x), torch.arange(ways).repeat_interleave(count).repeat(tasks, 1))


def as_input(items: Tensor) -> Tensor:
    """Items of a bank as a network takes them: uint8 becomes float32 in [0, 1]."""
    return items.float().div_(255) if items.dtype == torch.uint8 else items


def distinct(noise: Tensor, size: Tensor) -> Tensor:
    """Ordered draws without replacement: uniform `noise` (..., k) in [0, 1) to k distinct integers below `size` (...).

    The i-th draw takes one of the size - i numbers that are left. Its rank p among those is p plus the number of smaller ones
    already taken: of the j-th smallest of them, t, that is whether t - j <= p.
    """
    drawn = noise.new_empty(noise.shape, dtype=torch.int64)
    for i in range(noise.shape[-1]):
        left = size - i
        rank = torch.minimum((noise[..., i] * left).long(), left - 1)
        taken = drawn[..., :i].sort(-1).values
        drawn[..., i] = rank + (taken - torch.arange(i) <= rank[..., None]).sum(-1)
    return drawn
