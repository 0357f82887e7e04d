"""Augmentation as a function of the task's own generator: the same task is augmented in the same way, always."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from toolkit.errors import UserError
from toolkit.randomness import kept
from toolkit.samplers.mixed import together
from toolkit.task import Batch, Input, Padded, Task, TaskSampler, stack, take

Transform = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Augmented:
    """The tasks of `sampler` with their images changed by `transform(images, generator)`, images of shape (n, channels, height,
    width), on whatever device they are. A torchvision transform, or another module called as `transform(image)`, is taken as
    by `by_torchvision`.

    With `copies` 0 each support image, and each query image if `queries`, is replaced by its transform; with more, that
    many transformed copies of every support image stand behind the support set and the originals stay, which also works at
    test time. Padded tasks stay padded: a copy of the filling is filling.

    Raises UserError for a negative number of copies, and when a task is drawn for inputs that are no images, and for
    transforms that leave support and query images of unequal shapes.
    """

    sampler: TaskSampler
    transform: Transform | nn.Module
    copies: int = 0
    queries: bool = True

    def __post_init__(self) -> None:
        if self.copies < 0:
            raise UserError(f"{self.copies} augmented copies; give 0 or more")
        if _takes_one_image(self.transform):
            object.__setattr__(self, "transform", by_torchvision(self.transform))

    @property
    def outputs(self) -> int | None:
        """What the sampler says of itself: the largest number of classes, if it varies."""
        found: int | None = getattr(self.sampler, "outputs", None)
        return found

    def __call__(self, generator: torch.Generator) -> Task:
        return self._changed(self.sampler(generator), generator)

    def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
        """One task per generator, stacked; equal to calling the sampler on each."""
        given = [(generator, generator.clone_state()) for generator in generators]
        plain = together(self.sampler, [clone for _, clone in given])
        tasks = []
        for i, (generator, clone) in enumerate(given):
            tasks.append(self._changed(take(plain, i), clone))
            generator.set_state(clone.get_state())  # for one who goes on with it, as an outer augmentation does
        return stack(tasks)

    def _changed(self, task: Task, generator: torch.Generator) -> Task:
        (x, y), query = task
        changed = [self._images(x, generator) for _ in range(self.copies or 1)]
        if self.copies:
            _check_same(changed[0], x, "its copies", "the support images")
            x, y = _joined([x, *changed]), torch.cat([y] * (self.copies + 1))
        else:
            x = changed[0]
        if self.queries:
            query = Batch(self._images(query.x, generator), query.y)
        else:
            _check_same(x, query.x, "support images", "query images, which it must change as well (queries=True, copies=0)")
        return Task(Batch(x, y), query)

    def _images(self, x: Input, generator: torch.Generator) -> Input:
        images = x.x if isinstance(x, Padded) else x
        if not isinstance(images, Tensor) or images.dim() != 4:
            shape = tuple(images.shape) if isinstance(images, Tensor) else f"a {type(images).__name__}"
            raise UserError(f"augmentation needs images (n, channels, height, width), but x of the tasks is {shape}")
        changed = self.transform(images, generator)
        if not isinstance(changed, Tensor) or changed.shape[:1] != images.shape[:1]:
            shape = tuple(changed.shape) if isinstance(changed, Tensor) else f"a {type(changed).__name__}"
            raise UserError(f"the transform made {shape} of images {tuple(images.shape)}; return one image for each")
        return x._replace(x=changed) if isinstance(x, Padded) else changed


def crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to an eighth of its size in both directions, black moving in, and flipped left to right half of
    the time: padding by 4, a random crop and a flip for 32 pixels, as is usual for CIFAR.

    `images` (n, channels, height, width) of any dtype and on any device; the eighth is rounded down.
    """
    n, channels, height, width = images.shape
    noise = torch.rand(3, n, generator=generator).to(images.device)
    (top, down), (left, right) = (
        (size // 8, (noise[i] * (2 * (size // 8) + 1)).long()) for i, size in enumerate((height, width))
    )
    padded = pad(images, (left, left, top, top))
    rows = torch.arange(height, device=images.device) + down[:, None]
    columns = torch.arange(width, device=images.device) + right[:, None]
    columns = torch.where(noise[2, :, None] < 0.5, columns.flip(1), columns)
    pixels = (rows[:, :, None] * padded.shape[3] + columns[:, None]).view(n, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, pixels).view(images.shape)


def by_torchvision(transform: Callable[..., Any]) -> Transform:
    """A torchvision transform (v2, or of the first version where it takes tensors) as one of ours, called on image after image.

    Its random choices, each image's own, follow the task's generator: the global generators of torch, Python and numpy are
    seeded for it and put back afterwards. Results may have another shape than the images if they all have the same. Not for
    several threads at once.

    Raises UserError for what cannot be called, and when a task is drawn for results that are no tensors of one shape.
    """
    if isinstance(transform, type) or not callable(transform):
        name = getattr(transform, "__name__", type(transform).__name__)
        raise UserError(f"{name} is no transform that can be called on an image; give an instance, such as {name}(...)")
    return _ByTorchvision(transform)


@dataclass(frozen=True)
class _ByTorchvision:
    transform: Callable[..., Any]

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**62, (), generator=generator))
        with kept(seed, devices=images.is_cuda):
            changed = [self.transform(image) for image in images]
        kinds = {tuple(c.shape) if isinstance(c, Tensor) else f"a {type(c).__name__}" for c in changed}
        if len(kinds) > 1 or not isinstance(changed[0], Tensor):
            name = type(self.transform).__name__
            found = " and ".join(sorted(map(str, kinds)))
            raise UserError(f"the transform {name} made {found} of images; make every image a tensor of one and the same shape")
        return torch.stack([c.as_subclass(Tensor) for c in changed])


def _takes_one_image(transform: object) -> bool:
    """Whether a transform is called as `transform(image)`: one of torchvision's, or a module without a `generator`."""
    if isinstance(transform, nn.Module):
        return "generator" not in inspect.signature(transform.forward).parameters
    return type(transform).__module__.startswith("torchvision.")


def _joined(parts: list[Input]) -> Input:
    if isinstance(parts[0], Padded):
        return Padded(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))  # type: ignore[arg-type]
    return torch.cat(parts)  # type: ignore[arg-type]


def _check_same(changed: Input, other: Input, what: str, than: str) -> None:
    one, two = (tuple((x.x if isinstance(x, Padded) else x).shape[1:]) for x in (changed, other))  # type: ignore[union-attr]
    if one != two:
        raise UserError(f"the transform gives {what} the shape {one}, unlike {two} of {than}")
