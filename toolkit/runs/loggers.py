"""Sinks for the rows of metrics.jsonl, beside the file itself.

A logger is made by a function or class that takes, by name, what it needs of `folder`, the run folder; `config`, the flags as a
dict; and `start`, the iteration that the run goes on from. It is then called with every row: a dict of numbers, as in
`Run.metrics`. A function with a parameter `row` is one itself. One that raises is dropped with a warning, and training goes on.
"""

import csv
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from toolkit import plugins
from toolkit.errors import UserError
from toolkit.runs.folder import Run

log = logging.getLogger("toolkit")
Row = dict[str, float]
COLUMNS = {
    "training.csv": ("iteration", "loss", "metric", "seconds"),
    "validation.csv": ("iteration", "val_loss", "val_metric", "val_ci95", "val_finite"),
}


class Csv:
    """Training and validation rows as tables for a spreadsheet: csv/training.csv and csv/validation.csv in the run folder."""

    def __init__(self, folder: Path, start: int = 0) -> None:
        self.folder = folder / "csv"  # beside the figures, whose numbers are tables called alike
        self.folder.mkdir(exist_ok=True)
        for name, columns in COLUMNS.items():
            with open(self.folder / name, "w", newline="") as file:
                csv.DictWriter(file, columns).writeheader()
        # A resumed run starts its tables anew from the journal: their own last line may be torn, and some may be missing.
        for row in Run(folder).metrics if start else ():
            if row["iteration"] <= start:
                self(row)

    def __call__(self, row: Row) -> None:
        for name, columns in COLUMNS.items():
            if row.keys() & set(columns[1:]):
                with open(self.folder / name, "a", newline="") as file:
                    csv.DictWriter(file, columns).writerow({key: row.get(key, "") for key in columns})


class Console:
    """Validation rows as lines of text."""

    def __call__(self, row: Row) -> None:
        if row.keys() & set(COLUMNS["validation.csv"][1:]):
            log.info("%s", "  ".join(f"{key} {value:.4g}" for key, value in row.items()))


class TensorBoard:
    """All rows as scalars for `tensorboard --logdir RUN`, in the folder tensorboard of the run folder; needs the package."""

    def __init__(self, folder: Path, start: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(f"--logger tensorboard needs a package ({error}); pip install tensorboard") from None
        # A resumed run writes anew what it lost; the older points of these iterations are hidden.
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=start + 1 if start else None)

    def __call__(self, row: Row) -> None:
        for key, value in row.items():
            if key != "iteration":
                group = "validation" if key.startswith("val_") else "rates" if key.startswith("rate/") else "training"
                self.writer.add_scalar(
                    f"{group}/{key.removeprefix('val_').removeprefix('rate/')}", value, int(row["iteration"])
                )
        self.writer.flush()


def loggers(names: Iterable[str], folder: Path, config: dict[str, Any], start: int) -> list[Callable[[Row], object]]:
    """The loggers called `names` (see `toolkit.plugins`) for a run. Raises UserError for one that cannot be made."""
    given = {"folder": folder, "config": config, "start": start}
    found = []
    for name in names:
        target = plugins.resolve(name, "loggers")
        if "row" in plugins.takes(target):
            found.append(target)
            continue
        logger = plugins.call(target, given, {}, f"--logger {name}")
        if not callable(logger):
            raise UserError(f"--logger {name} made a {type(logger).__name__}; a logger is called with each row, as logger(row)")
        found.append(logger)
    return found
