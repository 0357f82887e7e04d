"""Augmentation: crops and flips as a plain loop makes them, torchvision transforms, copies, and nothing but the generator."""

import random
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn
from torchvision.transforms import v2

from tests.test_samplers import same
from toolkit import Batch, Task, TaskSampler, UserError, draw
from toolkit.data.bank import ClassBank
from toolkit.samplers import Augmented, Episodes, Sinusoid, crop_flip
from toolkit.samplers.augment import by_torchvision
from toolkit.samplers.mixed import Mixed
from toolkit.task import Padded


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Images of random pixels, none of them black."""
    return torch.randint(1, 256, shape, generator=seeded(9)).to(dtype)


def episodes(size: int = 16, channels: int = 3) -> Episodes:
    items = noise(60, channels, size, size)
    return Episodes(ClassBank(items, torch.arange(7) * 10, tuple("abcdef"), "toy"), ways=3, shots=2, queries=4)


def moves(images: Tensor, changed: Tensor) -> list[tuple[int, int, bool]]:
    """By which row and column of its padded self each image was cropped and whether it was flipped, found by trying all."""
    height, width = images.shape[2:]
    top, left = height // 8, width // 8
    found = []
    for image, result in zip(images, changed, strict=True):
        padded = torch.zeros(image.shape[0], height + 2 * top, width + 2 * left, dtype=image.dtype)
        padded[:, top : top + height, left : left + width] = image
        hits = []
        for down in range(2 * top + 1):
            for right in range(2 * left + 1):
                crop = padded[:, down : down + height, right : right + width]
                hits += [(down, right, flip) for flip in (False, True) if torch.equal(crop.flip(2) if flip else crop, result)]
        assert len(hits) == 1, "each image is one crop of itself"
        found += hits
    return found


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 17, 30), (1, 9, 7), (3, 5, 5)])
def test_crop_flip_is_a_pad_a_crop_and_a_flip(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    images = noise(12, *shape, dtype=dtype)
    before = images.clone()
    changed = crop_flip(images, seeded())
    assert changed.dtype == dtype and changed.shape == images.shape and changed.is_contiguous()
    assert torch.equal(images, before)
    moves(images, changed)
    assert torch.equal(crop_flip(images, seeded()), changed)
    assert not torch.equal(crop_flip(images, seeded(1)), changed)
    assert torch.equal(crop_flip(images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), seeded()), changed)


def test_shifts_and_flips_are_uniform_and_each_image_has_its_own() -> None:
    images = noise(3600, 1, 16, 9)
    found = moves(images, crop_flip(images, seeded()))
    counts = torch.zeros(5, 3, 2)
    for down, right, flip in found:
        counts[down, right, int(flip)] += 1
    assert chisquare(counts.flatten()).pvalue > 1e-3


WAYS: dict[str, TaskSampler] = {
    "crop and flip": Augmented(episodes(), crop_flip),
    "support only": Augmented(episodes(), crop_flip, queries=False),
    "copies": Augmented(episodes(), crop_flip, copies=2, queries=False),
    "copies and queries": Augmented(episodes(), crop_flip, copies=1),
    "torchvision": Augmented(episodes(), v2.Compose([v2.RandomCrop(12), v2.RandomHorizontalFlip(), v2.ColorJitter(0.5)])),
    "one by one": Augmented(lambda generator: episodes()(generator), crop_flip),
    "of a mixture": Augmented(Mixed([episodes(), episodes()]), crop_flip),
    "mixed": Mixed([Augmented(episodes(), crop_flip), episodes()]),
    "mixed, then augmented twice": Augmented(Augmented(Mixed([Mixed([episodes()]), episodes()]), crop_flip), crop_flip),
    "twice": Augmented(Augmented(episodes(), crop_flip), v2.RandomHorizontalFlip()),
}


def test_what_is_to_stay_stays_and_labels_are_kept() -> None:
    plain = draw(episodes(), 5, seed=0)
    for name, support, query in (("crop and flip", True, True), ("support only", True, False)):
        tasks = draw(WAYS[name], 5, seed=0)
        assert torch.equal(tasks.support.y, plain.support.y) and torch.equal(tasks.query.y, plain.query.y)
        assert torch.equal(tasks.support.x, plain.support.x) != support  # type: ignore[arg-type]
        assert torch.equal(tasks.query.x, plain.query.x) != query  # type: ignore[arg-type]


def test_copies_stand_behind_the_support_set_with_its_labels() -> None:
    plain, tasks = draw(episodes(), 5, seed=0), draw(WAYS["copies"], 5, seed=0)
    assert same(tasks.query, plain.query)
    assert tasks.support.x.shape == (5, 18, 3, 16, 16)  # type: ignore[union-attr]
    assert torch.equal(tasks.support.y, torch.cat([plain.support.y] * 3, 1))
    for i in range(5):
        images, drawn = plain.support.x[i], tasks.support.x[i]  # type: ignore[index]
        assert torch.equal(drawn[:6], images)
        first, second = moves(images, drawn[6:12]), moves(images, drawn[12:])
        assert first != second, "each copy is of its own"


def test_targets_of_more_than_one_number_are_copied_as_rows() -> None:
    def soft(generator: torch.Generator) -> Task:
        batch = Batch(torch.rand(4, 1, 8, 8, generator=generator), torch.arange(8.0).view(4, 2))
        return Task(batch, batch)

    task = Augmented(soft, crop_flip, copies=2)(seeded())
    assert torch.equal(task.support.y, torch.arange(8.0).view(4, 2).repeat(3, 1))


def padded(generator: torch.Generator) -> Task:
    """Three images and one of filling, black."""
    real = torch.tensor([True, True, False, True])
    x = (torch.rand(4, 1, 8, 8, generator=generator) + 0.1) * real[:, None, None, None]
    batch = Batch(Padded(x, real), torch.tensor([0, 1, -100, 1]))
    return Task(batch, batch)


def test_padded_tasks_stay_padded() -> None:
    plain = padded(seeded())
    task = Augmented(padded, crop_flip, copies=1)(seeded())
    assert isinstance(task.support.x, Padded) and isinstance(task.query.x, Padded)
    assert task.support.x.real.tolist() == [True, True, False, True] * 2
    assert task.support.y.tolist() == [0, 1, -100, 1] * 2
    assert torch.equal(task.support.x.x[:4], plain.support.x.x)  # type: ignore[union-attr]
    assert ((task.support.x.x != 0).flatten(1).any(1) == task.support.x.real).all()
    alone = Augmented(padded, crop_flip)(seeded())
    assert isinstance(alone.support.x, Padded) and alone.support.x.x.shape == (4, 1, 8, 8)
    assert not torch.equal(alone.query.x.x, plain.query.x.x)  # type: ignore[union-attr]


def test_torchvision_transforms_choose_for_each_image_alone_and_by_the_generator() -> None:
    images = noise(40, 1, 6, 6)
    flip = by_torchvision(v2.RandomHorizontalFlip())
    changed = flip(images, seeded())
    flipped = [torch.equal(a.flip(2), b) for a, b in zip(images, changed, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(images, changed, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True)) and 8 < sum(flipped) < 32
    assert torch.equal(flip(images, seeded()), changed) and not torch.equal(flip(images, seeded(1)), changed)
    generator = seeded()
    assert not torch.equal(flip(images, generator), flip(images, generator)), "the generator moves on"


def test_torchvision_transforms_do_what_torchvision_does() -> None:
    images = noise(3, 3, 8, 8)
    normal = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Resize(5), v2.Normalize([0.5] * 3, [0.2] * 3)])
    assert torch.equal(by_torchvision(normal)(images, seeded()), torch.stack([normal(image) for image in images]))
    made = by_torchvision(v2.ToImage())(images, seeded())
    assert type(made) is Tensor and torch.equal(made, images)


def test_pythons_random_numbers_follow_the_generator_too() -> None:
    def shaded(image: Tensor) -> Tensor:
        return image * random.random()

    images = torch.ones(5, 1, 2, 2)
    first = by_torchvision(shaded)(images, seeded())
    random.seed(1)
    assert torch.equal(by_torchvision(shaded)(images, seeded()), first) and len(first.unique()) == 5


def test_global_state_is_put_back_when_a_transform_raises() -> None:
    def broken(image: Tensor) -> Tensor:
        torch.rand(1), random.random()
        raise RuntimeError("my own")

    state, python = torch.get_rng_state(), random.getstate()
    with pytest.raises(RuntimeError, match="my own"):
        by_torchvision(broken)(torch.zeros(1, 1, 2, 2), seeded())
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python


class Brighter(nn.Module):
    """A module of ours, with a generator; and one that is called on an image."""

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return images + torch.rand(len(images), 1, 1, 1, generator=generator)


class Negative(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        assert image.dim() == 3
        return 1 - image


def test_modules_with_and_without_a_generator_are_told_apart() -> None:
    plain = episodes()(seeded())
    assert torch.equal(Augmented(episodes(), Negative())(seeded()).query.x, 1 - plain.query.x)  # type: ignore[arg-type, operator]
    assert (Augmented(episodes(), Brighter())(seeded()).query.x > plain.query.x).any()  # type: ignore[operator]


def test_outputs_are_those_of_the_sampler() -> None:
    class Told:
        outputs = 7

        def __call__(self, generator: torch.Generator) -> Task:
            return padded(generator)

    assert Augmented(Told(), crop_flip).outputs == 7
    assert Augmented(episodes(), crop_flip).outputs is None


def words(generator: torch.Generator) -> Task:
    batch = Batch({"tokens": torch.zeros(2, 3)}, torch.arange(2))
    return Task(batch, batch)


@pytest.mark.parametrize(
    ("sampler", "transform", "settings", "message"),
    [
        (Sinusoid(), crop_flip, {}, r"augmentation needs images .* x of the tasks is \(10, 1\)"),
        (words, crop_flip, {}, "augmentation needs images .* x of the tasks is a dict"),
        (words, crop_flip, {"copies": 1, "queries": False}, "is a dict"),
        (episodes(), v2.Resize(8), {"queries": False}, r"support images the shape \(3, 8, 8\), unlike \(3, 16, 16\) of query"),
        (episodes(), v2.Resize(8), {"copies": 1}, r"its copies the shape \(3, 8, 8\), unlike \(3, 16, 16\) of the support"),
        (episodes(), v2.ToPILImage(), {}, "the transform ToPILImage made a Image of images; make every image a tensor"),
        (episodes(), lambda images, g: images[:1], {}, r"the transform made \(1, 3, 16, 16\) of images \(6, 3, 16, 16\)"),
        (episodes(), lambda images, g: None, {}, "the transform made a NoneType of images"),
    ],
)
def test_what_cannot_be_augmented_is_a_user_error(sampler: Any, transform: Any, settings: Any, message: str) -> None:
    augmented = Augmented(sampler, transform, **settings)
    for drawing in (lambda: draw(augmented, 2, seed=0), lambda: augmented(seeded())):
        with pytest.raises(UserError, match=message) as caught:
            drawing()
        assert "\n" not in str(caught.value)


def test_images_that_become_unequal_are_a_user_error() -> None:
    def cut(image: Tensor) -> Tensor:
        return image[:, int(torch.randint(3, ())) :]

    with pytest.raises(UserError, match=r"the transform function made \(1, 2, 4\) and \(1, 3, 4\) and \(1, 4, 4\) of images"):
        by_torchvision(cut)(noise(40, 1, 4, 4), seeded())


def test_what_is_no_transform_is_a_user_error() -> None:
    with pytest.raises(UserError, match="-1 augmented copies"):
        Augmented(episodes(), crop_flip, copies=-1)
    with pytest.raises(UserError, match=r"RandomHorizontalFlip is no transform .* such as RandomHorizontalFlip\(\.\.\.\)"):
        by_torchvision(v2.RandomHorizontalFlip)
    with pytest.raises(UserError, match="str is no transform"):
        by_torchvision("flip")  # type: ignore[arg-type]
