"""The path of adaptation in its plane: the projection against numpy, losses against direct evaluation and a closed form."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.conftest import convolutional, dense, flat, named, stirred, task_batch
from toolkit import Batch, Learner, Meta, Task, UserError, algorithms
from toolkit.engine import exact_attention
from toolkit.landscape import Landscape, landscape, losses, spanned
from toolkit.metrics import squared_error
from toolkit.plots.landscape import landscape as drawn
from toolkit.plots.landscape import levels_of
from toolkit.plots.save import save
from toolkit.task import take
from toolkit.tree import Params

pytestmark = pytest.mark.filterwarnings("error")


def walk(learner: Learner, meta: Meta, task: Task, steps: int) -> list[Params]:
    with torch.no_grad(), exact_attention():
        return list(learner.path(meta, task.support, steps))


def quadratic(steps: int = 2) -> tuple[Learner, Meta, Task]:
    """A linear model of three weights, no bias, and its task: the loss is a quadratic form of the weights."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
    learner = algorithms.maml(
        nn.Linear(3, 1, bias=False).double(), inner_lr=0.1, inner_steps=steps, loss=squared_error, metric=squared_error
    )
    return learner, learner.init(), Task(Batch(x[:4], y[:4]), Batch(x[4:], y[4:]))


def test_the_projection_is_that_of_numpy() -> None:
    """On the two leading right singular vectors of the centred path, up to their signs, which are settled by the path."""
    learner, task = algorithms.maml(dense(), inner_lr=0.5, inner_steps=4), take(task_batch(), 0)
    meta = stirred(learner)
    found = landscape(learner, meta, task, 6, grid=3)
    rows = np.stack([flat({n: fast[n] for n in learner.adapted_names}).numpy() for fast in walk(learner, meta, task, 6)])
    _, sizes, directions = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    expected = (rows - rows.mean(0)) @ directions[:2].T
    np.testing.assert_allclose(np.abs(found.points), np.abs(expected), atol=1e-10)
    np.testing.assert_allclose(found.explained, sizes[:2] ** 2 / (sizes**2).sum(), rtol=1e-10)
    assert found.points[-1, 0] > found.points[0, 0]
    assert found.points[found.points[:, 1].abs().argmax(), 1] > 0
    assert all(tensor.dtype == torch.float64 and not tensor.requires_grad for tensor in vars(found).values())


def test_the_grid_holds_the_path_and_its_margin() -> None:
    learner, meta, task = quadratic()
    found = landscape(learner, meta, task, 4, grid=7, margin=0.5)
    low, high = found.points.amin(0), found.points.amax(0)
    length = float((high - low).max())
    assert found.loss.shape == found.support_loss.shape == (7, 7) and found.points.shape == (5, 2)
    assert float(found.u[0]) == pytest.approx(float(low[0]) - 0.5 * length)
    assert float(found.u[-1]) == pytest.approx(float(high[0]) + 0.5 * length)
    assert found.v[0] <= low[1] - 0.5 * length and found.v[-1] >= high[1] + 0.5 * length


def test_losses_of_a_quadratic_are_its_closed_form() -> None:
    """|X (w - target)|^2 / n, at every point of the grid, from the weights c + u d1 + v d2 that numpy makes."""
    learner, meta, task = quadratic()
    found = landscape(learner, meta, task, 2, grid=5)
    rows = np.stack([fast["weight"][0].numpy() for fast in walk(learner, meta, task, 2)])
    # The directions follow from the points, whose coordinates they are: rows - centre = points @ directions.
    directions = np.linalg.lstsq(found.points.numpy(), rows - rows.mean(0), rcond=None)[0]
    v, u = np.meshgrid(found.v, found.u, indexing="ij")
    weights = rows.mean(0) + u[..., None] * directions[0] + v[..., None] * directions[1]
    for batch, loss in ((task.query, found.loss), (task.support, found.support_loss)):
        assert isinstance(batch.x, Tensor)
        errors = weights @ batch.x.numpy().T - batch.y[:, 0].numpy()
        np.testing.assert_allclose(loss, (errors**2).mean(-1), rtol=1e-9)


@pytest.mark.parametrize("build", [dense, convolutional, lambda: named(body=nn.RNN(3, 4, batch_first=True), head=Last(4, 2))])
def test_a_path_of_two_steps_lies_in_its_plane(build: Any) -> None:
    """Where the plane's losses at the path's own points are those of `assess`; of recurrent layers without vmap."""
    shape = (1, 8, 8) if build is convolutional else (3,) if build is dense else (5, 3)
    learner, task = algorithms.maml(build(), inner_lr=0.3, inner_steps=2), take(task_batch(shape=shape), 0)
    meta = stirred(learner)
    path = walk(learner, meta, task, 2)
    with torch.no_grad():
        plane, points, explained = spanned(learner, meta, task, path)
        in_plane, on_support = losses(learner, meta, task, plane, points, 2)
        expected = torch.stack([learner.assess(meta, fast, task).loss for fast in path])
    found = landscape(learner, meta, task, 2, grid=3)
    assert float(explained.sum()) == pytest.approx(1.0)
    assert torch.allclose(in_plane, expected, rtol=1e-9) and torch.allclose(found.path_loss, expected, rtol=1e-12)
    assert torch.allclose(on_support, found.path_support_loss, rtol=1e-9)


class Last(nn.Linear):
    """The outputs of a recurrent layer's last step."""

    def forward(self, x: Any) -> Tensor:
        return super().forward(x[0][:, -1])


def test_every_point_of_the_grid_is_evaluated_at_its_own_place() -> None:
    """A long path, in float32, against weights written into the model itself."""
    learner, task = algorithms.maml(dense().float(), inner_lr=0.5, inner_steps=1), take(task_batch(), 0)
    task = Task(*(Batch(batch.x.float(), batch.y) for batch in task))  # type: ignore[union-attr]
    meta = learner.init()
    found, path = landscape(learner, meta, task, 5, grid=4), walk(learner, meta, task, 5)
    with torch.no_grad():
        plane, _, _ = spanned(learner, meta, task, path)
    for i, j in ((0, 0), (1, 3), (3, 2)):
        weights = plane.at(torch.stack([found.u[j], found.v[i]]))
        predicted = functional_call(dense().float(), weights, (task.query.x,))
        assert float(found.loss[i, j]) == pytest.approx(float(learner.loss(predicted, task.query.y)), rel=1e-5)


def test_a_model_that_vmap_cannot_map_is_evaluated_point_by_point() -> None:
    class Looking(nn.Linear):
        """Decides by the values that it computes."""

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out if float(out.sum()) > 0 else out * 1.0

    plain, looking = (algorithms.maml(kind(3, 2).double(), inner_steps=2) for kind in (nn.Linear, Looking))
    task, meta = take(task_batch(), 0), plain.init()
    with torch.no_grad():
        plane, points, _ = spanned(plain, meta, task, walk(plain, meta, task, 2))
        expected, found = (losses(learner, meta, task, plane, points, 2) for learner in (plain, looking))
    assert torch.allclose(found, expected, rtol=1e-12) and len(found.unique()) == 6


def test_nothing_is_kept() -> None:
    learner, meta, task = quadratic()
    before, state = {n: p.clone() for n, p in meta.params.items()}, torch.get_rng_state()
    first, second = (landscape(learner, meta, task, 3, grid=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in meta.params.items())
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def test_a_straight_path_gets_the_slope_across_it() -> None:
    """One step: its second direction is where the query loss rises fastest at the end, at right angles to the path."""
    learner, meta, task = quadratic(1)
    found = landscape(learner, meta, task, 1, grid=5)
    assert found.explained.tolist() == [1.0, 0.0] and found.points[:, 1].abs().max() < 1e-12
    path = walk(learner, meta, task, 1)
    assert isinstance(task.query.x, Tensor)
    end = path[1]["weight"].clone().requires_grad_()
    (slope,) = torch.autograd.grad((task.query.x @ end.T - task.query.y).square().mean(), end)
    first = torch.nn.functional.normalize(path[1]["weight"] - path[0]["weight"], dim=1)
    rest = slope - (slope * first).sum() * first
    with torch.no_grad():
        plane, _, _ = spanned(learner, meta, task, path)
    assert torch.allclose(plane.second["weight"], rest / rest.norm())


def test_a_single_weight_has_no_second_direction() -> None:
    learner = algorithms.maml(nn.Linear(1, 1, bias=False).double(), inner_lr=0.1, loss=squared_error, metric=squared_error)
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    found = landscape(learner, learner.init(), Task(Batch(x, 3 * x), Batch(x, 3 * x)), 3, grid=4)
    assert found.explained.tolist() == [1.0, 0.0] and torch.equal(found.loss[0], found.loss[-1])
    drawn(found)


def refused(learner: Learner, meta: Meta, task: Task, steps: int = 3, **given: Any) -> str:
    with pytest.raises(UserError) as caught:
        landscape(learner, meta, task, steps, **given)
    return str(caught.value)


def test_errors_are_one_sentence() -> None:
    learner, meta, task = quadratic()
    assert refused(learner, meta, task, 0).startswith("0 steps, grid 25, margin 0.4; give 1 step or more")
    assert "grid 1" in refused(learner, meta, task, grid=1) and "margin 0" in refused(learner, meta, task, margin=0.0)
    stuck = "the weights of protonet do not move in 3 inner steps, so there is no path to draw"
    protonet = algorithms.protonet(named())
    assert refused(protonet, protonet.init(), take(task_batch(), 0)).startswith(stuck)
    solved = Meta({"weight": torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)}, meta.learned)
    assert "do not move" in refused(learner, solved, task)
    wild = algorithms.maml(nn.Linear(3, 1, bias=False).double(), inner_lr=1e200, loss=squared_error, metric=squared_error)
    assert refused(wild, wild.init(), task).startswith("the weights are not finite after 2 steps")


def test_batch_norm_of_each_step_is_that_of_the_last() -> None:
    learner, task = (
        algorithms.maml(convolutional(), inner_lr=0.3, inner_steps=2, batch_norm="support"),
        take(task_batch(shape=(1, 8, 8)), 0),
    )
    found = landscape(learner, learner.init(), task, 2, grid=3)
    path = walk(learner, learner.init(), task, 2)
    with torch.no_grad():
        assert float(found.path_loss[1]) == pytest.approx(float(learner.assess(learner.init(), path[1], task, 1).loss))


def valley(loss: Tensor, steps: int = 3, flat: bool = False) -> Landscape:
    points = torch.stack([torch.linspace(-1, 1, steps + 1), torch.linspace(0.5, -0.5, steps + 1) * (not flat)], 1).double()
    u = torch.linspace(-1.5, 1.5, loss.shape[1], dtype=torch.float64)
    explained = torch.tensor([1.0, 0.0] if flat else [0.9, 0.064], dtype=torch.float64)
    on_path = torch.linspace(2, 0.5, steps + 1, dtype=torch.float64)
    return Landscape(points, u, u[: loss.shape[0]], loss, loss + 1, explained, on_path, on_path)


def test_the_figure_shows_path_numbers_and_shares() -> None:
    loss = torch.linspace(0.5, 2.0, 25, dtype=torch.float64).view(5, 5)
    figure = drawn(valley(loss), "maml on toy, test task 3")
    axes = figure.axes[0]
    (line,) = [drawn for drawn in axes.get_lines() if drawn.get_label() == "path"]
    np.testing.assert_allclose(line.get_xydata(), valley(loss).points)
    assert {text.get_text() for text in axes.texts} == {"0", "1", "2", "3"}
    assert axes.get_xlabel() == "direction 1: 90 % of variance" and axes.get_ylabel() == "direction 2: 6.4 % of variance"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "start, loss 2", "end (3), loss 0.5", "query loss", "support loss",
    ]  # fmt: skip
    assert figure.get_suptitle() == "maml on toy, test task 3"
    assert drawn(valley(loss, flat=True)).axes[0].get_ylabel() == "slope across the path"


def test_numbers_do_not_cover_each_other() -> None:
    loss = torch.linspace(0.5, 2.0, 25, dtype=torch.float64).view(5, 5)
    crowded = valley(loss, 40)
    figure = drawn(crowded)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert {"0", "40"} <= {text.get_text() for text in figure.axes[0].texts} and 5 < len(boxes) < 40
    assert all(box.count_overlaps(boxes) == 1 for box in boxes)


def test_levels_are_equal_ratios_only_where_the_loss_is_wide() -> None:
    ratios = np.diff(np.log(levels_of(np.array([[0.01, 3.0], [math.inf, math.nan]]))))
    np.testing.assert_allclose(ratios, ratios[0])
    for narrow in ([[1.0, 3.0]], [[-1.0, 300.0]], [[2.0, 2.0]]):
        np.testing.assert_allclose(np.diff(levels_of(np.array(narrow)), 2), 0, atol=1e-12)
    assert levels_of(np.array([[0.0, 5.0]]))[0] == pytest.approx(0.005)
    with pytest.raises(UserError, match="no loss around the path is finite"):
        levels_of(np.array([[math.nan]]))


@pytest.mark.parametrize("kind", ["flat", "gap", "wide"])
def test_surfaces_of_every_kind_are_drawn(kind: str, tmp_path: Path) -> None:
    loss = torch.linspace(0.0, 1.0, 25, dtype=torch.float64).view(5, 5)
    loss = {"flat": 0 * loss, "gap": torch.where(loss > 0.8, math.nan, loss), "wide": loss**9}[kind]
    written = [save(drawn(valley(loss)), tmp_path / name / "path-0") for name in "ab"]
    assert [path.name for path in written[0]][:2] == ["path-0.png", "path-0.pdf"]
    assert [path.read_bytes() for path in written[0]] == [path.read_bytes() for path in written[1]]
