"""Regression families: each is the family that its docstring tells of, and image completion tells true pixels."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Tensor

from toolkit import Task, TaskSampler, UserError, draw
from toolkit.data.bank import ClassBank, with_rotations
from toolkit.samplers.completion import Completion
from toolkit.samplers.curves import Harmonics, SineOrLine, Steps
from toolkit.task import take


def bank(channels: int = 2, height: int = 5, width: int = 4, dtype: torch.dtype = torch.uint8) -> ClassBank:
    """Seven images in classes of 2, 4 and 1; every pixel of every channel tells which it is."""
    items = torch.arange(7 * channels * height * width).view(7, channels, height, width).remainder(256).to(dtype)
    return ClassBank(items, torch.tensor([0, 2, 6, 7]), ("a", "b", "c"), "toy")


SAMPLERS: dict[str, TaskSampler] = {
    "harmonics": Harmonics(4, 6, noise=0.1),
    "sine or line": SineOrLine(4, 6),
    "steps": Steps(4, 6, noise=0.1),
    "completion": Completion(bank(), 4, 6),
}


def joined(tasks: Task) -> tuple[Tensor, Tensor]:
    """All x and y of each task, float64, (tasks, examples)."""
    x, y = (torch.cat([getattr(batch, part) for batch in tasks], 1)[..., 0].double() for part in ("x", "y"))
    return x, y


@pytest.mark.parametrize("name", SAMPLERS)
def test_sets_have_the_sizes_that_were_asked_for_in_single_precision(name: str) -> None:
    drawn = draw(SAMPLERS[name], 20, seed=3, start=5)
    assert drawn.support.y.shape[:2] == (20, 4) and drawn.query.y.shape[:2] == (20, 6)
    assert drawn.support.x.dtype == drawn.support.y.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["harmonics", "sine or line", "steps"])
def test_noise_is_gaussian_of_the_given_size_on_all_targets(name: str) -> None:
    noisy = type(SAMPLERS[name])(20, 20, noise=0.5)  # type: ignore[call-arg]
    clean = type(SAMPLERS[name])(20, 20, noise=0.0)  # type: ignore[call-arg]
    (x, y), (same_x, truth) = joined(draw(noisy, 200, seed=0)), joined(draw(clean, 200, seed=0))
    assert torch.equal(x, same_x)
    assert kstest((y - truth).flatten() / 0.5, "norm").pvalue > 1e-3
    assert abs(float(torch.corrcoef(torch.stack([(y - truth).flatten(), truth.flatten()]))[0, 1])) < 0.05


def residual(frequency: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """How far y is from two waves of this frequency and twice it, by least squares, and their four coefficients."""
    angle = frequency[:, None] * x
    design = torch.stack([angle.sin(), angle.cos(), (2 * angle).sin(), (2 * angle).cos()], -1)
    fit = torch.linalg.lstsq(design, y[..., None]).solution
    return (design @ fit - y[..., None]).square().sum((1, 2)), fit[..., 0]


def test_harmonics_are_two_waves_the_second_of_twice_the_frequency() -> None:
    x, y = joined(draw(Harmonics(20, 20), 300, seed=0))
    grid = torch.linspace(5, 7, 101, dtype=torch.float64)
    best = grid[torch.stack([residual(w.expand(300), x, y)[0] for w in grid]).argmin(0)]
    width = 0.02
    for _ in range(25):
        near = torch.stack([best - width, best - width / 2, best, best + width / 2, best + width])
        choice = torch.stack([residual(w, x, y)[0] for w in near]).argmin(0)
        best, width = near.gather(0, choice[None])[0], width / 2
    error, fit = residual(best, x, y)
    assert error.max().sqrt() < 1e-3
    first, second = fit[:, :2].norm(dim=1), fit[:, 2:].norm(dim=1)
    for amplitude in (first, second):
        assert kstest(amplitude, "chi", (1,)).pvalue > 1e-3, "the size of N(0, 1)"
    assert kstest(best, "uniform", (5, 2)).pvalue > 1e-3
    phases = torch.atan2(fit[:, [1, 3]], fit[:, [0, 2]])
    assert kstest(phases.flatten(), "uniform", (-math.pi, 2 * math.pi)).pvalue > 1e-3
    shift = (phases[:, 0] - phases[:, 1]) % (2 * math.pi)
    assert kstest(shift, "uniform", (0, 2 * math.pi)).pvalue > 1e-3, "phases of their own"


def test_harmonics_are_seen_near_a_place_of_their_own() -> None:
    x, _ = joined(draw(Harmonics(50, 50), 2000, seed=0))
    inside = x - x.mean(1, keepdim=True)
    assert kstest(inside.flatten()[::7] / math.sqrt(0.99), "norm").pvalue > 1e-3
    assert kstest(x.mean(1), "uniform", (-4, 8)).pvalue > 1e-3
    first, _ = joined(draw(Harmonics(1, 1), 20_000, seed=0))
    assert abs(first.var() - (64 / 12 + 1)) < 0.3


def test_half_of_the_tasks_are_sines_and_the_others_lines_within_their_ranges() -> None:
    x, y = joined(draw(SineOrLine(10, 10, noise=0), 2000, seed=0))
    designs = torch.stack([x.sin(), x.cos()], -1), torch.stack([x, torch.ones_like(x)], -1)
    fits = [torch.linalg.lstsq(design, y[..., None]).solution for design in designs]
    errors = torch.stack([(d @ f - y[..., None]).abs().amax((1, 2)) for d, f in zip(designs, fits, strict=True)])
    assert errors.min(0).values.max() < 1e-4, "each is one of the two"
    assert errors.max(0).values.min() > 1e-3, "and not the other"
    sine, line = errors[0] < 1e-4, errors[1] < 1e-4
    assert chisquare(torch.stack([sine.sum(), line.sum()])).pvalue > 1e-3
    wave = fits[0][sine, :, 0]
    assert kstest(wave.norm(dim=1), "uniform", (0.1, 4.9)).pvalue > 1e-3
    assert kstest(torch.atan2(-wave[:, 1], wave[:, 0]), "uniform", (0, math.pi)).pvalue > 1e-3
    assert kstest(fits[1][line, 0, 0], "uniform", (-3, 6)).pvalue > 1e-3
    assert kstest(fits[1][line, 1, 0], "uniform", (-3, 6)).pvalue > 1e-3
    assert kstest(x.flatten(), "uniform", (-5, 10)).pvalue > 1e-3


@pytest.mark.parametrize("jumps", [1, 3, 4])
def test_steps_begin_low_and_turn_over_at_each_jump(jumps: int) -> None:
    x, y = joined(draw(Steps(700, 800, jumps), 300, seed=0))
    assert set(y.flatten().tolist()) == {-1.0, 1.0}
    assert kstest(x.flatten()[::9], "uniform", (-5, 10)).pvalue > 1e-3
    assert (y[x < -2.5] == -1).all() and (y[x > 2.5] == (1 if jumps % 2 else -1)).all()
    order = x.argsort(1)
    turns = y.gather(1, order).diff(dim=1) != 0
    counts = turns.sum(1)
    assert (counts <= jumps).all() and ((jumps - counts) % 2 == 0).all(), "two jumps between neighbours hide each other"
    assert (counts == jumps).double().mean() > 0.9
    places = x.gather(1, order)[:, 1:][turns]
    assert kstest(places, "uniform", (-2.5, 5)).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 5, 4), (2, 1, 12)])
def test_completion_tells_the_pixels_of_one_image_each_once(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    whole = bank(*shape, dtype=dtype)
    channels, height, width = shape
    tasks = draw(Completion(whole, shots=3, queries=height * width - 3), 40, seed=0)
    assert tasks.support.y.shape == (40, 3, channels) and tasks.query.x.shape == (40, height * width - 3, 2)  # type: ignore[union-attr]
    images = whole.items.float() / 255 if dtype == torch.uint8 else whole.items
    for i in range(40):
        task = take(tasks, i)
        x, y = torch.cat([task.support.x, task.query.x]), torch.cat([task.support.y, task.query.y])  # type: ignore[list-item]
        assert x.dtype == y.dtype == images.dtype and x.min() >= 0 and x.max() <= 1
        rows, columns = (x * torch.tensor([height - 1, width - 1])).round().long().unbind(1)
        assert sorted((rows * width + columns).tolist()) == list(range(height * width)), "every pixel once"
        image = torch.zeros_like(images[0])
        image[:, rows, columns] = y.T
        assert (images == image).flatten(1).all(1).sum() == 1


def test_every_image_and_every_pixel_of_it_is_equally_likely() -> None:
    items = torch.arange(7 * 6, dtype=torch.uint8).view(7, 1, 2, 3)
    tasks = draw(Completion(ClassBank(items, torch.tensor([0, 2, 6, 7]), ("a", "b", "c")), 1, 1), 4000, seed=0)
    for batch in tasks:
        pixel = (batch.y * 255).round().long().flatten()
        assert chisquare((pixel // 6).bincount(minlength=7)).pvalue > 1e-3
        assert chisquare((pixel % 6).bincount(minlength=6)).pvalue > 1e-3
    assert (tasks.support.y != tasks.query.y).all(), "support and query are disjoint"
    support, query = ((batch.y * 255).round().long() // 6 for batch in tasks)
    assert torch.equal(support, query), "of the same image"


def test_completion_sees_turned_images() -> None:
    items = torch.tensor([[[[0, 1], [2, 3]]]], dtype=torch.uint8)
    whole = with_rotations(ClassBank(items, torch.tensor([0, 1]), ("a",)))
    tasks = draw(Completion(whole, 1, 3), 50, seed=0)
    x, y = torch.cat([tasks.support.x, tasks.query.x], 1), torch.cat([tasks.support.y, tasks.query.y], 1)  # type: ignore[list-item]
    place = (2 * x[..., 0] + x[..., 1]).long()
    found = {tuple(row) for row in (y[..., 0] * 255).round().long().gather(1, place.argsort(1)).tolist()}
    assert found == {(0, 1, 2, 3), (1, 3, 0, 2), (3, 2, 1, 0), (2, 0, 3, 1)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Harmonics(0), "0 shots and 10 queries: each must be at least 1"),
        (lambda: SineOrLine(queries=0), "must be at least 1"),
        (lambda: Steps(shots=-1), "must be at least 1"),
        (lambda: Steps(jumps=0), "0 jumps; a step function needs at least 1"),
        (lambda: Harmonics(noise=-0.1), "noise -0.1 is no standard deviation"),
        (lambda: Steps(noise=math.inf), "noise inf is no"),
        (lambda: SineOrLine(noise=math.nan), "noise nan is no"),
        (lambda: Completion(bank(), 0, 3), "must be at least 1"),
        (lambda: Completion(bank(), 11, 10), "need 21 pixels, but an image of toy has 20; take fewer"),
        (lambda: Completion(bank(dtype=torch.int64)), "image completion needs images .* but toy has items"),
        (lambda: Completion(ClassBank(torch.zeros(3, 200), torch.tensor([0, 3]), ("a",))), r"items of shape \(200,\)"),
    ],
)
def test_what_cannot_be_drawn_is_a_user_error(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
    Completion(bank(), 10, 10)
