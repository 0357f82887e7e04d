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

from tests.test_comparison import method
from toolkit import UserError
from toolkit.plots.kinds import KINDS
from toolkit.plots.pairs import pairs
from toolkit.plots.reliability import reliability
from toolkit.plots.save import numbers, save
from toolkit.plots.seeds import training_seeds
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
    assert np.array(sorted(found[0, "tasks"][:, :2].tolist())) == pytest.approx(np.array(sorted(counts)))
    sizes = figure.axes[0].collections[0].get_sizes()
    by_point = {tuple(p): s for p, s in zip(found[0, "tasks"][:, :2].tolist(), sizes, strict=True)}
    assert max(by_point, key=by_point.__getitem__) == max(counts, key=counts.__getitem__) and len(set(sizes)) > 1
    assert found[1, "tasks"][:, 1].sum() == 40, "every task is in the histogram"
    gap = difference(entries({"b": runs[1:]})[0], entries({"a": runs[:1]})[0])
    (text,) = [text.get_text() for text in figure.legends[0].get_texts() if "mean difference" in text.get_text()]
    assert f"{100 * gap.mean:+.2f} ± {100 * gap.ci95:.2f}" in text.replace("\n", " ")
    assert figure.axes[1].lines[0].get_xdata()[0] == pytest.approx(100 * gap.mean)


def test_pairs_refuse_what_cannot_be_paired(tmp_path: Path) -> None:
    one, other = run(tmp_path / "a"), run(tmp_path / "b", "anil", tasks="others")
    assert refused(pairs, [one]) == "tasks are paired between two runs, not 1; give two"
    assert "2 different lists of tasks" in refused(pairs, [one, other])
    assert "different metrics" in refused(pairs, [one, run(tmp_path / "c", "anil", name="squared error")])


def carded(folder: Path, algorithm: str = "maml") -> Run:
    share, sure, right = np.zeros((3, 15))
    share[[4, 14]], sure[[4, 14]], right[[4, 14]] = (0.25, 0.75), (0.25 * 0.3, 0.75 * 0.95), (0.25 * 0.5, 0.75 * 0.9)
    diagram = [[share.tolist(), sure.tolist(), (right * factor).tolist()] for factor in (0.5, 1.0)]
    return run(folder, algorithm, card={"reliability": diagram, "ece": [0.5, 0.0875]})


def test_a_reliability_diagram_is_that_of_the_card(tmp_path: Path) -> None:
    figure = reliability([carded(tmp_path / "a")])
    found = drawn(figure)
    assert found[0, "accuracy"][:, :2] == pytest.approx(np.array([[30, 25], [95, 45]]))
    assert found[0, "accuracy 2"][:, :2] == pytest.approx(np.array([[30, 50], [95, 90]]))
    assert found[1, "queries"][[4, 14], 1] == pytest.approx([25, 75])
    texts = " ".join(text.get_text() for text in figure.legends[0].get_texts())
    assert "after 0 steps: calibration error 50.0 %" in texts and "after 1 step: calibration error 8.8 %" in texts
    assert len(drawn(reliability([carded(tmp_path / "b"), carded(tmp_path / "c", "anil")]))) == 5


def test_a_run_that_was_not_measured_has_no_diagram(tmp_path: Path) -> None:
    assert "a has no reliability in its summary.json: it is of an older version" in refused(reliability, [run(tmp_path / "a")])


def test_a_sweep_has_a_point_for_each_number_over_seeds(tmp_path: Path) -> None:
    runs = [run(tmp_path / f"{m}{s}", m, FIFTHS * s / 10, shots=s) for m in ("maml", "anil") for s in (5, 1)]
    runs.append(run(tmp_path / "seed1", "maml", FIFTHS * 0.5 + 0.1, shots=5, seed=1))
    found = drawn(sweep(runs, "shots"))
    assert found[0, "maml"][:, 0].tolist() == [1, 5] and found[0, "anil"][:, 0].tolist() == [1, 5]
    mean = 100 * float(FIFTHS[:, 1].mean())
    assert found[0, "anil"][:, 1] == pytest.approx([mean / 10, mean / 2])
    assert found[0, "maml"][:, 1] == pytest.approx([mean / 10, mean / 2 + 5])
    (entry,) = entries({"maml": [runs[0], runs[-1]]})
    assert found[0, "maml"][1, 3] - found[0, "maml"][1, 1] == pytest.approx(100 * entry.mean()[1])


def test_a_sweep_needs_two_numbers_of_one_metric(tmp_path: Path) -> None:
    one = run(tmp_path / "a", shots=5)
    assert refused(sweep, [one], "shots") == "all runs have 5 shots; give runs of two or more numbers of shots"
    assert "has no ways in its config.json" in refused(sweep, [one], "ways")
    assert "different metrics" in refused(sweep, [one, run(tmp_path / "b", shots=1, name="squared error")], "shots")


def trained(folder: Path, rows: Sequence[tuple[int, float]], **changed: Any) -> Run:
    made = run(folder, **changed)
    lines = [json.dumps({"iteration": at, "val_metric": value, "val_loss": 1.0}) for at, value in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return made


def test_seeds_are_thin_and_their_mean_is_over_common_iterations(tmp_path: Path) -> None:
    runs = [trained(tmp_path / "a", [(10, 0.5), (20, 0.75), (30, 0.9)], seed=0)]
    runs.append(trained(tmp_path / "b", [(10, 0.25), (20, 0.5)], seed=1))
    found = drawn(training_seeds(runs))
    assert found[0, "one seed"][:, 1] == pytest.approx([50, 75, 90]) and found[0, "one seed 2"][:, 1] == pytest.approx([25, 50])
    assert found[0, "maml, mean"][:, :2] == pytest.approx(np.array([[10, 37.5], [20, 62.5]]))
    (tmp_path / "b" / "metrics.jsonl").write_text("")
    assert "has no validation rows; train for" in refused(training_seeds, [Run(tmp_path / "b")])


def test_the_same_run_twice_is_no_two_seeds(tmp_path: Path) -> None:
    runs = [trained(tmp_path / name, [(10, 0.5)]) for name in "ab"]
    assert "are one method with the same seed 0; give one of them" in refused(training_seeds, runs)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_saved_with_the_numbers_that_it_draws(kind: str, tmp_path: Path) -> None:
    runs = []
    for i, name in enumerate(("maml", "anil")):
        made = carded(tmp_path / name, name)
        config = made.config | {"shots": i + 1, "ways": i + 2}
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
