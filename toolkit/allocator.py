"""The C library's allocator, told to keep what we will ask for again."""

import ctypes
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@cache
def keep_freed_memory() -> bool:
    """Lets this process keep freed blocks of up to a gigabyte. By default glibc maps each large tensor anew, and the system
    fills its pages with zeros first, which costs more than a pass over it. Whether it worked: glibc has this switch only."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(MMAP_THRESHOLD, 2**30) and mallopt(TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory() -> None:
    """Gives what is free back to the system, where the C library can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return
