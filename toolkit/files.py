"""Files that are whole or not there, folders that one process writes into."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from toolkit.errors import UserError


def replace(path: Path, data: bytes) -> None:
    """Writes `data` to `path` such that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def alone_in(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """As the only process that is in this folder, which the system lets go of when the process ends, however it ends. Raises
    UserError where another is in it; with `wait` one waits for it that many seconds, for what is done in a moment, and goes in
    all the same. Where there are no such locks (Windows, some shared disks) all are let in."""
    try:
        import fcntl

        place = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                os.close(place)
                raise UserError(
                    f"another process is at work in {folder}; wait until it has ended, or choose another --out"
                ) from None
            if time.monotonic() - began < wait:
                time.sleep(0.02)
                continue
        except OSError:
            pass
        break
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_UN)  # also for processes that were forked meanwhile, which have it too
        os.close(place)
