"""The adaptation curve: loss and metric of every test task after 0, 1, ..., S inner steps. The first-class result."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Curve:
    """`loss` and `metric`, each of shape (tasks, steps + 1), float64 on the CPU; column k is after k inner steps.

    `metric_name` names what `metric` holds ("accuracy" in [0, 1], or "squared error").
    `task_list_hash` identifies the very tasks: only curves with equal hashes are comparable task by task.
    The statistics are over tasks, never over pooled queries, and take the tasks whose value is finite; say `finite()` beside
    them. Each returns a tensor of shape (steps + 1,), of the metric unless another tensor such as `curve.loss` is given.
    """

    loss: Tensor
    metric: Tensor
    metric_name: str
    task_list_hash: str = ""

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
        from scipy.stats import t

        values = self._finite_only(values)
        n = values.isfinite().sum(0).double()
        deviation = ((values - values.nanmean(0)).square().nansum(0) / (n - 1)).sqrt()
        factor = torch.from_numpy(t.ppf(0.975, (n - 1).clamp(min=1).numpy()))
        return torch.where(n > 1, factor * deviation / n.sqrt(), torch.nan)

    def finite(self) -> Tensor:
        """The fraction of tasks whose loss and metric are finite."""
        return (self.loss.isfinite() & self.metric.isfinite()).double().mean(0)

    def _finite_only(self, values: Tensor | None) -> Tensor:
        values = self.metric if values is None else values
        return torch.where(values.isfinite(), values, torch.nan)

    def to_json(self) -> dict[str, Any]:
        """Plain lists; a value that is not finite becomes None, as JSON has no NaN."""
        return {
            "metric_name": self.metric_name,
            "task_list_hash": self.task_list_hash,
            "loss": _to_lists(self.loss),
            "metric": _to_lists(self.metric),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Curve":
        """The inverse of `to_json`, but that every value that was not finite comes back as NaN."""
        loss, metric = (
            torch.tensor([[torch.nan if v is None else v for v in row] for row in data[key]], dtype=torch.float64)
            for key in ("loss", "metric")
        )
        return cls(loss, metric, data["metric_name"], data["task_list_hash"])


def _to_lists(values: Tensor) -> list[list[float | None]]:
    return [[v if v - v == 0 else None for v in row] for row in values.tolist()]
