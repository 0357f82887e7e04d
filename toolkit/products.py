"""The three maps of a convolution for tasks with weights of their own, as products of matrices: a batch of tasks is one batched
product, where torch would run one convolution after the other."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]
Size = Sequence[int]


class Geometry(NamedTuple):
    """How a two-dimensional convolution walks over its input."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As torch's operators take it: stride, padding, dilation, not transposed, no output padding, groups."""
        return list(self.stride), list(self.padding), list(self.dilation), False, [0, 0], self.groups


def of_tasks(a: Tensor, b: Tensor, bias: Tensor | None, kind: str, shape: Any, g: Geometry) -> Tensor:
    """What `kernels` calls the map of this `kind`, of (tasks, examples, channels, height, width) and (tasks, outputs, channels,
    height, width) in the order that the kind has: "output", "input" or "weight", the last two of this `shape`."""
    if kind == "output":
        size, (top, _) = b.shape[3:], g.padding
        rows = _patches(a, size, g) @ _matrix(b)
        rows = rows if bias is None else rows + bias.unsqueeze(1)
        height = (a.shape[3] + 2 * top - g.dilation[0] * (size[0] - 1) - 1) // g.stride[0] + 1
        return rows.unflatten(1, (a.shape[1], height, -1)).permute(0, 1, 4, 2, 3)  # type: ignore[no-any-return]
    slopes = a.permute(0, 1, 3, 4, 2)
    if kind == "weight":
        rows, slopes = _patches(b, shape[3:], g), slopes.flatten(1, 3)
        if _on_gpu(a):
            rows, slopes = (t.unflatten(1, (_shares(*a.shape[:2]), -1)) for t in (rows, slopes))
            product = (rows.transpose(2, 3) @ slopes).sum(1)
        else:
            product = rows.transpose(1, 2) @ slopes
        return product.unflatten(1, (*shape[3:], shape[2])).permute(0, 4, 3, 1, 2)  # type: ignore[no-any-return]
    (tasks, examples, channels, height, width), (down, right) = shape, b.shape[3:]
    if _on_gpu(a) and g.stride == (1, 1):  # by the convolution with the kernel turned around, in fewer and larger steps
        (top, left), (rise, side) = g.padding, g.dilation
        turned = g._replace(padding=(rise * (down - 1) - top, side * (right - 1) - left))
        return of_tasks(a, b.flip(3, 4).transpose(1, 2), None, "output", None, turned)
    parts = (slopes.flatten(1, 3) @ _matrix(b).transpose(1, 2)).unflatten(1, slopes.shape[1:4])
    top, left = g.padding
    whole = parts.new_zeros(tasks * examples, height + 2 * top, width + 2 * left, channels)
    for part, window in zip(parts.flatten(0, 1).split(channels, -1), _windows(whole.shape[1:3], b.shape[3:], g), strict=True):
        whole[window] += part
    inside = whole[:, top : top + height, left : left + width]
    return inside.unflatten(0, (tasks, examples)).permute(0, 1, 4, 2, 3)  # type: ignore[no-any-return]


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _shares(tasks: int, examples: int) -> int:
    """Into how many sums of neighbouring examples each task's is cut: a GPU is busy with some hundred products at a time, and a
    product of few numbers by few, over millions of pixels, is not cut by its libraries."""
    return next((n for n in range(1, examples) if examples % n == 0 and n * tasks >= 256), examples)


def _patches(x: Tensor, size: Size, g: Geometry) -> Tensor:
    """What each output pixel sees: (tasks, pixels, kernel height * kernel width * channels)."""
    top, left = g.padding
    # Tasks and examples as one axis: torch joins five axes by a copy of each part on a GPU, four in one go.
    images = F.pad(x.permute(0, 1, 3, 4, 2), (0, 0, left, left, top, top)).flatten(0, 1)
    seen = torch.cat([images[window] for window in _windows(images.shape[1:3], size, g)], -1)
    return seen.flatten(0, 2).unflatten(0, (x.shape[0], -1))  # type: ignore[no-any-return]


def _windows(padded: Size, size: Size, g: Geometry) -> list[Any]:
    """For each place of the kernel the slice of padded (images, height, width, channels) that it meets."""
    down, right = (n - d * (k - 1) for n, d, k in zip(padded, g.dilation, size, strict=True))
    return [
        (slice(None), slice(i, i + down, g.stride[0]), slice(j, j + right, g.stride[1]))
        for i in range(0, size[0] * g.dilation[0], g.dilation[0])
        for j in range(0, size[1] * g.dilation[1], g.dilation[1])
    ]


def _matrix(weight: Tensor) -> Tensor:
    """(tasks, outputs, channels, height, width) as (tasks, height * width * channels, outputs)."""
    return weight.permute(0, 3, 4, 2, 1).flatten(1, 3)
