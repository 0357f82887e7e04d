"""A command line handed to Slurm by submitit: the same experiment, by the processes of a job."""

import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkit.errors import UserError, unknown

# What can be asked for, with what submitit calls it.
KEYS = {
    "nodes": "nodes",
    "processes": "tasks_per_node",
    "gpus": "gpus_per_node",
    "cpus": "cpus_per_task",
    "minutes": "timeout_min",
    "memory_gb": "mem_gb",
    "partition": "slurm_partition",
    "account": "slurm_account",
    "constraint": "slurm_constraint",
    "local": "",
}
TEXTS = ("partition", "account", "constraint")
LOGS = Path("results") / "slurm"


@dataclass(frozen=True)
class Work:
    """A command line (a script and its words) as the work of each process of a job. A job that Slurm takes the machine from,
    or whose time is up, is put in line again and goes on from its newest checkpoint."""

    words: tuple[str, ...]

    def __call__(self) -> None:
        from submitit.helpers import TorchDistributedEnvironment

        # Each process sees all devices of its machine and takes the one of its local rank.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        script, *rest = self.words
        sys.argv = [script, *rest]
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")

    def checkpoint(self, *arguments: Any) -> Any:
        """What submitit puts in line when the job is stopped."""
        from submitit.helpers import DelayedSubmission

        if "SLURM_JOB_ID" in os.environ:
            return DelayedSubmission(self)  # Slurm counts how often, so that it knows its run: `entry.put_in_line_again`
        kept = tuple(word for word in self.words if word not in ("--resume", "--overwrite"))
        return DelayedSubmission(replace(self, words=(*kept, "--resume")))


def asked(text: str) -> dict[str, int | str]:
    """What a text such as "nodes=2,gpus=8,minutes=600,partition=gpu" asks for. Without `processes` there is one for each GPU.
    Raises UserError for an unknown key and for a value that is no number where one is wanted."""
    found: dict[str, int | str] = {"nodes": 1}
    for pair in filter(None, text.split(",")):
        key, _, value = (part.strip() for part in pair.partition("="))
        if key not in KEYS:
            raise unknown("key of --slurm", key, KEYS)
        if key not in TEXTS and not (value.isdigit() and int(value) > 0):
            raise UserError(f"--slurm {pair}: {key} is a whole number, 1 or more; give one")
        found[key] = value if key in TEXTS else int(value)
    return {"processes": found.get("gpus", 1)} | found


def submit(words: Sequence[str], wish: Mapping[str, int | str], logs: Path = LOGS) -> Any:
    """Hands the command line to Slurm, or with `local` to processes on this machine; returns submitit's job. Raises UserError
    where submitit or Slurm is missing."""
    try:
        import submitit
    except ImportError:
        raise UserError("--slurm needs submitit; run pip install submitit, or start the processes by torchrun") from None
    logs.mkdir(parents=True, exist_ok=True)
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster="local" if "local" in wish else "slurm")
        executor.update_parameters(name="toolkit", **{KEYS[key]: value for key, value in wish.items() if key != "local"})
        return executor.submit(Work(tuple(words)))
    except (RuntimeError, FileNotFoundError, ValueError) as error:
        raise UserError(f"--slurm: {' '.join(str(error).split())}; or start the processes by torchrun") from None


def without(words: Sequence[str], flag: str) -> tuple[str, ...]:
    """A command line without a flag and its value, however it was written."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip or word.startswith(f"{flag}="):
            skip = False
        elif word == flag:
            skip = True
        else:
            kept.append(word)
    return tuple(kept)
