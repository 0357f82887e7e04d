"""Arrays that were costly to make, kept on disk: written once, checked by SHA-256 whenever they are read."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

log = logging.getLogger("toolkit")


def cache_folder() -> Path:
    """`$TOOLKIT_CACHE`, or `toolkit` in the user's cache folder."""
    if chosen := os.environ.get("TOOLKIT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toolkit"


def cached(name: str, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that `build` makes, from the cache when they are there.

    `name` must change whenever the content would (put a format number in it). A damaged file is made anew; a cache that
    cannot be written costs a warning, never the run.
    """
    from safetensors.torch import load, save

    path = cache_folder() / f"{name}.safetensors"
    checksum = path.with_suffix(".sha256")
    if path.exists():
        data = path.read_bytes()
        if checksum.exists() and checksum.read_text().strip() == hashlib.sha256(data).hexdigest():
            return load(data)
        log.warning("the cached file %s is damaged; making it anew", path)
    tensors = build()
    data = save(tensors)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(checksum, hashlib.sha256(data).hexdigest().encode())
        replace(path, data)
    except OSError as error:
        log.warning("cannot write the cache %s (%s); going on without it, set TOOLKIT_CACHE to change the place", path, error)
    return tensors


def replace(path: Path, data: bytes) -> None:
    """Writes `data` to `path` such that a reader sees the old file or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
