"""The glyph bank: its class list, its images, its cache, its errors."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from toolkit.data import glyphs as module
from toolkit.data.bank import ClassBank
from toolkit.data.glyphs import IMAGES, SPLITS, glyph_list, glyphs, render
from toolkit.errors import UserError

CODES = [0x41, 0x533, 0x5D0, 0x10D1]


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ClassBank]]:
    """The bank of every split, rendered once for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield {split: glyphs(split) for split in SPLITS}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, and a class list of `CODES` only."""
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path))
    listed = [glyph for glyph in glyph_list() if glyph.code in CODES]
    monkeypatch.setattr(module, "glyph_list", lambda: listed)
    return tmp_path


def refuse(*_: object) -> Tensor:
    raise AssertionError("rendered again")


def test_list_has_each_class_once_and_each_script_in_one_split() -> None:
    listed = glyph_list()
    assert Counter(glyph.split for glyph in listed) == {"train": 579, "val": 72, "test": 208}
    assert len({glyph.code for glyph in listed}) == len(listed)
    assert len({glyph.script for glyph in listed}) == 14
    assert len({(glyph.script, glyph.split) for glyph in listed}) == 14


def test_banks_hold_twenty_images_of_every_listed_class(banks: dict[str, ClassBank]) -> None:
    for split, bank in banks.items():
        assert bank.classes == sum(glyph.split == split for glyph in glyph_list())
        assert bank.items.shape == (bank.classes * IMAGES, 1, 28, 28) and bank.items.dtype == torch.uint8
        assert bank.sizes.eq(20).all() and bank.source == f"glyphs {split}"
    assert "Georgian U+10D1" in banks["test"].names


def test_a_subset_renders_the_same_as_the_whole(banks: dict[str, ClassBank]) -> None:
    images = render([0x10D1, 0x5D0], 28)
    bank = banks["test"]
    for name, some in zip(("Georgian U+10D1", "Hebrew U+05D0"), images, strict=True):
        start = bank.names.index(name) * IMAGES
        assert torch.equal(bank.items[start : start + IMAGES], some)


def test_images_are_ink_on_an_empty_ground_and_all_different(banks: dict[str, ClassBank]) -> None:
    for bank in banks.values():
        ink = bank.items.float().mean((1, 2, 3))
        assert ink.min() >= module.BLANK and ink.max() < 160
        assert bank.items.amax((1, 2, 3)).min() > 128
        assert bank.items[..., 0, 0].eq(0).float().mean() > 0.99
        assert len(bank.items.flatten(1).unique(dim=0)) == len(bank.items)


def test_images_of_a_class_resemble_each_other(banks: dict[str, ClassBank]) -> None:
    bank = banks["test"]
    pixels = bank.items.view(bank.classes, IMAGES, -1).float() / 255
    means = pixels[:, : IMAGES // 2].mean(1)
    nearest = torch.cdist(pixels[:, IMAGES // 2 :].flatten(0, 1), means).argmin(1).view(bank.classes, -1)
    assert nearest.eq(torch.arange(bank.classes)[:, None]).float().mean() > 0.3


def test_rendering_repeats_and_leaves_global_state_alone() -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first = render(CODES, 28)
    assert torch.equal(first, render(CODES[::-1], 28).flip(0))
    assert torch.equal(before, torch.get_rng_state()) and torch.get_num_threads() == threads


def test_other_sizes_show_the_same_shapes() -> None:
    small, large = render([0x10D1], 28), render([0x10D1], 56)
    shrunk = torch.nn.functional.avg_pool2d(large[0].float(), 2)
    assert (shrunk - small[0].float()).abs().mean() < 5


def test_only_faces_that_cover_a_character_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[int, int] = {}

    def count(masters: Tensor, code: int, size: int) -> Tensor:
        used[code] = len(masters)
        return torch.zeros(IMAGES, 1, size, size)

    monkeypatch.setattr(module, "draw_class", count)
    render([0x41, 0x5D0, 0x2D30], 28)
    assert used == {0x41: 16, 0x5D0: 4, 0x2D30: 2}


def test_blank_images_are_drawn_again_and_the_others_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def half_blank(sources: Tensor, size: int, generator: torch.Generator) -> Tensor:
        attempts.append(generator.initial_seed())
        images = torch.full((IMAGES, 1, size, size), 100 * len(attempts), dtype=torch.uint8)
        images[0] = 3 if len(attempts) == 1 else 200
        return images

    monkeypatch.setattr(module, "distort", half_blank)
    images = module.draw_class(torch.ones(2, 64, 64), 0x41, 28)
    assert len(set(attempts)) == 2
    assert images[:, 0, 0, 0].tolist() == [200] + [100] * (IMAGES - 1)
    monkeypatch.setattr(module, "distort", lambda *_: torch.zeros(IMAGES, 1, 28, 28, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"U\+0041 stays blank"):
        module.draw_class(torch.ones(2, 64, 64), 0x41, 28)


def test_second_call_reads_the_cache(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = glyphs("test")
    assert [f"-{module.FORMAT}-28px-" in path.name for path in short.glob("*.safetensors")] == [True]
    monkeypatch.setattr(module, "render", refuse)
    assert torch.equal(first.items, glyphs("test").items)
    assert glyphs("val").names == ("Armenian U+0533",)
    with pytest.raises(AssertionError, match="rendered again"):
        glyphs("test", size=20)


def test_another_class_list_is_another_cached_file(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    glyphs("test")
    listed = module.glyph_list()[:-1]
    monkeypatch.setattr(module, "glyph_list", lambda: listed)
    assert glyphs("test").classes == 1


def test_damaged_cache_is_made_anew(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = glyphs("test")
    (path,) = short.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 255]))
    assert torch.equal(first.items, glyphs("test").items)
    assert path.read_bytes() == whole


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unknown split 'tets'; did you mean 'test'"):
        glyphs("tets")
    with pytest.raises(UserError, match="size of at least 14"):
        glyphs("test", size=8)
    with pytest.raises(UserError, match=r"no font of matplotlib has U\+4E00"):
        render([0x4E00], 28)
    monkeypatch.setattr(module, "FACES", (*module.FACES, "DejaVuSlab"))
    with pytest.raises(UserError, match="lack DejaVuSlab"):
        render(CODES, 28)


def test_import_loads_neither_matplotlib_nor_pillow() -> None:
    code = "import sys, toolkit.data.glyphs; print({'matplotlib', 'torchvision', 'PIL'} & set(sys.modules))"
    root = Path(module.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
