"""Intervals and tests over tasks: what a mean is worth, and whether one method is better than another on the same tasks."""

from typing import NamedTuple

import torch
from torch import Tensor


def half_width(count: Tensor, deviation: Tensor) -> Tensor:
    """Half the width of the 95 % t interval of the mean of `count` values with this standard deviation (with count - 1); NaN
    with fewer than two values."""
    from scipy.stats import t

    n = count.double()
    factor = torch.as_tensor(t.ppf(0.975, (n - 1).clamp(min=1).numpy()))
    return torch.where(n > 1, factor * deviation / n.sqrt(), torch.nan)


class Difference(NamedTuple):
    """The mean difference between two methods on the same tasks, A minus B.

    `ci95` is half its 95 % interval; `p_sign` the two-sided sign test's probability over tasks, ties left out; `wins`, `ties`
    and `losses` count tasks with A above, level and below; `lost` counts those left out, where a side has no finite value:
    A on `lost_a` tasks, B on `lost_b`.
    """

    mean: float
    ci95: float
    p_sign: float
    wins: int
    ties: int
    losses: int
    lost: int
    lost_a: int
    lost_b: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0: only then may one side be called better."""
        return abs(self.mean) > self.ci95


def paired(a: Tensor, b: Tensor) -> Difference:
    """A minus B of values on the same tasks, of shape (tasks,) or (seeds, tasks), where row s of both was trained with the same
    seed.

    With one row the interval is Student's over tasks, of these two trained models. With more it is of the methods: tasks and
    seeds are both drawn at random and crossed. By a two-way analysis of variance without replication the mean varies by
    (MS seeds + (MS tasks - MS rest)) / (seeds * tasks); the half-width is the root of the sum of the two parts' squared t
    half-widths, of seeds - 1 and tasks - 1 degrees of freedom (recovery of variance estimates, Zou & Donner 2008); the usual
    single number of degrees (Satterthwaite) was seen to cover 92 % only with two or three seeds. The sign test is over tasks,
    each averaged over seeds. NaN is the interval of fewer than two tasks, and the mean of none.
    """
    from scipy.stats import binomtest, t

    difference = torch.atleast_2d((a - b).double())
    kept = difference[:, difference.isfinite().all(0)]
    seeds, tasks = kept.shape
    mean, of_tasks, of_seeds = kept.mean(), kept.mean(0), kept.mean(1)
    if seeds == 1 or tasks < 2:
        count = torch.tensor(tasks)
        ci95 = float(half_width(count, ((of_tasks - mean).square().sum() / (count - 1)).sqrt()))
    else:
        rest = (kept - of_tasks - of_seeds.unsqueeze(1) + mean).square().sum() / ((seeds - 1) * (tasks - 1))
        by_seeds, by_tasks = tasks * of_seeds.var(), (seeds * of_tasks.var() - rest).clamp(min=0)
        squares = t.ppf(0.975, seeds - 1) ** 2 * by_seeds + t.ppf(0.975, tasks - 1) ** 2 * by_tasks
        ci95 = float((squares / (seeds * tasks)).sqrt())
    # A mean over seeds of what was rounded to float32 is level within that rounding; of one seed, equal is equal.
    level = 1e-6 * torch.atleast_2d(torch.maximum(a.abs(), b.abs()))[:, difference.isfinite().all(0)].double().mean(0)
    wins, losses = (int((sign * of_tasks > level * (seeds > 1)).sum()) for sign in (1, -1))
    sign = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    lost = [int((~torch.atleast_2d(side).isfinite().all(0)).sum()) for side in (a, b)]
    return Difference(float(mean), ci95, sign, wins, tasks - wins - losses, losses, difference.shape[1] - tasks, *lost)
