"""`metrics.jsonl` while a run goes on: rows of training means and of validations, and the clock behind them."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from toolkit.learner import Meta
from toolkit.runs.loggers import Row
from toolkit.train import Record

log = logging.getLogger("toolkit")
ROWS = 1000  # training rows at most, so that the file stays small however long the run


def rates(meta: Meta) -> dict[str, float]:
    """The learned inner rates, "rate/<name>" each: of a tensor whose weights have one each, the mean."""
    return {f"rate/{name}": float(value.mean()) for name, value in meta.learned.items() if "lr/" in name}


class Journal:
    """Appends to `path`. Training records are averaged over windows, and written when one is full.

    Without a path, as in all processes but the first, the rows are only returned. A resumed run gives the `size` in bytes that
    the file had at its checkpoint, so that no row repeats, the `seconds` that had passed by then, and the records of the
    `window` that was open: so its rows are those of a run that was never stopped.
    """

    def __init__(
        self,
        path: Path | None,
        iterations: int,
        size: int = 0,
        seconds: float = 0.0,
        loggers: Iterable[Callable[[Row], object]] = (),
        window: Iterable[tuple[int, float, float]] = (),
    ) -> None:
        self.path, self.every, self.loggers = path, -(-iterations // ROWS), list(loggers)
        self.window = list(window)
        self.began = time.perf_counter() - seconds
        if path is None:
            return
        with open(path, "ab+") as file:
            if file.tell() < size:
                log.warning("%s is shorter than at the checkpoint; the rows in between are lost", path)
                file.seek(0)
                size = file.read().rfind(b"\n") + 1  # a row that was cut would spoil the next
            file.truncate(size)

    @property
    def seconds(self) -> float:
        """The time of this run, earlier parts included."""
        return time.perf_counter() - self.began

    @property
    def size(self) -> int:
        """The file's length in bytes."""
        return self.path.stat().st_size if self.path else 0

    def add(self, record: Record) -> dict[str, float] | None:
        """Notes one iteration. Returns the row when it filled a window."""
        self.window.append((record.iteration, record.loss, record.metric))
        return self.flush() if len(self.window) >= self.every else None

    def flush(self) -> dict[str, float] | None:
        """Writes the window's means, even if it is not full, and returns them; None when it is empty."""
        if not self.window:
            return None
        n = len(self.window)
        row = {
            "iteration": self.window[-1][0],
            "loss": sum(loss for _, loss, _ in self.window) / n,
            "metric": sum(metric for *_, metric in self.window) / n,
            "seconds": round(self.seconds, 3),
        }
        self.window.clear()
        self.write(row)
        return row

    def write(self, row: dict[str, float]) -> None:
        """Appends one row, without the values that are not finite, for which JSON has no name."""
        if self.path is None:
            return
        finite = {key: value for key, value in row.items() if math.isfinite(value)}
        with open(self.path, "a") as file:
            file.write(json.dumps(finite) + "\n")
        for logger in list(self.loggers):
            try:
                logger(dict(finite))
            except Exception as error:  # a sink is somebody else's code, and no reason to lose a run
                self.loggers.remove(logger)
                log.warning("the logger %s failed (%s: %s); going on without it", logger, type(error).__name__, error)

    def sync(self) -> None:
        """Makes sure that what was written is on the disk."""
        if self.path is None:
            return
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())


def better(row: dict[str, float], selected: dict[str, float], metric: str) -> bool:
    """Whether a validation row beats the one selected before: by accuracy where that is the metric, by loss otherwise, since of
    other metrics we do not know which way is better. A state under which more tasks stay finite comes first, since means leave
    the others out."""
    key, sign = ("val_metric", 1) if metric == "accuracy" else ("val_loss", -1)

    def rank(row: dict[str, float]) -> tuple[float, float]:
        return row.get("val_finite", 0.0), sign * row[key] if key in row else -math.inf

    return not selected or rank(row) > rank(selected)
