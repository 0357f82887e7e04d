"""Augmentation as a function of the task's own generator: the same task is augmented in the same way, always."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.task import Batch, Task, TaskSampler

Transform = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Augmented:
    """The tasks of `sampler` with their images changed by `transform(images, generator)`, images of shape (n, channels, height,
    width), on whatever device they are.

    With `copies` 0 each support image, and each query image if `queries`, is replaced by its transform; with more, that
    many transformed copies of every support image stand behind the support set and the originals stay, which also works at
    test time.
    """

    sampler: TaskSampler
    transform: Transform
    copies: int = 0
    queries: bool = True

    def __post_init__(self) -> None:
        if self.copies < 0:
            raise UserError(f"{self.copies} augmented copies; give 0 or more")

    def __call__(self, generator: torch.Generator) -> Task:
        (x, y), query = self.sampler(generator)
        if not isinstance(x, Tensor) or x.dim() != 4:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise UserError(f"augmentation needs images (n, channels, height, width), but x of the tasks is {shape}")
        if self.copies:
            x = torch.cat([x, *(self.transform(x, generator) for _ in range(self.copies))])
            y = y.repeat(self.copies + 1)
        else:
            x = self.transform(x, generator)
        if self.queries and isinstance(query.x, Tensor):
            query = Batch(self.transform(query.x, generator), query.y)
        return Task(Batch(x, y), query)


def crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to an eighth of its size in both directions, black moving in, and flipped left to right half of the
    time: padding by 4, a random crop and a flip for 32 pixels, as is usual for CIFAR."""
    n, _, height, width = images.shape
    noise = torch.rand(3, n, generator=generator).to(images.device)
    down, right = ((noise[i] * (2 * (size // 8) + 1)).long() - size // 8 for i, size in enumerate((height, width)))
    rows = torch.arange(height, device=images.device) + down[:, None]
    columns = torch.arange(width, device=images.device) + right[:, None]
    columns = torch.where(noise[2, :, None] < 0.5, columns.flip(1), columns)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    index = torch.arange(n, device=images.device)[:, None, None]
    moved = images[index, :, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]]
    return torch.where(inside[:, None], moved.permute(0, 3, 1, 2), 0).to(images.dtype)
