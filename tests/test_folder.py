"""Folders of pictures and CSV lists as class banks: what is decoded, how splits are made, and bad input in one sentence."""

import gzip
import io
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import folder as experiment
from toolkit import UserError
from toolkit.data import folder as module
from toolkit.data import lists
from toolkit.data.folder import SPLITS, folder
from toolkit.data.images import Look, decode
from toolkit.data.lists import csv_lists, mini_imagenet, tiered_imagenet
from toolkit.flags import launch
from toolkit.samplers import Episodes


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and a process that has seen no folder yet."""
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache"
    forget()


def forget() -> None:
    for function in (module._folder, module._say, lists._whole):
        function.cache_clear()


def photo(number: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """A picture of its own for each number, in colour."""
    generator = np.random.default_rng(number)
    return Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def write(path: Path, image: Image.Image | bytes | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, bytes):
        path.write_bytes(image)
    else:
        (image or photo(zlib.crc32(str(path).encode()))).save(path, **options)
    return path


def pictures(root: Path, classes: int = 6, images: int = 3, start: int = 0) -> Path:
    for c in range(start, start + classes):
        for i in range(images):
            write(root / f"kind{c:02}" / f"{i}.png", photo(100 * c + i))
    return root


def names(root: Path, **settings: Any) -> list[set[str]]:
    return [set(folder(split, root, size=8, **settings).names) for split in SPLITS]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def flat(values: Any, mode: str) -> Image.Image:
    return Image.new(mode, (6, 6), values)


def with_orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(Image.fromarray(np.array([[[255] * 3, [0] * 3], [[0] * 3, [0] * 3]], np.uint8)), "PNG", exif=exif)


def sixteen(value: int) -> Image.Image:
    return Image.fromarray(np.full((6, 6), value, np.uint16))


def palette(transparent: int | None = None) -> bytes:
    image = Image.new("P", (6, 6), 1)
    image.putpalette([9, 9, 9, 10, 200, 30])
    return encoded(image, "PNG", **({} if transparent is None else {"transparency": transparent}))


# What a picture of one colour is, as RGB and as grey.
ONE_COLOUR: dict[str, tuple[bytes, tuple[int, int, int], int]] = {
    "rgb png": (encoded(flat((10, 200, 30), "RGB"), "PNG"), (10, 200, 30), 124),
    "grey png": (encoded(flat(77, "L"), "PNG"), (77, 77, 77), 77),
    "grey jpeg": (encoded(flat(77, "L"), "JPEG"), (77, 77, 77), 77),
    "one bit": (encoded(flat(1, "1"), "PNG"), (255, 255, 255), 255),
    "palette": (palette(), (10, 200, 30), 124),
    "palette, transparent": (palette(1), (255, 255, 255), 255),
    "rgba, half transparent": (encoded(flat((0, 0, 0, 128), "RGBA"), "PNG"), (127, 127, 127), 127),
    "grey with alpha": (encoded(flat((50, 0), "LA"), "PNG"), (255, 255, 255), 255),
    "16 bits": (encoded(sixteen(257 * 90 + 60), "PNG"), (90, 90, 90), 90),
    "16 bits, transparent": (encoded(sixteen(257), "PNG", transparency=257), (255, 255, 255), 255),
    "16 bits, white": (encoded(sixteen(65535), "PNG"), (255, 255, 255), 255),
    "cmyk": (encoded(flat((255, 0, 0, 0), "CMYK"), "JPEG", quality=100), (0, 255, 255), 179),
    "bmp": (encoded(flat((1, 2, 3), "RGB"), "BMP"), (1, 2, 3), 2),
    "webp": (encoded(flat((9, 9, 9), "RGB"), "WEBP", lossless=True), (9, 9, 9), 9),
    "gif of two frames": (
        encoded(flat(40, "L"), "GIF", save_all=True, append_images=[flat(200, "L")]), (40, 40, 40), 40,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ONE_COLOUR)
def test_every_kind_of_picture_keeps_its_colour(kind: str) -> None:
    data, colour, grey = ONE_COLOUR[kind]
    pixels = decode(data, Look(4, 3))
    assert pixels.shape == (3, 4, 4) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert np.abs(pixels.astype(int) - np.array(colour)[:, None, None]).max() <= 1
    assert np.abs(decode(data, Look(4, 1)).astype(int) - grey).max() <= 1
    assert decode(data, Look(4, 1)).shape == (1, 4, 4)


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (1, 1)), (6, (0, 1)), (8, (1, 0))])
def test_exif_orientation_is_honoured(orientation: int, corner: tuple[int, int]) -> None:
    pixels = decode(with_orientation(orientation), Look(2, 1))[0]
    assert pixels[corner] == 255 and pixels.sum() == 255


def test_pictures_are_squashed_by_lanczos_or_cropped_to_their_middle() -> None:
    image = photo(5, (40, 20))
    expected = np.asarray(image.resize((9, 9), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.array_equal(decode(encoded(image, "PNG"), Look(9)), expected)
    middle = np.asarray(image.resize((9, 9), Image.Resampling.LANCZOS, box=(10, 0, 30, 20))).transpose(2, 0, 1)
    assert np.array_equal(decode(encoded(image, "PNG"), Look(9, fit="crop")), middle)


def test_other_formats_are_not_decoded_whatever_their_name() -> None:
    """Some decoders of PIL start other programs."""
    with pytest.raises(Image.UnidentifiedImageError):
        decode(encoded(photo(1), "EPS"), Look(4))


MIXED = ["a.jpg", "b.JPEG", "c.PNG", "d.webp", "e.bmp", "f.gif", "sub/deeper/g.Jpg"]


def test_all_pictures_of_a_class_folder_are_taken_and_nothing_else(tmp_path: Path) -> None:
    root = pictures(tmp_path / "mine", 5)
    for name in MIXED:
        write(root / "mixed" / name)
    for name in ("notes.txt", ".hidden.png", ".thumbs/a.png", "__MACOSX/a.png", "data.tiff.zip"):
        write(root / "mixed" / name, b"no picture")
    write(root / "stray.png")
    write(root / ".git" / "a.png")
    banks = [folder(split, root, least=2, size=8) for split in SPLITS]
    (bank,) = (bank for bank in banks if "mixed" in bank.names)
    assert bank.sizes[bank.names.index("mixed")] == len(MIXED)
    assert sum(int(bank.sizes.sum()) for bank in banks) == 15 + len(MIXED)


@pytest.mark.parametrize("settings", [{}, {"size": 84}, {"channels": 1}, {"fit": "crop"}])
def test_a_bank_holds_the_pixels_of_its_classes_in_order(tmp_path: Path, settings: dict[str, Any]) -> None:
    root = pictures(tmp_path / "mine")
    given = {"size": 7} | settings
    for split in SPLITS:
        bank = folder(split, root, least=2, **given)
        assert bank.source == f"mine {split}" and bank.sizes.tolist() == [3] * bank.classes
        assert list(bank.names) == sorted(bank.names)
        pixels = bank.read(torch.arange(bank.entries))
        for e in range(bank.entries):
            data = (root / bank.names[e // 3] / f"{e % 3}.png").read_bytes()
            assert np.array_equal(pixels[e].numpy(), decode(data, Look(**given)))


def test_pixels_are_84_squared_in_colour_unless_told_otherwise(tmp_path: Path) -> None:
    bank = folder("train", pictures(tmp_path / "mine", 15, 1))
    assert bank.items.shape[1:] == (3, 84, 84) and bank.items.dtype == torch.uint8


@pytest.mark.parametrize(
    ("classes", "shares", "least", "sizes"),
    [
        (100, "0.64,0.16,0.2", 5, (64, 16, 20)),
        (20, "0.5,0.25,0.25", 5, (10, 5, 5)),
        (15, "0.64,0.16,0.2", 5, (5, 5, 5)),
        (18, "0.64,0.16,0.2", 5, (8, 5, 5)),
        (11, "0.64,0.16,0.2", 2, (7, 2, 2)),
        (7, "0.34,0.33,0.33", 1, (3, 2, 2)),
    ],
)
def test_classes_are_split_by_shares(tmp_path: Path, classes: int, shares: str, least: int, sizes: tuple[int, ...]) -> None:
    found = names(pictures(tmp_path / "mine", classes, 1), shares=shares, least=least)
    assert tuple(map(len, found)) == sizes
    assert all(not a & b for a, b in combinations(found, 2)) and len(set.union(*found)) == classes


def test_the_split_is_the_same_everywhere_but_not_by_the_alphabet(tmp_path: Path) -> None:
    first, second = (names(pictures(tmp_path / where / "mine", 20, 1), least=2) for where in ("a", "b"))
    assert first == second
    assert [sorted(split) for split in first[1:]] == [["kind04", "kind06", "kind09"], ["kind01", "kind05", "kind08", "kind15"]]
    assert names(tmp_path / "a" / "mine", least=2, split_seed=1) != first


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_folders_named_after_splits_are_the_splits(tmp_path: Path, val: str) -> None:
    root = tmp_path / "mine"
    for start, split in ((0, "train"), (3, val), (5, "test")):
        pictures(root / split, 3 if split == "train" else 2, start=start)
    write(root / "samples" / "a.png")
    assert names(root) == [{"kind00", "kind01", "kind02"}, {"kind03", "kind04"}, {"kind05", "kind06"}]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    root = pictures(tmp_path / "mine", 5, 1)
    write(root / "train" / "a.png")
    write(root / "train" / "wagons" / "b.png")
    assert "train" in set.union(*names(root, least=2))


@pytest.mark.parametrize("nested", [False, True])
def test_a_zip_is_read_as_it_is(tmp_path: Path, nested: bool) -> None:
    root = pictures(tmp_path / "mine", 6)
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(tmp_path if nested else root))
        archive.writestr("__MACOSX/kind00/._0.png", b"no picture")
    for split in SPLITS:
        plain, packed = folder(split, root, least=2, size=6), folder(split, tmp_path, "mine.zip", least=2, size=6)
        assert plain.names == packed.names
        entries = torch.arange(plain.entries)
        assert torch.equal(plain.read(entries), packed.read(entries))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "mine", "mine.zip"]


def test_classes_may_lie_below_a_single_folder(tmp_path: Path) -> None:
    pictures(tmp_path / "data" / "JPEGImages", 6, 1)
    assert len(set.union(*names(tmp_path / "data", least=2))) == 6


def test_links_to_class_folders_are_followed(tmp_path: Path) -> None:
    pictures(tmp_path / "elsewhere", 6, 1)
    (tmp_path / "mine").mkdir()
    for path in (tmp_path / "elsewhere").iterdir():
        (tmp_path / "mine" / path.name).symlink_to(path)
    assert len(set.union(*names(tmp_path / "mine", least=2))) == 6


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from toolkit.data import images

    seen = list[int]()
    monkeypatch.setattr(images, "decode", lambda data, look: seen.append(1) or decode(data, look))
    return seen


CHANGES: dict[str, Callable[[Path], object]] = {
    "a picture more": lambda root: write(root / "kind00" / "new.png"),
    "a picture less": lambda root: (root / "kind00" / "0.png").unlink(),
    "another name": lambda root: (root / "kind00" / "0.png").rename(root / "kind00" / "7.png"),
    "another class": lambda root: (root / "kind00" / "0.png").rename(root / "kind01" / "7.png"),
    "touched": lambda root: os.utime(root / "kind00" / "0.png", ns=(1, 1)),
}


def test_pictures_are_decoded_once_for_all_splits_and_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, root = count_decoded(monkeypatch), pictures(tmp_path / "mine")
    names(root, least=2)
    forget()
    names(root, least=2, split_seed=3, min_images=2, shares="0.4,0.3,0.3")
    (tmp_path / "other").mkdir()
    names(root.rename(tmp_path / "other" / "mine"), least=2)
    assert len(seen) == 18


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_has_changed_is_decoded_anew(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = pictures(tmp_path / "mine")
    before = names(root, least=2)
    forget()
    CHANGES[change](root)
    seen = count_decoded(monkeypatch)
    assert set.union(*names(root, least=2)) == set.union(*before) and len(seen) >= 17


@pytest.mark.parametrize("settings", [{"size": 9}, {"channels": 1}, {"fit": "crop"}])
def test_another_look_is_another_entry_of_the_cache(tmp_path: Path, cache: Path, settings: dict[str, Any]) -> None:
    root = pictures(tmp_path / "mine")
    folder("train", root, least=2, size=8)
    folder("train", root, least=2, **({"size": 8} | settings))
    assert len(list(cache.iterdir())) == 2


def spoil(root: Path) -> None:
    for i, name in enumerate(("kind00/0.png", "kind02/1.png", "kind03/2.png", "kind04/0.png")):
        data = (root / name).read_bytes()
        (root / name).write_bytes((data[: len(data) // 2], b"", b"<html>", data[:-40] + b"x" * 28)[i])
    (root / "kind05" / "gone.jpg").symlink_to(root / "nowhere")


def test_unreadable_pictures_are_counted_and_three_are_named(tmp_path: Path, cache: Path) -> None:
    root = pictures(tmp_path / "mine")
    spoil(root)
    sentence = (
        r"^5 of 19 images in \S+mine cannot be read \(kind00/0.png, kind02/1.png, kind03/2.png, \.\.\.\); .*skip_bad True"
    )
    with pytest.raises(UserError, match=sentence) as caught:
        folder("train", root, least=2, size=8)
    assert "\n" not in str(caught.value)
    assert not list(cache.iterdir()), "nothing half-cached"


def test_skip_bad_goes_on_without_them_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = pictures(tmp_path / "mine")
    spoil(root)
    for _ in range(2):
        caplog.clear()
        banks = [folder(split, root, least=2, size=8, skip_bad=True) for split in SPLITS]
        sizes = {name: int(size) for bank in banks for name, size in zip(bank.names, bank.sizes, strict=True)}
        assert sizes == {"kind00": 2, "kind01": 3, "kind02": 2, "kind03": 2, "kind04": 2, "kind05": 3}
        assert (
            caplog.text.count("mine: went on without 5 unreadable images (kind00/0.png, kind02/1.png, kind03/2.png, ...)") == 1
        )
        forget()
    with pytest.raises(UserError, match="5 of 19 images"):
        folder("train", root, least=2, size=8)


def test_a_class_without_pictures_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = pictures(tmp_path / "mine")
    (root / "empty").mkdir()
    write(root / "broken" / "a.png", b"")
    assert len(set.union(*names(root, least=2, skip_bad=True))) == 6
    assert caplog.text.count("mine: left out 2 classes (broken, empty) of less than 1 image") == 1


def test_small_classes_are_left_out_if_so_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = pictures(tmp_path / "mine")
    write(root / "small" / "a.png")
    assert len(set.union(*names(root, least=2))) == 7
    forget()
    assert len(set.union(*names(root, least=2, min_images=2))) == 6
    assert "left out 1 class (small) of less than 2 images" in caplog.text


def test_the_same_picture_in_two_splits_or_twice_in_a_class_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "mine"
    for start, split in ((0, "train"), (2, "val"), (4, "test")):
        pictures(root / split, 2, start=start)
    names(root)
    assert not caplog.text
    forget()
    write(root / "test" / "kind04" / "copy.bmp", photo(1))  # of train/kind00/1.png, in another format
    write(root / "val" / "kind02" / "copy.png", photo(1))
    write(root / "train" / "kind01" / "copy.png", photo(2))  # within a split: fine
    write(root / "train" / "kind01" / "twice.png", photo(101))
    names(root)
    assert caplog.text.count("mine: 2 images of one split are also, pixel by pixel, in another") == 1
    assert caplog.text.count("mine: 1 images are more than once in their class") == 1


def shared_class(root: Path) -> None:
    for split in SPLITS:
        pictures(root / split, 2, start={"train": 0, "val": 2, "test": 1}[split])


def flat_images(root: Path) -> None:
    write(root / "a.png")
    write(root / "b.png")


def evil_zip(root: Path, name: str) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root, "w") as archive:
        archive.writestr("cat/a.png", encoded(photo(1), "PNG"))
        archive.writestr(name, encoded(photo(2), "PNG"))


REFUSED: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "no folder": (lambda root: None, {}, r"^there is no \S+mine; give the folder of the images with --data-root$"),
    "empty folder": (lambda root: root.mkdir(), {}, "mine has no images in it; it needs one folder for each class, with jpg"),
    "images only": (flat_images, {}, "mine has 2 images but no folders of them; it needs one folder for each class"),
    "empty classes": (lambda root: [(root / x).mkdir(parents=True) for x in "ab"], {}, "mine has no images in it"),
    "too few classes": (
        lambda root: pictures(root, 12, 1), {},
        r"mine has 12 classes, which cannot give train, val and test 5 each; add 3 classes, or use --ways 4 --dataset.least 4$",
    ),
    "far too few classes": (lambda root: pictures(root, 4, 1), {}, "has 4 classes, .* 5 each; add 11 classes$"),
    "too few of enough images": (lambda root: pictures(root, 15, 1), {"min_images": 2}, "has 0 classes of 2 or more images, "),
    "no test": (lambda root: [pictures(root / s, 2) for s in ("train", "val")], {}, "folders in train and val, but no test;"),
    "two names": (
        lambda root: [pictures(root / s, 2) for s in ("train", "val", "validation", "test")], {},
        "has the folders val and validation, which name one split; put all of its classes into one of them",
    ),
    "only test": (lambda root: [pictures(root / s, 2) for s in ("test", "more")], {}, "in test, but no train and no val;"),
    "shared class": (
        shared_class, {}, r"splits of \S+mine share 2 classes \('kind01' in test and train, 'kind02' in test and val\), but",
    ),
    "a file": (lambda root: write(root, b"text"), {}, "mine is no folder or zip that can be read .*; give one with"),
    "up and out": (lambda root: evil_zip(root, "../evil.png"), {}, r"holds the path '\.\./evil\.png', which leads out of it"),
    "absolute": (lambda root: evil_zip(root, "/tmp/evil.png"), {}, "holds the path '/tmp/evil.png', which leads out of it"),
    "inner up": (lambda root: evil_zip(root, "cat/../../evil.txt"), {}, "which leads out of it; use a zip without such paths"),
    "drive": (lambda root: evil_zip(root, "C:/evil.png"), {}, "which leads out of it"),
    "backslash": (lambda root: evil_zip(root, "..\\evil.png"), {}, "which leads out of it"),
    "shares": (pictures, {"shares": "0.5,0.5"}, r"shares '0.5,0.5': give three shares of train, val and test that make 1"),
    "shares of more": (pictures, {"shares": "0.8,0.2,0.2"}, "shares '0.8,0.2,0.2'"),
    "no shares": (pictures, {"shares": "a,b,c"}, "shares 'a,b,c'"),
    "no share": (pictures, {"shares": "0.8,0,0.2"}, "shares '0.8,0,0.2'"),
    "channels": (pictures, {"channels": 4}, "images of 4 channels and size 84; give 1 or 3 channels"),
    "size": (pictures, {"size": 0}, "images of 3 channels and size 0"),
    "fit": (pictures, {"fit": "squish"}, "unknown fit 'squish'; did you mean 'squash'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_folder_costs_one_sentence_and_no_cache(case: str, tmp_path: Path, cache: Path) -> None:
    prepare, settings, sentence = REFUSED[case]
    prepare(tmp_path / "mine")
    with pytest.raises(UserError, match=sentence) as caught:
        folder("train", tmp_path, "mine", **settings)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*evil*"))
    assert not cache.exists(), "refused before anything is decoded"


def test_a_misspelt_split_gets_a_suggestion(tmp_path: Path) -> None:
    for make in (folder, csv_lists, mini_imagenet):
        with pytest.raises(UserError, match="unknown split 'tests'; did you mean 'test'"):
            make("tests", tmp_path)


def test_a_class_of_too_few_pictures_is_named_by_the_episodes(tmp_path: Path) -> None:
    root = pictures(tmp_path / "mine")
    bank = next(bank for bank in (folder(split, root, least=2, size=8) for split in SPLITS) if bank.classes == 2)
    with pytest.raises(UserError, match=rf"class '{bank.names[0]}' of {bank.source} has 3; use --queries 2 or fewer"):
        Episodes(bank, 2, 1, 3)


def test_a_folder_of_a_split_without_pictures_is_named(tmp_path: Path) -> None:
    for start, split in ((0, "train"), (2, "val"), (4, "test")):
        pictures(tmp_path / "mine" / split, 2, start=start)
    for path in (tmp_path / "mine" / "val").rglob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match="mine has no class for val with 1 or more images; add some"):
        folder("val", tmp_path / "mine", size=8)


LISTS = {
    "train": [("0.png", "cat"), ("1.png", "cat"), ("2.png", "dog")],
    "val": [("3.png", "emu")],
    "test": [("4.png", "fox"), ("5.png", "fox")],
}


def listed(root: Path, changes: dict[str, str] | None = None, by_label: bool = False) -> Path:
    """A folder with images and lists, some of them replaced by other text."""
    for split, rows in LISTS.items():
        text = "filename,label\n" + "".join(f"{name},{label}\n" for name, label in rows)
        write(root / f"{split}.csv", (changes or {}).get(split, text).encode())
        for name, label in rows:
            write(root / "images" / (label if by_label else "") / name, photo(int(name[0])))
    return root


@pytest.mark.parametrize("layout", ["flat", "by label", "zip", "gz", "splits folder", "with a mark", "windows"])
def test_lists_give_classes_and_splits(tmp_path: Path, layout: str) -> None:
    root = listed(tmp_path / "mini-imagenet", by_label=layout == "by label")
    if layout == "zip":
        with zipfile.ZipFile(root / "images.zip", "w") as archive:
            for path in (root / "images").iterdir():
                archive.write(path, f"images/{path.name}")
                path.unlink()
        (root / "images").rmdir()
    for path in root.glob("*.csv"):
        text = path.read_bytes()
        if layout in ("gz", "splits folder"):
            path.unlink()
            target = path.with_suffix(".csv.gz")
            if layout == "splits folder":
                target = tmp_path / "splits" / f"mini_imagenet_{path.stem}.csv.gz"
            write(target, gzip.compress(text))
        elif layout in ("with a mark", "windows"):
            path.write_bytes(b"\xef\xbb\xbf" + text if layout == "with a mark" else text.replace(b"\n", b"\r\n"))
    for split, rows in LISTS.items():
        bank = mini_imagenet(split, tmp_path)
        assert bank.items.shape[1:] == (3, 84, 84) and bank.source == f"mini-imagenet {split}"
        assert list(bank.names) == sorted({label for _, label in rows})
        assert bank.sizes.tolist() == [sum(label == name for _, label in rows) for name in bank.names]
        for pixels, (name, _) in zip(bank.read(torch.arange(bank.entries)), rows, strict=True):
            assert np.array_equal(pixels.numpy(), decode(encoded(photo(int(name[0])), "PNG"), Look(84)))


def test_another_label_of_an_image_is_seen(tmp_path: Path) -> None:
    """The files are the same, and so is their order, but where one class ends and the next begins is not."""
    root = listed(tmp_path / "mini-imagenet")
    assert mini_imagenet("train", tmp_path, size=8).sizes.tolist() == [2, 1]
    forget()
    (root / "train.csv").write_text("filename,label\n0.png,cat\n1.png,dog\n2.png,dog\n")
    assert mini_imagenet("train", tmp_path, size=8).sizes.tolist() == [1, 2]


def test_lists_by_label_may_repeat_file_names(tmp_path: Path) -> None:
    for split, label in zip(SPLITS, "abc", strict=True):
        write(tmp_path / f"{split}.csv", f"filename,label\n1.png,{label}\n".encode())
        write(tmp_path / "images" / label / "1.png", photo(ord(label)))
    banks = [csv_lists(split, tmp_path, size=8) for split in SPLITS]
    assert [bank.names for bank in banks] == [("a",), ("b",), ("c",)]
    assert not torch.equal(*(bank.read(torch.tensor(0)) for bank in banks[:2]))


def test_tiered_imagenet_has_a_folder_of_its_own(tmp_path: Path) -> None:
    listed(tmp_path / "tiered-imagenet")
    assert tiered_imagenet("val", tmp_path, size=8).names == ("emu",)
    with pytest.raises(UserError, match=r"there is no folder \S+mini-imagenet; make it, with images/ and train.csv"):
        mini_imagenet("val", tmp_path)


HEAD = "filename,label\n"
BAD_LISTS: dict[str, tuple[dict[str, str], str]] = {
    "missing files": (
        {"train": HEAD + "".join(f"no{i}.png,cat\n" for i in range(4))},
        r"4 of 7 listed images are not in \S+images \(no0.png, no1.png, no2.png, \.\.\.\); add them, or .*skip_bad",
    ),
    "other columns": ({"val": "file,class\na.png,cat\n"}, r"val.csv has the columns file, class; its first line must be"),
    "no header": ({"val": "3.png,emu\n"}, r"val.csv has no rows; its first line must be filename,label"),
    "empty": ({"val": ""}, r"val.csv has no rows"),
    "no label": ({"val": HEAD + "3.png,emu\n4.png\n"}, r"line 3 of \S+val.csv has no label; each image needs both"),
    "no filename": ({"val": HEAD + ",emu\n"}, r"line 2 of \S+val.csv has no filename"),
    "shared class": ({"val": HEAD + "3.png,cat\n"}, r"splits of \S+images share 1 class \('cat' in train and val\)"),
    "an image twice": ({"val": HEAD + "3.png,emu\n3.png,emu\n"}, r"lists of \S+ name 1 images more than once \(3.png\)"),
    "an image in two splits": ({"val": HEAD + "0.png,emu\n"}, r"name 1 images more than once \(0.png\)"),
    "up and out": ({"val": HEAD + "../3.png,emu\n"}, r"line 2 of \S+val.csv names '\.\./3.png', which leads out of the folder"),
    "absolute": ({"val": HEAD + "/etc/3.png,emu\n"}, r"names '/etc/3.png', which leads out of the folder"),
    "label up and out": ({"val": HEAD + "3.png,../emu\n"}, r"names '\.\./emu', which leads out of the folder"),
    "drive": ({"val": HEAD + "C:\\3.png,emu\n"}, "which leads out of the folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LISTS)
def test_a_bad_list_costs_one_sentence_and_no_cache(case: str, tmp_path: Path, cache: Path) -> None:
    changes, sentence = BAD_LISTS[case]
    listed(tmp_path / "mini-imagenet", changes)
    with pytest.raises(UserError, match=sentence) as caught:
        mini_imagenet("train", tmp_path)
    assert "\n" not in str(caught.value) and not cache.exists()


@pytest.mark.parametrize("damage", ["missing", "cut short", "no gzip", "no text"])
def test_a_list_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    root = listed(tmp_path / "mini-imagenet")
    data = gzip.compress((root / "val.csv").read_bytes())
    (root / "val.csv").unlink()
    content = {"cut short": data[:-9], "no gzip": b"text", "no text": gzip.compress(b"\xff\xfe")}
    if damage != "missing":
        (root / "val.csv.gz").write_bytes(content[damage])
    with pytest.raises(
        UserError, match=r"there is no list \S+val.csv \(or" if damage == "missing" else r"val.csv.gz cannot be read"
    ):
        mini_imagenet("train", tmp_path)


def test_skip_bad_goes_on_without_missing_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed(tmp_path / "mini-imagenet", {"val": HEAD + "3.png,emu\nno.png,emu\nno2.png,gnu\n"})
    bank = mini_imagenet("val", tmp_path, skip_bad=True)
    assert bank.names == ("emu",) and bank.entries == 1
    assert "mini-imagenet: went on without 2 missing images (no.png, no2.png)" in caplog.text


def test_the_experiment_asks_for_splits_that_its_tasks_fit_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """40 classes by shares would leave 6 for validation, too few for 10 ways; 29 cannot give three times 10 at all."""
    for classes, ways, error in (
        (29, 10, "29 classes, which cannot give train, val and test 10 each; add 1 class"),
        (40, 10, ""),
    ):
        root = pictures(tmp_path / f"of {classes}", classes, 2)
        flags = [
            "--data-root",
            str(root),
            "--ways",
            str(ways),
            "--queries",
            "1",
            "--eval-queries",
            "1",
            "--out",
            str(tmp_path / "r"),
        ]
        monkeypatch.setattr(sys, "argv", ["folder.py", *flags, *([] if error else ["--inner-clip", "0"])])
        with pytest.raises(SystemExit):
            launch(experiment.Config, experiment.main, experiment.PRESETS, experiment.__doc__ or "")
        assert (error or "the inner gradient's longest length is 0") in capsys.readouterr().err
        assert not (tmp_path / "r").exists()


DATA = Path(os.environ.get("TOOLKIT_DATA", "nowhere"))


@pytest.mark.skipif("TOOLKIT_DATA" not in os.environ, reason="set TOOLKIT_DATA to the data root")
def test_the_real_lists_of_mini_imagenet_are_64_16_and_20_classes_of_600(tmp_path: Path) -> None:
    rows = {split: lists._list(DATA, tmp_path / "mini-imagenet", split) for split in SPLITS}
    labels = {split: [label for _, label in rows[split]] for split in SPLITS}
    assert [len(set(labels[split])) for split in SPLITS] == [64, 16, 20]
    assert all(labels[split].count(label) == 600 for split in SPLITS for label in set(labels[split]))
    assert len({name for split in SPLITS for name, _ in rows[split]}) == 60_000
