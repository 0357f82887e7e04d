"""Any folder of class folders as class banks, with splits that share no class."""

import hashlib
import logging
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from toolkit.data.bank import ClassBank
from toolkit.data.images import Files, Look, decoded, image_files, some
from toolkit.errors import UserError, unknown

log = logging.getLogger("toolkit")
SPLITS = ("train", "val", "test")
NAMED = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Listed(NamedTuple):
    """A class: the split it belongs to ("" where that is still open), its name, and its images."""

    split: str
    name: str
    images: tuple[str, ...]


class Cut(NamedTuple):
    """How classes of at least `min_images` images are dealt to three splits of at least `least` classes."""

    shares: tuple[float, ...]
    seed: int
    least: int
    min_images: int


class Whole(NamedTuple):
    """The classes of all splits in one bank, the split of each ("" if it is left out), and (class, class, images) of images
    that are in both."""

    bank: ClassBank
    splits: tuple[str, ...]
    same: tuple[tuple[int, int, int], ...]


def folder(
    split: str,
    data_root: str | Path = "data",
    path: str = "",
    size: int = 84,
    channels: int = 3,
    fit: str = "squash",
    shares: str = "0.64,0.16,0.2",
    split_seed: int = 0,
    min_images: int = 1,
    skip_bad: bool = False,
    least: int = 5,
) -> ClassBank:
    """Any folder of class folders, or a zip of them: images of any size and kind, squashed (or cropped) to one size.

    The folder is `data_root`, or `path` below it. Each folder in it is a class of all jpg, png, webp, bmp and gif images at any
    depth below. If there are folders train, val and test, these hold the class folders of the splits. Otherwise classes are put
    in an order by a hash of `split_seed` and their name and cut by `shares` (of train, val, test), such that each split has at
    least `least` classes. Images become uint8 (channels, size, size), see `Look` in toolkit.data.images. Classes of less than
    `min_images` images are left out with a warning; with `skip_bad` so are unreadable images. Images that are in two splits, or
    twice in a class, are counted in a warning. A folder is looked at once in a process.

    Raises UserError, in one sentence, for a folder without class folders, with too few classes, with unreadable images or with
    a class in two splits.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    cut = Cut(_shares(shares), split_seed, max(least, 1), max(min_images, 1))
    return chosen(_folder(Path(data_root) / path, Look(size, channels, fit), skip_bad, cut), split, min_images)


def chosen(whole: Whole, split: str, min_images: int = 1) -> ClassBank:
    """The classes of one split that have enough images; says, once, which have not, and which images are there twice."""
    bank, splits, least = whole.bank, whole.splits, max(min_images, 1)
    if few := [bank.names[c] for c in range(bank.classes) if bank.sizes[c] < least]:
        _say(f"{bank.source}: left out {_some(few, 'class', 'classes')} of less than {least} image{'s' * (least > 1)}")
    # A pair of classes is known by the first class that an image was found in; one left out counts in no split.
    shared = sum(n for a, b, n in whole.same if splits[a] and splits[b] and splits[a] != splits[b])
    twice = sum(n for a, b, n in whole.same if a == b)
    if shared:
        _say(f"{bank.source}: {shared} images of one split are also, pixel by pixel, in another; results on them flatter")
    if twice:
        _say(f"{bank.source}: {twice} images are more than once in their class, so support and query sets may share them")
    own = [c for c in range(bank.classes) if splits[c] == split and bank.sizes[c] >= least]
    if not own:
        raise UserError(f"{bank.source} has no class for {split} with {least} or more images; add some")
    return bank.select(own, f"{bank.source} {split}")


def whole_bank(name: str, files: Files, classes: list[Listed], look: Look, skip_bad: bool) -> Whole:
    """The images of all splits, decoded once. Raises UserError for a class name in two splits, and for unreadable images."""
    owners: dict[str, set[str]] = {}
    for listed in classes:
        owners.setdefault(listed.name, set()).add(listed.split)
    if both := [f"{name!r} in {' and '.join(sorted(splits))}" for name, splits in owners.items() if len(splits) > 1]:
        raise UserError(
            f"splits of {files.root} share {_some(both, 'class', 'classes')}, but few-shot tests need classes unseen "
            "in training; give each class to one split, or put all class folders beside one another to have them split"
        )
    found = decoded(name, files, [listed.images for listed in classes], look, skip_bad)
    if found.bad:
        log.warning("%s: went on without %s", name, _some(found.first_bad, "unreadable image", "unreadable images", found.bad))
    first = torch.tensor([0, *found.counts]).cumsum(0)
    bank = ClassBank(found.items, first, tuple(listed.name for listed in classes), name)
    return Whole(bank, tuple(listed.split for listed in classes), tuple(found.same))


@cache
def _folder(root: Path, look: Look, skip_bad: bool, cut: Cut) -> Whole:
    files = image_files(root)
    classes = _classes(files)
    given = [listed.split for listed in classes]
    if "" in given:  # tried before anything is decoded, and once more when unreadable images are known
        _dealt([listed.name for listed in classes], [len(listed.images) for listed in classes], cut, root)
    name = re.sub(r"[^\w.]+", "-", root.resolve().name) or "images"
    whole = whole_bank(name, files, classes, look, skip_bad)
    if "" in given:
        given = _dealt(list(whole.bank.names), whole.bank.sizes.tolist(), cut, root)
    return whole._replace(splits=tuple(given))


def _classes(files: Files) -> list[Listed]:
    """The class folders; two levels down where the first names splits. One without images is listed, and later left out."""
    tops: dict[str, set[str]] = {}
    for name in files.folders:
        top, _, below = name.partition("/")
        tops.setdefault(top, set()).update({below.partition("/")[0]} - {""})
    with_images = {name.partition("/")[0] for name in files.stamps if name.count("/") == 1}
    named = {top: NAMED[top.lower()] for top in tops if top.lower() in NAMED and top not in with_images and tops[top]}
    if named and set(named.values()) != set(SPLITS):
        missing = [split for split in SPLITS if split not in named.values()]
        raise UserError(
            f"{files.root} has class folders in {' and '.join(sorted(named))}, but no {' and no '.join(missing)}; add it, "
            "or put all class folders beside one another to have them split"
        )
    if len(named) > len(SPLITS):
        both = " and ".join(sorted(top for top in named if list(named.values()).count(named[top]) > 1))
        raise UserError(f"{files.root} has the folders {both}, which name one split; put all of its classes into one of them")
    places = [(split, f"{top}/{c}") for top, split in named.items() for c in tops[top]] or [("", top) for top in tops]
    images: dict[str, list[str]] = {place: [] for _, place in places}
    depth = 2 if named else 1
    for name in files.stamps:
        place = "/".join(name.split("/")[:depth])
        if place in images and place != name:
            images[place].append(name)
    if not any(images.values()):
        what = f"{len(files.stamps)} images but no folders of them" if files.stamps else "no images in it"
        raise UserError(f"{files.root} has {what}; it needs one folder for each class, with jpg, png, webp, bmp or gif files")
    return sorted(Listed(split, place.rpartition("/")[2], tuple(images[place])) for split, place in places)


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if len(shares) != 3 or not all(0 < share < 1 for share in shares) or abs(sum(shares) - 1) > 0.01:
        raise UserError(f"shares {text!r}: give three shares of train, val and test that make 1, such as 0.64,0.16,0.2")
    return shares


def _dealt(names: list[str], images: list[int], cut: Cut, root: Path) -> list[str]:
    """A split for each class by shares, largest remainders first, but at least `cut.least`; "" for one of too few images."""
    kept = [name for name, count in zip(names, images, strict=True) if count >= cut.min_images]
    total, more = len(kept), 3 * cut.least - len(kept)
    if more > 0:
        fits = f", or use --ways {total // 3} --dataset.least {total // 3}" if total >= 6 else ""
        few = f" of {cut.min_images} or more images" if cut.min_images > 1 else ""
        raise UserError(
            f"{root} has {total} classes{few}, which cannot give train, val and test {cut.least} each; add {more} "
            f"class{'es' * (more > 1)}{fits}"
        )
    sizes = [int(share * total) for share in cut.shares]
    for i in sorted(range(3), key=lambda i: sizes[i] - cut.shares[i] * total)[: total - sum(sizes)]:
        sizes[i] += 1
    while min(sizes) < cut.least:
        sizes[sizes.index(max(sizes))] -= 1
        sizes[sizes.index(min(sizes))] += 1
    ordered = sorted(kept, key=lambda name: hashlib.sha256(f"{cut.seed}/{name}".encode(errors="surrogateescape")).digest())
    dealt = dict(zip(ordered, [split for split, size in zip(SPLITS, sizes, strict=True) for _ in range(size)], strict=True))
    return [dealt.get(name, "") for name in names]


def _some(names: list[str], one: str, many: str, count: int | None = None) -> str:
    count = len(names) if count is None else count
    return f"{count} {one if count == 1 else many} ({some(names, count)})"


@cache
def _say(text: str) -> None:
    """A warning that is given once in a process, though three splits call for it."""
    log.warning("%s", text)
