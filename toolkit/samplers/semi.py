"""N-way K-shot tasks with unlabelled items in the support set, and queries of no class of the task."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.data.bank import ClassBank
from toolkit.errors import UserError
from toolkit.samplers.episodes import Episodes, as_input, distinct
from toolkit.task import IGNORED, Batch, Task, take


@dataclass(frozen=True)
class SemiEpisodes:
    """Classification tasks of `ways` classes with `shots` support and `queries` query items per class; behind the support set,
    `unlabelled` items of each of these classes and of each of `distractors` further classes, all of label `IGNORED`; behind
    the query set, `distractor_queries` items of each distractor class, also of label `IGNORED`.

    What has no label counts in no loss and no metric, but the model sees it: batch norm takes it into its statistics, a
    learned inner loss (`learned.TaskLoss`) may learn from it, and predictions for it can be looked at. Classes, their order
    and items are drawn without replacement, so no item is twice in a task. Per task: support x (S, ...) and y (S,) with
    S = ways * shots + (ways + distractors) * unlabelled, query x (Q, ...) and y (Q,) with Q = ways * queries +
    distractors * distractor_queries, ordered by class. uint8 items become float32 in [0, 1].

    Source: Ren et al. 2018, "Meta-learning for semi-supervised few-shot classification", section 3.1 (there 5 unlabelled items
    per class and as many distractors as ways). Departures: any item may have a label in one task and none in another, where
    they split each class once; distractor queries are ours.

    Raises UserError when the bank has too few classes, or a class too few items.
    """

    bank: ClassBank
    ways: int = 5
    shots: int = 1
    queries: int = 15
    unlabelled: int = 5
    distractors: int = 0
    distractor_queries: int = 0

    def __post_init__(self) -> None:
        Episodes(self.bank, self.ways, self.shots, self.queries)
        if min(self.unlabelled, self.distractors, self.distractor_queries) < 0:
            raise UserError(
                f"{self.unlabelled} unlabelled items, {self.distractors} distractors, {self.distractor_queries} distractor "
                "queries: each must be at least 0"
            )
        if self.distractors and not (self.unlabelled or self.distractor_queries):
            raise UserError(
                f"{self.distractors} distractor classes without any item would do nothing; give unlabelled or "
                "distractor_queries, or 0 distractors"
            )
        if self.distractor_queries and not self.distractors:
            raise UserError(
                f"{self.distractor_queries} distractor queries are of distractor classes, and there are 0; give distractors"
            )
        if self.ways + self.distractors > self.bank.classes:
            raise UserError(
                f"{self.ways} ways and {self.distractors} distractors need {self.ways + self.distractors} classes, but "
                f"{self.bank.source} has {self.bank.classes}; use distractors={self.bank.classes - self.ways} or fewer"
            )
        smallest = int(self.bank.sizes.argmin())
        size, labelled = int(self.bank.sizes[smallest]), self.shots + self.queries
        if self._each > size:
            few = labelled + self.unlabelled > size
            fits = f"unlabelled={size - labelled}" if few else f"distractor_queries={size - self.unlabelled}"
            raise UserError(
                f"{self.shots} shots, {self.queries} queries, {self.unlabelled} unlabelled items and {self.distractor_queries} "
                f"distractor queries need {self._each} images per class, but class {self.bank.names[smallest]!r} of "
                f"{self.bank.source} has {size}; use {fits} or fewer"
            )

    @property
    def _each(self) -> int:
        """The items that a task takes of a class at most: any class can be one of the task, or a distractor."""
        of_distractor = self.distractor_queries if self.distractors else 0
        return self.unlabelled + max(self.shots + self.queries, of_distractor)

    def __call__(self, generator: torch.Generator) -> Task:
        return take(self.draw_many(iter([generator])), 0)

    def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
        """One task per generator, stacked; equal to calling the sampler on each."""
        ways, total = self.ways, self.ways + self.distractors
        numbers = (total, total * self._each)
        noise = torch.stack([torch.rand(sum(numbers), generator=g, dtype=torch.float64) for g in generators])
        of_classes, of_items = noise.split(numbers, 1)
        classes = distinct(of_classes, torch.tensor(self.bank.classes))
        inside = distinct(of_items.view(-1, total, self._each), self.bank.sizes[classes])
        entries = self.bank.first[classes][..., None] + inside
        unlabelled, rest = entries.split([self.unlabelled, self._each - self.unlabelled], 2)
        support, query = rest[:, :ways, : self.shots], rest[:, :ways, self.shots : self.shots + self.queries]
        return Task(self._batch(support, unlabelled), self._batch(query, rest[:, ways:, : self.distractor_queries]))

    def _batch(self, labelled: Tensor, others: Tensor) -> Batch:
        """The items of entries (tasks, classes, items), those of `others` without a label."""
        y = torch.arange(self.ways).repeat_interleave(labelled.shape[2]).repeat(len(labelled), 1)
        hidden = torch.full((len(others), others[0].numel()), IGNORED)
        entries = torch.cat([labelled.flatten(1), others.flatten(1)], 1)
        return Batch(as_input(self.bank.read(entries)), torch.cat([y, hidden], 1))
