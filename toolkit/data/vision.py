"""torchvision's data sets by name, and CUB, as class banks: all images of all parts pooled, then the classes divided.

`aircraft`, `flowers` and `dtd` have the class splits of Meta-Dataset (Triantafillou et al. 2020, its files
`dataset_conversion/splits`), `cub` that of torchmeta (`datasets/assets/cub`: 100/50/50 of the 200 classes, by number). The
others have no published one and are divided as `pooled.divided` says. Departures from Meta-Dataset: whole images, resized to a
square, where it cuts aircraft out by their boxes.
"""

import inspect
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any

from toolkit import plugins
from toolkit.data.bank import ClassBank
from toolkit.data.pooled import divided, pooled
from toolkit.errors import UserError, unknown

# The parts that hold all labelled images; a set that takes `split` and is not here has "train" and "test".
PARTS = {
    "Country211": ("train", "valid", "test"),
    "DTD": ("train", "val", "test"),
    "FGVCAircraft": ("trainval", "test"),
    "Flowers102": ("train", "val", "test"),
    "Imagenette": ("train", "val"),
    "OxfordIIITPet": ("trainval", "test"),
    "PCAM": ("train", "val", "test"),
    "RenderedSST2": ("train", "val", "test"),
}
DAMAGED = (OSError, RuntimeError, HTTPException, tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError)
BANNER = 20  # pixels at the bottom of every image of aircraft, with the photographer's name


def fashion_mnist(split: str, data_root: str | Path = "data", download: bool = False, size: int = 28) -> ClassBank:
    """Fashion-MNIST (Xiao et al. 2017): 6/2/2 classes of clothes, 7,000 grey images each."""
    return divided(_bank("FashionMNIST", data_root, download, size), split)


def emnist(
    split: str, data_root: str | Path = "data", download: bool = False, size: int = 28, variant: str = "balanced"
) -> ClassBank:
    """EMNIST (Cohen et al. 2017), "balanced": 29/9/9 letters and digits, 2,800 grey images each, transposed as in its files."""
    return divided(_bank("EMNIST", data_root, download, size, variant=variant), split)


def svhn(split: str, data_root: str | Path = "data", download: bool = False, size: int = 32) -> ClassBank:
    """SVHN (Netzer et al. 2011): 6/2/2 digits of house numbers in colour, without its part "extra"."""
    return divided(_bank("SVHN", data_root, download, size), split)


def flowers(split: str, data_root: str | Path = "data", download: bool = False, size: int = 84) -> ClassBank:
    """Oxford Flowers (Nilsback and Zisserman 2008): 71/15/16 species in colour, the split of Meta-Dataset."""
    return divided(_bank("Flowers102", data_root, download, size), split, "flowers")


def dtd(split: str, data_root: str | Path = "data", download: bool = False, size: int = 84) -> ClassBank:
    """Describable Textures (Cimpoi et al. 2014): 33/7/7 textures in colour, the split of Meta-Dataset."""
    return divided(_bank("DTD", data_root, download, size), split, "dtd")


def aircraft(split: str, data_root: str | Path = "data", download: bool = False, size: int = 84) -> ClassBank:
    """FGVC-Aircraft (Maji et al. 2013): 70/15/15 variants in colour, banner cut off, the split of Meta-Dataset."""
    return divided(_bank("FGVCAircraft", data_root, download, size, transform=_without_banner), split, "aircraft")


def torchvision_set(
    split: str,
    name: str,
    data_root: str | Path = "data",
    download: bool = False,
    size: int = 0,
    channels: int = 0,
    parts: str = "",
) -> ClassBank:
    """Any image classification set of torchvision, by the name of its class ("STL10"), or a class like those (`file.py:Name`).

    The class takes `root`, and may take `download` and either `train` or `split`; `parts` lists the values of `split` to pool
    ("train,test"), where the default leaves some out. `size` and `channels` are as for `convert.from_dataset`, 0 meaning as
    they are. Raises UserError for a class that is unknown or refuses these arguments, and for data that is not there.
    """
    return divided(_bank(name, data_root, download, size, channels, parts), split)


def cub(split: str, data_root: str | Path = "data", size: int = 84) -> ClassBank:
    """CUB-200-2011 (Wah et al. 2011): 100/50/50 bird species in colour, whole images, the split of torchmeta."""
    return divided(_cub(Path(data_root).absolute(), size), split, "cub")


@cache
def _cub(root: Path, size: int) -> ClassBank:
    from torchvision.datasets import ImageFolder

    folder = root / "CUB_200_2011" / "images"
    if not folder.is_dir():
        raise UserError(
            f"there is no {folder}; fetch CUB_200_2011.tgz by hand from data.caltech.edu/records/65de6-vp158 "
            f"and unpack it in {root}"
        )
    images = _made("CUB-200-2011", root, False, lambda: [ImageFolder(folder)])
    return pooled("CUB-200-2011", images, images[0].classes, size)


def _bank(
    name: str, root: str | Path, download: bool, size: int, channels: int = 0, parts: str = "", **extra: Any
) -> ClassBank:
    return _cached_bank(name, Path(root).absolute(), download, size, channels, parts, tuple(extra.items()))


@cache
def _cached_bank(
    name: str, root: Path, download: bool, size: int, channels: int, parts: str, extra: tuple[tuple[str, Any], ...]
) -> ClassBank:
    target = _class(name)
    options = dict(extra)
    variant = options.pop("variant", None)
    calls = [{"split": variant, "train": train} for train in (True, False)] if variant else _calls(name, target, parts)
    takes = inspect.signature(target).parameters
    if "download" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        options["download"] = download
    sets = _made(name, root, download, lambda: [target(root=str(root), **call, **options) for call in calls])
    classes = getattr(sets[0], "classes", None)
    names = [str(c) for c in classes] if isinstance(classes, list | tuple) else None
    return pooled(name.rpartition(":")[2], sets, names, size or None, channels or None, relabel=variant is not None)


def _class(name: str) -> Any:
    if ":" in name:
        return plugins.resolve(name)
    from torchvision import datasets

    if name not in datasets.__all__ or not isinstance(getattr(datasets, name), type):
        raise unknown("data set of torchvision", name, [n for n in datasets.__all__ if isinstance(getattr(datasets, n), type)])
    return getattr(datasets, name)


def _calls(name: str, target: Any, parts: str) -> list[dict[str, Any]]:
    """The arguments of the calls that together give all parts."""
    takes = plugins.takes(target)
    if "train" in takes and not parts:
        return [{"train": True}, {"train": False}]
    if "split" in takes:
        return [{"split": part.strip()} for part in (parts.split(",") if parts else PARTS.get(name, ("train", "test")))]
    if parts:
        raise UserError(f"{name} takes no split, so parts={parts} means nothing to it; leave parts out")
    return [{}]


def _made(name: str, root: Path, download: bool, make: Callable[[], list[Any]]) -> list[Any]:
    try:
        return make()
    except DAMAGED as error:
        said = " ".join(str(error).split()).rstrip(".")
        if download:
            advice = f"could not be downloaded ({said}); try again, or fetch it by hand into {root}"
        else:
            advice = f"cannot be read from {root} ({said}); add --download to fetch it, or give its folder with --data-root"
        raise UserError(f"{name} {advice}") from None
    except (TypeError, ValueError, ImportError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{name} cannot be made ({said}); give another set, or its parts as parts=train,test") from None


def _without_banner(image: Any) -> Any:
    return image.crop((0, 0, image.width, image.height - BANNER))
