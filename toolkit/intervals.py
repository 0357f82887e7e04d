"""Intervals and tests over tasks: what a mean is worth, and whether one method is better than another on the same tasks."""

from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.errors import UserError


def half_width(count: Tensor, deviation: Tensor) -> Tensor:
    """Half the width of the 95 % t interval of the mean of `count` values with this standard deviation (with count - 1); NaN
    with fewer than two values."""
    from scipy.stats import t

    n = count.double()
    factor = torch.from_numpy(t.ppf(0.975, (n - 1).clamp(min=1).numpy()))
    return torch.where(n > 1, factor * deviation / n.sqrt(), torch.nan)


class Difference(NamedTuple):
    """The mean difference between two methods on the same tasks, A minus B.

    `ci95` is half its 95 % interval; `p_sign` the two-sided sign test's probability over tasks, ties left out; `wins`, `ties`
    and `losses` count tasks; `lost` counts the tasks without a finite value on both sides, which are left out.
    """

    mean: float
    ci95: float
    p_sign: float
    wins: int
    ties: int
    losses: int
    lost: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0: only then may one side be called better."""
        return abs(self.mean) > self.ci95


def paired(a: Tensor, b: Tensor) -> Difference:
    """A minus B of values on the same tasks, of shape (tasks,) or (seeds, tasks), where row s of both was trained with the same
    seed.

    With one row the interval is Student's over tasks, of these two trained models. With more it is of the methods: tasks and
    seeds are both drawn at random and crossed, so the variance of the mean is (MS seeds + MS tasks - MS rest) / (seeds *
    tasks), by a two-way analysis of variance without replication, with Satterthwaite's (1946) degrees of freedom. The sign test
    is over tasks, each averaged over seeds.
    """
    from scipy.stats import binomtest, t

    difference = torch.atleast_2d((a - b).double())
    kept = difference[:, difference.isfinite().all(0)]
    seeds, tasks = kept.shape
    if tasks < 2:
        raise UserError(f"{tasks} tasks have finite values on both sides; a comparison needs at least 2")
    mean, of_tasks, of_seeds = kept.mean(), kept.mean(0), kept.mean(1)
    if seeds == 1:
        ci95 = float(half_width(torch.tensor(tasks), of_tasks.std()))
    else:
        rest = (kept - of_tasks - of_seeds.unsqueeze(1) + mean).square().sum() / ((seeds - 1) * (tasks - 1))
        parts = [(tasks * of_seeds.var(), seeds - 1), (seeds * of_tasks.var(), tasks - 1), (-rest, (seeds - 1) * (tasks - 1))]
        variance = float(sum(part for part, _ in parts)) / (seeds * tasks)
        # Never below what seeds or tasks alone would say: an estimate of components may come out negative.
        variance = max(variance, float(max(parts[0][0], parts[1][0])) / (seeds * tasks))
        spread = float(sum(part.square() / freedom for part, freedom in parts))
        freedom = (variance * seeds * tasks) ** 2 / spread if spread else 1.0
        ci95 = float(t.ppf(0.975, min(max(freedom, seeds - 1), tasks - 1))) * variance**0.5
    wins, losses = int((of_tasks > 0).sum()), int((of_tasks < 0).sum())
    sign = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return Difference(float(mean), ci95, sign, wins, tasks - wins - losses, losses, difference.shape[1] - tasks)
