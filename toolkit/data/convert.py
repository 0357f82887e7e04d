"""Tensors and other people's datasets as class banks."""

from collections.abc import Iterator, Sequence
from itertools import count as numbers_from
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from toolkit.data.bank import ClassBank
from toolkit.data.images import on_white
from toolkit.errors import UserError

QUICK = ("targets", "labels", "_labels", "y")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL's conversion to greyscale


def from_tensors(
    x: Tensor, y: Tensor, names: Sequence[str] | None = None, source: str = "tensors", relabel: bool = False
) -> ClassBank:
    """A bank of items `x`, of shape (items, ...), with integer labels `y`, of shape (items,) or (items, 1).

    The bank's entries are sorted by class and keep their order within one; `x` is shared, not copied. Labels run from 0
    without gaps, unless `relabel`, which numbers the distinct ones anew in sorted order. `names[label]` names a class; without
    `names` its label does. Raises UserError for tensors that do not fit together and for labels as above.
    """
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or not x.dim() or not y.dim() or len(x) != len(y):
        given = " and ".join(f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else f"a {type(t).__name__}" for t in (x, y))
        raise UserError(f"{source}: x and y are {given}; give two tensors, one label for each item")
    return grouped(x, y, names, source, relabel)


def from_dataset(
    dataset: Any,
    size: int | None = None,
    names: Sequence[str] | None = None,
    source: str | None = None,
    relabel: bool = False,
    channels: int | None = None,
) -> ClassBank:
    """A bank of all items of a map-style dataset: `len(dataset)`, and `dataset[i]` an (image, label) pair.

    An image is a PIL image, or a numpy array or tensor of shape (height, width), (height, width, channels) or (channels,
    height, width); PIL images become uint8, arrays keep their dtype; the bank's items have shape (channels, height, width).
    Arrays of other than two or three axes stay as they are. With `size` every image is resized to (size, size), whatever its
    proportions, by Lanczos; with `channels` 3 greyscale is repeated, with 1 colour becomes greyscale. `names` and `relabel` are
    as for `from_tensors`; without `names` those in `dataset.classes` count. Each item is read once and written to its place,
    so the peak of memory is the bank and one item; a transform of the dataset is applied that one time.

    Raises UserError for a dataset without length or index, for items that cannot be read or differ in size, channels or dtype,
    and for labels with gaps, negative or not integer: where the dataset lists its labels (`.targets`, `.labels`, `._labels`,
    `.y`), before any other image than the first is read.
    """
    source = source or type(dataset).__name__
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UserError(
            f"{source} has no length or no index; give a dataset with len(dataset) and dataset[i], or collect its items and "
            "use from_tensors"
        )
    total = len(dataset)
    if not total:
        raise UserError(f"{source} is empty; a class bank needs at least one item")
    items: Tensor | None = None
    labels = []
    for i, (item, label) in enumerate(read(dataset, size, channels, source)):
        if items is None:
            quick = quick_labels(dataset, total, label)
            if quick is not None:
                numbered(quick, source, relabel)
            items = torch.empty(total, *item.shape, dtype=item.dtype)
        items[i] = item
        labels.append(label)
    assert items is not None
    if names is None:
        names = _class_names(dataset, labels)
    return grouped(items, labels, names, source, relabel)


def read(
    dataset: Any, size: int | None, channels: int | None, source: str, index: Sequence[int] | None = None
) -> Iterator[tuple[Tensor, Any]]:
    """The (item, label) pairs of a map-style dataset, all or those of `index`, as `from_dataset` describes them."""
    from tqdm import tqdm

    first: Tensor | None = None
    for i in tqdm(range(len(dataset)) if index is None else index, f"reading {source}", leave=False, delay=1):
        try:
            raw, label = dataset[i]
        except Exception as error:  # whatever somebody else's dataset raises
            raise UserError(
                f"item {i} of {source} cannot be read as an (image, label) pair ({type(error).__name__}: {error}); mend the "
                "dataset, or leave that item out"
            ) from error
        item = _image(raw, size, channels, f"item {i} of {source}")
        first = item if first is None else first
        if item.shape != first.shape or item.dtype != first.dtype:
            raise _differs(first, item, i, source)
        yield item, plain(label)


def grouped(items: Tensor, labels: Any, names: Sequence[str] | None, source: str, relabel: bool = False) -> ClassBank:
    """The bank of `items` in any order with their `labels`, by a stable sort of its rows. Raises as `from_tensors`."""
    index, values = numbered(labels, source, relabel)
    order = index.argsort(stable=True)
    first = torch.cat([torch.zeros(1, dtype=torch.int64), index.bincount().cumsum(0)])
    rows = None if torch.equal(order, torch.arange(len(order))) else order
    return ClassBank(items, first, _names(names, values, source, relabel), source, rows)


def numbered(labels: Any, source: str, relabel: bool = False) -> tuple[Tensor, list[Any]]:
    """Labels as class numbers 0, 1, ..., of shape (items,), and the label that each number stands for."""
    import numpy as np

    try:
        values = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    except ValueError:
        raise UserError(f"the labels of {source} differ in shape; give each item one label") from None
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or not len(values):
        raise UserError(f"the labels of {source} have shape {values.shape}; give each item one label, and at least one item")
    kind = values.dtype.kind
    if kind not in "iub" and (kind == "O" or not relabel):
        i = int((values % 1 != 0).argmax()) if kind == "f" else 0
        raise UserError(
            f"the labels of {source} are no integers, as {values[i : i + 1].tolist()[0]!r} of item {i}; number the classes "
            "from 0, or, for texts and numbers, give relabel=True to have the distinct ones numbered"
        )
    present, index = np.unique(values, return_inverse=True)
    if not relabel and present[0] < 0:
        i = int((values < 0).argmax())
        raise UserError(
            f"the labels of {source} are negative, as {values[i]} of item {i}; number the classes from 0, leave such items "
            "out, or give relabel=True to have the distinct labels numbered anew"
        )
    if not relabel and int(present[-1]) + 1 != len(present):
        known = set(present.tolist())
        left_out = int(present[-1]) + 1 - len(present)
        missing = ", ".join(str(n) for n in islice((n for n in numbers_from() if n not in known), min(3, left_out)))
        more = f" and {left_out - 3} more" if left_out > 3 else ""
        raise UserError(
            f"the labels of {source} go from {present[0]} to {present[-1]} but leave out {missing}{more}; number the classes "
            "without gaps, or give relabel=True to have them numbered anew"
        )
    return torch.from_numpy(index.reshape(-1).astype(np.int64)), present.tolist()


def _names(names: Sequence[str] | None, values: list[Any], source: str, relabel: bool) -> tuple[str, ...]:
    if names is None:
        return tuple(str(value) for value in values)
    by_label = all(isinstance(value, int) and 0 <= value < len(names) for value in values)
    if len(names) != len(values) and not (relabel and by_label):
        raise UserError(f"{len(names)} names do not fit {len(values)} classes of {source}; give one for each label")
    return tuple(str(names[value]) for value in values) if by_label else tuple(map(str, names))


def _class_names(dataset: Any, labels: list[Any]) -> Sequence[str] | None:
    """The names in `dataset.classes` of the classes that have items, where there is a name for each label."""
    classes = getattr(dataset, "classes", None)
    if not isinstance(classes, list | tuple) or not all(isinstance(label, int) for label in labels):
        return None
    if min(labels) < 0 or max(labels) >= len(classes):
        return None
    return [str(classes[label]) for label in sorted(set(labels))]


def quick_labels(dataset: Any, total: int, label: Any) -> Any:
    """The labels that the dataset lists, unless its first item says that the list means something else."""
    for attribute in QUICK:
        found = getattr(dataset, attribute, None)
        if found is None or not hasattr(found, "__len__") or getattr(found, "ndim", 1) == 0 or len(found) != total:
            continue
        listed = plain(found[0])
        if getattr(dataset, "target_transform", None) is None and type(listed) is type(label) and listed == label:
            return found
    return None


def plain(label: Any) -> Any:
    """A number of numpy or torch, or an array of one, as Python's own."""
    one = label.numel() if isinstance(label, Tensor) else getattr(label, "size", None)
    return label.item() if one == 1 and hasattr(label, "item") else label


def _image(raw: Any, size: int | None, channels: int | None, what: str) -> Tensor:
    import numpy as np
    from PIL import Image

    if isinstance(raw, Image.Image):
        raw = _pixels(raw, channels, what)
    if not isinstance(raw, Tensor | np.ndarray):
        raise UserError(f"{what} is a {type(raw).__name__}; an item is a PIL image, a numpy array or a tensor, with its label")
    item = raw.detach().cpu() if isinstance(raw, Tensor) else torch.from_numpy(np.array(raw))
    if item.dim() == 2:
        item = item[None]
    elif item.dim() == 3:
        last, ahead = item.shape[-1] in (1, 3), item.shape[0] in (1, 3)
        numpy = isinstance(raw, np.ndarray)
        if (last and (numpy or not ahead)) or (numpy and not ahead and item.shape[-1] in (2, 4)):
            item = item.permute(2, 0, 1)
    if item.dim() != 3:
        if size or channels:
            raise UserError(f"{what} has shape {tuple(item.shape)} and is no image; leave size and channels out")
        return item
    item = _with_channels(item, channels, what)
    return item if not size or item.shape[1:] == (size, size) else _resized(item, size)


def _pixels(image: Any, channels: int | None, what: str) -> Any:
    """A PIL image as uint8 (height, width) or (height, width, 3), white where it is transparent: greyscale stays so, every
    other kind becomes RGB."""
    import numpy as np

    if image.mode.startswith(("I", "F")):
        raise UserError(f"{what} has pixels of PIL's mode {image.mode!r}, more than 8 bits; convert it in the dataset")
    natural = "L" if image.mode in ("1", "L", "LA") else "RGB"
    pixels = np.array(on_white(image).convert({1: "L", 3: "RGB"}.get(channels or 0, natural)))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _with_channels(item: Tensor, channels: int | None, what: str) -> Tensor:
    if not channels or len(item) == channels:
        return item
    if len(item) == 1:
        return item.expand(channels, -1, -1)
    if len(item) != 3 or channels != 1:
        raise UserError(
            f"{what} has {len(item)} channels, and channels={channels} is asked for; 1 and 3 can be made of 3 and 1"
        )
    grey = torch.einsum("chw,c->hw", item.double(), torch.tensor(LUMA, dtype=torch.float64))[None]
    return (grey if item.is_floating_point() else grey.round()).to(item.dtype)


def _resized(item: Tensor, size: int) -> Tensor:
    """(channels, height, width) to (channels, size, size), each channel by PIL's Lanczos filter."""
    import numpy as np
    from PIL import Image

    arrays = [channel.numpy() if item.dtype == torch.uint8 else channel.float().numpy() for channel in item]
    resized = [Image.fromarray(np.ascontiguousarray(a)).resize((size, size), Image.Resampling.LANCZOS) for a in arrays]
    found = torch.stack([torch.from_numpy(np.array(a)) for a in resized])
    if item.dtype == torch.bool:
        return found > 0.5
    if not item.is_floating_point():
        limits = torch.iinfo(item.dtype)
        found = found.double().round().clamp(limits.min, limits.max)
    return found.to(item.dtype)


def _differs(first: Tensor, item: Tensor, i: int, source: str) -> UserError:
    if item.dtype != first.dtype:
        return UserError(f"item {i} of {source} is {item.dtype} and item 0 is {first.dtype}; give all items the same dtype")
    if item.dim() == 3 == first.dim() and len(item) != len(first):
        return UserError(
            f"item {i} of {source} has {len(item)} channels and item 0 has {len(first)}; give channels=3, which repeats "
            "greyscale, or channels=1, which drops colour"
        )
    shapes = [" x ".join(str(n) for n in (t.shape[1:] if t.dim() == 3 else t.shape)) for t in (item, first)]
    return UserError(f"item {i} of {source} is {shapes[0]} and item 0 is {shapes[1]}; give size=84, say, to resize all images")
