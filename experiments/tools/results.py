"""Runs what the tables in results/tables/*.json want and results/reference/ does not hold yet; `make results`.

    python -m experiments.tools.results --data-root data
    python -m experiments.tools.results --data-root data --estimate 60      (how long all of it takes here)

A row with `seeds` has one run per seed, in FOLDER-seed0, FOLDER-seed1, ...; the first seeds of all rows come first. Each run is
its row's command with one thread. Stopped by Ctrl-C or worse, the same command goes on where it was. A run that fails is named
at the end, and the others go on.

`--estimate N` trains each row for N iterations, `--jobs` at a time, and tells what the seconds of the later half and those of a
test task make for all runs with their own numbers of iterations, validation and test tasks, by the configurations in `--out`.
What a run does once (data, recordings, figures: some seconds) is left out.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from toolkit.cluster import without
from toolkit.errors import UserError
from toolkit.flags import launch
from toolkit.runs.folder import Run

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Config:
    """Fill results/reference/ with the runs of all tables."""

    data_root: Path = Path("data")
    """Folder of the data sets."""
    jobs: int = 2
    """Runs at a time, each with one thread."""
    match: str = ""
    """Runs to make: those with this in the name of their folder."""
    out: Path = ROOT / "results" / "reference"
    """Where the run folders go."""
    estimate: int = 0
    """Iterations of each row by which to tell how long all runs take, in place of making them."""


class Wanted(NamedTuple):
    """A run of a table: the name of its folder, and its command line after `python`."""

    folder: str
    words: tuple[str, ...]


def wanted(config: Config) -> list[Wanted]:
    """The runs of all tables, the first seeds of all rows first."""
    rows = [
        row for table in sorted((ROOT / "results" / "tables").glob("*.json")) for row in json.loads(table.read_text())["rows"]
    ]
    found = []
    for seed in range(max(row["seeds"] or 1 for row in rows)):
        for row in rows:
            if seed >= (row["seeds"] or 1):
                continue
            _, *words = shlex.split(row["command"])
            if "--data-root" in words:
                words[words.index("--data-root") + 1] = str(config.data_root)
            own = ("--seed", str(seed)) if row["seeds"] else ()
            found.append(Wanted(row["folder"] + (f"-seed{seed}" if own else ""), (*words, *own)))
    return [each for each in found if config.match in each.folder]


SHORT = {"val-tasks": 10, "eval-tasks": 130}


def minutes(run: Wanted, iterations: int, kept: dict[str, Any]) -> float:
    """What the whole run takes, by a short one; `kept` is its configuration."""
    words = run.words
    asked = {"iterations": iterations, "validate-every": iterations} | SHORT
    for flag in asked:
        words = without(words, f"--{flag}")
    # With a budget, plans are measured as for a long training.
    flags = [word for flag, value in asked.items() for word in (f"--{flag}", str(value))] + ["--budget", "12GB"]
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, *words, *flags, "--out", f"{place}/run"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise UserError(f"{run.folder}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        short = Run(Path(place) / "run")
        rows = [row for row in short.metrics if "loss" in row]
        half, last = rows[len(rows) // 2], rows[-1]
        each = (last["seconds"] - half["seconds"]) / (last["iteration"] - half["iteration"])
        task = short.summary["card"]["seconds_per_task"]
    judged = kept["eval_tasks"] + kept["val_tasks"] * kept["iterations"] / kept["validate_every"]
    return float(each * kept["iterations"] + task * judged) / 60


def tell(config: Config, runs: list[Wanted]) -> None:
    """Prints minutes of each row's run, and hours of all."""
    if config.estimate < 4:
        raise UserError(f"--estimate is {config.estimate}; give at least 4 iterations")
    rows: dict[str, list[Wanted]] = {}
    for run in runs:
        rows.setdefault(run.folder.rsplit("-seed", 1)[0], []).append(run)
    if unknown := [own[0].folder for own in rows.values() if not (config.out / own[0].folder / "config.json").exists()]:
        raise UserError(f"{config.out} has no configuration of {unknown[0]}; let its run begin first")

    def of(own: list[Wanted]) -> float:
        return minutes(own[0], config.estimate, Run(config.out / own[0].folder).config)

    with ThreadPoolExecutor(config.jobs) as pool:
        found = dict(zip(rows, tqdm(pool.map(of, rows.values()), total=len(rows), desc="estimate", unit="row"), strict=True))
    for name, own in rows.items():
        print(f"{name:40} {len(own)} x {found[name]:6.1f} min")
    hours = sum(len(own) * found[name] for name, own in rows.items()) / 60 / config.jobs
    print(f"{len(runs)} runs, {config.jobs} at a time: {hours:.2f} hours")


def main(config: Config) -> None:
    if config.jobs < 1:
        raise UserError(f"--jobs is {config.jobs}; give 1 or more")
    runs = wanted(config)
    if not runs:
        raise UserError(f"no run of the tables has {config.match!r} in its name; leave --match out to make all")
    if config.estimate:
        return tell(config, runs)
    missing = [run for run in runs if not (config.out / run.folder / "summary.json").exists()]
    failed: list[str] = []
    stop = threading.Event()

    def make(run: Wanted, bar: "tqdm[object]") -> None:
        if stop.is_set():
            return
        bar.write(f"{run.folder}: begins")
        log, folder = config.out / f"{run.folder}.log", config.out / run.folder
        with log.open("w") as out:
            command = [sys.executable, *run.words, "--out", str(folder), "--resume"]
            done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            failed.append(f"{run.folder} (its last words are in {log})")
            bar.write(f"{run.folder}: failed")
            return
        log.unlink()
        summary = json.loads((folder / "summary.json").read_text())
        test, k = summary["test"], summary["inner_steps"]
        bar.write(
            f"{run.folder}: {test['metric']} {test['mean'][k]:.4f} after {summary['cost']['seconds'] / 60:.1f} min of training"
        )
        bar.update()

    with tqdm(total=len(runs), initial=len(runs) - len(missing), desc="results", unit="run") as bar:
        pool = ThreadPoolExecutor(config.jobs)
        try:
            list(pool.map(lambda run: make(run, bar), missing))
        except KeyboardInterrupt:
            stop.set()
            raise
    if failed:
        raise UserError(f"{len(failed)} of {len(missing)} runs failed: {'; '.join(failed)}; mend the cause and start again")


if __name__ == "__main__":
    launch(Config, main, {}, __doc__ or "")
