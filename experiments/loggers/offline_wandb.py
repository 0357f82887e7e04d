"""Rows of metrics.jsonl as a run of Weights & Biases, offline: nothing leaves the machine until you call `wandb sync`.

    python experiments/quickstart.py --logger experiments/loggers/offline_wandb.py:Wandb

Needs `pip install wandb`.
"""

from pathlib import Path
from typing import Any


class Wandb:
    """An offline run in the folder `wandb` of the run folder; a resumed run goes on in it, from its checkpoint on."""

    def __init__(self, folder: Path, config: dict[str, Any], start: int = 0) -> None:
        import wandb

        settings = wandb.Settings(silent=True)
        name = "-".join(folder.resolve().parts[-2:])
        self.run = wandb.init(
            project="toolkit", id=name, name=name, dir=folder, mode="offline", config=config, settings=settings, resume="allow"
        )

    def __call__(self, row: dict[str, float]) -> None:
        self.run.log({key: value for key, value in row.items() if key != "iteration"}, step=int(row["iteration"]))
