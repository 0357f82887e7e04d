"""`summary.json`: a run's result on one page, with all that is needed to trace and repeat it."""

import platform
import shlex
import subprocess
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import toolkit
from toolkit.allocator import memory
from toolkit.cost import model_bytes, own_weights, stored_bytes
from toolkit.curve import Curve
from toolkit.learner import Learner, Meta
from toolkit.metrics import ece
from toolkit.norms import TRANSDUCTIVE
from toolkit.plan import Plan
from toolkit.runs.folder import NOT_HASHED, config_hash, result_step
from toolkit.task import Batch
from toolkit.tree import numel


@dataclass(frozen=True)
class Outcome:
    """What training leaves: the meta-parameters chosen on validation tasks, where they come from, what it cost (seconds, with
    validation and earlier parts of the run; the most megabytes that the process held), and the plan of its end. Where they are
    known, also the operations of one meta-gradient, and the joules that the machine spent, by which of its counters."""

    best: Meta
    selected: dict[str, float]
    seconds: float
    plan: Plan
    peak_mb: int
    operations: int | None = None
    joules: float | None = None
    joules_of: str = ""


def summarise(
    config: dict[str, Any],
    learner: Learner,
    curve: Curve,
    outcome: Outcome,
    chance: float | None,
    uses_batch_norm: bool,
    evaluation_bytes: int,
    traces: dict[str, Any],
    evaluation_operations: int | None = None,
    support: Batch | None = None,
) -> dict[str, Any]:
    """The content of `summary.json`. `evaluation_bytes` is what evaluation held at most beyond what was held before; `traces`
    leads back to the run: how its checkpoint was selected, its code, the command that repeats it; `evaluation_operations` are
    those of adapting to one test task and predicting its query set; `support` is the support set of one."""
    seconds = outcome.seconds
    params, learned, _ = learner.init()
    fast = own_weights(learner, support)
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
        "loss_ci95": _plain(curve.ci95(curve.loss)),
        "loss_median": _plain(curve.median(curve.loss)),
        "loss_q05": _plain(curve.quantile(0.05, curve.loss)),
        "loss_q95": _plain(curve.quantile(0.95, curve.loss)),
        "finite": _plain(curve.finite()),
        "worst_tenth": _plain(curve.worst()),
    }
    cost = {
        "seconds": round(seconds, 1),
        "seconds_per_iteration": round(seconds / config["iterations"], 6),
        "tasks_per_second": round(config["iterations"] * config["tasks"] / seconds, 1) if seconds else None,
        "peak_mb": outcome.peak_mb,
        "evaluation_mb": round(evaluation_bytes / 2**20, 1),
        "parameters": numel(params),
        "adapted_parameters": numel(fast),
        "learned_numbers": numel(learned),
        "meta_gradient_operations": outcome.operations,
        "evaluation_operations": evaluation_operations,
        "model_parameters": sum(p.numel() for p in learner.model.parameters()),
        "model_bytes": model_bytes(learner),
        "task_bytes": stored_bytes(fast.values()),
        "joules": None if outcome.joules is None else round(outcome.joules, 1),
        "joules_of": outcome.joules_of if outcome.joules is not None else None,
    }
    return {
        "experiment": config["experiment"],
        "algorithm": learner.name,
        "sampler": config["sampler"],
        "seed": config["seed"],
        "inner_steps": learner.steps,
        "chance": chance,
        "test": test,
        "card": card(curve, result_step({"inner_steps": learner.steps, "test": test}) or 0),
        "selected": outcome.selected,
        "cost": cost,
        "plan": asdict(outcome.plan),
        "pretrained_on": getattr(learner.model, "pretrained_on", ""),
        "batch_norm": policy,
        "transductive": policy in TRANSDUCTIVE,
        "versions": _versions(),
        "config_hash": config_hash(config),
        "task_list_hash": curve.task_list_hash,
        **traces,
    }


def card(curve: Curve, trained: int) -> dict[str, Any]:
    """What else evaluation measured, for every number of steps: means over tasks, the intervals of those that are one number,
    the calibration error of all queries together (each task weighs the same); and which tasks are the worst after the steps of
    training."""
    found: dict[str, Any] = {}
    for name, spread in curve.card.items():
        found[name] = _plain(spread.mean())
        if spread.mean().dim() == 1:
            found[f"{name}_ci95"] = _plain(spread.ci95())
        if name == "reliability":
            found["ece"] = _plain(ece(spread.mean()))
    worst = [int(task) for task in curve.worst_tasks()[:, trained]]
    return found | {"worst_tasks": worst, "seconds_per_task": round(curve.seconds_per_task, 6)}


def command(flags: Any, experiment: str) -> str:
    """The command line that repeats a run: every flag that is not the experiment's default and can change its numbers."""
    words = ["python", f"experiments/{experiment}.py"]
    for field in fields(flags):
        value, default = getattr(flags, field.name), getattr(type(flags)(), field.name)
        flag = field.name.replace("_", "-")
        if value == default or field.name in NOT_HASHED:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return shlex.join(words)


def peak_mb(device: str) -> int:
    """The most memory held since the plan was chosen: by the process on a CPU, taken by it from a GPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_reserved(device) // 2**20
    return memory("VmHWM") // 2**20


def _plain(values: Tensor) -> list[Any]:
    """Nested lists of numbers as the tensor is shaped; None for what is not finite."""
    if values.dim() > 1:
        return [_plain(row) for row in values]
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
        mark = " <- as trained" if i == result_step(summary) else ""
        lines.append(
            f"{step:>5} {cells[0]:>8} {'±' + cells[1]:>8} {cells[2]:>8} {_number(test['loss'][i], False):>8} "
            f"{test['finite'][i]:>7.1%}{mark}"
        )
    return "\n".join([*lines, _card_line(summary), *_cost_line(summary["cost"])])


def _card_line(summary: dict[str, Any]) -> str:
    """The rest of the evaluation card on a line, after the steps of training."""
    last = len(summary["test"]["steps"]) - 1
    k, card, percent = result_step(summary) or 0, summary["card"], "ece" in summary["card"]
    said = [f"after {k} step{'s' * (k != 1)}:"]
    if percent:
        said += [f"NLL {card['nll'][k]:.3f}, Brier {card['brier'][k]:.3f}, calibration error {100 * card['ece'][k]:.1f}%,"]
    worst = _number(summary["test"]["worst_tenth"][k], summary["test"]["metric"] == "accuracy")
    policy = f"batch norm {summary['batch_norm']}{' (transductive)' if summary['transductive'] else ''}"
    policy = summary["batch_norm"] if summary["batch_norm"].startswith("no ") else policy
    time = f"{1000 * card['seconds_per_task']:.3g} ms a task for {last} step{'s' * (last != 1)}"
    said += [f"worst tenth of tasks {worst}, {time},", policy]
    return " ".join(said)


def _cost_line(cost: dict[str, Any]) -> list[str]:
    """What training and a task cost, as far as the run knows it: those of earlier versions do not."""
    works = (("meta_gradient_operations", "a meta-gradient"), ("evaluation_operations", "to adapt to a task and predict"))
    said = [f"{cost[key] / 1e9:,.4g} GFLOP {what}" for key, what in works if cost.get(key) is not None]
    if "task_bytes" in cost:
        stored, shared = (f"{cost[key] / 1e3:,.4g} kB" for key in ("task_bytes", "model_bytes"))
        said.append(f"{stored} to store for a task beside the model's {shared}")
    if cost.get("peak_mb"):
        said.append(f"{cost['peak_mb']:,.0f} MiB at most")
    if cost.get("joules") is not None:
        said.append(f"{cost['joules']:,.0f} J ({cost['joules_of']})")
    return [f"cost: {', '.join(said)}"] if said else []


def _number(value: float | None, percent: bool) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2f}%" if percent else f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"
