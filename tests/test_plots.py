"""The figures of a run, checked by the numbers drawn: line data, bands, positions, texts, scales; never pixels."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.path import Path as Path2D
from safetensors.torch import save_file
from torch import Tensor

from experiments.compare_algorithms import FAMILIES
from toolkit import Learner, UserError, algorithms
from toolkit.models import conv4, mlp
from toolkit.plots import figures
from toolkit.plots.comparison import comparison
from toolkit.plots.frame import heading, moving_mean
from toolkit.plots.rates import learned_rates
from toolkit.plots.save import draw_run, numbers, save
from toolkit.rule_line import parse
from toolkit.runs.folder import Run
from toolkit.runs.journal import rates

pytestmark = pytest.mark.filterwarnings("error")

STEPS = [0, 1, 2, 3, 4]
ACCURACY = {"mean": [0.2, 0.7, 0.8, 0.9, 0.91], "ci95": [0.01, 0.02, 0.01, 0.005, 0.004], "metric": "accuracy"}
SQUARED = {"mean": [4.0, 1.0, 0.5, 0.2, 0.1], "ci95": [0.4, 0.1, 0.05, 0.02, 0.012], "metric": "squared error"}


def classification() -> dict[str, Tensor]:
    """Three classes, two shots; queries in the order 2 0 1 0, of which 1 is right before and 3 after."""
    query_y = torch.tensor([2, 0, 1, 0])
    predicted = torch.tensor([[0, 0, 2, 1], [2, 0, 1, 2]])
    support_y = torch.tensor([0, 1, 2, 0, 1, 2])
    return {
        "support_x": support_y.float().div(4).reshape(-1, 1, 1, 1).expand(-1, 1, 6, 6),
        "support_y": support_y,
        "query_x": query_y.float().div(4).add(0.1).reshape(-1, 1, 1, 1).expand(-1, 1, 6, 6),
        "query_y": query_y,
        "steps": torch.tensor([0, 4]),
        "predictions": torch.nn.functional.one_hot(predicted, 3).float() * 5 - 1,
    }


def regression() -> dict[str, Tensor]:
    """y = 2 x at unsorted queries; the prediction is 0 before and 2 x + 1 after, so the errors are 10 and 1."""
    query_x = torch.tensor([[3.0], [-1.0], [0.0], [0.0]])
    support_x = torch.tensor([[0.5], [-0.5]])
    return {
        "support_x": support_x,
        "support_y": 2 * support_x,
        "query_x": query_x,
        "query_y": 2 * query_x,
        "steps": torch.tensor([0, 4]),
        "predictions": torch.stack([0 * query_x, 2 * query_x + 1]),
    }


def make(path: Path, result: dict[str, Any], example: dict[str, Tensor] | None = None, **summary: Any) -> Run:
    """A run folder, written by hand."""
    path.mkdir(parents=True)
    percent = result["metric"] == "accuracy"
    median = [None if m is None else 0.5 * m for m in result["mean"]]
    test = {"tasks": 600, "steps": STEPS, "median": median, "loss": result["mean"]} | result
    content = {"experiment": "e", "algorithm": "maml", "sampler": "toy", "seed": 0, "batch_norm": "batch", "test": test}
    content |= {"chance": 0.2 if percent else None, "inner_steps": 1, "selected": {"iteration": 20, "val_metric": 0.6}}
    rows: list[dict[str, Any]] = [
        {"iteration": i, "loss": 30.0 / i, "metric": 0.5 + 0.1 * (i % 20 == 0), "seconds": 1.0} for i in range(10, 410, 10)
    ]
    rows.insert(2, {"iteration": 20, "val_loss": 1.5, "val_metric": 0.6, "val_ci95": 0.05})
    rows.append({"iteration": 400, "val_loss": 0.5, "val_metric": 0.7, "val_ci95": None})
    (path / "config.json").write_text('{"val_tasks": 50}')
    (path / "summary.json").write_text(json.dumps(content | summary))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    example = example or (classification() if percent else regression())
    save_file({key: value.contiguous() for key, value in example.items()}, path / "example.safetensors")
    return Run(path)


def line(axes: Axes, name: str, which: int = 0) -> np.ndarray:
    """The points (n, 2) of a line, by the name it was drawn under."""
    return np.asarray([drawn for drawn in axes.get_lines() if drawn.get_label() == name][which].get_xydata())


def texts(axes: Axes) -> dict[str, Any]:
    return {text.get_text(): text for text in axes.texts}


def legend(figure: Figure) -> list[str]:
    return [text.get_text().replace("\N{NO-BREAK SPACE}", " ") for text in figure.legends[0].get_texts()]


def test_adaptation_draws_percent_band_chance_and_ring(tmp_path: Path) -> None:
    figure = figures.adaptation([make(tmp_path / "one", ACCURACY)])
    (axes,) = figure.axes
    np.testing.assert_allclose(line(axes, "mean"), [[0, 20], [1, 70], [2, 80], [3, 90], [4, 91]])
    np.testing.assert_allclose(line(axes, "ring"), [[1, 70]])
    np.testing.assert_allclose(line(axes, "chance")[:, 1], [20, 20])
    corners = axes.collections[0].get_paths()[0].vertices
    assert {(x, round(y, 6)) for x, y in corners} == {
        (k, round(100 * (m + sign * c), 6))
        for k, m, c in zip(STEPS, ACCURACY["mean"], ACCURACY["ci95"], strict=True)
        for sign in (-1, 1)
    }
    assert set(texts(axes)) == {"70.0 ± 2.0", "91.0 ± 0.4"}
    assert [texts(axes)[t].xy[0] for t in ("70.0 ± 2.0", "91.0 ± 0.4")] == [1, 4]
    assert axes.get_yscale() == "linear" and axes.get_ylabel() == "test accuracy (%)"
    assert figure.get_suptitle() == "maml on toy\n600 test tasks"
    assert legend(figure) == ["mean, 95 % interval over tasks", "as trained", "chance, 20 %"]


def test_adaptation_of_regression_has_the_median_and_a_log_axis_only_when_wide(tmp_path: Path) -> None:
    wide = figures.adaptation([make(tmp_path / "wide", SQUARED)]).axes[0]
    np.testing.assert_allclose(line(wide, "mean")[:, 1], SQUARED["mean"])
    np.testing.assert_allclose(line(wide, "median")[:, 1], np.array(SQUARED["mean"]) / 2)
    assert wide.get_yscale() == "log"
    assert set(texts(wide)) == {"1.00 ± 0.10", "0.5", "0.100 ± 0.012", "0.05"}
    assert not [drawn for drawn in wide.get_lines() if drawn.get_label() == "chance"]
    narrow = make(tmp_path / "narrow", SQUARED | {"mean": [0.5, 0.3, 0.2, 0.15, 0.11]})
    assert figures.adaptation([narrow]).axes[0].get_yscale() == "linear"


def test_an_interval_that_reaches_zero_does_not_stretch_the_log_axis(tmp_path: Path) -> None:
    axes = figures.adaptation([make(tmp_path / "a", SQUARED | {"ci95": [0.1, 0.1, 0.1, 0.1, 0.0999999]})]).axes[0]
    assert 0.001 < axes.get_ylim()[0] < 0.05


def test_adaptation_of_several_runs_differs_in_dash_and_marker_and_says_the_numbers(tmp_path: Path) -> None:
    runs = [
        make(tmp_path / "first", ACCURACY),
        make(tmp_path / "second", ACCURACY | {"mean": [0.1, 0.3, 0.4, 0.5, 0.6]}, algorithm="anil", inner_steps=3),
        make(tmp_path / "third", ACCURACY, algorithm="reptile", inner_steps=9, chance=0.05),
    ]
    figure = figures.adaptation(runs)
    axes = figure.axes[0]
    means = [drawn for drawn in axes.get_lines() if drawn.get_label() == "mean"]
    assert len({(m.get_linestyle(), m.get_marker(), m.get_color()) for m in means}) == 3
    assert len({m.get_linestyle() for m in means}) == len({m.get_marker() for m in means}) == 3
    np.testing.assert_allclose(line(axes, "ring", 1), [[3, 50]])
    assert len([drawn for drawn in axes.get_lines() if drawn.get_label() == "ring"]) == 2  # 9 steps are off the curve
    assert legend(figure) == [
        "maml (first)\n70.0 ± 2.0 at 1; 91.0 ± 0.4 at 4",
        "anil (second)\n50.0 ± 0.5 at 3; 60.0 ± 0.4 at 4",
        "reptile (third)\n91.0 ± 0.4 at 4",
        "as trained",
        "95 % interval over tasks",
        "chance, 5 %",
        "chance, 20 %",
    ]
    assert not axes.texts
    series = {row[1] for row in numbers(figure)}
    assert series >= {"maml (first): mean", "anil (second): mean", "reptile (third): band", "chance", "chance 2"}


def test_runs_are_told_apart_by_their_names(tmp_path: Path) -> None:
    """In the legend and in the numbers beside the figure: also where folders have one name or shorten to one."""
    long = [f"{'a' * 30}{n}{'b' * 30}" for n in "01c"]
    runs = [make(tmp_path / place, ACCURACY) for place in (*long[:2], "x/run", "y/run", f"{long[2][:30]}{'d' * 30}")]
    figure = figures.training(runs)
    names = [text.replace("\n", "") for text in legend(figure) if text.startswith("maml")]
    ends = [long[0], long[1], "x/run", "y/run", "aaaaaaaaaaaaaa…ddddddddddddd"]
    assert names == [f"maml ({end})" for end in ends]
    assert {row[1].partition(":")[0] for row in numbers(figure)} >= set(names)


def test_a_run_called_like_a_curve_is_no_curve(tmp_path: Path) -> None:
    error = ACCURACY | {"metric": "squared error"}
    runs = [make(tmp_path / "maml-mean-median", error), make(tmp_path / "ring", error)]
    series = [row[1] for row in numbers(figures.adaptation(runs))]
    own = {f"maml ({name}): {what}" for name in ("maml-mean-median", "ring") for what in ("mean", "median", "ring", "band")}
    assert set(series) == own


def test_values_that_are_not_finite_leave_a_gap(tmp_path: Path) -> None:
    run = make(tmp_path / "a", ACCURACY | {"mean": [0.2, 0.5, 0.6, 0.7, None], "ci95": [None] * 5})
    figure = figures.adaptation([run])
    assert np.isnan(line(figure.axes[0], "mean")[-1, 1])
    assert set(texts(figure.axes[0])) == {"50.0"}
    figure.draw_without_rendering()


def test_training_draws_raw_smooth_validation_and_the_selected_checkpoint(tmp_path: Path) -> None:
    figure = figures.training([make(tmp_path / "one", ACCURACY)])
    upper, lower = figure.axes
    assert upper.get_shared_x_axes().joined(upper, lower)
    raw, smooth = line(upper, "raw"), line(upper, "smooth")
    np.testing.assert_allclose(raw[:3], [[10, 50], [20, 60], [30, 50]])
    np.testing.assert_allclose(smooth[:3, 1], [55, 160 / 3, 170 / 3])  # 40 rows: a window of three
    np.testing.assert_allclose(line(upper, "selected"), [[20, 60]])
    points, _, (bars,) = upper.containers[0]
    np.testing.assert_allclose(points.get_xydata(), [[20, 60], [400, 70]])
    np.testing.assert_allclose(bars.get_segments()[0], [[20, 55], [20, 65]])
    np.testing.assert_allclose(line(lower, "raw")[0], [10, 3.0])
    np.testing.assert_allclose(lower.containers[0][0].get_xydata(), [[20, 1.5], [400, 0.5]])
    assert (upper.get_yscale(), lower.get_yscale()) == ("linear", "log")
    assert [a.get_ylabel() for a in (upper, lower)] == ["accuracy (%)", "loss"]
    assert legend(figure) == [
        "training, bold: mean over 1/20 of it", "validation, 95 % interval over 50 tasks", "selected on validation",
    ]  # fmt: skip


def test_training_of_regression_has_one_panel_and_needs_no_validation(tmp_path: Path) -> None:
    run = make(tmp_path / "one", SQUARED, selected=None)
    kept = [row for row in (run.path / "metrics.jsonl").read_text().splitlines() if "val_" not in row]
    (run.path / "metrics.jsonl").write_text("\n".join(kept))
    figure = figures.training([run])
    (axes,) = figure.axes
    assert axes.get_ylabel() == "squared error"
    np.testing.assert_allclose(line(axes, "raw")[:2, 1], [0.5, 0.6])
    assert legend(figure) == ["training, bold: mean over 1/20 of it"]


def test_moving_mean_is_centred_and_skips_what_is_not_finite() -> None:
    np.testing.assert_allclose(moving_mean(np.array([1.0, np.nan, 3.0, 8.0]), 3), [1, 2, 5.5, 5.5])
    np.testing.assert_allclose(moving_mean(np.array([np.nan, np.nan, 3.0]), 1), [np.nan, np.nan, 3])
    assert moving_mean(np.array([2.0]), 5).tolist() == [2.0]


def test_task_card_marks_every_query_before_and_after(tmp_path: Path) -> None:
    figure = figures.task_card(make(tmp_path / "one", ACCURACY))
    (axes,) = figure.axes
    found = [(t.get_position()[0], t.get_text(), t.get_color()) for t in axes.texts if t.get_text()[-1] in "✓✗"]
    right, wrong = figures.RIGHT[1], figures.WRONG[1]
    assert sorted(found) == sorted(
        [
            (0.5, "0: 0 ✓", right),
            (0.5, "4: 0 ✓", right),
            (0.5, "0: 1 ✗", wrong),
            (0.5, "4: 2 ✗", wrong),
            (1.5, "0: 2 ✗", wrong),
            (1.5, "4: 1 ✓", right),
            (2.5, "0: 0 ✗", wrong),
            (2.5, "4: 2 ✓", right),
        ]
    )
    columns = {t.get_text(): t.get_position()[0] for t in axes.texts if t.get_text().startswith("class")}
    assert columns == {"class 0": 0.5, "class 1": 1.5, "class 2": 2.5}
    frames = [matplotlib.colors.to_hex(patch.get_edgecolor()) for patch in axes.patches]
    assert (frames.count(right.lower()), frames.count(wrong.lower())) == (3, 1)
    assert len(axes.images) == 10
    told = {row[1]: row[3] for row in numbers(figure) if row[2] == 4}
    data = make(tmp_path / "again", ACCURACY).example
    for n, label in enumerate(data["query_y"].tolist()):
        shares = data["predictions"][-1, n].softmax(-1)
        assert told[f"query {n} of class {label}: predicted class"] == int(shares.argmax())
        assert told[f"query {n} of class {label}: probability of class {label}"] == pytest.approx(float(shares[label]))
    # Ink is high in the data and dark on the page; a class stands in its column.
    for image in axes.images:
        ink = 0.25 * int(image.get_extent()[0])
        assert min(abs(float(image.get_array()[0, 0]) - (1 - ink - extra)) for extra in (0, 0.1)) < 1e-6


def test_task_card_shows_colour_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    y = torch.arange(12)
    x = torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    many = {"support_x": x.repeat(7, 1, 1, 1), "support_y": y.repeat(7), "query_x": x.repeat(5, 1, 1, 1)}
    many |= {"query_y": y.repeat(5), "steps": torch.tensor([3]), "predictions": torch.zeros(1, 60, 12)}
    figure = figures.task_card(make(tmp_path / "many", ACCURACY, many))
    axes = figure.axes[0]
    assert len(axes.images) == 10 * (5 + 3)
    assert sum(t.get_text().endswith("✓") for t in axes.texts) == 3  # argmax of equal logits is class 0
    assert sum(t.get_text().endswith("✗") for t in axes.texts) == 27
    assert "10 of 12 classes" in figure.get_suptitle()
    np.testing.assert_allclose(axes.images[0].get_array(), x[0].permute(1, 2, 0).numpy())


def test_fits_are_sorted_and_tell_their_errors(tmp_path: Path) -> None:
    figure = figures.fits(make(tmp_path / "one", SQUARED))
    (axes,) = figure.axes
    np.testing.assert_allclose(line(axes, "true"), [[-1, -2], [0, 0], [0, 0], [3, 6]])
    np.testing.assert_allclose(line(axes, "0")[:, 1], 0)
    np.testing.assert_allclose(line(axes, "4"), [[-1, -1], [0, 1], [0, 1], [3, 7]])
    np.testing.assert_allclose(line(axes, "support"), [[0.5, 1], [-0.5, -1]])
    assert legend(figure) == ["true", "support", "0 steps: 10", "4 steps: 1"]


def test_example_chooses_by_the_data(tmp_path: Path) -> None:
    pictures, scalars = make(tmp_path / "c", ACCURACY), make(tmp_path / "r", SQUARED)
    assert (figures.example_kind(pictures), figures.example_kind(scalars)) == ("task", "fits")
    assert figures.example(pictures).axes[0].images
    assert line(figures.example(scalars).axes[0], "support").shape == (2, 2)


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    good, other = make(tmp_path / "good", ACCURACY), make(tmp_path / "other", SQUARED)
    with pytest.raises(UserError, match="nothing has no test result"):
        figures.adaptation([make(tmp_path / "nothing", ACCURACY, test=None)])
    with pytest.raises(UserError, match=r"different metrics .*accuracy.*squared error"):
        figures.adaptation([good, other])
    with pytest.raises(UserError, match="different metrics"):
        figures.training([good, other])
    with pytest.raises(UserError, match="1 to 7 runs, not 0"):
        figures.adaptation([])
    with pytest.raises(UserError, match="1 to 7 runs, not 8"):
        figures.training([good] * 8)
    (other.path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no training rows"):
        figures.training([Run(other.path)])
    (other.path / "metrics.jsonl").write_text('{"iteration": 1, "metric": 1.0}\n{"metric": 1.0}\n')
    with pytest.raises(UserError, match=r"other/metrics.jsonl is damaged \(line 2 is no row of a run, which has"):
        figures.training([Run(other.path)])
    with pytest.raises(UserError, match=r"task card needs images .*\(2, 1\)"):
        figures.task_card(other)
    with pytest.raises(UserError, match="fits need x and y"):
        figures.fits(good)
    with pytest.raises(UserError, match="no run folder"):
        draw_run(tmp_path / "absent")


def test_save_writes_both_files_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    run = make(tmp_path / "one", ACCURACY)
    first, second = (save(figures.task_card(run), tmp_path / name / "lr0.4") for name in "ab")
    assert [path.name for path in first] == ["lr0.4.png", "lr0.4.pdf", "lr0.4.csv"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert b"CreationDate" not in first[1].read_bytes() and b"matplotlib.org" not in first[0].read_bytes()
    assert imread(first[0]).shape[1] == pytest.approx(3.4 * 200, abs=1)


def test_save_clears_the_figure(tmp_path: Path) -> None:
    figure = figures.adaptation([make(tmp_path / "one", ACCURACY)])
    save(figure, tmp_path / "x")
    assert figure.axes == []


@pytest.mark.parametrize(("test", "example"), [(ACCURACY, "task"), (SQUARED, "fits")], ids=["accuracy", "squared"])
def test_draw_run_leaves_backend_and_style_alone(tmp_path: Path, test: dict[str, Any], example: str) -> None:
    run = make(tmp_path / "one", test)
    before = dict(matplotlib.rcParams.copy())
    written = draw_run(run.path)
    assert dict(matplotlib.rcParams.copy()) == before
    stems = ("adaptation", "training", example)
    assert written == [run.path / f"{stem}.{suffix}" for stem in stems for suffix in ("png", "pdf", "csv")]
    assert all(path.stat().st_size > (20 if path.suffix == ".csv" else 1000) for path in written)


def test_the_users_style_does_not_reach_the_figures(tmp_path: Path) -> None:
    run = make(tmp_path / "one", ACCURACY)
    plain = save(figures.adaptation([run]), tmp_path / "plain")
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "savefig.facecolor": "red"}):
        styled = save(figures.adaptation([run]), tmp_path / "styled")
    assert [path.read_bytes() for path in plain] == [path.read_bytes() for path in styled]


@pytest.mark.parametrize(
    ("file", "left"),
    [
        ("metrics.jsonl", {"adaptation", "task"}),
        ("example.safetensors", {"adaptation", "training"}),
    ],
)
def test_draw_run_draws_what_a_damaged_file_leaves_and_says_so(tmp_path: Path, file: str, left: set[str]) -> None:
    run = make(tmp_path / "run", ACCURACY)
    (run.path / file).write_bytes(b"damaged")
    with pytest.raises(UserError, match=rf"{file} is damaged .* \(drawn without it: "):
        draw_run(run.path)
    assert {path.stem for path in run.path.glob("*.png")} == left


def test_of_a_run_that_was_stopped_its_training_is_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "toolkit")
    run = make(tmp_path / "run", ACCURACY)
    whole = heading([run])
    for name in ("summary.json", "curve.json", "example.safetensors"):
        (run.path / name).unlink(missing_ok=True)
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 12, "lo')  # as in a run that is just writing
    (run.path / "config.json").write_text('{"algorithm": "maml", "sampler": "toy", "metric": "accuracy", "val_tasks": 50}')
    assert {path.stem for path in draw_run(run.path)} == {"training"}
    assert "run is not finished: only its training can be drawn" in caplog.text and "have no picture" not in caplog.text
    stopped = Run(run.path)
    assert heading([stopped]) == whole and figures.training([stopped]).axes[0].get_ylabel() == "accuracy (%)"
    (run.path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"run has no summary\.json; the run has not come so far, continue it with --resume$"):
        draw_run(run.path)


def test_draw_run_wants_no_training_of_an_evaluation(tmp_path: Path) -> None:
    run = make(tmp_path / "run", ACCURACY, weights_of="other")
    (run.path / "metrics.jsonl").unlink()
    assert {path.stem for path in draw_run(run.path)} == {"adaptation", "task"}


def test_draw_run_leaves_out_an_example_without_picture(tmp_path: Path) -> None:
    flat = classification() | {"support_x": torch.rand(6, 8), "query_x": torch.rand(4, 8)}
    run = make(tmp_path / "flat", ACCURACY, flat)
    assert {path.stem for path in draw_run(run.path)} == {"adaptation", "training"}


@pytest.mark.parametrize("test", [ACCURACY, SQUARED], ids=["accuracy", "squared"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["a", "a_long_name-of$_$run_" * 8], ids=["short", "long"])
def test_no_text_overlaps_the_axes_or_leaves_the_figure(tmp_path: Path, test: dict[str, Any], count: int, name: str) -> None:
    runs = [make(tmp_path / f"{i}{name}", test, sampler=f"plugin.py:{name}") for i in range(count)]
    drawn = [figures.adaptation(runs), figures.training(runs), figures.example(runs[0])]
    for figure in drawn:
        figure.draw_without_rendering()
        title = figure._suptitle.get_window_extent()
        whole = [
            title,
            *(axes.get_tightbbox() for axes in figure.axes),
            *(box.get_window_extent() for box in figure.legends),
        ]
        for i, box in enumerate(whole):
            assert figure.bbox.x0 - 0.5 <= box.x0 and box.x1 <= figure.bbox.x1 + 0.5
            assert figure.bbox.y0 - 0.5 <= box.y0 and box.y1 <= figure.bbox.y1 + 0.5
            assert not [other for other in whole[:i] if box.overlaps(other)]
        written = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
        assert not [i for i, box in enumerate(written) for other in written[:i] if box.overlaps(other)]
        for axes in figure.axes:
            assert axes.get_window_extent().height > 80  # the legend must not eat the plot
    assert min(text.get_fontsize() for figure in drawn for text in figure.findobj(matplotlib.text.Text)) >= 8


SHAPES = {
    "saturating": ACCURACY,
    "rising": ACCURACY | {"mean": [0.2, 0.35, 0.5, 0.65, 0.8]},
    "falling": ACCURACY | {"mean": [0.9, 0.8, 0.7, 0.6, 0.5]},
    "at chance": ACCURACY | {"mean": [0.2, 0.21, 0.2, 0.19, 0.2]},
    "log": SQUARED,
    "linear": SQUARED | {"mean": [0.5, 0.3, 0.2, 0.15, 0.11]},
}


@pytest.mark.parametrize("step", range(1, 5))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_numbers_in_the_plot_cover_no_curve_and_no_other_number(tmp_path: Path, shape: str, step: int) -> None:
    figure = figures.adaptation([make(tmp_path / "one", SHAPES[shape], inner_steps=step)])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not [i for i, box in enumerate(boxes) for other in boxes[:i] if box.overlaps(other)]
    drawn = [name for name in ("mean", "median") if name == "mean" or shape in ("log", "linear")]
    corners = [axes.transData.transform(line(axes, name)) for name in drawn]
    for box in boxes:
        assert axes.bbox.padded(4).contains(*box.p0) and axes.bbox.padded(4).contains(*box.p1)
        for points in corners:
            assert not Path2D(points).intersects_bbox(box, filled=False)


def test_a_number_changes_side_where_the_curve_is_in_its_way(tmp_path: Path) -> None:
    flat, rising = (figures.adaptation([make(tmp_path / shape, SHAPES[shape])]).axes[0] for shape in ("saturating", "rising"))
    assert texts(flat)["91.0 ± 0.4"].xyann[1] < 0 < texts(rising)["80.0 ± 0.4"].xyann[1]


TITLE = "omniglot-20w1s: 1,000 iterations, 3 seeds, 600 test tasks"
ALL = [method for names in FAMILIES.values() for method in names]


def compared(methods: Sequence[str] = ALL, metric: str = "accuracy", **changed: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a comparison with curves that differ, `changed` by method; accuracy rises, an error falls."""
    found = []
    for i, method in enumerate(methods):
        end = (0.5 + 0.02 * i) if metric == "accuracy" else 0.1 * (i + 1)
        mean = [end + ((0.2 if metric == "accuracy" else 4.0) - end) * math.exp(-k) for k in range(11)]
        row = {"method": method, "metric": metric, "mean": mean, "ci95": [0.01] * 11, "trained_steps": i % 6}
        found.append(row | {"chance": 0.2 if metric == "accuracy" else None} | changed.get(method, {}))
    return found


def panels(figure: Figure) -> dict[str, Axes]:
    """The panels by their family."""
    return {axes.get_legend().get_title().get_text(): axes for axes in figure.axes if axes.get_visible()}


def named(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def drawn(axes: Axes, name: str) -> list[Any]:
    return [line for line in axes.get_lines() if line.get_label() == name]


def assert_tidy(figure: Figure, room: float = 80) -> None:
    """No box of text or axes touches another or leaves the figure, no text is small, and the axes keep their room (height)."""
    figure.draw_without_rendering()
    shown = [axes for axes in figure.axes if axes.get_visible()]
    legends = [box for box in (axes.get_legend() for axes in shown) if box]
    boxes = [axes.get_window_extent() for axes in shown] + [box.get_window_extent() for box in (*legends, *figure.legends)]
    boxes += [axes.xaxis.label.get_window_extent() for axes in shown if axes.get_xlabel()]
    boxes += [axes.yaxis.label.get_window_extent() for axes in shown if axes.get_ylabel()]
    boxes.append(figure._suptitle.get_window_extent())
    for i, box in enumerate(boxes):
        assert not [other for other in boxes[:i] if box.overlaps(other)]
    for box in boxes + [axes.get_tightbbox() for axes in shown]:
        assert figure.bbox.x0 - 0.5 <= box.x0 and box.x1 <= figure.bbox.x1 + 0.5
        assert figure.bbox.y0 - 0.5 <= box.y0 and box.y1 <= figure.bbox.y1 + 0.5
    assert min(axes.get_window_extent().height for axes in shown) > room
    assert min(text.get_fontsize() for text in figure.findobj(matplotlib.text.Text)) >= 8


def test_a_comparison_has_a_panel_per_family_and_names_every_method_once() -> None:
    found = panels(comparison(compared(), FAMILIES, TITLE))
    assert {family: tuple(named(axes)) for family, axes in found.items()} == FAMILIES
    for family, axes in found.items():
        for i, method in enumerate(ALL):
            curves = [line.get_ydata() for line in (drawn(axes, method) or drawn(axes, "in grey"))]
            expected = 100 * np.array(compared()[i]["mean"])
            assert sum(np.allclose(curve, expected) for curve in curves) == 1, "every curve is in every panel, once"
        assert len(drawn(axes, "in grey")) == len(ALL) - len(FAMILIES[family])
        assert {(line.get_color(), line.get_linestyle()) for line in drawn(axes, "in grey")} == {("0.75", "-")}
        bold = [drawn(axes, method)[0] for method in FAMILIES[family]]
        assert len({(line.get_color(), line.get_marker()) for line in bold}) == len(bold)
        assert min(line.get_zorder() for line in bold) >= max(line.get_zorder() for line in drawn(axes, "in grey"))


def test_a_comparison_of_accuracy_is_in_percent_with_chance_rings_and_bands() -> None:
    figure = comparison(compared(["maml", "anil"]), FAMILIES, TITLE)
    (first, second) = panels(figure).values()
    assert list(panels(figure)) == ["MAML and its order", "a part adapts"]
    assert (first.get_ylabel(), second.get_ylabel(), first.get_yscale()) == ("test accuracy (%)", "", "linear")
    assert [axes.get_xlabel() for axes in (first, second)] == ["inner steps"] * 2
    for axes in (first, second):
        assert [line.get_ydata()[0] for line in drawn(axes, "chance")] == [20]
    (ring,) = drawn(second, "ring")
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (1, pytest.approx(100 * compared()[1]["mean"][1]))
    assert not drawn(first, "anil") and drawn(first, "ring")[0].get_xdata()[0] == 0
    band = first.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((19, 100 * compared()[0]["mean"][-1] + 1))
    assert legend(figure) == ["other methods", "95 % interval over tasks", "as trained", "chance, 20 %"]
    assert figure.get_suptitle() == TITLE


def test_a_comparison_of_methods_close_together_shows_where_they_differ() -> None:
    close = {
        method: {"mean": [0.2] + [end] * 10, "ci95": [0.01] * 11, "trained_steps": 3}
        for method, end in [("maml", 0.92), ("anil", 0.95)]
    }
    figure = comparison(compared(["maml", "anil"], **close), FAMILIES, TITLE)
    for axes in panels(figure).values():
        low, high = axes.get_ylim()
        assert 88 < low < 91 and 96 < high < 98, "both rings and their intervals"
    assert legend(figure)[-1] == "chance, 20 %, below the axis"
    assert_tidy(figure)
    apart = close | {"anil": {"mean": [0.2] + [0.5] * 10, "ci95": [0.01] * 11, "trained_steps": 3}}
    figure = comparison(compared(["maml", "anil"], **apart), FAMILIES, TITLE)
    assert panels(figure)["a part adapts"].get_ylim()[0] < 20
    assert legend(figure)[-1] == "chance, 20 %"


def test_a_comparison_of_errors_is_on_a_log_axis_that_what_diverges_does_not_stretch() -> None:
    diverging = {"mean": [4.0, 1.0, 50.0, 1e4, 1e9] + [None] * 6, "ci95": [None] * 11, "trained_steps": 6}
    touching = {"ci95": [0.3 - 1e-9] * 11, "mean": [0.3] * 11}
    figure = comparison(compared(metric="squared error", maml=diverging, anil=touching), FAMILIES, TITLE)
    found = panels(figure)
    for axes in found.values():
        assert axes.get_yscale() == "log" and not drawn(axes, "chance")
        low, high = axes.get_ylim()
        assert 0.1 < low < 0.2 and 40 <= high < 100
    assert found["MAML and its order"].get_ylabel() == "test squared error"
    own = FAMILIES["MAML and its order"]
    assert len(drawn(found["MAML and its order"], "ring")) == len(own) - 1, "no ring where nothing is finite"
    assert legend(figure) == ["other methods", "95 % interval over tasks, where less than the mean", "as trained"]
    np.testing.assert_allclose(drawn(found["MAML and its order"], "maml")[0].get_ydata()[4:], [1e9] + [np.nan] * 6)
    assert_tidy(figure)


@pytest.mark.parametrize("metric", ["accuracy", "squared error"])
@pytest.mark.parametrize("count", [1, 2, 7, 11, len(ALL)])
def test_nothing_in_a_comparison_overlaps_or_leaves_the_figure(count: int, metric: str) -> None:
    assert_tidy(comparison(compared(ALL[:count], metric), FAMILIES, TITLE))


def test_a_comparison_of_curves_without_any_number_is_drawn_all_the_same() -> None:
    nothing = {"mean": [None] * 11, "ci95": [None] * 11}
    for metric in ("accuracy", "squared error"):
        assert_tidy(comparison(compared(["maml"], metric, maml=nothing), FAMILIES, TITLE))


def test_a_comparison_of_unknown_methods_is_refused() -> None:
    with pytest.raises(UserError, match=r"^no row of the comparison belongs to a family; the rows are mine, yours$"):
        comparison(compared(["mine", "yours"]), FAMILIES, TITLE)


def learning(path: Path, learner: Learner, rows: int = 4) -> tuple[Run, dict[str, float]]:
    """A run whose learned rates go up by their number, and how they start."""
    start = rates(learner.init())
    run = make(path, SQUARED, algorithm=learner.name, sampler="toy")
    grown = [{"iteration": 100 * n} | {key: r + n * i for i, (key, r) in enumerate(start.items())} for n in range(1, rows + 1)]
    with open(path / "metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in grown))
    return Run(run.path), start


def test_rates_of_tensors_have_a_line_each(tmp_path: Path) -> None:
    run, start = learning(tmp_path / "run", algorithms.meta_sgd(mlp(), inner_lr=0.4))
    figure = learned_rates(run)
    (axes,) = figure.axes
    names = ["body.layer0.weight", "body.layer0.bias", "body.layer1.weight", "body.layer1.bias", "head.weight", "head.bias"]
    assert legend(figure) == names == [key.removeprefix("rate/lr/") for key in start]
    for i, name in enumerate(names):
        np.testing.assert_allclose(line(axes, name), [[100 * n, 0.4 + n * i] for n in (1, 2, 3, 4)], rtol=1e-6)
    assert len({tuple(drawn(axes, name)[0].get_color()) for name in names}) == 6
    assert len(axes.get_lines()) == 6
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("iteration", "learned inner rate")
    assert figure.get_suptitle() == "meta_sgd on toy\nlearned inner rates"
    assert_tidy(figure)


def test_rates_of_steps_are_thin_around_their_mean(tmp_path: Path) -> None:
    run, _ = learning(tmp_path / "run", algorithms.maml_plus_plus(mlp(), inner_lr=0.1, inner_steps=3))
    figure = learned_rates(run)
    (axes,) = figure.axes
    assert legend(figure) == [f"step {k}, mean of 6 tensors" for k in range(3)]
    for k in range(3):
        np.testing.assert_allclose(line(axes, f"step {k}")[:, 1], [0.1 + n * (6 * k + 2.5) for n in (1, 2, 3, 4)], rtol=1e-6)
        thin = [line for line in axes.get_lines() if f"step{k}/" in str(line.get_label())]
        assert [line.get_ydata()[0] for line in thin] == pytest.approx([0.1 + 6 * k + i for i in range(6)])
    assert_tidy(figure)


def test_rates_of_many_tensors_are_drawn_by_the_part_of_the_model(tmp_path: Path) -> None:
    figure = learned_rates(learning(tmp_path / "run", algorithms.meta_sgd(conv4(5)))[0])
    blocks = [f"body.block{i}, mean of 4 tensors" for i in range(4)]
    assert legend(figure) == [*blocks, "head.weight", "head.bias"]
    assert len(figure.axes[0].get_lines()) == 18 + 4
    assert_tidy(figure)


def test_rates_of_groups_are_told_apart_by_step_where_they_have_steps(tmp_path: Path) -> None:
    rule = parse("head: sgd 0.4 learned per-step=2; rest: sgd 0.1 learned")
    figure = learned_rates(learning(tmp_path / "run", algorithms.maml(mlp(), rule=rule, inner_steps=2))[0])
    tensors = [f"body.layer{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")]
    assert legend(figure) == ["step 0, mean of 2 tensors", "step 1, mean of 2 tensors", *tensors]


def test_a_single_row_of_rates_is_a_point_and_none_is_refused(tmp_path: Path) -> None:
    run, _ = learning(tmp_path / "one", algorithms.meta_sgd(mlp()), rows=1)
    assert {drawn.get_marker() for drawn in learned_rates(run).axes[0].get_lines()} == {"o"}
    with pytest.raises(UserError, match=r"none has no learned inner rates; they are learned by methods such as meta_sgd"):
        learned_rates(make(tmp_path / "none", SQUARED))


def test_rates_differ_in_more_than_colour(tmp_path: Path) -> None:
    lines = learned_rates(learning(tmp_path / "run", algorithms.meta_sgd(mlp()))[0]).axes[0].get_lines()
    assert len({drawn.get_linestyle() for drawn in lines if drawn.get_label() != "thin"}) == 4


def test_draw_run_draws_the_rates_of_a_run_that_has_them(tmp_path: Path) -> None:
    run, _ = learning(tmp_path / "run", algorithms.meta_sgd(mlp()))
    assert {path.name for path in draw_run(run.path)} >= {"rates.png", "rates.pdf"}
