"""MedMNIST and other .npz files laid out like it, as class banks."""

import zipfile
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from toolkit.data.bank import ClassBank
from toolkit.data.cache import sha256
from toolkit.data.convert import grouped
from toolkit.data.pooled import divided, slug, written
from toolkit.data.stored import Write, stored
from toolkit.errors import UserError

PARTS = ("train", "val", "test")


def medmnist(split: str, data_root: str | Path = "data", file: str = "bloodmnist.npz") -> ClassBank:
    """A file of MedMNIST (Yang et al. 2023): all its images pooled, its classes divided as `pooled.divided` says.

    `file`, in `data_root`, is an .npz with uint8 `train_images`, of shape (items, height, width) or (items, height, width, 3),
    integer `train_labels`, of shape (items,) or (items, 1), and the like for `val` and `test`. Images are read one by one into
    the cache, which is keyed by the file's SHA-256. Raises UserError for a file that is missing, damaged or laid out in
    another way, and for one with several labels for each image.
    """
    return divided(_bank(Path(data_root).absolute() / file), split)


@cache
def _bank(path: Path) -> ClassBank:
    if not path.is_file():
        raise UserError(
            f"there is no {path}; fetch it by hand from zenodo.org/records/10519652, or give its name as file=NAME.npz"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return _pooled(archive, path)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, ValueError, RuntimeError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is damaged or not laid out like MedMNIST ({' '.join(str(error).split())}); it needs {PARTS[0]}_images, "
            f"{PARTS[0]}_labels and the like for val and test"
        ) from None


def _pooled(archive: zipfile.ZipFile, path: Path) -> ClassBank:
    import numpy as np

    shapes = []
    for part in PARTS:
        with archive.open(f"{part}_images.npy") as member:
            shapes.append(_header(member, part))
    if len({shape[1:] for shape in shapes}) > 1:
        raise ValueError(f"its parts have images of shape {' and '.join(str(shape[1:]) for shape in shapes)}")
    labels = []
    for part, shape in zip(PARTS, shapes, strict=True):
        with archive.open(f"{part}_labels.npy") as member:
            labels.append(np.lib.format.read_array(member, allow_pickle=False))
        if labels[-1].ndim > 2 or labels[-1].size != shape[0]:
            raise UserError(
                f"{part}_labels of {path} has shape {labels[-1].shape} for {shape[0]} images; tasks need one label each"
            )
    flat = [int(label) for each in labels for label in each.reshape(-1)]

    def pairs() -> Iterator[tuple[Tensor, Any]]:
        from tqdm import tqdm

        with tqdm(flat, desc=f"reading {path.name}", leave=False, delay=1) as bar:
            label = iter(bar)
            for part, shape in zip(PARTS, shapes, strict=True):
                with archive.open(f"{part}_images.npy") as member:
                    _header(member, part)
                    for _ in range(shape[0]):
                        yield _image(member, shape[1:]), next(label)

    def fill(write: Write) -> dict[str, Any]:
        return {"labels": written(write, pairs(), path.name)}

    shape = (3, *shapes[0][1:3]) if len(shapes[0]) == 4 else (1, *shapes[0][1:])
    items, notes = stored(f"{slug(path.stem)}-{sha256(path)[:16]}-v2", len(flat), shape, fill)
    return grouped(items, notes["labels"], None, path.stem)


def _header(member: IO[bytes], part: str) -> tuple[int, ...]:
    """The shape of an array in .npy format, of which only the pixels are left to read."""
    import numpy as np

    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = read(member)
    if dtype != np.uint8 or columns_first or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] != 3):
        raise ValueError(f"{part}_images is {dtype} of shape {shape}")
    return tuple(shape)


def _image(member: IO[bytes], shape: tuple[int, ...]) -> Tensor:
    size = shape[0] * shape[1] * (shape[2] if len(shape) == 3 else 1)
    data = bytearray(member.read(size))
    if len(data) < size:
        raise EOFError("it ends too early")
    pixels = torch.frombuffer(data, dtype=torch.uint8).view(shape)
    return pixels.permute(2, 0, 1) if len(shape) == 3 else pixels[None]
