"""A comparison of methods: its numbers by hand, its table, and the script that makes the runs."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats

from experiments import big_model_intents, compare_algorithms, omniglot, sinusoid
from experiments.compare_algorithms import FAMILIES, SETTINGS, Config, main
from toolkit import UserError
from toolkit.algorithms import METHODS
from toolkit.flags import build, checked, launch
from toolkit.metrics import squared_error
from toolkit.models import conv4_32, mlp
from toolkit.runs.comparison import comparison, difference, entries, grouped, rows, table, verdict
from toolkit.runs.folder import Run, write_json

NAN = float("nan")
SCRIPTS = {"sinusoid.py": sinusoid, "omniglot.py": omniglot, "big_model_intents.py": big_model_intents}


def made(folder: Path, metric: Sequence[Sequence[float]], steps: int = 1, name: str = "accuracy", **changed: Any) -> Run:
    """A finished run, by hand: `metric` has a row per test task, `steps` are those of its training."""
    folder.mkdir(parents=True)
    values = [[v if v - v == 0 else None for v in row] for row in metric]
    curve = {"metric_name": name, "task_list_hash": changed.pop("tasks", "these"), "loss": values, "metric": values}
    cost = {"seconds": 10.0, "peak_mb": 300, "parameters": 1000, "adapted_parameters": 500, "learned_numbers": 20}
    points = len(values[0]) if values else 1
    test = {"tasks": len(values), "metric": name, "steps": list(range(points)), "mean": [0.5] * points, "ci95": [0.1] * points}
    summary = {
        "algorithm": "maml", "sampler": "tasks", "inner_steps": steps, "transductive": False,
        "chance": 0.2 if name == "accuracy" else None,
        "test": test, "cost": cost | changed.pop("cost", {}),
    }  # fmt: skip
    config = {"inner_lr": 0.4, "iterations": changed.pop("iterations", 7), "seed": changed.pop("seed", 0)}
    contents = {"curve": curve, "summary": summary | changed, "config": config}
    for file, content in contents.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    return Run(folder)


def flat_run(folder: Path, values: Sequence[float], **changed: Any) -> Run:
    """A run of two tasks that differ by 0.02 around a mean curve."""
    return made(folder, [[v - 0.01 for v in values], [v + 0.01 for v in values]], **changed)


def test_an_entry_is_the_mean_over_seeds_task_by_task_and_then_over_tasks(tmp_path: Path) -> None:
    first = made(tmp_path / "a0", [[0.2, 0.6], [0.4, 1.0], [0.0, 0.5]])
    second = made(tmp_path / "a1", [[0.4, 0.8], [0.2, 0.4], [0.0, 0.9]])
    (entry,) = entries({"a": [first, second]})
    expected = torch.tensor([[0.3, 0.7], [0.3, 0.7], [0.0, 0.7]], dtype=torch.float64)
    assert torch.allclose(entry.curve.metric, expected)
    (row,) = rows({"a": [first, second]})
    assert row["mean"] == pytest.approx([0.2, 0.7]) and row["median"] == pytest.approx([0.3, 0.7])
    half = stats.t.ppf(0.975, 2) * expected[:, 0].std().item() / 3**0.5
    assert row["ci95"] == pytest.approx([half, 0.0], abs=1e-6) and row["finite"] == [1, 1]
    assert (row["method"], row["seeds"], row["metric"], row["trained_steps"], row["inner_lr"]) == ("a", 2, "accuracy", 1, 0.4)
    assert (row["transductive"], row["chance"]) == (False, 0.2)


def test_the_spread_is_the_standard_deviation_over_seeds_of_the_result(tmp_path: Path) -> None:
    group = [flat_run(tmp_path / f"a{seed}", [0.2, mean, 0.9]) for seed, mean in enumerate((0.5, 0.6, 0.8))]
    assert rows({"a": group})[0]["spread"] == pytest.approx(torch.tensor([0.5, 0.6, 0.8]).std().item(), abs=1e-6)
    assert rows({"a": group[:1]})[0]["spread"] is None


def test_cost_is_the_mean_over_seeds_and_learned_counts_parameters_and_learned_numbers(tmp_path: Path) -> None:
    costs = [{"seconds": 10.0, "peak_mb": 300}, {"seconds": 11.5, "peak_mb": 401}]
    (row,) = rows({"a": [flat_run(tmp_path / f"a{i}", [0.2, 0.5], cost=cost) for i, cost in enumerate(costs)]})
    assert (row["seconds"], row["peak_mb"], row["learned"], row["adapted"]) == (10.8, 350, 1020, 500)


def test_the_difference_is_paired_task_by_task_with_a_t_interval(tmp_path: Path) -> None:
    noise = torch.rand(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base = made(tmp_path / "maml", noise.tolist(), steps=1)
    better = noise + torch.linspace(0, 0.3, 12, dtype=torch.float64)[:, None]
    other = made(tmp_path / "other", better.tolist(), steps=2)
    gap = (better[:, 2] - noise[:, 1]).numpy()  # each at its own steps
    low, high = stats.ttest_1samp(gap, 0).confidence_interval(0.95)
    first, second = entries({"maml": [base], "other": [other]})
    assert difference(second, first)[:2] == pytest.approx((gap.mean(), (high - low) / 2), rel=1e-9)
    assert difference(second, first, step=3).mean == pytest.approx(float((better - noise)[:, 3].mean()))
    found = {row["method"]: row for row in rows({"maml": [base], "other": [other]})}
    assert found["maml"]["difference"] is None
    assert found["other"]["difference"] == list(difference(second, first)[:2])
    assert rows({"other": [other]})[0]["difference"] is None
    based = {row["method"]: row for row in rows({"maml": [base], "other": [other]}, base="other")}
    assert based["maml"]["difference"] == pytest.approx((-gap.mean(), (high - low) / 2), rel=1e-9)


def test_seeds_are_paired_and_their_spread_counts(tmp_path: Path) -> None:
    noise = torch.rand(2, 12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifts = torch.tensor([0.1, 0.3])[:, None, None]
    base = [made(tmp_path / f"a{s}", noise[s].tolist(), seed=s) for s in (0, 1)]
    other = [made(tmp_path / f"b{s}", (noise + shifts)[s].tolist(), seed=s) for s in (0, 1)]
    first, second = entries({"a": base, "b": other})
    found = difference(second, first)
    assert found.mean == pytest.approx(0.2) and found.ci95 == pytest.approx(0.1 * stats.t.ppf(0.975, 1)) and not found.clear
    lone = entries({"a": base, "b": other[:1]})
    with pytest.raises(UserError, match="b was trained with seeds 0 and a with 0, 1; give the same seeds of both"):
        difference(lone[1], lone[0])
    once = entries({"a": base, "b": other[:1]}, seedless=["b"])
    found = difference(once[0], once[1])
    gaps = (noise - (noise + shifts)[0])[:, :, 1].mean(1)
    assert found.mean == pytest.approx(float(gaps.mean())) and once[1].spread() is None


def method(folder: Path, algorithm: str, values: list[list[float]], seed: int = 0, **changed: Any) -> Run:
    run = made(folder, values, seed=seed, algorithm=algorithm, **changed)
    config = json.loads((folder / "config.json").read_text()) | {"algorithm": algorithm, "out": str(folder)}
    (folder / "config.json").write_text(json.dumps(config))
    return Run(run.path)


def test_runs_that_differ_in_their_seed_only_belong_together(tmp_path: Path) -> None:
    flat = [[0.1, 0.2], [0.2, 0.4]]
    runs = [
        method(tmp_path / "m1", "maml", flat, 1),
        method(tmp_path / "a0", "anil", flat),
        method(tmp_path / "m0", "maml", flat),
    ]
    assert {name: [run.path.name for run in group] for name, group in grouped(runs).items()} == {
        "maml": ["m0", "m1"],
        "anil": ["a0"],
    }
    longer = method(tmp_path / "long", "maml", flat, iterations=99)
    assert list(grouped([*runs, longer])) == ["maml (m0)", "anil", "maml (long)"]


@pytest.mark.parametrize(
    ("metric", "shift", "said"),
    [
        ("accuracy", 0.1, "better"), ("accuracy", -0.1, "worse"), ("squared error", 0.1, "worse"),
        ("squared error", -0.1, "better"), ("accuracy", 0.0, "no difference shown"),
    ],
)  # fmt: skip
def test_better_only_where_the_interval_excludes_zero(tmp_path: Path, metric: str, shift: float, said: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, noise = 0.5 + 0.1 * torch.rand(2, 30, 2, generator=generator, dtype=torch.float64)
    b = a + shift + 0.1 * (noise - noise.mean(0))
    runs = [method(tmp_path / "a", "maml", a.tolist(), name=metric), method(tmp_path / "b", "anil", b.tolist(), name=metric)]
    text = comparison(entries(grouped(runs)))
    (line,) = [line for line in text.splitlines() if line.startswith("anil")]
    found = difference(*reversed(entries(grouped(runs))))
    number = f"{100 * found.mean:+.2f}" if metric == "accuracy" else f"{found.mean:+.3f}"
    won, lost = (found.wins, found.losses) if metric == "accuracy" else (found.losses, found.wins)
    assert line.endswith(said) and (not shift or number in line) and f"{won}, 0, {lost}" in line
    assert {"better": won > lost, "worse": won < lost}.get(said, True)


def test_a_side_that_lost_tasks_is_never_called_better(tmp_path: Path) -> None:
    sound = [[0.5, 0.50 + 0.001 * i] for i in range(20)]
    lossy = [[0.5, value + 0.1 if i < 6 else math.nan] for i, (_, value) in enumerate(sound)]
    lost = method(tmp_path / "lost", "anil", lossy)
    first, second = entries(grouped([method(tmp_path / "whole", "maml", sound), lost]))
    found = difference(second, first)
    assert found.clear and found.mean > 0 and (found.lost, found.lost_a, found.lost_b) == (14, 14, 0)
    assert verdict(found, "accuracy") == "no difference shown" and verdict(found, "squared error") == "worse"
    turned = difference(first, second)
    assert verdict(turned, "accuracy") == "no difference shown" and verdict(turned, "squared error") == "better"


def test_of_an_unknown_metric_nobody_is_called_better(tmp_path: Path) -> None:
    """It is said which is larger, counts are of tasks above and below, and the order is by loss."""
    values = [[0.5, 0.50 + 0.001 * i] for i in range(20)]
    runs = [
        method(tmp_path / f"{name}-{n}", name, [[v + shift for v in row] for row in values], name=n)
        for n in ("macro recall", "mean absolute error", "top2 accuracy")
        for name, shift in (("maml", 0.0), ("anil", 0.1))
    ]
    texts = [comparison(entries(grouped(runs[i : i + 2]))) for i in (0, 2, 4)]
    wanted = [
        ("above, tied, below", "20, 0, 0", "larger"),
        ("won, tied, lost", "0, 0, 20", "worse"),
        ("won, tied, lost", "20, 0, 0", "better"),
    ]
    for text, (score, counts, said) in zip(texts, wanted, strict=True):
        assert score in text and counts in text and text.splitlines()[-2].endswith(said)
    loss = json.loads((runs[0].path / "curve.json").read_text())
    (runs[0].path / "curve.json").write_text(json.dumps(loss | {"loss": [[x - 1 for x in row] for row in loss["loss"]]}))
    groups = grouped([Run(run.path) for run in runs[:2]])
    assert [row["method"] for row in rows(groups)] == ["maml", "anil"], "the smaller loss first"


def test_runs_in_folders_of_one_name_stay_apart(tmp_path: Path) -> None:
    values = [[0.1, 0.2], [0.2, 0.4]]
    runs = [made(tmp_path / place / "maml-seed0", values, iterations=i) for i, place in ((5, "a"), (6, "b"))]
    assert list(grouped(runs)) == ["maml (a/maml-seed0)", "maml (b/maml-seed0)"]


def test_runs_of_before_a_flag_belong_with_those_after_it(tmp_path: Path) -> None:
    values = [[0.1, 0.2], [0.2, 0.4]]
    old, new = made(tmp_path / "old", values), made(tmp_path / "new", values, seed=1)
    write_json(new.path / "config.json", new.config | {"order": None, "lora": None})
    assert list(grouped([old, Run(new.path)])) == ["maml"]
    write_json(new.path / "config.json", new.config | {"order": "first"})
    assert len(grouped([old, Run(new.path)])) == 2


def test_a_test_that_stopped_before_the_steps_of_training_is_not_compared_as_trained(tmp_path: Path) -> None:
    short = method(tmp_path / "short", "anil", [[0.1], [0.2]], steps=2)
    whole = method(tmp_path / "whole", "maml", [[0.1, 0.2], [0.2, 0.4]])
    pair = entries(grouped([whole, short]))
    with pytest.raises(
        UserError, match="anil was trained with 2 inner steps and tested for 0; compare after as many with --step"
    ):
        comparison(pair)
    assert "anil" in comparison(pair, 0)
    with pytest.raises(UserError, match="not -1; choose among 0 to 1"):
        comparison(pair, -1)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tasks": "those"}, "2 different lists of tasks; give them the same --eval-seed"),
        ({"name": "squared error"}, "different metrics \\(accuracy, squared error\\)"),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    flat = [[0.1, 0.2], [0.2, 0.4]]
    runs = [method(tmp_path / "a", "maml", flat), method(tmp_path / "b", "anil", flat, **changed)]
    with pytest.raises(UserError, match=said):
        entries(grouped(runs))
    with pytest.raises(UserError, match="maml was tested for 1 inner steps, not 5; choose among 0 to 1"):
        comparison(entries(grouped(runs[:1])), 5)


@pytest.mark.parametrize(
    ("steps", "curve", "expected"),
    [
        (1, [0.2, 0.5, 0.6], 1),
        (2, [0.2, 0.5, 0.6], 2),
        (7, [0.2, 0.5, 0.6], 2),
        (0, [0.2, 0.5, 0.6], 2),
        (0, [0.5, 0.2, 0.51], 2),
        (0, [0.5, 0.5, 0.5], 0),
        (0, [NAN, NAN, NAN], 0),
    ],
    ids=["trained", "all", "more than the curve", "adapts all the same", "moves", "cannot adapt", "not finite"],
)
def test_the_point_that_counts(tmp_path: Path, steps: int, curve: list[float], expected: int) -> None:
    """The result is where training was, but the end of the curve for what was trained without steps and adapts at test time."""
    (entry,) = entries({"a": [made(tmp_path / "a", [curve, [0.5] * 3], steps=steps)]})
    assert entry.trained_steps == expected


def test_runs_on_different_tasks_are_refused(tmp_path: Path) -> None:
    runs = {"a": [flat_run(tmp_path / "a", [0.2, 0.5])], "b": [flat_run(tmp_path / "b", [0.2, 0.5], tasks="others")]}
    with pytest.raises(UserError, match="tested on 2 different lists of tasks; give them the same --eval-seed") as caught:
        rows(runs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"), [("accuracy", "high middle low zero"), ("squared error", "zero low middle high")]
)
def test_the_best_comes_first_and_what_is_not_finite_last(tmp_path: Path, name: str, expected: str) -> None:
    values = {"middle": 0.5, "lost": NAN, "high": 0.7, "zero": 0.0, "low": 0.2}
    runs = {m: [made(tmp_path / m, [[0.3, v, 0.9 - v]] * 2, name=name)] for m, v in values.items()}
    assert [row["method"] for row in rows(runs)] == [*expected.split(), "lost"]


def cells(text: str, method: str) -> list[str]:
    (found,) = [line for line in text.splitlines() if line.startswith(f"| `{method}` |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_table_of_accuracy_is_in_percent(tmp_path: Path) -> None:
    base = [flat_run(tmp_path / f"maml{i}", [0.2, 0.5 + 0.01 * i, 0.6]) for i in (0, 1)]
    better = [flat_run(tmp_path / f"anil{i}", [0.2, 0.6, 0.6], cost={"seconds": 61.4, "parameters": 123_456}) for i in (0, 1)]
    worse = [flat_run(tmp_path / f"protonet{i}", [0.4] * 3, steps=0, transductive=True) for i in (0, 1)]
    text = table(rows({"maml": base, "anil": better, "protonet": worse}))
    head, rule, *lines = text.splitlines()
    assert [name.strip() for name in head.strip("|").split("|")] == [
        "method", "0 steps", "1 step", "as trained (steps)", "2 steps", "minus maml (paired)", "seeds' s.d.",
        "training", "peak MiB", "learned", "adapts", "transductive",
    ]  # fmt: skip
    assert rule.count("---") == 12 and all(line.count("|") == 13 for line in (head, rule, *lines))
    half = f"{100 * stats.t.ppf(0.975, 1) * 0.01:.2f}"  # two tasks, 0.02 apart: deviation 0.02 / sqrt(2), over sqrt(2)
    assert [line.split("`")[1] for line in lines] == ["anil", "maml", "protonet"]
    assert cells(text, "maml") == [
        "`maml`", f"20.00 ± {half}", f"50.50 ± {half}", f"50.50 ± {half} (1)", f"60.00 ± {half}", "-", "0.71",
        "10 s", "300", "1,020", "500", "no",
    ]  # fmt: skip
    seeds = f"{100 * stats.t.ppf(0.975, 1) * 0.005:.2f}"  # the differences of the two seeds, 0.1 and 0.09
    assert cells(text, "anil")[5:10] == [f"+9.50 ± {seeds}", "0.00", "61 s", "300", "123,476"]
    assert cells(text, "protonet")[3] == f"40.00 ± {half} (0)" and cells(text, "protonet")[5].startswith("-10.50 ± ")
    assert cells(text, "protonet")[-1] == "yes"


def test_the_table_of_errors_is_plain_and_one_seed_has_no_spread(tmp_path: Path) -> None:
    runs = {m: [flat_run(tmp_path / m, [v, v / 2, v / 4], name="squared error")] for m, v in (("maml", 4.0), ("wild", 24690.0))}
    text = table(rows(runs))
    assert cells(text, "maml")[1:4] == ["4.000 ± 0.127", "2.000 ± 0.127", "2.000 ± 0.127 (1)"]
    assert cells(text, "wild")[1:3] == ["2.5e+04 ± 0.127", "1.2e+04 ± 0.127"]
    assert cells(text, "wild")[5] == "+1.2e+04 ± 0.000" and cells(text, "wild")[6] == "-"


def test_the_table_says_which_method_the_others_are_compared_with(tmp_path: Path) -> None:
    found = rows(
        {"as it came": [flat_run(tmp_path / "a", [0.5, 0.5])], "maml": [flat_run(tmp_path / "b", [0.4, 0.6])]}, "as it came"
    )
    text = table(found, "as it came")
    assert "minus as it came (paired)" in text and cells(text, "maml")[5].startswith("+10.00")
    assert cells(text, "as it came")[5] == "-"


def lossy(tmp_path: Path) -> dict[str, list[Run]]:
    """A good method, one that loses a task of four after the first step, one that loses all, and one seed of another lost."""
    good = [[0.2, 0.5, 0.6], [0.2, 0.5, 0.7], [0.2, 0.6, 0.6], [0.1, 0.5, 0.6]]
    part = [[*row[:2], NAN] if i == 0 else row for i, row in enumerate(good)]
    lost = [[row[0], NAN, NAN] for row in good]
    return {
        "maml": [made(tmp_path / "maml0", good), made(tmp_path / "maml1", good)],
        "part": [made(tmp_path / "part0", part), made(tmp_path / "part1", part)],
        "lost": [made(tmp_path / "lost0", lost), made(tmp_path / "lost1", lost)],
        "half": [made(tmp_path / "half0", good), made(tmp_path / "half1", lost)],
    }


def test_tasks_that_are_not_finite_are_named_in_the_table(tmp_path: Path) -> None:
    text = table(rows(lossy(tmp_path)))
    assert cells(text, "part")[4].endswith(", 25.0% lost") and "lost" not in cells(text, "part")[3]
    assert cells(text, "lost")[2:5] == ["not finite", "not finite (1)", "not finite"]
    assert cells(text, "half")[3] == "not finite (1)", "a seed that is lost is not left out in silence"
    assert "nan" not in text


def test_rows_with_what_is_not_finite_are_json(tmp_path: Path) -> None:
    found = rows(lossy(tmp_path))
    assert json.loads(json.dumps(found, allow_nan=False))
    assert {row["method"]: row["mean"][1] is None for row in found} == {
        "maml": False, "part": False, "lost": True, "half": True,
    }  # fmt: skip


def test_a_single_task_has_no_interval_and_is_written_all_the_same(tmp_path: Path) -> None:
    found = rows({m: [made(tmp_path / m, [[0.2, v]])] for m, v in (("maml", 0.5), ("anil", 0.6))})
    json.dumps(found, allow_nan=False)
    assert cells(table(found), "anil")[2] == "60.00 ± ?" and cells(table(found), "anil")[5] == "+10.00 ± ?"


# The script.


def test_every_method_is_in_one_family_and_every_setting_has_known_methods() -> None:
    assert {method for names in FAMILIES.values() for method in names} >= METHODS.keys()
    for name, setting in SETTINGS.items():
        listed = [method for names in setting.families.values() for method in names]
        assert len(set(listed)) == len(listed) and setting.base in setting.methods.keys() <= set(listed)
        assert setting.methods.keys() == set(listed) or name == "sinusoid"
        if setting.flag == "preset":
            assert setting.methods.keys() == SCRIPTS[setting.script].PRESETS.keys()
            continue
        for method, options in setting.methods.items():
            assert options.get("algorithm", method) in METHODS
            assert ("algorithm" in options) == (method not in METHODS), "only a variant names the method it is one of"


class Machine:
    """Stands in for `subprocess.run`: notes the commands and, for methods that do not fail, writes a finished run."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.lock = failing, Lock()
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []

    def __call__(self, command: list[str], *, stdout: Any, stderr: Any, env: dict[str, str]) -> SimpleNamespace:
        assert stderr == subprocess.STDOUT
        flags = dict(pairwise(command))
        with self.lock:
            self.commands.append(command)
            self.environments.append(env)
        out, seed = Path(flags["--out"]), int(flags["--seed"])
        method = out.name.removesuffix(f"-seed{seed}")
        if method in self.failing:
            stdout.write(f"train: 10 %\nerror: {method} broke\n")
            return SimpleNamespace(returncode=2)
        stdout.write("all well\n")
        error = 0.1 * (1 + list(METHODS).index(flags["--algorithm"])) + 0.01 * seed
        values = [[4.0, error, error / 2], [3.0, error + 0.1, error]]
        made(out, values, name="squared error", iterations=int(flags["--iterations"]))
        return SimpleNamespace(returncode=0)

    @property
    def runs(self) -> list[tuple[str, str]]:
        return sorted((c[c.index("--algorithm") + 1], c[c.index("--seed") + 1]) for c in self.commands)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine that never fails, and no figures: they have tests of their own."""
    machine = Machine()
    monkeypatch.setattr(compare_algorithms, "subprocess", SimpleNamespace(run=machine, STDOUT=subprocess.STDOUT))
    monkeypatch.setattr("toolkit.plots.save.save", lambda figure, path: [path.with_suffix(".png")])
    yield machine


def test_runs_are_started_with_the_flags_of_the_setting_and_the_method(tmp_path: Path, machine: Machine) -> None:
    main(Config(methods=("maml", "reptile"), seeds=2, out=tmp_path / "out"))
    assert machine.runs == [("maml", "0"), ("maml", "1"), ("reptile", "0"), ("reptile", "1")]
    for command in machine.commands:
        assert command[0] == sys.executable and Path(command[1]) == Path(compare_algorithms.__file__).parent / "sinusoid.py"
        assert command[2] == "--resume" and "--no-compile" in command
        flags = dict(pairwise(command))
        own = {"--inner-steps": "5", "--inner-lr": "0.02", "--inner-batch": "5", "--meta-lr": "0.5"}
        common = {"--iterations": "10000", "--val-tasks": "200", "--validate-every": "2000"}
        maml = {"--inner-steps": "1", "--inner-lr": "0.01"}
        expected = common | (own if flags["--algorithm"] == "reptile" else maml)
        assert {key: flags[key] for key in expected} == expected and "--data-root" not in flags
        assert Path(flags["--out"]) == tmp_path / "out" / f"{flags['--algorithm']}-seed{flags['--seed']}"
        assert Path(f"{flags['--out']}.log").read_text() == "all well\n"


def test_threads_are_shared_among_jobs_only_when_there_are_several(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    main(Config(methods=("maml",), out=tmp_path / "alone"))
    assert "OMP_NUM_THREADS" not in machine.environments[0]
    main(Config(methods=("maml", "anil", "boil"), jobs=3, out=tmp_path / "several"))
    assert [env["OMP_NUM_THREADS"] for env in machine.environments[1:]] == ["2"] * 3
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    main(Config(methods=("maml",), jobs=3, out=tmp_path / "many"))
    assert machine.environments[-1]["OMP_NUM_THREADS"] == "1"


def test_iterations_and_data_root_reach_the_runs(tmp_path: Path, machine: Machine) -> None:
    (tmp_path / "data").mkdir()
    chosen = {"iterations": 60, "data_root": tmp_path / "data", "out": tmp_path / "out"}
    main(Config(setting="omniglot-20w1s", methods=("maml",), **chosen))
    flags = dict(pairwise(machine.commands[0]))
    assert (flags["--iterations"], flags["--validate-every"], flags["--ways"]) == ("60", "60", "20")
    assert flags["--data-root"] == str(tmp_path / "data") and machine.commands[0][1].endswith("omniglot.py")


def test_finished_runs_are_kept_and_missing_ones_made(tmp_path: Path, machine: Machine) -> None:
    chosen = Config(methods=("maml", "anil"), out=tmp_path)
    main(chosen)
    stamp = (tmp_path / "maml-seed0" / "curve.json").stat().st_mtime_ns
    main(chosen)
    assert len(machine.commands) == 2
    shutil.rmtree(tmp_path / "anil-seed0")
    main(Config(methods=("maml", "anil"), seeds=2, out=tmp_path))
    assert machine.runs == [("anil", "0"), ("anil", "0"), ("anil", "1"), ("maml", "0"), ("maml", "1")]
    assert (tmp_path / "maml-seed0" / "curve.json").stat().st_mtime_ns == stamp


def test_what_draws_nothing_at_random_runs_once(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = replace(SETTINGS["sinusoid"], seedless=("anil",))
    monkeypatch.setitem(SETTINGS, "sinusoid", setting)
    main(Config(methods=("maml", "anil"), seeds=2, out=tmp_path))
    assert machine.runs == [("anil", "0"), ("maml", "0"), ("maml", "1")]
    found = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert {row["method"]: (row["seeds"], row["difference"] is None) for row in found} == {
        "maml": (2, True),
        "anil": (1, False),
    }


def test_finished_runs_of_another_budget_are_not_passed_off_as_these(tmp_path: Path, machine: Machine) -> None:
    main(Config(methods=("maml",), iterations=7, out=tmp_path))
    with pytest.raises(UserError, match="iterations"):
        main(Config(methods=("maml",), iterations=8, out=tmp_path))


def test_table_and_plain_data_are_written_and_printed(
    tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    main(Config(methods=("fomaml", "maml"), seeds=2, out=tmp_path))
    text = (tmp_path / "table.md").read_text()
    assert [line.split("`")[1] for line in text.splitlines()[2:]] == ["maml", "fomaml"]
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert data["setting"] == "sinusoid" and [row["seeds"] for row in data["rows"]] == [2, 2]
    assert text == table(data["rows"]) + "\n"
    printed = capsys.readouterr().out
    assert text in printed
    last = json.loads(printed.splitlines()[-1])
    assert last == {"table": str(tmp_path / "table.md"), "figure": str(tmp_path / "curves.png")}


def test_the_figure_is_drawn_of_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_algorithms, "subprocess", SimpleNamespace(run=Machine(), STDOUT=subprocess.STDOUT))
    main(Config(methods=("maml", "meta_sgd"), out=tmp_path))
    assert all((tmp_path / f"curves.{kind}").stat().st_size > 1000 for kind in ("png", "pdf"))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_is_told_in_a_sentence_and_the_others_go_on(
    tmp_path: Path, machine: Machine, jobs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.failing = ("anil",)
    with pytest.raises(UserError, match=r"^2 of 6 runs failed \(anil, seed [01]: error: anil broke\); ") as caught:
        main(Config(methods=("maml", "anil", "boil"), seeds=2, jobs=jobs, out=tmp_path))
    assert "\n" not in str(caught.value) and len(machine.commands) == 6
    log = next(tmp_path.glob("anil-seed0*.log"))
    assert log.read_text().endswith("error: anil broke\n")
    assert log.name.removeprefix("anil-seed0") in str(caught.value), "the sentence says where the output is"
    text = (tmp_path / "table.md").read_text()
    assert "`maml`" in text and "`boil`" in text and "anil" not in text
    machine.failing = ()
    main(Config(methods=("maml", "anil", "boil"), seeds=2, out=tmp_path))
    assert len(machine.commands) == 8 and "`anil`" in (tmp_path / "table.md").read_text()


def test_a_method_with_a_failed_seed_is_left_out_of_the_table(tmp_path: Path, machine: Machine) -> None:
    main(Config(methods=("maml", "anil"), out=tmp_path))
    machine.failing = ("anil",)
    with pytest.raises(UserError, match=r"^1 of 2 runs failed"):
        main(Config(methods=("maml", "anil"), seeds=2, out=tmp_path))
    assert "anil" not in (tmp_path / "table.md").read_text()


def test_when_all_runs_fail_there_is_no_table(tmp_path: Path, machine: Machine) -> None:
    machine.failing = ("maml",)
    with pytest.raises(UserError, match=r"^1 of 1 runs failed"):
        main(Config(methods=("maml",), out=tmp_path))
    assert not (tmp_path / "table.md").exists()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"setting": "sinusoids"}, "^unknown setting 'sinusoids'; did you mean 'sinusoid'"),
        ({"methods": ("maml", "mamml")}, "^unknown method for sinusoid 'mamml'; did you mean 'maml'"),
        ({"methods": ("protonet",)}, "^unknown method for sinusoid 'protonet'"),
        ({"setting": "omniglot-5w1s", "data_root": Path("no/where")}, "^there is no folder no/where; give the one that holds"),
        ({"setting": "intents-5w1s", "data_root": Path("no/where")}, "no/where; give the one that holds clinc150.json.gz with"),
        ({"seeds": 0}, "0 seeds, 1 jobs, None iterations; each must be at least 1"),
        ({"jobs": 0}, "1 seeds, 0 jobs"),
        ({"iterations": -1}, "-1 iterations; each must be at least 1"),
        ({"iterations": 0}, "0 iterations; each must be at least 1"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    tmp_path: Path, machine: Machine, changed: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        main(Config(**{"out": tmp_path / "out"} | changed))
    assert "\n" not in str(caught.value) and not machine.commands and not (tmp_path / "out").exists()


class Texts(torch.nn.Module):
    """Has layers of the names that adapters go to in a language model."""

    def __init__(self, ways: int) -> None:
        super().__init__()
        parts = ("query", "value")
        blocks = [torch.nn.ModuleDict({name: torch.nn.Linear(9, 9) for name in parts}) for _ in range(6)]
        self.layer = torch.nn.ModuleList(torch.nn.ModuleDict({"self": block}) for block in blocks)
        self.head = torch.nn.Linear(9, ways)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_command_is_one_that_its_script_takes(
    name: str, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsed as the script parses it: every option is a flag of it, has the value of the table, and makes a learner."""
    setting, module = SETTINGS[name], SCRIPTS[SETTINGS[name].script]
    known = {field.name for field in fields(module.Config)}
    machine.failing = tuple(setting.methods)  # only the commands are wanted
    with pytest.raises(UserError, match=f"^{len(setting.methods)} of {len(setting.methods)} runs failed"):
        main(Config(setting=name, out=tmp_path, data_root=tmp_path))
    assert len(machine.commands) == len(setting.methods)
    for command in machine.commands:
        caught: list[Any] = []
        monkeypatch.setattr(sys, "argv", command[1:])
        launch(module.Config, caught.append, module.PRESETS, module.__doc__)
        (flags,) = caught
        method = flags.out.name.removesuffix("-seed0")
        options = {setting.flag: method} | setting.common | setting.methods[method] | {"resume": True, "seed": 0}
        assert {key.removeprefix("no_") for key in options} <= known
        for key, value in options.items():
            assert getattr(flags, key.removeprefix("no_")) == (value if key in known else not value), (key, value)
        checked(flags)
        if module is omniglot:
            learner = build(flags, conv4_32(flags.ways), 50)
        elif module is big_model_intents:
            learner = build(flags, Texts(flags.ways), 75)
        else:
            learner = build(flags, mlp(), loss=squared_error, metric=squared_error)
        assert learner.name == flags.algorithm


@pytest.mark.slow
def test_two_methods_are_really_run_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = Config(methods=("maml", "joint"), seeds=2, iterations=3, jobs=2, out=tmp_path)
    main(chosen)
    found = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert {row["method"]: (row["trained_steps"], row["seeds"]) for row in found} == {"maml": (1, 2), "joint": (10, 2)}
    assert all(Run(tmp_path / f"maml-seed{seed}").config["iterations"] == 3 for seed in (0, 1))
    assert (tmp_path / "curves.png").exists() and "`joint`" in (tmp_path / "table.md").read_text()
    stamps = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/summary.json"))]
    main(chosen)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/summary.json"))] == stamps
