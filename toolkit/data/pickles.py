"""Pickled data sets of others, read without running anything that they name.

learn2learn and others ship mini-ImageNet, tieredImageNet, CIFAR-FS and FC100 as pickles, and a plain `pickle.load` runs
whatever code a pickle asks for. Here a file is read only when its SHA-256 is the one that the caller has pinned, and by an
unpickler that imports nothing: the few names that arrays need stand for small functions and classes of this module, which also
build each array from its bytes, so that no state of a pickle reaches numpy's own objects (whose `__setstate__` trusts it).
"""

import hashlib
import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from toolkit.data.bank import ClassBank
from toolkit.data.cache import cached
from toolkit.data.convert import grouped, numbered
from toolkit.data.pooled import SPLITS, slug
from toolkit.errors import UserError, unknown

IMAGES, LABELS = ("image_data", "data", "images"), ("labels", "label_specific")
PLAIN = "biufcSU"  # kinds of dtype that are numbers or text


def load(path: str | Path, sha256: str) -> Any:
    """What a pickle holds, of numpy arrays of numbers and text, builtin containers, numbers and texts.

    Texts of Python 2 are read as latin-1. Raises UserError for a file whose SHA-256 is not `sha256`, one that is damaged, and
    one that names anything else.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256.strip().lower():
                raise _refused(path, sha256, found)
            file.seek(0)
            return _whole(_Reader(file, path).load())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); give the path of a pickle") from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path} is no readable pickle of arrays ({type(error).__name__}: {error}); get it anew") from None


def pickled(
    split: str,
    data_root: str | Path = "data",
    file: str | Mapping[str, str] = "mini-imagenet-cache-{split}.pkl",
    sha256: str | Mapping[str, str] = "",
    labels_file: str | Mapping[str, str] = "",
    labels_sha256: str | Mapping[str, str] = "",
) -> ClassBank:
    """A split from pickles of arrays, in `data_root`: every class of that split's file.

    A file holds a dict of `image_data`, `data` or `images`, uint8 of shape (items, height, width[, channels]), and of
    `class_dict` (the items of each class) or `labels` (items,), numbered with gaps or not. For tieredImageNet `file` is a list
    of PNG files as arrays of bytes, and `labels_file` a dict with `label_specific`. `{split}` in a name becomes train, val or
    test; names and hashes may differ by split, as "train=...,val=...,test=..." or as a dict. The items are cached, keyed by
    the hashes; a file whose items are there is not read again. Raises UserError as `load`, and for another layout.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    paths = [Path(data_root) / _of(split, each).replace("{split}", split) for each in (file, labels_file) if each]
    hashes = [_of(split, each).strip().lower() for each in (sha256, labels_sha256)][: len(paths)]
    for path, pinned in zip(paths, hashes, strict=True):
        if not path.is_file():
            raise UserError(f"there is no {path}; give the folder that holds it with --data-root, and its name as file=NAME")
        if not pinned:
            raise _refused(path, pinned, _hash(path))
    key = hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]

    def build() -> dict[str, Tensor]:
        images, labels, names = _arrays([load(path, pinned) for path, pinned in zip(paths, hashes, strict=True)], paths[0])
        numbered(labels, paths[0].name, relabel=True)
        return {
            "images": _pixels(images, paths[0]),
            "labels": labels,
            "names": torch.tensor(list(names.encode()), dtype=torch.uint8),
        }

    kept = cached(f"{slug(paths[0].stem)}-{key}-v1", build)
    names = bytes(kept["names"].tolist()).decode().split("\n") if len(kept["names"]) else None
    return grouped(kept["images"], kept["labels"], names, paths[0].name, relabel=names is None)


def _of(split: str, given: str | Mapping[str, str]) -> str:
    """What is given for one split: a text for all, or one for each, "train=...,val=...,test=..."."""
    if isinstance(given, str) and "=" in given:
        given = dict(part.strip().split("=", 1) for part in given.split(",") if "=" in part)
    if isinstance(given, str):
        return given
    if split not in given:
        raise UserError(f"a file or hash is given for {', '.join(given)} but not for {split}; give one for each split")
    return str(given[split])


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refused(path: Path, pinned: str, found: str) -> UserError:
    if pinned:
        return UserError(f"{path} has the SHA-256 {found} and not {pinned}; it is damaged or another file, get it anew")
    return UserError(
        f"{path} is a pickle, which is read only when its SHA-256 is pinned; if you trust the place you have it from, give "
        f"sha256={found}"
    )


def _arrays(contents: list[Any], path: Path) -> tuple[Any, Tensor, str]:
    """The images (an array, or a list of PNG files), the labels and the names of the classes, if there are some."""
    import numpy as np

    held: dict[Any, Any] = {}
    for content in contents:
        held |= content if isinstance(content, dict) else {"images": content}
    images = next((held[key] for key in IMAGES if key in held), None)
    labels = next((held[key] for key in LABELS if key in held), None)
    names = ""
    if isinstance(found := held.get("class_dict"), dict) and images is not None:
        labels = np.full(len(images), -1)
        for number, items in enumerate(found.values()):
            labels[np.asarray(items)] = number
        names = "\n".join(map(str, found))
    if images is None or labels is None or not 0 < len(images) == len(labels) or (names and min(labels) < 0):
        raise UserError(
            f"{path} holds {', '.join(map(str, held)) or 'nothing'}; a data set is image_data, data or images with a "
            "label for each in class_dict or labels"
        )
    return images, torch.tensor(np.asarray(labels).astype(np.int64)), names


def _pixels(images: Any, path: Path) -> Tensor:
    """uint8 of shape (items, channels, height, width), from an array or from a list of PNG files."""
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    def decoded(item: Any) -> Any:
        if isinstance(item, bytes) or (isinstance(item, np.ndarray) and item.ndim < 3 and 1 in (item.ndim, *item.shape[1:])):
            with Image.open(io.BytesIO(bytes(item))) as image:
                return np.array(image.convert("RGB"))
        return item

    pixels: Tensor | None = None
    for i, item in enumerate(tqdm(images, f"reading {path.name}", leave=False, delay=1)):
        array = decoded(item)
        array = array[..., None] if array.ndim == 2 else array
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3):
            raise UserError(f"item {i} of {path} is {array.dtype} {array.shape}; pixels are uint8 of (height, width[, 1 or 3])")
        if pixels is None:
            pixels = torch.empty(len(images), array.shape[2], *array.shape[:2], dtype=torch.uint8)
        if pixels.shape[2:] != array.shape[:2]:
            raise UserError(
                f"item {i} of {path} is {array.shape} and item 0 {tuple(pixels.shape[1:])}; images must have one size"
            )
        pixels[i].numpy()[:] = array.transpose(2, 0, 1)
    assert pixels is not None
    return pixels


class _Dtype:
    """Stands for numpy.dtype: only the text that says a kind of numbers or text is taken over."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        import numpy as np

        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in PLAIN:
            raise pickle.UnpicklingError(f"it holds an array of {self.dtype}, and only numbers and texts are read")

    def __setstate__(self, state: Any) -> None:
        if state[1] in "<>":
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for numpy.ndarray: an array built from its bytes alone."""

    array: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, columns_first, data = state
        self.array = _from_bytes(data, dtype, shape, "F" if columns_first else "C")


def _from_bytes(data: Any, dtype: _Dtype, shape: Any, order: str) -> Any:
    import numpy as np

    raw = data.encode("latin-1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


class _Reader(pickle.Unpickler):
    """An unpickler for which a few names stand for what is here, and every other one is refused."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file, encoding="latin1")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (stand_ins := _stand_ins()):
            return stand_ins[module, name]
        raise UserError(
            f"{self.path} asks for {module}.{name}, which no file of plain arrays needs and which can run code; nothing was "
            "run, do not use this file"
        )


def _stand_ins() -> dict[tuple[str, str], Callable[..., Any] | type]:
    """New functions and classes for every name, so that a pickle that changes one changes nothing else."""

    class Dtype(_Dtype):
        pass

    class Array(_Array):
        pass

    def reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
        return Array()

    def scalar(dtype: _Dtype, data: Any = b"") -> Any:
        return _from_bytes(data, dtype, (), "C")[()]

    def frombuffer(data: Any, dtype: _Dtype, shape: Any, order: str) -> Any:
        return _from_bytes(data, dtype, shape, order)

    def encode(text: str, encoding: str = "latin1") -> bytes:
        return text.encode("latin-1")  # the only one with which bytes are pickled

    def no_bytes() -> bytes:
        return b""  # the one value that protocols 0 to 2 pickle by the name of its type

    def plain_set(items: Any = ()) -> set[Any]:
        return set(items)

    def plain_dict(items: Any = ()) -> dict[Any, Any]:
        return dict(items)

    found: dict[tuple[str, str], Callable[..., Any] | type] = {
        ("numpy", "ndarray"): Array,
        ("numpy", "dtype"): Dtype,
        ("_codecs", "encode"): encode,
        ("collections", "OrderedDict"): plain_dict,
    }
    for core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
        found |= {(f"{core}.multiarray", "_reconstruct"): reconstruct, (f"{core}.multiarray", "scalar"): scalar}
        found[f"{core}.numeric", "_frombuffer"] = frombuffer
    for builtins in ("builtins", "__builtin__"):  # Python 3 and 2
        found |= {(builtins, "set"): plain_set, (builtins, "frozenset"): plain_set, (builtins, "bytes"): no_bytes}
    return found


def _whole(content: Any) -> Any:
    """The content with arrays in the place of what stood for them."""
    if isinstance(content, _Array):
        return content.array
    if isinstance(content, _Dtype):
        return content.dtype
    if isinstance(content, dict):
        return {_whole(key): _whole(value) for key, value in content.items()}
    if isinstance(content, list | tuple | set):
        return type(content)(_whole(each) for each in content)
    return content
