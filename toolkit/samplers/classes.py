"""All classes of a bank at once, for pretraining a plain classifier."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from toolkit.data.bank import ClassBank
from toolkit.errors import UserError
from toolkit.samplers.episodes import as_input
from toolkit.task import Batch, Task, take


@dataclass(frozen=True)
class AllClasses:
    """Mini-batches of a bank as "tasks" whose query set holds `queries` items of classes drawn uniformly, with replacement, y
    being the class's number in the bank. The support set is one more such item: what is trained on this has no inner steps.
    """

    bank: ClassBank
    queries: int = 64
    # What `check_sampler` would call faults in few-shot tasks.
    by_design: ClassVar[tuple[str, ...]] = ("labels", "label meaning", "disjoint by content", "disjoint by identity")

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise UserError(f"{self.queries} items per batch; give at least 1")

    def __call__(self, generator: torch.Generator) -> Task:
        return take(self.draw_many(iter([generator])), 0)

    def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
        """One task per generator, stacked; equal to calling the sampler on each."""
        noise = torch.stack([torch.rand(2, 1 + self.queries, generator=g, dtype=torch.float64) for g in generators])
        classes = (noise[:, 0] * self.bank.classes).long()
        entries = self.bank.first[classes] + (noise[:, 1] * self.bank.sizes[classes]).long()
        return Task(self._batch(entries[:, :1], classes[:, :1]), self._batch(entries[:, 1:], classes[:, 1:]))

    def _batch(self, entries: Tensor, classes: Tensor) -> Batch:
        return Batch(as_input(self.bank.read(entries)), classes)
