"""Figures of several runs: the numbers that they draw, the CSV beside each, and what they refuse."""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from tests.test_comparison import method
from tests.test_plots import assert_tidy, legend
from toolkit import UserError
from toolkit.plots.kinds import KINDS
from toolkit.plots.pairs import pairs
from toolkit.plots.reliability import reliability
from toolkit.plots.save import draw_run, numbers, save
from toolkit.plots.seeds import training_seeds
from toolkit.plots.speed import bars
from toolkit.plots.sweep import sweep
from toolkit.runs.comparison import difference, entries
from toolkit.runs.folder import Run

FIFTHS = torch.randint(0, 6, (40, 2), generator=torch.Generator().manual_seed(0)).double() / 5
SEED = torch.Generator().manual_seed(1)


def run(folder: Path, algorithm: str = "maml", values: torch.Tensor = FIFTHS, **changed: Any) -> Run:
    metric = changed.get("name", "accuracy")
    flags = {key: changed.pop(key) for key in ("shots", "ways") if key in changed}
    test = {
        "tasks": len(values),
        "steps": [0, 1],
        "metric": metric,
        "mean": [0.2, 0.9],
        "ci95": [0.1, 0.1],
        "median": [0.2, 0.9],
    }
    made = method(folder, algorithm, values.tolist(), sampler="glyphs", test=test, **changed)
    config = json.loads((folder / "config.json").read_text()) | flags
    (folder / "config.json").write_text(json.dumps(config))
    return Run(made.path)


def drawn(figure: Figure) -> dict[tuple[int, str], np.ndarray[Any, Any]]:
    """The numbers of each series, by panel and name: rows of x, y, low, high."""
    found: dict[tuple[int, str], list[list[float]]] = {}
    for panel, series, *values in numbers(figure):
        found.setdefault((panel, series), []).append([np.nan if v == "" else float(v) for v in values])
    return {key: np.array(rows) for key, rows in found.items()}


def refused(figure: Any, *given: Any) -> str:
    with pytest.raises(UserError) as caught:
        figure(*given)
    return str(caught.value)


def test_pairs_are_all_tasks_and_their_differences(tmp_path: Path) -> None:
    better = (FIFTHS + torch.randint(0, 2, (40, 2), generator=SEED) / 5).clamp(max=1)
    runs = [run(tmp_path / "a"), run(tmp_path / "b", "anil", better)]
    figure = pairs(runs)
    found = drawn(figure)
    counts = Counter(zip((100 * FIFTHS[:, 1]).tolist(), (100 * better[:, 1]).tolist(), strict=True))
    assert max(counts.values()) > 3
    for n in set(counts.values()):
        points = found[0, f"{n} task{'s' * (n > 1)}"][:, :2]
        assert np.array(sorted(points.tolist())) == pytest.approx(np.array(sorted(p for p, m in counts.items() if m == n)))
    sizes = {int(str(dots.get_label()).split()[0]): float(dots.get_sizes()[0]) for dots in figure.axes[0].collections}
    assert [sizes[n] for n in sorted(sizes)] == sorted(set(sizes.values())) and set(sizes) == set(counts.values())
    steps = Counter((better[:, 1] - FIFTHS[:, 1]).mul(5).round().int().tolist())
    assert {round(x / 20, 6): y for x, y, *_ in found[1, "tasks"].tolist() if y} == steps, "a bin for each difference"
    gap = difference(entries({"b": runs[1:]})[0], entries({"a": runs[:1]})[0])
    ends = [100 * (gap.mean + sign * gap.ci95) for sign in (-1, 1)]
    assert found[1, "mean"][0, 0] == pytest.approx(100 * gap.mean) and found[1, "95 % interval"][0, 2:] == pytest.approx(ends)
    assert legend(figure)[-2:] == ["equal", f"mean difference {100 * gap.mean:+.2f} ± {100 * gap.ci95:.2f} (95 %)"]
    assert {f"{n(counts.values())} tasks" for n in (min, max)} < set(legend(figure))
    assert figure.get_suptitle().splitlines() == [
        "glyphs, the same 40 test tasks",
        f"anil better in {gap.wins}, equal in {gap.ties}, worse in 0; sign test p = {gap.p_sign:.2g}",
    ]
    assert [axes.get_xlabel() for axes in figure.axes] == ["maml: accuracy (%)", "anil minus maml (points)"]
    assert figure.axes[0].get_xlim() == figure.axes[0].get_ylim(), "the diagonal is that of the panel"


def test_pairs_of_one_method_are_a_and_b_whatever_their_seeds_and_names(tmp_path: Path) -> None:
    figure = pairs([run(tmp_path / ("long" * 20)), run(tmp_path / "b", seed=1)])
    assert [axes.get_xlabel() for axes in figure.axes] == ["A: accuracy (%)", "B minus A (points)"]
    _, names, score = figure.get_suptitle().splitlines()
    assert names == "A: maml (longlonglonglo…glonglonglong), B: maml (b)"
    assert score == "B better in 0, equal in 40, worse in 0; sign test p = 1"
    assert_tidy(figure)


def test_pairs_of_errors_are_on_log_axes_and_leave_out_what_is_not_finite(tmp_path: Path) -> None:
    errors = 10 ** torch.rand(300, 2, generator=SEED).mul(3).double()
    worse = torch.where(torch.arange(300).unsqueeze(1) < 2, torch.nan, 2 * errors)
    figure = pairs(
        [run(tmp_path / "a", values=errors, name="squared error"), run(tmp_path / "b", "anil", worse, name="squared error")]
    )
    assert "300 test tasks, 2 left out without a finite value" in figure.get_suptitle().replace("\n", " ")
    assert (figure.axes[0].get_xscale(), figure.axes[0].get_yscale()) == ("log", "log")
    found = drawn(figure)
    assert len(found[0, "1 task"]) == found[1, "tasks"][:, 1].sum() == 298
    assert len(found[1, "tasks"]) < 30
    assert_tidy(figure)


def test_a_pair_of_one_task_has_no_interval(tmp_path: Path) -> None:
    figure = pairs([run(tmp_path / "a", values=FIFTHS[:1] * 0), run(tmp_path / "b", "anil", FIFTHS[:1] * 0 + 0.6)])
    assert legend(figure) == ["1 task", "equal", "mean difference +60.00"]
    assert drawn(figure)[1, "tasks"][-1, :2] == pytest.approx([60, 1])
    assert_tidy(figure)


@pytest.mark.parametrize("queries", [5, 25, 75, 80])
def test_ties_stand_around_zero_and_no_difference_on_an_edge(queries: int, tmp_path: Path) -> None:
    first, second = (torch.randint(0, queries + 1, (500, 2), generator=SEED).float().div(queries).double() for _ in range(2))
    figure = pairs([run(tmp_path / "a", values=first), run(tmp_path / "b", "anil", second)])
    bars = drawn(figure)[1, "tasks"]
    width = bars[1, 0] - bars[0, 0]
    steps = (second[:, 1] - first[:, 1]).mul(queries).round()
    wide = round(width * queries / 100)
    assert wide % 2 == 1 and len(bars) <= 30 and bars[:, 1].sum() == 500
    ((x, tied),) = bars[np.abs(bars[:, 0]) < width / 2, :2].tolist()
    assert x == pytest.approx(0, abs=1e-4) and tied == (steps.abs() <= wide // 2).sum()


def test_pairs_refuse_what_cannot_be_paired(tmp_path: Path) -> None:
    one, other = run(tmp_path / "a"), run(tmp_path / "b", "anil", tasks="others")
    assert refused(pairs, [one]) == "tasks are paired between two runs, not 1; give two"
    assert "2 different lists of tasks" in refused(pairs, [one, other])
    assert "different metrics" in refused(pairs, [one, run(tmp_path / "c", "anil", name="squared error")])
    nothing = run(tmp_path / "d", "anil", torch.full((40, 2), torch.nan))
    assert refused(pairs, [one, nothing]) == (
        f"no test task has a finite accuracy in both {tmp_path / 'a'} and {tmp_path / 'd'}; give others"
    )
    (tmp_path / "d" / "curve.json").unlink()
    assert "d has no curve.json, though the run is finished" in refused(pairs, [one, Run(tmp_path / "d")])


def carded(folder: Path, algorithm: str = "maml") -> Run:
    share, sure, right = np.zeros((3, 15))
    share[[4, 14]], sure[[4, 14]], right[[4, 14]] = (0.25, 0.75), (0.25 * 0.3, 0.75 * 0.95), (0.25 * 0.5, 0.75 * 0.9)
    diagram = [[share.tolist(), sure.tolist(), (right * factor).tolist()] for factor in (0.5, 1.0)]
    return run(folder, algorithm, card={"reliability": diagram, "ece": [0.5, 0.0875]})


def test_a_reliability_diagram_is_that_of_the_card(tmp_path: Path) -> None:
    figure = reliability([carded(tmp_path / "a")])
    found = drawn(figure)
    assert found[0, "after 0 steps: accuracy"][:, :2] == pytest.approx(np.array([[30, 25], [95, 45]]))
    assert found[0, "after 1 step: accuracy"][:, :2] == pytest.approx(np.array([[30, 50], [95, 90]]))
    gaps = [segment.tolist() for segment in figure.axes[0].collections[0].get_segments()]
    assert np.array(gaps) == pytest.approx(np.array([[[30, 30], [30, 50]], [[95, 95], [95, 90]]])), "to the diagonal"
    for name in ("after 0 steps", "after 1 step"):
        assert found[1, f"{name}: queries"][[4, 14], :2] == pytest.approx(np.array([[30, 25], [290 / 3, 75]]))
    assert not any(line.get_clip_on() for line in figure.axes[0].get_lines()[1:]), "marks on the edge are whole"
    assert_tidy(figure, room=30)
    texts = " ".join(text.get_text() for text in figure.legends[0].get_texts())
    assert "after 0 steps: calibration error 50.0 %" in texts and "after 1 step: calibration error 8.8 %" in texts
    both = reliability([carded(tmp_path / "b"), carded(tmp_path / "c", "anil")])
    curves = {(i, f"{name}: {what}") for name in ("maml (b)", "anil (c)") for i, what in enumerate(("accuracy", "queries"))}
    assert set(drawn(both)) == curves | {(0, "as sure as right")} and not both.axes[0].collections
    assert legend(both)[:2] == [f"{name}\ncalibration error 8.8 % after 1 step" for name in ("maml (b)", "anil (c)")]
    assert_tidy(both, room=30)


def test_a_run_that_diverged_has_an_empty_diagram(tmp_path: Path) -> None:
    nothing = [[0.0] * 15, [None] * 15, [0.0] * 15]
    figure = reliability([run(tmp_path / "a", card={"reliability": [nothing] * 2, "ece": [None] * 2})])
    assert legend(figure)[:2] == [f"after {k}: no finite prediction" for k in ("0 steps", "1 step")]
    assert [len(line.get_xdata()) for line in figure.axes[0].get_lines()] == [2, 0, 0]
    assert_tidy(figure, room=30)


BINS = [[1.0]] * 3
DAMAGED: dict[str, dict[str, Any]] = {
    "no error": {"reliability": [BINS] * 2},
    "two rows": {"reliability": [BINS[:2]] * 2, "ece": [0.0] * 2},
    "unequal rows": {"reliability": [[[1.0], [1.0, 1.0], [1.0]]] * 2, "ece": [0.0] * 2},
    "no steps": {"reliability": [], "ece": []},
    "text": {"reliability": "none", "ece": [0.0] * 2},
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_diagram_is_said_to_be_one(kind: str, tmp_path: Path) -> None:
    assert refused(reliability, [run(tmp_path / "a", card=DAMAGED[kind])]) == (
        f"the reliability in {tmp_path / 'a' / 'summary.json'} is damaged: it needs three rows of bins and an error after "
        "0 steps; restore the file or measure it anew by `toolkit evaluate`"
    )


def test_a_run_that_was_not_measured_has_no_diagram(tmp_path: Path) -> None:
    for made in (
        run(tmp_path / "a"),
        run(tmp_path / "null", card=None),
        run(tmp_path / "regression", card={"nll": [1.0, 0.5]}),
    ):
        assert refused(reliability, [carded(tmp_path / "good" / made.path.name), made]) == (
            f"{made.path} has no reliability in its summary.json: it is of an older version, or no classification; "
            "`toolkit evaluate` measures it for a run that has its checkpoint"
        )


def test_a_sweep_has_a_point_for_each_number_over_seeds(tmp_path: Path) -> None:
    runs = [run(tmp_path / f"{m}{s}", m, FIFTHS * s / 10, shots=s) for m in ("maml", "anil") for s in (5, 1)]
    runs.append(run(tmp_path / "seed1", "maml", FIFTHS * 0.5 + 0.1, shots=5, seed=1))
    figure = sweep(runs, "shots")
    assert legend(figure) == ["maml, 1-2 seeds, 95 % interval", "anil, 1 seed, 95 % interval"]
    assert figure.axes[0].get_xticks().tolist() == [1, 5] and figure.axes[0].get_xlabel() == "shots"
    assert_tidy(figure)
    found = drawn(figure)
    assert found[0, "maml"][:, 0].tolist() == [1, 5] and found[0, "anil"][:, 0].tolist() == [1, 5]
    mean = 100 * float(FIFTHS[:, 1].mean())
    assert found[0, "anil"][:, 1] == pytest.approx([mean / 10, mean / 2])
    assert found[0, "maml"][:, 1] == pytest.approx([mean / 10, mean / 2 + 5])
    (entry,) = entries({"maml": [runs[0], runs[-1]]})
    assert found[0, "maml"][1, 3] - found[0, "maml"][1, 1] == pytest.approx(100 * entry.mean()[1])


def test_a_sweep_needs_two_numbers_of_one_metric(tmp_path: Path) -> None:
    one = run(tmp_path / "a", shots=5)
    assert refused(sweep, [one], "shots") == "shots is 5 in all runs; give runs of two or more numbers of shots"
    assert "has no ways in its config.json" in refused(sweep, [one], "ways")
    assert "different metrics" in refused(sweep, [one, run(tmp_path / "b", shots=1, name="squared error")], "shots")
    assert "1 to 7 runs, not 0" in refused(sweep, [], "shots")
    many = [run(tmp_path / f"m{i}", f"m{i}", shots=1) for i in range(8)]
    assert "1 to 7 runs, not 8" in refused(sweep, many, "shots")
    text = run(tmp_path / "text", shots="few")
    assert "text has no shots in its config.json; draw runs of few-shot tasks" in refused(sweep, [one, text], "shots")
    unfinished = run(tmp_path / "unfinished", shots=1)
    (unfinished.path / "summary.json").write_text(json.dumps({"algorithm": "maml"}))
    assert "unfinished has no test result in summary.json" in refused(sweep, [one, Run(unfinished.path)], "shots")


def test_a_sweep_is_of_one_setting_but_for_what_it_is_over(tmp_path: Path) -> None:
    one, other = run(tmp_path / "a", shots=1, ways=5), run(tmp_path / "b", shots=5, ways=20)
    assert refused(sweep, [one, other], "shots") == "the runs differ in ways too (20, 5); give those of one value of it"
    assert refused(sweep, [one, other], "ways") == "the runs differ in shots too (1, 5); give those of one value of it"
    longer = run(tmp_path / "c", shots=1, ways=5, iterations=99, seed=1)
    five = run(tmp_path / "d", shots=5, ways=5)
    assert refused(sweep, [one, longer, five], "shots") == (
        f"the runs of maml with shots 1 differ in more than the seed ({one.path}, {longer.path}); give those of one setting"
    )


def test_a_sweep_of_one_task_has_no_interval_and_of_errors_may_have_a_log_axis(tmp_path: Path) -> None:
    kind = {"name": "squared error"}
    runs = [run(tmp_path / f"{s}", values=torch.tensor([[9.0, 40.0 / s]]).double(), shots=s, **kind) for s in (1, 2, 40)]
    figure = sweep(runs, "shots")
    found = drawn(figure)[0, "maml"]
    assert found[:, :2] == pytest.approx(np.array([[1, 40], [2, 20], [40, 1]])) and np.isnan(found[:, 2:]).all()
    assert figure.axes[0].get_yscale() == "log" and figure.axes[0].get_ylabel() == "test squared error"
    assert figure.axes[0].get_xticks().tolist() != [1, 2, 40], "1 and 2 have no room for their names"


def trained(folder: Path, rows: Sequence[tuple[int, float | None]], **changed: Any) -> Run:
    made = run(folder, **changed)
    lines = [json.dumps({"iteration": at, "val_metric": value, "val_loss": 1.0}) for at, value in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return made


def test_seeds_are_thin_and_their_mean_is_over_common_iterations(tmp_path: Path) -> None:
    runs = [trained(tmp_path / "a", [(10, 0.5), (20, 0.75), (30, 0.9)], seed=0)]
    runs.append(trained(tmp_path / "b", [(10, 0.25), (20, 0.5)], seed=1))
    runs.append(trained(tmp_path / "c", [(20, 0.5), (10, 0.25)], algorithm="anil"))
    figure = training_seeds(runs)
    found = drawn(figure)
    assert found[0, "maml, seed 0"][:, 1] == pytest.approx([50, 75, 90])
    assert found[0, "maml, seed 1"][:, 1] == pytest.approx([25, 50])
    assert found[0, "maml, mean of 2 seeds"][:, :2] == pytest.approx(np.array([[10, 37.5], [20, 62.5]]))
    assert found[0, "anil, one seed"][:, :2] == pytest.approx(np.array([[10, 25], [20, 50]])) and len(found) == 4
    widths = {str(line.get_label()): line.get_linewidth() for line in figure.axes[0].get_lines()}
    assert widths["maml, seed 0"] == widths["maml, seed 1"] < widths["maml, mean of 2 seeds"] == widths["anil, one seed"]
    assert len({line.get_linestyle() for line in figure.axes[0].get_lines()}) == 2, "seeds have the dashes of their method"
    assert legend(figure) == ["maml, mean of 2 seeds", "anil, one seed", "single seeds"]
    assert_tidy(figure)


def test_a_validation_that_was_not_finite_leaves_a_gap(tmp_path: Path) -> None:
    runs = [trained(tmp_path / str(seed), [(10, 0.5), (20, None if seed else 0.75), (30, 0.9)], seed=seed) for seed in (0, 1)]
    found = drawn(training_seeds(runs))
    assert found[0, "maml, mean of 2 seeds"][:, 1] == pytest.approx([50, np.nan, 90], nan_ok=True)
    assert found[0, "maml, seed 1"][:, 1] == pytest.approx([50, np.nan, 90], nan_ok=True)


def test_seeds_need_validations_at_common_iterations(tmp_path: Path) -> None:
    runs = [trained(tmp_path / str(seed), [(10 + seed, 0.5)], seed=seed) for seed in (0, 1)]
    assert refused(training_seeds, runs) == (
        "the seeds of maml were validated at no common iteration; give runs of one --validate-every"
    )
    (tmp_path / "0" / "metrics.jsonl").write_text("")
    assert "has no validation rows; train for" in refused(training_seeds, [Run(tmp_path / "0")])
    (tmp_path / "0" / "metrics.jsonl").unlink()
    assert "0 has no metrics.jsonl, though the run is finished" in refused(training_seeds, [Run(tmp_path / "0")])
    other = trained(tmp_path / "other", [(10, 0.5)], algorithm="anil", name="squared error")
    assert "different metrics" in refused(training_seeds, [runs[1], other])


@pytest.mark.parametrize(
    "line",
    ["[1]", "5", "null", '{"val_metric": 0.5}', '{"iteration": null}', '{"iteration": 2, "val_metric": "x"}'],
)
def test_a_line_that_no_run_writes_is_named(line: str, tmp_path: Path) -> None:
    made = trained(tmp_path / "a", [(1, 0.5)])
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write(f"\n{line}\n")
    assert refused(training_seeds, [made]) == (
        f"{tmp_path / 'a' / 'metrics.jsonl'} is damaged (line 2 is no row of a run, which has an iteration and numbers by "
        "name); restore it or repeat the run"
    )


def test_a_truncated_metrics_file_is_damaged(tmp_path: Path) -> None:
    made = trained(tmp_path / "a", [(1, 0.5), (2, 0.6)])
    text = (tmp_path / "a" / "metrics.jsonl").read_text()
    (tmp_path / "a" / "metrics.jsonl").write_text(text[:-9])
    assert "metrics.jsonl is damaged (" in refused(training_seeds, [made])


def test_the_same_run_twice_is_no_two_seeds(tmp_path: Path) -> None:
    runs = [trained(tmp_path / name, [(10, 0.5)]) for name in "ab"]
    assert "are one method with the same seed 0; give one of them" in refused(training_seeds, runs)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_saved_with_the_numbers_that_it_draws(kind: str, tmp_path: Path) -> None:
    runs = []
    for i, name in enumerate(("maml", "anil")):
        made = carded(tmp_path / name, name)
        config = made.config | {"shots": 1, "ways": 5} | {kind: i + 1}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "metrics.jsonl").write_text(
            json.dumps({"iteration": 5, "val_metric": 0.5, "loss": 1.0, "metric": 0.5})
        )
        runs.append(Run(tmp_path / name))
    figure = KINDS[kind](runs)
    rows = [[str(value) for value in row] for row in numbers(figure)]
    files = save(figure, tmp_path / "out" / kind)
    assert [path.suffix for path in files] == [".png", ".pdf", ".csv"]
    head, *written = csv.reader((tmp_path / "out" / f"{kind}.csv").read_text().splitlines())
    assert head == ["panel", "series", "x", "y", "low", "high"] and written == rows and rows
    again = save(KINDS[kind](runs), tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in files]


def test_lying_bars_are_saved_with_their_length(tmp_path: Path) -> None:
    row = {"workload": "w", "unit": "steps/s", "ratio": None, "low": 1.0, "high": 9.0}
    figure = bars([row | {"subject": "toolkit", "value": 5.0}, row | {"subject": "other", "value": 3.0}], "speed")
    found = {(panel, name): [x, y, low, high] for panel, name, x, y, low, high in numbers(figure)}
    assert found == {(0, "w: toolkit"): [5, 0, 1, 9], (0, "w: other"): [3, 1, 1, 9]}


def test_no_words_beside_a_bar_leave_the_figure() -> None:
    """However long they are, and the bar too."""
    row = {"unit": "ms", "ratio": 1.31, "low": 1.0}
    long = "toolkit: threads, 1 task a piece, recorded, bfloat16"
    rows = [row | {"workload": f"w {n}", "subject": long, "value": v, "high": v} for n, v in enumerate((2.0, 3000.0))]
    figure = bars(rows, "steps")
    figure.draw_without_rendering()
    assert all(text.get_window_extent().x1 < figure.bbox.x1 for text in figure.axes[0].texts)
    assert max(figure.axes[0].get_xticks()) <= 3000, "no numbers where nothing is"


def test_a_run_folder_gets_the_diagram_where_it_was_measured(tmp_path: Path) -> None:
    for folder, measured in ((carded(tmp_path / "a").path, True), (run(tmp_path / "b").path, False)):
        (folder / "metrics.jsonl").write_text(json.dumps({"iteration": 5, "loss": 1.0, "metric": 0.5}))
        flat = {"support_x": torch.rand(4, 8), "query_x": torch.rand(4, 8), "support_y": torch.arange(4)}
        flat |= {"query_y": torch.arange(4), "steps": torch.arange(2), "predictions": torch.rand(2, 4, 4)}
        save_file(flat, folder / "example.safetensors")
        files = {path.name for path in draw_run(folder)}
        assert ({"reliability.png", "reliability.pdf", "reliability.csv"} <= files) == measured
        assert {"adaptation.csv", "training.csv"} < files
