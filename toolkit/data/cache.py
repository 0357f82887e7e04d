"""Arrays that were costly to make and fit into memory, kept on disk: written once, checked by SHA-256 when read."""

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
    """The tensors that `build` makes, mapped from the cache, without a copy, when they are there.

    `name` must change whenever the content would (put a format number in it). A damaged file is made anew; a cache that
    cannot be written costs a warning, never the run. What may be larger than memory goes through `stored` instead.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    path = cache_folder() / f"{name}.safetensors"
    checksum = path.with_suffix(".sha256")
    if path.exists():
        try:
            if checksum.read_text().strip() == sha256(path):
                return load_file(path)
        except (OSError, ValueError, SafetensorError):
            pass  # as good as damaged
        log.warning("the cached file %s is damaged; making it anew", path)
    tensors = build()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            replace(checksum, sha256(temporary).encode())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        cannot_write(path, error)
    return tensors


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cannot_write(path: Path, error: Exception) -> None:
    """The warning for a cache without room or permission."""
    log.warning("cannot write the cache %s (%s); going on without it, set TOOLKIT_CACHE to change the place", path, error)
