"""Intervals and paired differences: against scipy, by simulation of their coverage and power, and their errors."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from toolkit import Curve
from toolkit.intervals import paired


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def accuracies(tasks: int, repeats: int, seed: int = 0) -> Tensor:
    """Accuracies on 75 queries of tasks that differ in difficulty: skewed, bounded, in steps of 1/75. Mean 8/9."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.binomial(75, rng.beta(16, 2, (tasks, repeats))) / 75)


@pytest.mark.parametrize("tasks", [30, 100, 600])
def test_the_interval_of_a_mean_accuracy_covers_the_truth(tasks: int) -> None:
    """In 93.5 to 96.5 % of 5,000 evaluations, whatever the number of tasks."""
    values = accuracies(tasks, 5000)
    curve = Curve(values, values, "accuracy")
    covered = ((curve.mean() - 16 / 18).abs() < curve.ci95()).double().mean()
    assert 0.935 < float(covered) < 0.965


@pytest.mark.parametrize("tasks", [30, 100, 600])
def test_the_interval_of_a_paired_difference_covers_the_truth(tasks: int) -> None:
    """Both methods meet the same tasks, one of them two points worse on every one."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(1000):
        easy = rng.beta(16, 4, tasks)
        a, b = (torch.from_numpy(rng.binomial(75, p) / 75) for p in (easy, easy - 0.02 * easy))
        found = paired(a, b)
        hits += abs(found.mean - 0.02 * 0.8) < found.ci95
    assert 0.935 < hits / 1000 < 0.965


def test_four_tenths_of_a_point_are_seen_on_600_tasks() -> None:
    """In at least 90 % of comparisons of methods whose answers agree as those of real runs do (a standard deviation of 2.5
    points between their accuracies on a task); and no difference at all is called one in 5 %."""
    rng = np.random.default_rng(2)
    seen = {0.004: 0, 0.0: 0}
    for gap in seen:
        for _ in range(500):
            a = torch.from_numpy(rng.normal(0.9, 0.06, 600))
            seen[gap] += paired(a + gap + torch.from_numpy(rng.normal(0, 0.025, 600)), a).clear
    assert seen[0.004] >= 450 and 15 <= seen[0.0] <= 35


@pytest.mark.parametrize(("of_seeds", "of_tasks"), [(0.02, 0.05), (0.0, 0.05), (0.02, 0.0)])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_over_seeds_and_tasks_covers_the_difference_of_methods(
    seeds: int, of_seeds: float, of_tasks: float
) -> None:
    """At least nearly so: two parts are estimated, of which one may be nothing."""
    rng, hits = np.random.default_rng(3), 0
    for _ in range(500):
        by_seed, by_task = rng.normal(0, of_seeds, (seeds, 1)), rng.normal(0, of_tasks, (1, 100))
        difference = 0.01 + by_seed + by_task + rng.normal(0, 0.03, (seeds, 100))
        found = paired(torch.from_numpy(difference), torch.zeros(seeds, 100))
        hits += abs(found.mean - 0.01) < found.ci95
    assert hits / 500 > 0.93


def test_tasks_alone_would_be_too_sure_of_a_method() -> None:
    """Why seeds count: the interval over tasks of runs averaged over seeds misses the method's difference much more often."""
    rng, hits = np.random.default_rng(4), 0
    for _ in range(500):
        difference = rng.normal(0, 0.02, (3, 1)) + rng.normal(0, 0.03, (3, 600))
        found = paired(torch.from_numpy(difference).mean(0), torch.zeros(600))
        hits += abs(found.mean) < found.ci95
    assert hits / 500 < 0.3


def test_one_seed_is_students_paired_interval_and_the_sign_test() -> None:
    a, b = torch.rand(2, 40, generator=generator(), dtype=torch.float64)
    b[:5] = a[:5]
    found = paired(a, b)
    low, high = stats.ttest_rel(a.numpy(), b.numpy()).confidence_interval(0.95)
    assert found.mean == pytest.approx((low + high) / 2) and found.ci95 == pytest.approx((high - low) / 2)
    assert (found.wins, found.ties, found.losses) == (int((a > b).sum()), 5, int((a < b).sum()))
    assert found.p_sign == pytest.approx(stats.binomtest(found.wins, 35).pvalue)


def test_components_by_hand() -> None:
    """Mean squares of a table of two seeds and three tasks, worked out with numpy."""
    d = np.array([[0.1, 0.5, 0.3], [0.2, 0.9, 0.1]])
    rows, columns, mean = d.mean(1), d.mean(0), d.mean()
    ms_seeds, ms_tasks = 3 * rows.var(ddof=1), 2 * columns.var(ddof=1)
    ms_rest = ((d - rows[:, None] - columns + mean) ** 2).sum() / 2
    half = np.sqrt((stats.t.ppf(0.975, 1) ** 2 * ms_seeds + stats.t.ppf(0.975, 2) ** 2 * max(ms_tasks - ms_rest, 0)) / 6)
    assert paired(torch.from_numpy(d), torch.zeros(2, 3))[:2] == pytest.approx((mean, half))


def test_equal_runs_have_no_difference() -> None:
    values = torch.rand(3, 20, generator=generator())
    for a in (values, values[0]):
        found = paired(a, a)
        assert found[:3] == (0.0, 0.0, 1.0) and found.ties == 20 and not found.clear


def test_a_task_that_diverged_on_either_side_is_left_out_and_counted() -> None:
    a, b = torch.rand(2, 10, generator=generator())
    a[2], b[7] = math.nan, math.inf
    kept = torch.tensor([i not in (2, 7) for i in range(10)])
    assert paired(a, b)[:6] == paired(a[kept], b[kept])[:6] and paired(a, b).lost == 2


def test_too_few_tasks_have_no_interval() -> None:
    found = paired(torch.tensor([0.5, math.nan]), torch.tensor([0.25, 0.4]))
    assert found.mean == 0.25 and math.isnan(found.ci95) and not found.clear
    assert math.isnan(paired(torch.tensor([math.nan]), torch.tensor([0.4])).mean)
