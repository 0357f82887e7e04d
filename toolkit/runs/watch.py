"""A run as text, while it goes on: how far, how fast, how good."""

import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.files import left
from toolkit.runs.folder import Run, result_step

BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 48  # characters of a curve
EVERY = 1.0  # seconds between looks


def follow(folder: Path, once: bool = False) -> None:
    """Prints the run and, in a terminal, keeps it up to date until the run is done; once where `once` is true or nobody
    watches.

    Raises UserError for a folder that is no run's."""
    lines = 0
    while True:
        done = (folder / "summary.json").exists()  # before the look, so that the last one shows the result
        text = view(Run(folder))
        print(f"\x1b[{lines}F\x1b[J{text}" if lines else text, flush=True)  # from the first line of the last look on
        lines = text.count("\n") + 1
        if once or done or not sys.stdout.isatty():
            return
        time.sleep(EVERY)


def view(run: Run) -> str:
    """The state of a run on some lines: iterations done and how long the rest may take, whether it was stopped, loss and metric
    of training and the metric on validation as they are now, each with its course; the test result when there is one. A torn
    last line of the journal is left out."""
    nobody = left(run.path)  # asked first: a run that ends meanwhile is done, not stopped
    total, rows = run.config.get("iterations"), run.metrics if (run.path / "metrics.jsonl").exists() else []
    if not isinstance(total, int) or total < 1:
        raise UserError(f"{run.path / 'config.json'} has no number of iterations; restore it or repeat the run")
    training = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "val_loss" in row]
    done = int(rows[-1]["iteration"]) if rows else 0
    lines = [f"{run.path}: {run.config.get('algorithm')} on {run.config.get('sampler')}"]
    tested = (run.path / "summary.json").exists()
    if tested and "weights_of" in run.result:
        lines.append(f"evaluation of {run.result['weights_of']}, which trains nothing")
    else:
        lines.append(_progress(done, total, training))
        if not tested and nobody:
            lines.append("stopped, as far as this machine sees; its command with --resume goes on with it")
    for key, name in (("loss", "loss"), ("metric", "metric")):
        if values := [row[key] for row in training if row.get(key) is not None]:
            lines.append(f"{name:22} {values[-1]:>10.4g}  {sparkline(values)}")
    if values := [row["val_metric"] for row in validation if row.get("val_metric") is not None]:
        lines.append(f"{'metric on validation':22} {values[-1]:>10.4g}  {sparkline(values)}")
    if tested:
        lines.append(_tested(run.result))
    return "\n".join(lines)


def _tested(summary: dict[str, Any]) -> str:
    test = summary["test"]
    k = result_step(summary) or 0
    percent = test["metric"] == "accuracy"
    mean, half = (
        "not finite" if value is None else f"{100 * value:.2f}" if percent else f"{value:.4g}"
        for value in (test["mean"][k], test["ci95"][k])
    )
    unit = " %" * percent
    return f"tested: {test['metric']} {mean} ± {half}{unit} after {k} step{'s' * (k != 1)}, {test['tasks']:,} tasks"


def sparkline(values: list[float]) -> str:
    """The course of some numbers in WIDTH characters at most, each the mean of its part of them."""
    parts = min(WIDTH, len(values))
    edges = [round(i * len(values) / parts) for i in range(parts + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    return "".join(BARS[1 + round((len(BARS) - 2) * ((v - low) / (high - low) if high > low else 0.5))] for v in means)


def _progress(done: int, total: int, training: list[dict[str, float]]) -> str:
    bar = "█" * min(20 * done // total, 20)
    seconds = training[-1].get("seconds", 0.0) if training else 0.0
    rest = ""
    if done and seconds:
        left = seconds / max(training[-1]["iteration"], 1) * max(total - done, 0)
        rest = f", {_time(seconds)} so far" + (f", about {_time(left)} left" if left else "")
    return f"{bar:░<20} {done:,} of {total:,} iterations{rest}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes}:{rest:02} min"
