"""The cost model of many processes against closed forms, its fit against numbers made by it, and the figure's numbers."""

import json
import math
from pathlib import Path

import pytest

from experiments import scaling
from experiments.scaling import Config, Costs, costs, elsewhere, fitted, middle, words
from toolkit.errors import UserError
from toolkit.plots.save import numbers
from toolkit.plots.scaling import scaling as drawn

COSTS = Costs(task=0.5, fixed=0.1, tasks=10, bytes=1_000_000, alpha=1e-3, beta=1e-8, cores=4)


def test_an_iteration_by_hand() -> None:
    assert COSTS.seconds(1) == pytest.approx(5.1)
    assert COSTS.seconds(3) == pytest.approx(4 * 0.5 + 0.1 + 4 * 1e-3 + 4 / 3 * 0.01)
    assert COSTS.seconds(3, ordered=True) == pytest.approx(4 * 0.5 + 0.1 + 6 * (1e-3 + 0.01))
    # Two take turns on a core for the first task of each, then two are left with a core each for their second.
    assert COSTS.seconds(8) == pytest.approx((2 + 1) * 0.5 + 0.1 + 14 * 1e-3 + 14 / 8 * 0.01)
    pieces = COSTS._replace(piece=4, alpha=0.0, beta=0.0)
    assert pieces.seconds(2) == pytest.approx(8 * 0.5 + 0.1) and pieces.seconds(3) == pytest.approx(4 * 0.5 + 0.1)
    assert COSTS.speedup(3) == COSTS.seconds(1) / COSTS.seconds(3)


def test_what_is_free_scales_to_the_number_of_tasks_and_what_only_talks_not_at_all() -> None:
    free = Costs(1.0, 0.0, 16, 10**9, 0.0, 0.0)
    assert free.speedup(16) == 16 and free.pays_until() == 16
    assert free._replace(alpha=100.0).pays_until() == 1
    # Half the tasks' time is lost where the fixed part is as long as a share.
    assert free._replace(fixed=1.0, tasks=64).pays_until() == max(
        n for n in range(1, 65) if 65 / (math.ceil(64 / n) + 1) >= n / 2
    )


def test_the_fit_finds_what_the_numbers_were_made_of() -> None:
    alpha, beta = 4e-5, 3e-10
    rows = [(n, b, 2 * (n - 1) * alpha + 2 * (n - 1) / n * b * beta) for n in (2, 3, 4) for b in (4_096, 10**6, 10**8)]
    assert fitted(rows) == pytest.approx((alpha, beta), rel=1e-6)
    assert fitted([(2, 1000, 1e-3), (2, 10**6, 1e-4)])[1] == 0  # larger messages that are faster: no negative rate


def test_the_costs_of_a_workload_from_two_sizes() -> None:
    alone = {"tasks": 8, "seconds of 8": 1.7, "seconds of 4": 0.9, "bytes": 4_000}
    found = costs("minilm-lora", {1: {"workloads": {"minilm-lora": alone}}}, 1e-5, 1e-9)
    assert found[:6] == pytest.approx((0.2, 0.1, 8, 4_000, 1e-5, 1e-9))
    there = elsewhere(found, Config(faster=10, gigabytes=4, alpha=2e-6, meta_batch=99))
    assert there[:6] == pytest.approx((0.02, 0.01, 99, 4_000, 2e-6, 0.25e-9)) and there.cores == math.inf


def test_rounds_are_one_by_their_medians() -> None:
    rounds = [{"tasks": 8, "seconds of 8": seconds, "all-reduce": [[64, seconds / 4]]} for seconds in (3.0, 1.0, 2.0)]
    assert middle(rounds) == {"tasks": 8, "seconds of 8": 2.0, "all-reduce": [[64, 0.5]]}
    with pytest.raises(UserError, match="--rounds 0; give 1 or more"):
        scaling.main(Config(rounds=0))


def test_the_figure_shows_the_numbers() -> None:
    there = COSTS._replace(cores=math.inf, tasks=16)
    rows = [{"workload": "a", "processes": n, "measured": m, "predicted": 1, "seconds": 1} for n, m in ((1, 1.0), (2, 1.9))]
    shown = list(numbers(drawn(rows, {"a": COSTS}, {"a": there})))
    assert [(x, y) for panel, series, x, y, *_ in shown if series == "a, measured"] == [(1, 1.0), (2, 1.9)]
    assert [y for _, series, _, y, *_ in shown if series == "a, by the model"] == pytest.approx([1, COSTS.speedup(2)])
    far = {x: y for panel, series, x, y, *_ in shown if panel == 1 and series == "a"}
    assert far[16] == pytest.approx(there.speedup(16)) and min(far) == 1
    text = words(rows, {"a": COSTS}, {"a": there}, Config())
    assert "| a | 2 | 1 | 1.90 | 1.00 |" in text and f"up to {there.pays_until()} of them" in text


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"workloads": ("conv",)}, "unknown workload 'conv'; did you mean 'conv4'"),
        ({"processes": (2, 3)}, "--processes"),
        ({"processes": (1,)}, "give 1, and at least one larger number"),
    ],
)
def test_wrong_requests(given: dict[str, tuple[str, ...]], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        scaling.main(Config(**given))  # type: ignore[arg-type]


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "started", lambda config, size: measured_by(size))
    scaling.main(Config(workloads=("conv4",), processes=(1, 2), out=tmp_path))
    assert json.loads((tmp_path / "scaling.json").read_text())["rows"][1]["measured"] == pytest.approx(2.0)
    assert all((tmp_path / f"scaling.{kind}").exists() for kind in ("png", "pdf", "csv", "md"))


def measured_by(size: int) -> dict[str, object]:
    work = {"tasks": 4, "bytes": 8, "seconds of 4": 4 / size, "seconds of 2": 2 / size}
    return {"workloads": {"conv4": work}, "all-reduce": [] if size == 1 else [(4_096, 1e-4), (10**6, 2e-3)]}
