"""Rows of metrics.jsonl as a run of trackio, kept on this machine; `trackio show --project toolkit` shows it.

    python experiments/quickstart.py --logger experiments/loggers/local_trackio.py:Trackio

Needs `pip install trackio`.
"""

import atexit
from pathlib import Path
from typing import Any


class Trackio:
    """A run of the project `toolkit`, named as the run folder."""

    def __init__(self, folder: Path, config: dict[str, Any], start: int = 0) -> None:
        import trackio

        plain = {key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in config.items()}
        name = "-".join(folder.resolve().parts[-2:])
        self.run = trackio.init(project="toolkit", name=name, config=plain, resume="allow", embed=False)
        atexit.register(trackio.finish)

    def __call__(self, row: dict[str, float]) -> None:
        self.run.log({key: value for key, value in row.items() if key != "iteration"}, step=int(row["iteration"]))
