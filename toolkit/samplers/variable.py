"""Tasks of varying ways and shots, filled up to one shape so that a batch of them is one vectorised pass."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.data.bank import ClassBank
from toolkit.errors import UserError
from toolkit.samplers.episodes import Episodes, as_input, distinct
from toolkit.task import IGNORED, Batch, Padded, Task, take


@dataclass(frozen=True)
class VariableEpisodes:
    """Classification tasks of `min_ways` to `ways` classes with `min_shots` to `shots` support items per class and `queries`
    query items per class.

    Each task draws its number of ways, and each of its classes a number of shots, both uniformly; if `balanced`, all classes
    of a task share one number of shots. A class with few items has fewer shots: those that its queries leave, at least 1.
    Classes, their order (which is the label order) and items are drawn without replacement, so support and query are disjoint.

    Inputs are `Padded`. Support x.x (ways * shots, ...), x.real and y (ways * shots,), query likewise with `queries`, ordered
    by label, each label in a block of its own; filling is zeros, not `real`, and of label `IGNORED`. A model needs `outputs`
    outputs, and a loss and metric made by `metrics.of_ways`. uint8 items become float32 in [0, 1].

    Source: Triantafillou et al. 2020, "Meta-Dataset", section 3.2 and its appendix on sampling. Simplified: classes are drawn
    from all of the bank, without their hierarchies of ImageNet and Omniglot; shots are uniform, where theirs grow with the
    size of a class within a budget for the support set; queries do not shrink with the smallest class of a task.

    Raises UserError for an empty range, when the bank has too few classes, or a class too few items for 1 shot.
    """

    bank: ClassBank
    ways: int = 10
    shots: int = 5
    queries: int = 15
    min_ways: int = 2
    min_shots: int = 1
    balanced: bool = False

    def __post_init__(self) -> None:
        Episodes(self.bank, self.ways, min(1, self.shots), self.queries)  # what is needed at least, in its sentences
        for what, low, high in (("ways", self.min_ways, self.ways), ("shots", self.min_shots, self.shots)):
            if not 1 <= low <= high:
                raise UserError(f"tasks of {low} to {high} {what}; give min_{what} from 1 to the most {what}, which are {high}")

    @property
    def outputs(self) -> int:
        """The largest number of classes of a task."""
        return self.ways

    def __call__(self, generator: torch.Generator) -> Task:
        return take(self.draw_many(iter([generator])), 0)

    def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
        """One task per generator, stacked; equal to calling the sampler on each."""
        each = self.queries + self.shots
        numbers = (1, self.ways, self.ways, self.ways * each)
        noise = torch.stack([torch.rand(sum(numbers), generator=g, dtype=torch.float64) for g in generators])
        of_ways, of_classes, of_shots, of_items = noise.split(numbers, 1)
        present = torch.arange(self.ways) < _between(of_ways, torch.tensor(self.min_ways), torch.tensor(self.ways))
        classes = distinct(of_classes, torch.tensor(self.bank.classes))
        sizes = self.bank.sizes[classes]
        most = (sizes - self.queries).clamp(max=self.shots)
        if self.balanced:
            most = most.masked_fill(~present, self.shots).amin(1, keepdim=True)
            of_shots = of_shots[:, :1]
        shots = _between(of_shots, most.clamp(max=self.min_shots), most)
        # The items of queries are drawn first: of a small class, only those drawn behind its last shot are beyond its end.
        entries = self.bank.first[classes][..., None] + distinct(of_items.view(-1, self.ways, each), sizes)
        query, support = entries.split([self.queries, self.shots], 2)
        used = (torch.arange(self.shots) < shots[..., None]) & present[..., None]
        return Task(self._batch(support, used), self._batch(query, present[..., None].expand_as(query)))

    def _batch(self, entries: Tensor, real: Tensor) -> Batch:
        """The items of `entries` where `real` (both (tasks, ways, items)) holds; the others are not read."""
        items = self.bank.read(entries[real])
        x = items.new_zeros(real.numel(), *items.shape[1:])
        x.index_copy_(0, real.flatten().nonzero().flatten().to(x.device), items)  # faster than by a mask
        y = torch.arange(self.ways)[:, None].expand_as(entries).masked_fill(~real, IGNORED)
        return Batch(Padded(as_input(x).view(len(real), -1, *x.shape[1:]), real.flatten(1)), y.flatten(1))


def _between(noise: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Uniform `noise` in [0, 1) to whole numbers from `low` to `high`, both included."""
    return low + torch.minimum((noise * (high - low + 1)).long(), high - low)
