"""CIFAR-100 as class banks by the splits CIFAR-FS (Bertinetto et al. 2019) and FC100 (Oreshkin et al. 2018): 32 x 32, colour.

`cifar_fs` and `fc100` take all 600 images of a class from torchvision's CIFAR-100; `cifar_fs_30` and `fc100_30` take the 180 of
`cifar100_fewshot.zip`, drawn at random: meta-training sees 30 % of the images, so results on them have a name of their own and
do not compare with published numbers.
"""

import hashlib
import io
import json
import zipfile
import zlib
from functools import cache
from http.client import HTTPException
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from toolkit.data.bank import ClassBank
from toolkit.data.cache import cached
from toolkit.errors import UserError, unknown

SPLITS = ("train", "val", "test")


def cifar_fs(split: str, data_root: str | Path = "data", download: bool = False) -> ClassBank:
    """CIFAR-FS: 64/16/20 classes of CIFAR-100, 600 images each (from torchvision's CIFAR-100)."""
    return _split("cifar-fs", split, _whole(Path(data_root), download))


def fc100(split: str, data_root: str | Path = "data", download: bool = False) -> ClassBank:
    """FC100: 60/20/20 classes of CIFAR-100, whole superclasses apart, 600 images each (from torchvision's CIFAR-100)."""
    return _split("fc100", split, _whole(Path(data_root), download))


def cifar_fs_30(split: str, data_root: str | Path = "data") -> ClassBank:
    """CIFAR-FS with 30 % of the images: 64/16/20 classes, 180 images each (from cifar100_fewshot.zip)."""
    return _split("cifar-fs-30", split, _part(Path(data_root)))


def fc100_30(split: str, data_root: str | Path = "data") -> ClassBank:
    """FC100 with 30 % of the images: 60/20/20 classes, 180 images each (from cifar100_fewshot.zip)."""
    return _split("fc100-30", split, _part(Path(data_root)))


def _split(name: str, split: str, whole: ClassBank) -> ClassBank:
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    chosen = _lists(name.removesuffix("-30"))[split]
    number = {c: i for i, c in enumerate(whole.names)}
    return whole.select([number[c] for c in chosen], f"{name} {split}")


def _lists(name: str) -> dict[str, list[str]]:
    lists: dict[str, list[str]] = json.loads((resources.files("toolkit.data") / "splits" / f"{name}.json").read_text())
    return lists


def _classes() -> set[str]:
    return {name for names in _lists("cifar-fs").values() for name in names}


def _whole(root: Path, download: bool) -> ClassBank:
    folder = root / "cifar-100-python"
    if not folder.is_dir() and not download:
        advice = "; cifar100_fewshot.zip is there: use the names that end in -30" if _zip(root).exists() else ""
        raise UserError(f"there is no {folder}; add --download, or give the folder that holds it with --data-root{advice}")
    return _from_torchvision(root, download)


@cache
def _from_torchvision(root: Path, download: bool) -> ClassBank:
    def decode() -> dict[str, Tensor]:
        from torchvision.datasets import CIFAR100

        try:
            parts = [CIFAR100(root, train=train, download=download) for train in (True, False)]
        except (OSError, RuntimeError, HTTPException) as error:
            raise UserError(f"CIFAR-100 cannot be read from {root} ({error}); add --download to fetch it anew") from None
        images = torch.cat([torch.from_numpy(part.data) for part in parts]).permute(0, 3, 1, 2)
        labels = torch.tensor([label for part in parts for label in part.targets])
        names = "\n".join(parts[0].classes).encode()
        return {
            "images": images[labels.argsort(stable=True)].contiguous(),
            "names": torch.tensor(list(names), dtype=torch.uint8),
        }

    return _bank(cached("cifar100-v1", decode), "cifar-100")


def _zip(root: Path) -> Path:
    return root / "cifar100_fewshot.zip"


def _part(root: Path) -> ClassBank:
    if not _zip(root).exists():
        raise UserError(f"there is no {_zip(root)}; give the folder that holds it with --data-root")
    return _from_zip(_zip(root))


@cache
def _from_zip(path: Path) -> ClassBank:
    def decode() -> dict[str, Tensor]:
        import numpy as np
        from PIL import Image
        from tqdm import tqdm

        images = []
        try:
            with zipfile.ZipFile(path) as archive:
                names = sorted(json.loads(archive.read("index.json"))["classes"])
                if set(names) != _classes():
                    raise ValueError(f"its {len(names)} classes are not those of CIFAR-100")
                for name in tqdm(names, f"decoding {path.name}", leave=False):
                    with Image.open(io.BytesIO(archive.read(f"strips/{name}.webp"))) as strip:
                        pixels = np.array(strip.convert("RGB")).reshape(-1, 32, 32, 3)
                    images.append(torch.from_numpy(pixels).permute(0, 3, 1, 2))
                if len({len(some) for some in images}) != 1:
                    raise ValueError("its classes differ in size")
        except (zipfile.BadZipFile, zlib.error, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged or not cifar100_fewshot.zip ({error}); copy it anew") from None
        return {
            "images": torch.cat(images).contiguous(),
            "names": torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8),
        }

    return _bank(cached(f"cifar100-fewshot-{_content(path)}-v1", decode), "cifar-100 (30 %)")


def _content(path: Path) -> str:
    """Names one zip among others by the checksums that it keeps of its members, without reading them."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted((member.filename, member.CRC) for member in archive.infolist())
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} is damaged or no zip ({error}); copy it anew") from None
    return hashlib.sha256(repr(members).encode()).hexdigest()[:12]


def _bank(tensors: dict[str, Tensor], source: str) -> ClassBank:
    names = tuple(bytes(tensors["names"].tolist()).decode().split("\n"))
    images = tensors["images"]
    return ClassBank(images, torch.arange(len(names) + 1) * (len(images) // len(names)), names, source)
