"""Files that are whole or not there, folders that one process writes into."""

import os
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
def alone_in(folder: Path) -> Iterator[None]:
    """As the only process that is in this folder, which the system lets go of when the process ends, however it ends. Raises
    UserError where another is in it. Where there are no such locks (Windows, some shared disks) all are let in."""
    try:
        import fcntl

        place = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(place)
        raise UserError(f"another process is at work in {folder}; wait until it has ended, or choose another --out") from None
    except OSError:
        pass
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_UN)  # also for processes that were forked meanwhile, which have it too
        os.close(place)
