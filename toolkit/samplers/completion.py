"""Image completion: a task is one image, to be told from a few of its pixels."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.data.bank import ClassBank
from toolkit.errors import UserError
from toolkit.samplers.episodes import as_input
from toolkit.task import Batch, Task, take


@dataclass(frozen=True)
class Completion:
    """Regression from coordinates to pixels: a task is one image of the bank, all equally likely, whatever their classes.

    x (`shots` or `queries`, 2) holds row and column, from 0 for the first to 1 for the last; y (`shots` or `queries`, channels)
    the pixel there, uint8 as float32 in [0, 1] and floats as they are. Pixels are drawn without replacement, so support and
    query are disjoint.

    Source: Garnelo et al. 2018 ("Conditional Neural Processes"), section 4.2; Zintgraf et al. 2019 (CAVIA), section 5.1.2.
    Departure: both are judged on all pixels of the image, support included; here on `queries` others, so that what was seen
    does not count (`queries` = all pixels less the shots gives all others).

    Raises UserError for a bank without images, and for more pixels than an image has.
    """

    bank: ClassBank
    shots: int = 10
    queries: int = 100

    def __post_init__(self) -> None:
        shape, dtype = tuple(self.bank.items.shape[1:]), self.bank.items.dtype
        if len(shape) != 3 or not (dtype == torch.uint8 or dtype.is_floating_point):
            raise UserError(
                f"image completion needs images (channels, height, width) of uint8 or floats, but {self.bank.source} has items "
                f"of shape {shape} and {dtype}; use a bank of images"
            )
        if min(self.shots, self.queries) < 1:
            raise UserError(f"{self.shots} shots and {self.queries} queries: each must be at least 1")
        pixels = shape[1] * shape[2]
        if self.shots + self.queries > pixels:
            raise UserError(
                f"{self.shots} shots and {self.queries} queries need {self.shots + self.queries} pixels, but an image of "
                f"{self.bank.source} has {pixels}; take fewer"
            )

    def __call__(self, generator: torch.Generator) -> Task:
        return take(self.draw_many(iter([generator])), 0)

    def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
        """One task per generator, stacked; equal to calling the sampler on each."""
        height, width = self.bank.items.shape[-2:]
        entries, places = [], []
        for g in generators:
            entries.append(torch.randint(self.bank.entries, (), generator=g))
            places.append(torch.randperm(height * width, generator=g)[: self.shots + self.queries])
        images = self.bank.read(torch.stack(entries)).flatten(2)
        place = torch.stack(places).to(images.device)
        y = as_input(images.gather(2, place[:, None].expand(-1, images.shape[1], -1))).transpose(1, 2).contiguous()
        rows, columns = place // width / max(height - 1, 1), place % width / max(width - 1, 1)
        x = torch.stack([rows, columns], 2).to(y.dtype)
        return Task(self._batch(x, y, slice(self.shots)), self._batch(x, y, slice(self.shots, None)))

    def _batch(self, x: Tensor, y: Tensor, part: slice) -> Batch:
        return Batch(x[:, part], y[:, part])
