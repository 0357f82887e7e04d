"""Several methods on the same test tasks: means over seeds, intervals over tasks, paired differences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.curve import Curve
from toolkit.errors import UserError
from toolkit.runs.folder import Run


@dataclass(frozen=True)
class Entry:
    """One method: its runs, one per seed, and their test curves averaged task by task over the seeds."""

    method: str
    runs: tuple[Run, ...]
    curve: Curve

    @property
    def trained_steps(self) -> int:
        """The point of the curve that counts as the method's result: the steps of its training; the last for what was trained
        without adaptation and adapts at test time all the same."""
        steps = min(int(self.runs[0].summary["inner_steps"]), self.curve.steps)
        moves = not torch.equal(*(self.curve.metric[:, k].nan_to_num() for k in (0, -1)))
        return self.curve.steps if steps == 0 and moves else steps

    def spread(self) -> float | None:
        """The standard deviation over seeds of the result; None for one seed."""
        results = torch.tensor([run.curve.mean()[self.trained_steps] for run in self.runs])
        return float(results.std()) if len(self.runs) > 1 else None

    def cost(self, key: str) -> float:
        """The mean over seeds of one entry of the runs' cost."""
        return sum(float(run.summary["cost"][key]) for run in self.runs) / len(self.runs)


def entries(runs: Mapping[str, Sequence[Run]]) -> list[Entry]:
    """One entry per method. Raises UserError unless all runs were tested on the same tasks."""
    hashes = {run.curve.task_list_hash for group in runs.values() for run in group}
    if len(hashes) != 1:
        raise UserError(
            f"the runs were tested on {len(hashes)} different lists of tasks; give them the same --eval-seed and size"
        )
    made = []
    for method, group in runs.items():
        curves = [run.curve for run in group]
        loss, metric = (torch.stack([getattr(c, key) for c in curves]).mean(0) for key in ("loss", "metric"))
        made.append(Entry(method, tuple(group), Curve(loss, metric, curves[0].metric_name, curves[0].task_list_hash)))
    return made


def difference(entry: Entry, base: Entry) -> tuple[float, float]:
    """The mean over tasks of (entry - base), each at its trained steps, and half its 95 % interval: paired, task by task."""
    gap: Tensor = entry.curve.metric[:, entry.trained_steps] - base.curve.metric[:, base.trained_steps]
    paired = Curve(gap[:, None], gap[:, None], "difference")
    return float(paired.mean()[0]), float(paired.ci95()[0])


def rows(runs: Mapping[str, Sequence[Run]], base: str = "maml") -> list[dict[str, Any]]:
    """The comparison as plain data, best first: per method the metric after 0..S steps with its interval, the paired difference
    to `base` where that is among them, seconds, peak memory, what is learned and what adapts."""
    made = entries(runs)
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
            "difference": [_finite(v) for v in difference(entry, by_name[base])]
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
    sign = -1 if made[0].curve.metric_name == "accuracy" else 1

    def rank(row: dict[str, Any]) -> float:
        value = row["mean"][row["trained_steps"]]
        return float("inf") if value is None else sign * value

    return sorted(result, key=rank)


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    percent = found[0]["metric"] == "accuracy"
    last = len(found[0]["mean"]) - 1
    head = ["method", "0 steps", "1 step", "as trained (steps)", f"{last} steps", "minus maml (paired)", "seeds' s.d.",
            "training", "peak MB", "learned", "adapts",
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
    sign = "+" if signed and mean > 0 else ""
    return f"{sign}{_number(mean, percent)} ± {'?' if half is None else _number(half, percent)}"


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.2f}" if percent else f"{value:.3f}" if abs(value) < 1000 else f"{value:.2g}"


def _plain(values: Tensor) -> list[float | None]:
    return [None if v is None else round(v, 6) for v in map(_finite, values.tolist())]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
