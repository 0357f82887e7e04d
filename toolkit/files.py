"""Files that are whole or not there, folders that one process writes into."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from toolkit.errors import UserError

LOOK = 0.2  # seconds; who only looks whether somebody is in a folder (`left`) is in it for less


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
def alone_in(folder: Path, wait: float = 0.0) -> Iterator[bool]:
    """As the only process that is in this folder, which the system lets go of when the process ends, however it ends. Raises
    UserError where another is in it; with `wait` one waits for it that many seconds, for what is done in a moment, and goes in
    all the same. Where there are no such locks (Windows, some shared disks) all are let in. Yields whether one is alone for
    sure."""
    try:
        import fcntl

        place = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    began, alone = time.monotonic(), False
    while True:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            if time.monotonic() - began < max(wait, LOOK):
                time.sleep(0.02)
                continue
            if not wait:
                os.close(place)
                raise UserError(
                    f"another process is at work in {folder}; wait until it has ended, or choose another --out"
                ) from None
        except OSError:
            pass
        break
    try:
        yield alone
    finally:
        with suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_UN)  # also for processes that were forked meanwhile, which have it too
        os.close(place)


def left(folder: Path) -> bool:
    """Whether no process is in this folder, of those whose locks this machine sees."""
    try:
        with alone_in(folder) as alone:
            return alone
    except UserError:
        return False
