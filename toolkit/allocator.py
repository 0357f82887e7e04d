"""The C library's allocator, told to keep what we will ask for again, or to keep nothing; and what the process holds."""

import ctypes
import re
import sys
from pathlib import Path

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Lets this process keep freed blocks of up to a gigabyte. By default glibc maps each large tensor anew, and the system
    fills its pages with zeros first, which costs more than a pass over it. Whether it worked: glibc has this switch only."""
    return _set(MMAP_THRESHOLD, 2**30) and _set(TRIM_THRESHOLD, 2**31 - 1)


def map_each_tensor() -> bool:
    """Lets every tensor of 64 kB up have pages of its own, which go back to the system with it: the least memory, where long
    work on many sizes would leave a heap full of gaps, at the price above."""
    return _set(MMAP_THRESHOLD, 2**16) and _set(TRIM_THRESHOLD, 2**17)


def _set(parameter: int, value: int) -> bool:
    try:
        return bool(ctypes.CDLL(None).mallopt(parameter, value))
    except (AttributeError, OSError):
        return False


def return_freed_memory() -> None:
    """Gives what is free back to the system, where the C library can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return


def memory(key: str) -> int:
    """A line of the kernel's account of this process in bytes: VmRSS, what it holds, or VmHWM, the most of it. (getrusage has
    the most of whoever started it, where that was more.) Its peak where there is no such account."""
    try:
        found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return 1024 * int(found[1])
    except OSError:
        import resource  # not on every system

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
