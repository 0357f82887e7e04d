"""Omniglot (Lake et al. 2015): 1,623 handwritten characters of 50 alphabets, 20 drawings each."""

import hashlib
import io
import json
import zipfile
from functools import cache
from http.client import HTTPException
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from toolkit.data.bank import ClassBank, with_rotations
from toolkit.data.cache import cached
from toolkit.errors import UserError, unknown

PARTS = ("images_background", "images_evaluation")
# The md5 of Lake's own zips, which torchvision checks too, and of the same PNG files packed anew.
KNOWN_MD5 = {
    "images_background": ("68d2efa1b9178cc56df9314c21c6e718", "96da06cdbdb0dfad918def30fc0f70ed"),
    "images_evaluation": ("6b91aef0f799c5bb55b94e3f2daec811", "1a0036a4b5367d31dede0d9fa37c580c"),
}
PROTOCOLS = ("vinyals", "background")
SPLITS = ("train", "val", "test")


def omniglot(
    split: str,
    root: str | Path = "data",
    protocol: str = "vinyals",
    rotations: bool = True,
    size: int = 28,
    download: bool = False,
) -> ClassBank:
    """Omniglot as uint8 images (items, 1, `size`, `size`), ink 255 on 0, resized by Lanczos, 20 per class.

    `protocol` "vinyals": 1,028 / 172 / 423 characters over all alphabets (Vinyals et al. 2016, the list of torchmeta);
    "background": Lake's background alphabets against his evaluation alphabets; it has no validation set of its own, so every
    fifth background alphabet, by name, is that.
    `rotations` makes the turns by 90, 180 and 270 degrees classes of their own. Reads the zips under `root`/omniglot-py,
    the place where torchvision puts them; `download` lets torchvision fetch them there. Decoded once into the cache.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if protocol not in PROTOCOLS:
        raise unknown("Omniglot protocol", protocol, PROTOCOLS)
    whole = _all_characters(Path(root), size, download)
    chosen = _characters(split, protocol, whole)
    bank = whole.select(chosen, f"omniglot {protocol} {split}")
    return with_rotations(bank) if rotations else bank


def vinyals(
    split: str, data_root: str | Path = "data", download: bool = False, rotations: bool = True, size: int = 28
) -> ClassBank:
    """Omniglot by the split of Vinyals et al. 2016: 1,028/172/423 characters over all alphabets, times four rotations."""
    return omniglot(split, data_root, "vinyals", rotations, size, download)


def background(
    split: str, data_root: str | Path = "data", download: bool = False, rotations: bool = True, size: int = 28
) -> ClassBank:
    """Omniglot, Lake's background alphabets against his evaluation alphabets, times four rotations."""
    return omniglot(split, data_root, "background", rotations, size, download)


def _characters(split: str, protocol: str, whole: ClassBank) -> list[int]:
    if protocol == "vinyals":
        lists = json.loads((resources.files("toolkit.data") / "splits" / "omniglot_vinyals.json").read_text())[split]
        names = {f"{a}/{c}" for alphabets in lists.values() for a, chars in alphabets.items() for c in chars}
        return [i for i, name in enumerate(whole.names) if name.split("/", 1)[1] in names]

    background = sorted({name.split("/")[1] for name in whole.names if name.startswith("background/")})

    def split_of(part: str, alphabet: str) -> str:
        return "test" if part == "evaluation" else "val" if alphabet in background[4::5] else "train"

    return [i for i, name in enumerate(whole.names) if split_of(*name.split("/")[:2]) == split]


def _all_characters(root: Path, size: int, download: bool) -> ClassBank:
    zips = [root / "omniglot-py" / f"{part}.zip" for part in PARTS]
    for path in zips:
        if not path.exists() and download:
            _download(path)
        if not path.exists():
            raise UserError(f"there is no {path}; give the folder that holds omniglot-py with --data-root, or add --download")
    return _from_cache(tuple(zips), size)


@cache
def _from_cache(zips: tuple[Path, ...], size: int) -> ClassBank:
    tensors = cached(f"omniglot-{size}-v1", lambda: _decode(zips, size))
    names = tuple(bytes(tensors["names"].tolist()).decode().split("\n"))
    first = torch.arange(len(names) + 1) * 20
    return ClassBank(tensors["images"], first, names, "omniglot")


def _download(path: Path) -> None:
    from torchvision.datasets import Omniglot
    from torchvision.datasets.utils import download_url

    try:
        download_url(f"{Omniglot.download_url_prefix}/{path.name}", path.parent, path.name, Omniglot.zips_md5[path.stem])
    except (OSError, RuntimeError, HTTPException) as error:
        path.unlink(missing_ok=True)
        raise UserError(
            f"{path.name} could not be downloaded ({error}); try again, or fetch it by hand from "
            f"github.com/brendenlake/omniglot into {path.parent}"
        ) from None


def _decode(zips: tuple[Path, ...], size: int) -> dict[str, Tensor]:
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    images, names = [], []
    for path in zips:
        data = path.read_bytes()
        if hashlib.md5(data, usedforsecurity=False).hexdigest() not in KNOWN_MD5[path.stem]:
            raise UserError(
                f"{path} is damaged or not Omniglot (its md5 is unknown); delete it and add --download, or copy it anew"
            )
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = sorted(name for name in archive.namelist() if name.endswith(".png"))
            for i, member in enumerate(tqdm(members, f"decoding {path.name}", leave=False)):
                with Image.open(io.BytesIO(archive.read(member))) as image:
                    grey = image.convert("L").resize((size, size), Image.Resampling.LANCZOS)
                images.append(torch.from_numpy(255 - np.asarray(grey)))
                if i % 20 == 0:
                    part, alphabet, character, _ = member.split("/")
                    names.append(f"{part.removeprefix('images_')}/{alphabet}/{character}")
    encoded = torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8)
    return {"images": torch.stack(images).unsqueeze(1), "names": encoded}
