"""`summary.json`: a run's result on one page, with all that is needed to trace and repeat it."""

import platform
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import toolkit
from toolkit.curve import Curve
from toolkit.learner import Learner
from toolkit.norms import TRANSDUCTIVE
from toolkit.plan import Plan
from toolkit.runs.folder import config_hash
from toolkit.tree import numel


def summarise(
    config: dict[str, Any],
    learner: Learner,
    plan: Plan,
    curve: Curve,
    seconds: float,
    selected: dict[str, float],
    chance: float | None,
    git: str | None,
    uses_batch_norm: bool,
) -> dict[str, Any]:
    """The content of `summary.json`. `seconds` is the training time, validation and earlier parts of the run included."""
    params, learned, _ = learner.init()
    policy = learner.batch_norm if uses_batch_norm else "no batch norm"
    test = {
        "tasks": curve.tasks,
        "steps": list(range(curve.steps + 1)),
        "metric": curve.metric_name,
        "mean": _plain(curve.mean()),
        "ci95": _plain(curve.ci95()),
        "median": _plain(curve.median()),
        "q05": _plain(curve.quantile(0.05)),
        "q95": _plain(curve.quantile(0.95)),
        "loss": _plain(curve.mean(curve.loss)),
        "finite": _plain(curve.finite()),
    }
    cost = {
        "seconds": round(seconds, 1),
        "seconds_per_iteration": round(seconds / config["iterations"], 6),
        "tasks_per_second": round(config["iterations"] * config["tasks"] / seconds, 1) if seconds else None,
        "peak_mb": _peak_mb(config["device"]),
        "parameters": numel(params),
        "adapted_parameters": numel(learner.adapted(params)),
        "learned_numbers": numel(learned),
    }
    return {
        "experiment": config["experiment"],
        "algorithm": learner.name,
        "sampler": config["sampler"],
        "seed": config["seed"],
        "inner_steps": learner.steps,
        "chance": chance,
        "test": test,
        "selected": selected,
        "cost": cost,
        "plan": asdict(plan),
        "batch_norm": policy,
        "transductive": policy in TRANSDUCTIVE,
        "versions": _versions(),
        "config_hash": config_hash(config),
        "task_list_hash": curve.task_list_hash,
        "git": git,
    }


def _peak_mb(device: str) -> int:
    """The most memory held so far: by the process on a CPU, by tensors on a GPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) // 2**20
    import resource  # not on every system, and needed only here

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def _plain(values: Tensor) -> list[float | None]:
    return [round(v, 6) if v - v == 0 else None for v in values.tolist()]


def _versions() -> dict[str, str]:
    found = {"toolkit": toolkit.__version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "scipy", "matplotlib"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def code_version() -> str | None:
    """The commit of the toolkit's own checkout, with "+changes" when files differ from it; None when it is no checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(toolkit.__file__).parent.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "toolkit/__init__.py")  # else this is an environment inside another repository
        changes = git("status", "--porcelain", "--untracked-files=no", "--", "toolkit", "experiments")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


def table(summary: dict[str, Any]) -> str:
    """The test result as text, one line per number of inner steps."""
    test = summary["test"]
    percent = test["metric"] == "accuracy"
    lines = [
        f"{summary['algorithm']} on {summary['sampler']}: {test['metric']} on {test['tasks']} test tasks, "
        f"checkpoint of iteration {summary['selected'].get('iteration', 0)} chosen on validation tasks",
        f"{'steps':>5} {'mean':>8} {'95 %':>8} {'median':>8} {'loss':>8} {'finite':>7}",
    ]
    for i, step in enumerate(test["steps"]):
        cells = [_number(test[key][i], percent) for key in ("mean", "ci95", "median")]
        mark = " <- as trained" if step == summary["inner_steps"] else ""
        lines.append(
            f"{step:>5} {cells[0]:>8} {'±' + cells[1]:>8} {cells[2]:>8} {_number(test['loss'][i], False):>8} "
            f"{test['finite'][i]:>7.1%}{mark}"
        )
    return "\n".join(lines)


def _number(value: float | None, percent: bool) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2f}%" if percent else f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"
