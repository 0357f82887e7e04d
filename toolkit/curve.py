"""The adaptation curve: loss and metric of every test task after 0, 1, ..., S inner steps. The first-class result."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toolkit.intervals import half_width


@dataclass(frozen=True)
class Spread:
    """Mean and interval over tasks of a measure of any shape, from running sums over its finite values."""

    count: Tensor | int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def plus(self, values: Tensor) -> "Spread":
        """With more tasks: `values` of shape (tasks, ...)."""
        finite, values = values.isfinite(), values.double().nan_to_num(0.0, 0.0, 0.0)
        return Spread(self.count + finite.sum(0), self.total + values.sum(0), self.squares + values.square().sum(0))

    def mean(self) -> Tensor:
        """The mean over tasks; NaN where none is finite."""
        return torch.as_tensor(self.total / self.count)

    def ci95(self) -> Tensor:
        """Half the 95 % t interval of the mean; NaN with fewer than two tasks."""
        count = torch.as_tensor(self.count)
        variance = (torch.as_tensor(self.squares) / count - self.mean().square()) * count / (count - 1)
        return half_width(count, variance.clamp(min=0).sqrt())


@dataclass(frozen=True)
class Curve:
    """`loss` and `metric`, each of shape (tasks, steps + 1), float64 on the CPU; column k is after k inner steps.

    `metric_name` names what `metric` holds ("accuracy" in [0, 1], or "squared error").
    `task_list_hash` identifies the very tasks: only curves with equal hashes are comparable task by task.
    `card` holds what else was measured, by name, as means over tasks of shape (steps + 1, ...); `seconds_per_task` is what it
    took to adapt and judge one. Both are of the evaluation itself, and a curve read from a file has none.
    The statistics are over tasks, never over pooled queries, and take the tasks whose value is finite; say `finite()` beside
    them. Each returns a tensor of shape (steps + 1,), of the metric unless another tensor such as `curve.loss` is given.
    """

    loss: Tensor
    metric: Tensor
    metric_name: str
    task_list_hash: str = ""
    card: dict[str, Spread] = field(default_factory=dict)
    seconds_per_task: float = 0.0

    @property
    def steps(self) -> int:
        """The number of inner steps S; the curve has S + 1 points."""
        return self.metric.shape[1] - 1

    @property
    def tasks(self) -> int:
        """The number of tasks."""
        return self.metric.shape[0]

    def mean(self, values: Tensor | None = None) -> Tensor:
        """The mean over tasks."""
        return self._finite_only(values).nanmean(0)

    def median(self, values: Tensor | None = None) -> Tensor:
        """The median over tasks."""
        return self.quantile(0.5, values)

    def quantile(self, q: float, values: Tensor | None = None) -> Tensor:
        """The quantile `q` in [0, 1] over tasks, linearly interpolated."""
        return self._finite_only(values).nanquantile(q, dim=0)

    def ci95(self, values: Tensor | None = None) -> Tensor:
        """Half the width of the 95 % t interval of the mean over tasks; NaN with fewer than two tasks."""
        values = self._finite_only(values)
        n = values.isfinite().sum(0)
        return half_width(n, ((values - values.nanmean(0)).square().nansum(0) / (n - 1)).sqrt())

    def worst(self, share: float = 0.1) -> Tensor:
        """The mean metric of the worst tasks, by the metric where it is accuracy and by the loss otherwise, at each point."""
        return self.metric.gather(0, self.worst_tasks(share)).mean(0)

    def worst_tasks(self, share: float = 0.1) -> Tensor:
        """Which tasks they are, the worst first: numbers of shape (tasks, steps + 1). A value that is not finite is worst."""
        badness = (-self.metric if self.metric_name == "accuracy" else self.loss).nan_to_num(torch.inf, torch.inf)
        order: Tensor = torch.sort(badness, dim=0, descending=True, stable=True).indices
        return order[: max(1, round(share * self.tasks))]

    def finite(self) -> Tensor:
        """The fraction of tasks whose loss and metric are finite."""
        return (self.loss.isfinite() & self.metric.isfinite()).double().mean(0)

    def _finite_only(self, values: Tensor | None) -> Tensor:
        values = self.metric if values is None else values
        return torch.where(values.isfinite(), values, torch.nan)

    def to_json(self) -> dict[str, Any]:
        """Plain lists; a value that is not finite becomes None, as JSON has no NaN. What was computed in float32 is written in
        half the digits, and `single` says so: read as float32 it is the same to the last bit."""
        single = all(torch.equal(v.float().double().nan_to_num(), v.nan_to_num()) for v in (self.loss, self.metric))
        return {
            "metric_name": self.metric_name,
            "task_list_hash": self.task_list_hash,
            "single": single,
            "loss": _to_lists(self.loss, single),
            "metric": _to_lists(self.metric, single),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Curve":
        """The inverse of `to_json`, but that every value that was not finite comes back as NaN. Raises ValueError for what is
        no curve of at least one task."""
        kind = torch.float32 if data.get("single") else torch.float64
        loss, metric = (
            torch.tensor([[torch.nan if v is None else v for v in row] for row in data[key]], dtype=kind).double()
            for key in ("loss", "metric")
        )
        if metric.dim() != 2 or loss.shape != metric.shape:
            raise ValueError(
                f"it holds tensors of shape {tuple(loss.shape)} and {tuple(metric.shape)}, not two of (tasks, steps + 1)"
            )
        return cls(loss, metric, data["metric_name"], data["task_list_hash"])


def _to_lists(values: Tensor, single: bool) -> list[list[float | None]]:
    # numpy writes a float32 in the fewest digits that tell it from its neighbours.
    rows = [[float(str(v)) for v in row] for row in values.float().numpy()] if single else values.tolist()
    return [[v if v - v == 0 else None for v in row] for row in rows]
