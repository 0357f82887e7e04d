"""Arrays that were costly to make, kept on disk: written once, checked by SHA-256 whenever they are read."""

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from toolkit.files import replace

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
