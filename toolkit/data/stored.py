"""Pixels that may be larger than memory, kept on disk: written item by item, whole or not at all, and mapped from there."""

import hashlib
import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from errno import ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toolkit.data.cache import cache_folder, cannot_write, sha256
from toolkit.errors import UserError
from toolkit.files import replace

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("toolkit")
WHOLE = 256 * 2**20  # bytes up to which all of a file is checked
BLOCKS, BLOCK = 64, 2**16  # of a larger one, so many blocks of so many bytes
Write = Callable[["np.ndarray[Any, Any]"], None]
Stored = tuple[Tensor, dict[str, Any]]


def stored(name: str, count: int, shape: Sequence[int], fill: Callable[[Write], dict[str, Any]]) -> Stored:
    """At most `count` uint8 items of `shape`, which `fill(write)` hands to `write` one by one, and the notes that it returns.

    The first call makes them; when all are written they become the folder `name`.bank of the cache, and later calls map it:
    the tensor, of shape (items, *shape), is read-only (writing into it ends the process) and takes memory only where it is
    looked at. `name` must change whenever the content would; the notes must be JSON. Opening checks the notes, the size and a
    SHA-256 of the items: of all up to 256 MiB, else of 64 blocks spread through them. A damaged folder is made anew with a
    warning. Processes that want the same folder wait for the one that makes it. If nothing can be written, memory holds the
    items, with a warning; `fill` may then run twice. Raises UserError when they are too many for that; errors of `fill` come
    through and leave nothing behind.
    """
    place, needed = cache_folder() / f"{name}.bank", count * math.prod(shape)
    if found := _opened(place):
        return found
    try:
        return _on_disk(place, needed, tuple(shape), fill)
    except _CannotWriteError as error:
        if needed > _memory() / 2:
            raise UserError(
                f"the cache {place} cannot be written ({error}) and its {needed / 1e9:.1f} GB are too much for memory; set "
                "TOOLKIT_CACHE to a folder with room for them"
            ) from None
        cannot_write(place, error)
    items, written = torch.empty(count, *shape, dtype=torch.uint8), 0

    def write(item: "np.ndarray[Any, Any]") -> None:
        nonlocal written
        items[written] = torch.from_numpy(_checked(item, tuple(shape)))
        written += 1

    notes = fill(write)
    return items[:written], notes


class _CannotWriteError(Exception):
    """What the disk said, told apart from what `fill` raises."""


def _on_disk(place: Path, needed: int, shape: tuple[int, ...], fill: Callable[[Write], dict[str, Any]]) -> Stored:
    temporary = place.with_name(f".{place.name}.tmp")
    lock: int | None = None
    try:
        lock = _disk(_locked, temporary)
        if place.exists():
            if found := _opened(place):  # another process made it meanwhile
                return found
            log.warning("the cached folder %s is damaged; making it anew", place)
            _disk(shutil.rmtree, place)
        if _disk(shutil.disk_usage, temporary).free < needed:
            raise _CannotWriteError(OSError(ENOSPC, f"its {needed / 1e9:.1f} GB are more than the disk has free"))
        return _written(place, temporary, shape, fill)
    finally:
        if lock is None or _same(lock, temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _written(place: Path, temporary: Path, shape: tuple[int, ...], fill: Callable[[Write], dict[str, Any]]) -> Stored:
    """Fills the temporary folder, anew if a killed process left something in it, and renames it to its place."""
    path, written = temporary / "items.bin", 0
    file = _disk(open, path, "wb", buffering=2**20)

    def write(item: "np.ndarray[Any, Any]") -> None:
        nonlocal written
        _disk(file.write, _checked(item, shape).data)
        written += 1

    try:
        notes = fill(write)
        _disk(file.flush)
        _disk(os.fsync, file.fileno())
    finally:
        with suppress(OSError):  # a full disk, which has been said
            file.close()
    index = {"format": 1, "shape": [written, *shape], "dtype": "uint8", "items": _digest(path), "notes": notes}
    _disk(replace, temporary / "index.json", json.dumps(index | {"seal": _seal(index)}).encode())
    _disk(os.rename, temporary, place)
    return _mapped(place / "items.bin", (written, *shape)), notes


def _opened(place: Path) -> Stored | None:
    """What a folder of the cache holds; None where there is none, or anything is wrong with it."""
    path = place / "items.bin"
    try:
        index = json.loads((place / "index.json").read_text())
        seal = index.pop("seal")
        if seal != _seal(index) or path.stat().st_size != math.prod(index["shape"]) or index["items"] != _digest(path):
            return None
        return _mapped(path, index["shape"]), index["notes"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _mapped(path: Path, shape: Sequence[int]) -> Tensor:
    import numpy as np

    if 0 in shape:
        return torch.empty(tuple(shape), dtype=torch.uint8)
    with warnings.catch_warnings():
        # Mapped for reading only, which counts as no memory of this process; torch warns that one should not write.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(np.memmap(path, np.uint8, "r", shape=tuple(shape)))


def _digest(path: Path) -> str:
    """SHA-256 of a file, or, if it is large, of blocks spread evenly from its start to its end."""
    size = path.stat().st_size
    if size <= WHOLE:
        return sha256(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for i in range(BLOCKS):
            file.seek(i * (size - BLOCK) // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _seal(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _checked(item: "np.ndarray[Any, Any]", shape: tuple[int, ...]) -> "np.ndarray[Any, Any]":
    import numpy as np

    if item.dtype != np.uint8 or item.shape != shape:
        raise UserError(f"an item of {item.dtype} {item.shape} was written to a bank of uint8 {shape}; write only such")
    return np.ascontiguousarray(item)


def _disk(act: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return act(*arguments, **options)
    except OSError as error:
        raise _CannotWriteError(error) from None


def _locked(folder: Path) -> int | None:
    """Makes the folder and waits until no other process holds it (a killed one does not); None where that cannot be asked."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":
            return None
        import fcntl

        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            os.close(lock)
            return None
        if _same(lock, folder):
            return lock
        os.close(lock)  # the other process has renamed or removed what was locked


def _same(lock: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), os.stat(folder))
    except FileNotFoundError:
        return False


def _memory() -> int:
    """Bytes of memory of this machine, as far as it can be asked."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize
