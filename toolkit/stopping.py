"""Ctrl-C and SIGTERM as a wish that the run comes to, in place of a death in the middle of a step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

GRACE = 60.0  # seconds, of the 90 that submitit leaves between its signal and the end of a job


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second SIGINT interrupts at once. So it does with SIGUSR1 and
    SIGUSR2 where they have a handler, as in a job of submitit whose time is nearly up: that is called at the end of the block,
    or when it has not come after a minute."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return
    postponed: dict[int, Any] = {n: h for n in (signal.SIGUSR1, signal.SIGUSR2) if callable(h := signal.getsignal(n))}
    timers: list[threading.Timer] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number in received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number in received and number in postponed:
            postponed.pop(number)(number, frame)  # which may well raise, and is not to be called again
        elif number in postponed:
            timers.append(threading.Timer(GRACE, os.kill, (os.getpid(), number)))
            timers[-1].daemon = True
            timers[-1].start()
        received.append(number)
        os.write(2, b"\nfinishing this iteration, then saving (Ctrl-C again stops at once)\n")

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, *postponed)}
    try:
        yield received
    finally:
        for timer in timers:
            timer.cancel()
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number in set(received) & set(postponed):
            postponed.pop(number)(number, None)
