"""A run folder: what is in it, how it is read, how each file is written.

config.json          what was asked for            curve.json            every test task after 0..S inner steps
metrics.jsonl        one line per log interval     summary.json          the result in one page (keys: see `Run`)
example.safetensors  one test task with predictions                      checkpoints/  see `toolkit.runs.checkpoint`
"""

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

import toolkit
from toolkit import plugins
from toolkit.curve import Curve
from toolkit.errors import UserError
from toolkit.files import replace

# These say where a run is kept and how it is watched; they cannot change its numbers.
NOT_HASHED = (
    "out", "resume", "overwrite", "debug", "data_root", "download", "preset", "logger", "budget", "protocol", "shard", "slurm",
    "job", "metric",
)  # fmt: skip
# Flags that came after the first version, with the value that leaves everything as it was: runs without them still resume.
LATER: dict[str, Any] = {
    "order": None, "method": [], "rule": None, "inner_batch": None, "inner_clip": None, "head": "head", "meta_optimizer": None,
    "meta_schedule": None, "meta_clip": None, "permutations": 1, "backend": "toolkit", "train_shots": None,
    "dataset": None, "sampler_args": [], "dataset_args": [], "model_args": [], "train_ways": None,
    "augment": "none", "support_copies": 0, "trace": True, "autocast": None, "adapts": None, "freeze": None, "lora": None,
    "lora_layers": "*", "prompts": None, "pretrained": None, "reduce": "fast",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run folder, read lazily; every reader raises UserError with one sentence when its file is missing or damaged."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The flags of the run, by name."""
        return self._json("config.json")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """experiment, algorithm, sampler, seed, test {tasks, steps, metric, mean, ci95, median, loss}, cost, versions, ..."""
        return self._json("summary.json")

    @cached_property
    def result(self) -> dict[str, Any]:
        """The summary of a run that has a test result, whole enough to be drawn and compared."""
        summary, test = self.summary, self.summary.get("test")
        if not test:
            raise UserError(f"{self.path} has no test result in summary.json; let the run finish, or evaluate it first")
        try:
            words = summary["algorithm"], summary["sampler"], test["metric"]
            steps = [int(step) for step in test["steps"]]
            if not (all(isinstance(word, str) for word in words) and steps and int(test["tasks"]) > 0):
                raise ValueError("no algorithm, sampler, metric, steps or tasks")
            for key in ("mean", "ci95"):
                if [value is None or math.isfinite(value) for value in test[key]] != [True] * len(steps):
                    raise ValueError(f"test {key} is not a number for each of its steps")
        except (KeyError, TypeError, ValueError) as error:
            raise self.damaged("summary.json", error) from None
        return summary

    @cached_property
    def known(self) -> dict[str, Any]:
        """The result; of a run that goes on or was stopped, what its configuration says of it: algorithm, sampler, test
        {metric}."""
        if (self.path / "summary.json").exists():
            return self.result
        return {key: str(self.config.get(key)) for key in ("algorithm", "sampler")} | {
            "test": {"metric": self.config.get("metric", "metric")}
        }

    @cached_property
    def curve(self) -> Curve:
        """The test curve, every task."""
        data = self._json("curve.json")
        try:
            return Curve.from_json(data)
        except (KeyError, TypeError, ValueError) as error:
            raise self.damaged("curve.json", error) from None

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """Training rows {iteration, loss, metric, seconds}, validation rows {iteration, val_loss, val_metric, val_ci95}, and
        rows of learned inner rates {iteration, rate/<name>, ...}; without a half-written last one in a run that goes on."""
        torn = not (self.path / "summary.json").exists()
        lines, rows = self._read("metrics.jsonl").splitlines(), []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if _is_row(row):
                rows.append(row)
            elif not (torn and number == len(lines)):
                why = f"line {number} is no row of a run, which has an iteration and numbers by name"
                raise self.damaged("metrics.jsonl", why)
        return rows

    @cached_property
    def example(self) -> dict[str, Tensor]:
        """One test task: support_x, support_y, query_x, query_y, `steps` (shown,), predictions (shown, queries, outputs)."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        name = "example.safetensors"
        try:
            found = load(self._bytes(name))
        except SafetensorError as error:
            raise self.damaged(name, error) from None
        if missing := {"support_x", "support_y", "query_x", "query_y", "steps", "predictions"} - found.keys():
            raise self.damaged(name, f"it has no {sorted(missing)[0]}")
        return found

    def _bytes(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing(name) from None

    def _read(self, name: str) -> str:
        try:
            return self._bytes(name).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(name, error) from None

    def _json(self, name: str) -> dict[str, Any]:
        try:
            data = json.loads(self._read(name))
        except json.JSONDecodeError as error:
            raise self.damaged(name, error) from None
        if not isinstance(data, dict):
            raise self.damaged(name, f"it is a {type(data).__name__}, not names with values")
        return data

    def damaged(self, name: str, error: Exception | str) -> UserError:
        """The error for a file of the folder that cannot be used."""
        return UserError(f"{self.path / name} is damaged ({error}); restore it or repeat the run")

    def _missing(self, name: str) -> UserError:
        if not self.path.is_dir():
            what = ", which is a file" if self.path.exists() else ""
            return UserError(f"there is no run folder {self.path}{what}; give the folder that holds config.json")
        there = [known for known in ("config.json", "summary.json") if (self.path / known).exists()]
        if not there:
            return UserError(f"{self.path} is no run folder, it has no config.json; give a folder that an experiment wrote")
        if "summary.json" in there:
            return UserError(f"{self.path} has no {name}, though the run is finished; what needs that file cannot be had of it")
        return UserError(f"{self.path} has no {name}; the run has not come so far, continue it with --resume")


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("iteration"), int | float):
        return False
    return all(value is None or isinstance(value, int | float) for value in row.values())


def result_step(summary: Mapping[str, Any]) -> int | None:
    """The inner steps after which a run's test counts as its result: those of its training, or the last tested where that is
    less; the last also for what was trained without adaptation and adapts at test time all the same. None where the summary
    does not say."""
    steps, test = summary.get("inner_steps"), summary.get("test")
    mean = test.get("mean") if isinstance(test, dict) else None
    if not isinstance(steps, int) or not isinstance(mean, list) or not mean:
        return None
    last = len(mean) - 1
    return last if steps == 0 and mean[0] != mean[-1] else min(steps, last)


def names(paths: Sequence[Path]) -> list[str]:
    """The shortest end of each path that tells it from the others, which are all different."""
    ends = [["/".join(path.resolve().parts[-n:]) for n in range(1, len(path.resolve().parts) + 1)] for path in paths]
    taken = Counter(end for of_path in ends for end in of_path)
    return [next((end for end in of_path if taken[end] == 1), of_path[-1]) for of_path in ends]


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes `data` as JSON, whole or not at all. Numbers are kept exactly; NaN is refused."""
    replace(path, (json.dumps(data, indent=None if "curve" in path.name else 2, allow_nan=False) + "\n").encode())


def size_words(config: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    """Ways and shots of the flags in words, where the test tasks were found to be of that size: a sampler that does not take a
    flag makes tasks of its own size. Runs of earlier versions did not look."""
    found = summary.get("sizes")
    told = found if isinstance(found, dict) else config
    keys = (key for key in ("ways", "shots") if config.get(key) is not None and told.get(key) == config[key])
    return [f"{config[key]}-{key.removesuffix('s')}" for key in keys]


def config_hash(config: dict[str, Any]) -> str:
    """Identifies the part of a configuration that decides the numbers."""
    config = json.loads(json.dumps(config))  # as config.json is read: tuples are lists there
    kept = {key: value for key, value in config.items() if key not in NOT_HASHED and not (key in LATER and value == LATER[key])}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def source_hash() -> str:
    """Identifies the code that runs: all of the toolkit, the script that was started, and the plug-ins that were resolved."""
    digest = hashlib.sha256()
    for file in (*sorted(Path(toolkit.__file__).parent.rglob("*.py")), Path(sys.argv[0]), *plugins.sources()):
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()[:16]
