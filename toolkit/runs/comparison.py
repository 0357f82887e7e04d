"""Several methods on the same test tasks: means over seeds, intervals over tasks, paired differences."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from toolkit.curve import Curve
from toolkit.errors import UserError
from toolkit.intervals import Difference, paired
from toolkit.metrics import direction
from toolkit.runs.folder import Run, config_hash, names, result_step


@dataclass(frozen=True)
class Entry:
    """One method: its runs, one per seed, and their test curves averaged task by task over the seeds. What draws nothing at
    random is `seedless`: its one run stands for every seed."""

    method: str
    runs: tuple[Run, ...]
    curve: Curve
    seedless: bool = False

    @property
    def trained_steps(self) -> int:
        """The point of the curve that counts as the method's result (`result_step`)."""
        mean = self.curve.mean().nan_to_num().tolist()
        return result_step({"inner_steps": self.inner_steps, "test": {"mean": mean}}) or 0

    @property
    def inner_steps(self) -> int:
        """The inner steps of training; a test may have stopped before them."""
        return int(self.runs[0].result["inner_steps"])

    @property
    def seeds(self) -> list[int]:
        """The training seed of each run."""
        return [int(run.config["seed"]) for run in self.runs]

    def values(self, step: int | None = None) -> Tensor:
        """The metric after `step` inner steps (those of training by default), shape (seeds, tasks)."""
        k = self.trained_steps if step is None else step
        if not 0 <= k <= self.curve.steps:
            raise UserError(
                f"{self.method} was tested for {self.curve.steps} inner steps, not {k}; choose among 0 to {self.curve.steps}"
            )
        return torch.stack([run.curve.metric[:, k] for run in self.runs])

    def mean(self, step: int | None = None) -> tuple[float, float]:
        """The mean over seeds and tasks and half its 95 % interval, which is of the method where there are several seeds."""
        values = self.values(step)
        return paired(values, torch.zeros_like(values))[:2]

    def spread(self) -> float | None:
        """The standard deviation over seeds of the result; None for one seed."""
        results = torch.tensor([run.curve.mean()[self.trained_steps] for run in self.runs])
        return float(results.std()) if len(self.runs) > 1 else None

    def cost(self, key: str) -> float:
        """The mean over seeds of one entry of the runs' cost."""
        return sum(float(run.summary["cost"][key]) for run in self.runs) / len(self.runs)


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by method: those that differ in their seed only belong together. A method is called by its algorithm where that
    tells it from the others, else by its first folder. Raises UserError for two runs of one method and seed."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if not isinstance(run.config.get("seed"), int):
            raise UserError(f"{run.path} has no seed in its config.json; give runs of experiments")
        found.setdefault(config_hash(run.config | {"seed": None}), []).append(run)
    groups = [sorted(group, key=lambda run: int(run.config["seed"])) for group in found.values()]
    for first, second in (pair for group in groups for pair in pairwise(group)):
        if first.config["seed"] == second.config["seed"]:
            raise UserError(
                f"{first.path} and {second.path} are one method with the same seed {first.config['seed']}; give one of them"
            )
    methods = [str(group[0].known["algorithm"]) for group in groups]
    places = names([group[0].path for group in groups])
    return {
        method if methods.count(method) == 1 else f"{method} ({place})": group
        for method, place, group in zip(methods, places, groups, strict=True)
    }


def entries(runs: Mapping[str, Sequence[Run]], seedless: Collection[str] = ()) -> list[Entry]:
    """One entry per method. Raises UserError unless all runs were tested on the same tasks, by the same metric."""
    metrics = {run.curve.metric_name for group in runs.values() for run in group}
    if len(metrics) != 1:
        raise UserError(f"the runs have different metrics ({', '.join(sorted(metrics))}); compare those of one metric")
    hashes = {run.curve.task_list_hash for group in runs.values() for run in group}
    if len(hashes) != 1:
        raise UserError(
            f"the runs were tested on {len(hashes)} different lists of tasks; give them the same --eval-seed and size, or test "
            "them anew on one list by `toolkit evaluate`"
        )
    made = []
    for method, group in runs.items():
        curves = [run.curve for run in group]
        loss, metric = (torch.stack([getattr(c, key) for c in curves]).mean(0) for key in ("loss", "metric"))
        curve = Curve(loss, metric, curves[0].metric_name, curves[0].task_list_hash)
        made.append(Entry(method, tuple(group), curve, method in seedless))
    return made


def difference(entry: Entry, base: Entry, step: int | None = None) -> Difference:
    """Entry minus base on the same tasks, each at its trained steps or at `step`; seed by seed where both have several.

    Raises UserError when they have different seeds, unless one is `seedless`."""
    if sorted(entry.seeds) != sorted(base.seeds) and not (entry.seedless or base.seedless):
        raise UserError(
            f"{entry.method} was trained with seeds {_listed(entry.seeds)} and {base.method} with {_listed(base.seeds)}; give "
            "the same seeds of both"
        )
    return paired(entry.values(step), base.values(step))


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def verdict(found: Difference, metric_name: str) -> str:
    """In words: better or worse only where the interval excludes 0, and not in favour of a side without a finite value on some
    tasks; accuracy is better when larger, an error when smaller, and of a metric called neither (`metrics.direction`) it is
    said which it is."""
    sign = direction(metric_name)
    better = sign * found.mean > 0
    lost = found.lost_a or found.lost_b if not sign else found.lost_a if better else found.lost_b
    if not found.clear or lost:
        return "no difference shown"
    if not sign:
        return "larger" if found.mean > 0 else "smaller"
    return "better" if better else "worse"


def comparison(made: Sequence[Entry], step: int | None = None) -> str:
    """Every method against the first as text, a line each."""
    base, name = made[0], made[0].curve.metric_name
    percent = name == "accuracy"
    width = max(len(entry.method) for entry in made)
    score = "won, tied, lost" if direction(name) else "above, tied, below"
    where = "as trained" if step is None else f"after {step} step{'s' * (step != 1)}"
    lines = [
        f"{name}{' (%)' * percent} {where} on the same {base.curve.tasks} tasks, minus {base.method}",
        f"{'method':{width}}  seeds  {'mean':>17}  {'difference':>19}  {score:>17}  sign test",
    ]
    for entry in made:
        if step is None and entry.curve.steps < entry.inner_steps:
            raise UserError(
                f"{entry.method} was trained with {entry.inner_steps} inner steps and tested for {entry.curve.steps}; compare "
                "after as many with --step, or test it for more by `toolkit evaluate --eval-steps`"
            )
        line = f"{entry.method:{width}}  {len(entry.seeds):>5}  {_pair(*entry.mean(step), percent):>17}"
        if entry is not base:
            found = difference(entry, base, step)
            won, lost = (found.losses, found.wins) if direction(name) < 0 else (found.wins, found.losses)
            counts = f"{won}, {found.ties}, {lost}"
            gap = _pair(found.mean, found.ci95, percent, signed=True)
            line += f"  {gap:>19}  {counts:>17}  p = {found.p_sign:<7.2g}  {verdict(found, name)}"
            line += f" ({found.lost} tasks without a finite value left out)" if found.lost else ""
        lines.append(line)
    seeds = max(len(entry.seeds) for entry in made)
    basis = "of these trained models, over tasks" if seeds == 1 else "of the methods, over training seeds and tasks"
    return "\n".join([*lines, f"± half the 95 % interval {basis}"])


def rows(runs: Mapping[str, Sequence[Run]], base: str = "maml", seedless: Collection[str] = ()) -> list[dict[str, Any]]:
    """The comparison as plain data, best first (by loss, where the metric does not tell): per method the metric after 0..S
    steps with its interval, the paired difference to `base` where that is among them, seconds, peak memory, what is learned and
    what adapts."""
    made = entries(runs, seedless)
    by_name = {entry.method: entry for entry in made}
    result = []
    for entry in made:
        mean, half, k = entry.curve.mean(), entry.curve.ci95(), entry.trained_steps
        result.append({
            "method": entry.method,
            "seeds": len(entry.runs),
            "metric": entry.curve.metric_name,
            "trained_steps": k,
            "mean": _plain(mean),
            "ci95": _plain(half),
            "median": _plain(entry.curve.median()),
            "finite": _plain(entry.curve.finite()),
            "spread": _finite(entry.spread()),
            "difference": [_finite(v) for v in difference(entry, by_name[base])[:2]]
            if base in by_name and entry.method != base
            else None,
            "seconds": round(entry.cost("seconds"), 1),
            "peak_mb": round(entry.cost("peak_mb")),
            "learned": round(entry.cost("parameters") + entry.cost("learned_numbers")),
            "adapted": round(entry.cost("adapted_parameters")),
            "transductive": bool(entry.runs[0].summary["transductive"]),
            "inner_lr": entry.runs[0].config["inner_lr"],
            "chance": entry.runs[0].summary["chance"],
        })  # fmt: skip
    sign, curves = direction(made[0].curve.metric_name), {entry.method: entry.curve for entry in made}

    def rank(row: dict[str, Any]) -> float:
        value = row["mean"][row["trained_steps"]]
        if not sign and value is not None:
            curve = curves[row["method"]]
            value = _finite(float(curve.mean(curve.loss)[row["trained_steps"]]))
        return math.inf if value is None else -(sign or -1) * value

    return sorted(result, key=rank)


def table(found: Sequence[dict[str, Any]], base: str = "maml") -> str:
    """The rows as a Markdown table; `base` is that of `rows`."""
    percent = found[0]["metric"] == "accuracy"
    last = len(found[0]["mean"]) - 1
    head = ["method", "0 steps", "1 step", "as trained (steps)", f"{last} steps", f"minus {base} (paired)", "seeds' s.d.",
            "training", "peak MiB", "learned", "adapts",
            "transductive"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for row in found:
        k = row["trained_steps"]
        gap = row["difference"]
        lines.append([
            f"`{row['method']}`", _cell(row, 0, percent), _cell(row, min(1, last), percent),
            f"{_cell(row, k, percent)} ({k})", _cell(row, last, percent),
            _pair(gap[0], gap[1], percent, signed=True) if gap and gap[0] is not None else "-",
            "-" if row["spread"] is None else _number(row["spread"], percent),
            f"{row['seconds']:.0f} s", str(row["peak_mb"]), f"{row['learned']:,}", f"{row['adapted']:,}",
            "yes" if row["transductive"] else "no",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: dict[str, Any], k: int, percent: bool) -> str:
    mean, half = row["mean"][k], row["ci95"][k]
    if mean is None:
        return "not finite"
    lost = f", {1 - row['finite'][k]:.1%} lost" if row["finite"][k] < 1 else ""
    return _pair(mean, half, percent) + lost


def _pair(mean: float, half: float | None, percent: bool, signed: bool = False) -> str:
    if not math.isfinite(mean):
        return "not finite"
    half = _finite(half)
    sign = "+" if signed and mean > 0 else ""
    return f"{sign}{_number(mean, percent)} ± {'?' if half is None else _number(half, percent)}"


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.2f}" if percent else f"{value:.3f}" if abs(value) < 1000 else f"{value:.2g}"


def _plain(values: Tensor) -> list[float | None]:
    return [None if v is None else round(v, 6) for v in map(_finite, values.tolist())]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
