"""Images with splits by CSV lists: mini-ImageNet, tieredImageNet, and whatever else is listed in their way.

Lists of Ravi & Larochelle 2017 (mini-ImageNet) and Ren et al. 2018 (tieredImageNet): train.csv, val.csv and test.csv with the
columns `filename` and `label`. The images themselves are ImageNet's and are the user's to bring.
"""

import csv
import gzip
import logging
import zlib
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from toolkit.data.bank import ClassBank
from toolkit.data.folder import SPLITS, Listed, Whole, chosen, whole_bank
from toolkit.data.images import Look, image_files, some
from toolkit.errors import UserError, unknown

log = logging.getLogger("toolkit")


def mini_imagenet(split: str, data_root: str | Path = "data", size: int = 84, skip_bad: bool = False) -> ClassBank:
    """mini-ImageNet: 64/16/20 classes, 600 images each, of `data_root`/mini-imagenet by the lists of Ravi & Larochelle 2017."""
    return csv_lists(split, data_root, "mini-imagenet", size=size, skip_bad=skip_bad)


def tiered_imagenet(split: str, data_root: str | Path = "data", size: int = 84, skip_bad: bool = False) -> ClassBank:
    """tieredImageNet: 351/97/160 classes, 779,165 images, from `data_root`/tiered-imagenet by the lists of Ren et al. 2018."""
    return csv_lists(split, data_root, "tiered-imagenet", size=size, skip_bad=skip_bad)


def csv_lists(
    split: str,
    data_root: str | Path = "data",
    path: str = "",
    size: int = 84,
    channels: int = 3,
    fit: str = "squash",
    min_images: int = 1,
    skip_bad: bool = False,
) -> ClassBank:
    """Images of the folder `path` below `data_root`, with classes and splits by three CSV lists with a header `filename,label`.

    The lists are train.csv, val.csv and test.csv there, or, `path` being "mini-imagenet", mini_imagenet_train.csv and so on in
    `data_root`/splits; all may be .csv.gz. Images lie in `images` there, a folder or images.zip, as <filename> or as
    <label>/<filename>; a name that leaves that folder is refused. They become uint8 (channels, size, size), see `Look` in
    toolkit.data.images; squashed to 84 x 84 by Lanczos, mini-ImageNet is as Finn et al. 2017 have it. With `skip_bad`, missing
    and unreadable images are left out with a warning, as are classes of less than `min_images`. Lists are read once in a
    process.

    Raises UserError, in one sentence, for lists that are missing, damaged, without these columns, or that name a class or an
    image twice, and for missing or unreadable images.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    whole = _whole(Path(data_root), path, Look(size, channels, fit), skip_bad)
    return chosen(whole, split, min_images)


@cache
def _whole(data_root: Path, path: str, look: Look, skip_bad: bool) -> Whole:
    root = data_root / path
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}; make it, with images/ and train.csv, val.csv, test.csv, or give --data-root"
        )
    lists = {split: _list(data_root, root, split) for split in SPLITS}
    archive = root / "images.zip"
    files = image_files(archive if archive.exists() and not (root / "images").exists() else root / "images")
    classes: dict[tuple[str, str], list[str]] = {}
    missing, seen, double = list[str](), set[str](), list[str]()
    for split, rows in lists.items():
        for filename, label in rows:
            found = next((name for name in (filename, f"{label}/{filename}") if name in files.stamps), None)
            if found is None:
                missing.append(filename)
            elif found in seen:
                double.append(found)
            else:
                seen.add(found)
                classes.setdefault((split, label), []).append(found)
    total = sum(map(len, lists.values()))
    if double:
        raise UserError(f"the lists of {root} name {len(double)} images more than once ({some(double)}); list each image once")
    if len(missing) == total or (missing and not skip_bad):
        raise UserError(
            f"{len(missing)} of {total} listed images are not in {files.root} ({some(missing)}); add them, or go on without "
            "them by --dataset.skip_bad True"
        )
    if missing:
        log.warning("%s: went on without %d missing images (%s)", root.name, len(missing), some(missing))
    listed = [Listed(split, label, tuple(sorted(images))) for (split, label), images in sorted(classes.items())]
    return whole_bank(root.resolve().name, files, listed, look, skip_bad)


def _list(data_root: Path, root: Path, split: str) -> list[tuple[str, str]]:
    """File name and label of each row of a split's list."""
    name = f"{root.name.replace('-', '_')}_{split}.csv"
    places = [root / f"{split}.csv", root / f"{split}.csv.gz", *(data_root / "splits" / f"{name}{end}" for end in ("", ".gz"))]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise UserError(f"there is no list {places[0]} (or .gz, or {places[2]}); copy the three lists there")
    try:
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8-sig")
        rows = list(csv.DictReader(text.splitlines(), skipinitialspace=True))
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV list ({error}); copy it anew") from None
    if not rows or not {"filename", "label"} <= rows[0].keys():
        has = f"the columns {', '.join(map(str, rows[0]))}" if rows else "no rows"
        raise UserError(f"{path} has {has}; its first line must be filename,label, and one line for each image must follow")
    found = []
    for line, row in enumerate(rows, 2):
        filename, label = (row["filename"] or "").strip(), (row["label"] or "").strip()
        if not filename or not label:
            raise UserError(f"line {line} of {path} has no {'label' if filename else 'filename'}; each image needs both")
        for part in (filename, label):
            if PurePosixPath(part).is_absolute() or PureWindowsPath(part).anchor or ".." in PureWindowsPath(part).parts:
                raise UserError(f"line {line} of {path} names {part!r}, which leads out of the folder of images; take it out")
        found.append((filename, label))
    return found
