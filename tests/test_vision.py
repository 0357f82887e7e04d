"""Sets of torchvision, CUB, MedMNIST and Hugging Face: every image under its class, splits apart, decoded once."""

import gc
import hashlib
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tqdm
from PIL import Image
from scipy.io import savemat

from toolkit import UserError, draw, plugins
from toolkit.data import huggingface as hf
from toolkit.data import medmnist as med
from toolkit.data import vision
from toolkit.data.bank import ClassBank
from toolkit.data.convert import from_tensors
from toolkit.data.pooled import divided, pooled
from toolkit.samplers import Episodes

SPLITS = ("train", "val", "test")
datasets = pytest.importorskip("torchvision.datasets")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    forget()


def forget() -> None:
    """As a new process: nothing is held in memory."""
    for function in (vision._cached_bank, vision._cub, med._bank, hf._bank):
        function.cache_clear()


def pixels(label: int, number: int, size: int = 8, colour: bool = True) -> Any:
    """An image of one colour: the class in its first channel, the image's number in its second."""
    return np.full((size, size, 3), (label, number, 7), np.uint8) if colour else np.full((size, size), label, np.uint8)


def save(path: Path, label: int, number: int, size: int = 8, banner: int = 0) -> None:
    """Without loss: what a file holds, and not its name, says how it is read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.concatenate([pixels(label, number, size), np.full((banner, size, 3), 255, np.uint8)])
    Image.fromarray(image).save(path, "png")


def idx(path: Path, array: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


def grey_files(folder: Path, prefix: str, classes: int, parts: tuple[str, str]) -> None:
    for part, each in zip(parts, (3, 1), strict=True):
        labels = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), each))
        idx(folder / f"{prefix}{part}-images-idx3-ubyte", np.stack([pixels(c, 0, 28, False) for c in labels]))
        idx(folder / f"{prefix}{part}-labels-idx1-ubyte", labels)


def fake_fashion(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey_files(root / "FashionMNIST" / "raw", "", 10, ("train", "t10k"))


def fake_emnist(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey_files(root / "EMNIST" / "raw", "emnist-balanced-", 47, ("train", "test"))


def fake_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.mkdir(parents=True, exist_ok=True)
    known = dict(datasets.SVHN.split_list)
    for part, each in (("train", 3), ("test", 1)):
        labels = np.repeat(np.arange(1, 11), each)  # 10 stands for the digit 0
        images = np.stack([pixels(label % 10, n, 32) for n, label in enumerate(labels)], -1)
        savemat(root / known[part][1], {"X": images, "y": labels[:, None]})
        known[part] = [*known[part][:2], hashlib.md5((root / known[part][1]).read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", known)


def fake_flowers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, ids, labels = root / "flowers-102", np.arange(1, 409), np.tile(np.arange(1, 103), 4)
    for number, label in zip(ids, labels, strict=True):
        save(folder / "jpg" / f"image_{number:05d}.jpg", int(label) - 1, int(number) % 256, 4)
    savemat(folder / "imagelabels.mat", {"labels": labels})
    savemat(folder / "setid.mat", {"trnid": ids[:102], "valid": ids[102:204], "tstid": ids[204:]})
    known = {
        key: (name, hashlib.md5((folder / name).read_bytes()).hexdigest() if name.endswith("mat") else "")
        for key, (name, _) in datasets.Flowers102._file_dict.items()
    }
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", known)


def names_of(published: str) -> list[str]:
    lists = json.loads((Path(vision.__file__).parent / "splits" / f"{published}.json").read_text())
    return sorted(name for part in SPLITS for name in lists[part])


def fake_dtd(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "dtd" / "dtd"
    for number, part in enumerate(SPLITS):
        lines = []
        for label, name in enumerate(names_of("dtd")):
            for k in range(1 + number % 2):
                save(folder / "images" / name / f"{name}_{number}{k}.jpg", label, 2 * number + k, 4 + number)
                lines.append(f"{name}/{name}_{number}{k}.jpg\n")
        (folder / "labels").mkdir(exist_ok=True)
        (folder / "labels" / f"{part}1.txt").write_text("".join(lines))


def fake_aircraft(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, names = root / "fgvc-aircraft-2013b" / "data", names_of("aircraft")
    for number, part in enumerate(("trainval", "test", "train")):  # those of "train" are in "trainval" too
        lines = []
        for label, name in enumerate(names):
            for k in range(1 if part == "train" else 2):
                code = f"{label:03d}{number % 2}{k}"
                save(folder / "images" / f"{code}.jpg", label, 2 * (number % 2) + k, 6, banner=20)
                lines.append(f"{code} {name}\n")
        (folder / f"images_variant_{part}.txt").write_text("".join(lines))
    (folder / "variants.txt").write_text("".join(f"{name}\n" for name in names))


SETS: dict[str, tuple[Callable[..., ClassBank], Callable[[Path, pytest.MonkeyPatch], None], tuple[int, ...], int, int]] = {
    "fashion": (vision.fashion_mnist, fake_fashion, (6, 2, 2), 4, 1),
    "emnist": (vision.emnist, fake_emnist, (29, 9, 9), 4, 1),
    "svhn": (vision.svhn, fake_svhn, (6, 2, 2), 4, 3),
    "flowers": (vision.flowers, fake_flowers, (71, 15, 16), 4, 3),
    "dtd": (vision.dtd, fake_dtd, (33, 7, 7), 4, 3),
    "aircraft": (vision.aircraft, fake_aircraft, (70, 15, 15), 4, 3),
}


def label_of(bank: ClassBank, c: int) -> set[int]:
    """The first channels of all pixels of a class."""
    return set(bank.read(torch.arange(int(bank.first[c]), int(bank.first[c + 1])))[:, 0].flatten().tolist())


@pytest.mark.parametrize("name", SETS)
def test_every_image_of_every_part_is_under_its_class_and_splits_are_apart(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, fake, counts, each, channels = SETS[name]
    fake(tmp_path, monkeypatch)
    banks = [make(split, tmp_path) for split in SPLITS]
    assert tuple(bank.classes for bank in banks) == counts
    seen = []
    for bank, split in zip(banks, SPLITS, strict=True):
        assert bank.source.endswith(f" {split}") and bank.items.dtype == torch.uint8 and bank.items.shape[1] == channels
        assert set(bank.sizes.tolist()) == {each}
        for c in range(bank.classes):
            (label,) = label_of(bank, c)
            seen.append((label, bank.names[c]))
    assert [label for label, _ in sorted(seen)] == list(range(sum(counts)))
    whole = {"fashion": datasets.FashionMNIST.classes, "flowers": datasets.Flowers102.classes}
    whole |= {"svhn": [str(n) for n in range(10)]} | {key: names_of(key) for key in ("dtd", "aircraft")}
    assert name not in whole or [label for _, label in sorted(seen)] == whole[name]
    assert draw(Episodes(banks[2], ways=2, shots=1, queries=2), 2, seed=0).query.x.shape[2] == channels


@pytest.mark.parametrize("name", SETS)
def test_images_are_decoded_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, fake, *_ = SETS[name]
    fake(tmp_path, monkeypatch)
    first = [make(split, tmp_path) for split in SPLITS]
    (made,) = (tmp_path / "cache").iterdir()
    written = made.stat().st_mtime_ns
    forget()
    again = [make(split, tmp_path) for split in SPLITS]
    assert list((tmp_path / "cache").iterdir()) == [made] and made.stat().st_mtime_ns == written
    assert all(torch.equal(a.items, b.items) and a.names == b.names for a, b in zip(first, again, strict=True))
    forget()
    if "size" in plugins.takes(make) and name != "fashion":
        assert make("val", tmp_path, size=5).items.shape[2:] == (5, 5)
        assert len(list((tmp_path / "cache").iterdir())) == 2


def test_other_pixels_in_the_same_place_are_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_dtd(tmp_path, monkeypatch)
    vision.dtd("val", tmp_path)
    save(tmp_path / "dtd" / "dtd" / "images" / "banded" / "banded_00.jpg", 200, 0)
    forget()
    assert 200 in vision.dtd("test", tmp_path).items[:, 0].unique()


def test_more_images_of_the_same_kind_are_another_cache() -> None:
    image = Image.fromarray(pixels(0, 0))
    assert [pooled("plain", [[(image, 0)] * count]).entries for count in (64, 96, 64)] == [64, 96, 64]


class Listed:
    """Images of one colour and their labels, which it also lists."""

    def __init__(self, targets: list[int]) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return Image.fromarray(pixels(0, 0)), self.targets[i]


def test_other_labels_of_items_that_are_not_looked_at_are_another_cache() -> None:
    count = 320
    looked_at = {i * (count - 1) // 31 for i in range(32)}
    first = Listed([i % 2 for i in range(count)])
    second = Listed([i % 2 if i in looked_at else 0 for i in range(count)])
    assert [pooled("listed", [each]).sizes.tolist() for each in (first, second)] == [
        [each.targets.count(label) for label in (0, 1)] for each in (first, second)
    ]


@pytest.mark.parametrize("name", SETS)
def test_data_that_is_not_there_is_one_sentence_and_nothing_is_fetched(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(
        UserError, match=r"cannot be read from .*; add --download to fetch it, or give its folder with --data-root"
    ):
        SETS[name][0]("train", tmp_path / "data")
    assert not (tmp_path / "cache").exists()


class Garbage(BaseHTTPRequestHandler):
    """A server of nothing but wrong files."""

    def do_GET(self) -> None:
        self.send_response(404 if "missing" in self.path else 200)
        self.end_headers()
        self.wfile.write(b"this is no archive")

    do_HEAD = do_GET

    def log_message(self, *given: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Garbage) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torchvision leaves sockets open
@pytest.mark.parametrize("fault", ["wrong file", "missing", "nobody there"])
def test_a_failed_download_is_one_sentence(fault: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = {"wrong file": server, "missing": f"{server}/missing", "nobody there": "http://127.0.0.1:9"}[fault]
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"{url}/"])
    monkeypatch.setattr(datasets.DTD, "_URL", f"{url}/dtd.tar.gz")
    monkeypatch.setattr(datasets.FGVCAircraft, "_URL", f"{url}/aircraft.tar.gz")  # has no md5, so its archive is opened
    for make in (vision.fashion_mnist, vision.dtd, vision.aircraft):
        with pytest.raises(UserError, match=r"could not be downloaded \(.*\); try again, or fetch it by hand into") as caught:
            make("train", tmp_path / "data", download=True)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()
    del caught
    gc.collect()  # so that those sockets are found here


def test_download_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.DTD, "_download", lambda self: fake_dtd(tmp_path, monkeypatch))
    assert vision.dtd("val", tmp_path, download=True).classes == 7


def test_a_damaged_image_is_named_and_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_dtd(tmp_path, monkeypatch)
    (tmp_path / "dtd" / "dtd" / "images" / "grid" / "grid_10.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"item \d+ of DTD cannot be read .*grid_10.jpg"):
        vision.dtd("train", tmp_path)
    assert not list((tmp_path / "cache").glob("*"))


class Local:
    """A class in the manner of torchvision's, with eight classes in two parts."""

    def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
        if split not in ("train", "test", "more"):
            raise ValueError(f"Unknown value '{split}' for argument split")
        self.classes = list("abcdefgh")
        self.size, self.split = 6 if split == "more" else 5, split

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> Any:
        return Image.fromarray(pixels(i % 8, i, self.size)), i % 8


class ByTrain(Local):
    def __init__(self, root: str, train: bool = True) -> None:
        super().__init__(root, "train" if train else "test")


class Whole(Local):
    def __init__(self, root: str, download: bool = True) -> None:
        super().__init__(root)
        assert not download


class Floats(Local):
    def __getitem__(self, i: int) -> Any:
        return torch.full((1, 2, 2), i % 8 / 10), i % 8


@pytest.mark.parametrize(("name", "each"), [("Local", 4), ("ByTrain", 4), ("Whole", 2), ("Floats", 4)])
def test_any_class_like_torchvisions_is_a_set(name: str, each: int, tmp_path: Path) -> None:
    banks = [vision.torchvision_set(split, f"tests.test_vision:{name}", tmp_path) for split in SPLITS]
    assert sorted(c for bank in banks for c in bank.names) == list("abcdefgh")
    assert [bank.classes for bank in banks] == [4, 2, 2]
    assert all(set(bank.sizes.tolist()) == {each} for bank in banks)
    assert banks[0].source == f"{name} train"
    if name == "Floats":
        assert banks[0].items.dtype == torch.float32 and not (tmp_path / "cache").exists()


def test_parts_size_and_channels_are_settings(tmp_path: Path) -> None:
    make, name = vision.torchvision_set, "tests.test_vision:Local"
    assert set(make("val", name, tmp_path, parts="train, test, train").sizes.tolist()) == {6}
    with pytest.raises(UserError, match="item 16 of Local is 6 x 6 and item 0 is 5 x 5; give size=84"):
        make("val", name, tmp_path, parts="train,more")
    assert make("val", name, tmp_path, parts="train,more", size=6, channels=1).items.shape == (32, 1, 6, 6)
    with pytest.raises(UserError, match=r"Local cannot be made \(Unknown value 'extra' for argument split\)"):
        make("val", name, tmp_path, parts="train,extra")
    with pytest.raises(UserError, match="Whole takes no split, so parts=train means nothing"):
        make("val", "tests.test_vision:Whole", tmp_path, parts="train")


def test_a_set_of_torchvision_is_found_by_the_name_of_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_fashion(tmp_path, monkeypatch)
    bank = vision.torchvision_set("test", "FashionMNIST", tmp_path)
    assert torch.equal(bank.items, vision.fashion_mnist("test", tmp_path).items)
    for wrong in ("FashionMnist", "wrap_dataset_for_transforms_v2", "FSHION"):
        with pytest.raises(UserError, match=f"unknown data set of torchvision '{wrong}'"):
            vision.torchvision_set("test", wrong, tmp_path)
    known = [name for name, parts in vision.PARTS.items() if parts != ("train", "test")]
    assert all("split" in plugins.takes(getattr(datasets, name)) for name in known)


def test_cub_is_read_from_its_folder_and_divided_as_torchmeta_does(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*CUB_200_2011/images; fetch CUB_200_2011.tgz by hand"):
        vision.cub("train", tmp_path)
    lists = json.loads((Path(vision.__file__).parent / "splits" / "cub.json").read_text())
    assert [len(lists[split]) for split in SPLITS] == [100, 50, 50]
    for name in (name for split in SPLITS for name in lists[split]):
        for k in range(2):
            save(tmp_path / "CUB_200_2011" / "images" / name / f"{k}.jpg", int(name[:3]), k, 4 + k)
    for split in SPLITS:
        bank = vision.cub(split, tmp_path, size=5)
        assert list(bank.names) == lists[split] and bank.items.shape == (400, 3, 5, 5)
        assert [label_of(bank, c) for c in range(bank.classes)] == [{int(name[:3])} for name in lists[split]]
    other = tmp_path / "other"
    save(other / "CUB_200_2011" / "images" / "001.Black_footed_Albatross" / "0.jpg", 1, 0)
    with pytest.raises(UserError, match=r"CUB-200-2011 lacks 199 classes of its published split, as 003.Sooty_Albatross"):
        vision.cub("train", other)


def named(count: int) -> ClassBank:
    labels = torch.arange(count)
    return from_tensors(labels[:, None], labels, [f"class {n}" for n in range(count)], "toy")


@pytest.mark.parametrize(("count", "expected"), [(6, (2, 2, 2)), (10, (6, 2, 2)), (47, (29, 9, 9)), (100, (60, 20, 20))])
def test_a_division_takes_every_class_once_and_knows_them_by_name(count: int, expected: tuple[int, ...]) -> None:
    bank = named(count)
    banks = [divided(bank, split) for split in SPLITS]
    assert tuple(part.classes for part in banks) == expected
    assert sorted(name for part in banks for name in part.names) == sorted(bank.names)
    turned = bank.select(list(range(count))[::-1])
    assert [set(divided(turned, split).names) for split in SPLITS] == [set(part.names) for part in banks]
    assert all(part.read(torch.arange(part.entries)).flatten().tolist() == [int(n[6:]) for n in part.names] for part in banks)


def test_the_division_never_changes() -> None:
    """Results that were published with it would then mean something else."""
    assert divided(named(10), "val").names == ("class 5", "class 6")
    assert divided(named(10), "test").names == ("class 4", "class 7")


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(UserError, match="toy has 5 classes; to divide them, train, val and test need 2 each"):
        divided(named(5), "train")
    with pytest.raises(UserError, match="unknown split 'tests'; did you mean 'test'"):
        divided(named(6), "tests")
    with pytest.raises(UserError, match="classes of toy share a name"):
        divided(from_tensors(torch.zeros(6, 1), torch.arange(6), list("abcdea"), "toy"), "train")


def npz(path: Path, colour: bool = True, labels: tuple[int, ...] = (1,), **changes: Any) -> None:
    arrays: dict[str, Any] = {}
    for number, part in enumerate(SPLITS):
        classes = np.random.default_rng(number).permutation(np.repeat(np.arange(8), number + 1))
        arrays[f"{part}_images"] = np.stack([pixels(c, n, 5, colour) for n, c in enumerate(classes)])
        arrays[f"{part}_labels"] = np.broadcast_to(classes.reshape(-1, *(1 for _ in labels)), (len(classes), *labels))
    arrays |= changes
    np.savez_compressed(path, **{key: array for key, array in arrays.items() if array is not None})


@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("labels", [(1,), ()])
def test_medmnist_files_are_pooled_and_divided(colour: bool, labels: tuple[int, ...], tmp_path: Path) -> None:
    npz(tmp_path / "somemnist.npz", colour, labels)
    for _ in range(2):
        banks = [med.medmnist(split, tmp_path, "somemnist.npz") for split in SPLITS]
        assert [bank.classes for bank in banks] == [4, 2, 2]
        assert sorted(name for bank in banks for name in bank.names) == [str(n) for n in range(8)]
        for bank in banks:
            assert bank.items.shape == (48, 3 if colour else 1, 5, 5) and set(bank.sizes.tolist()) == {6}
            assert [label_of(bank, c) for c in range(bank.classes)] == [{int(name)} for name in bank.names]
        forget()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_medmnist_is_read_alike_without_a_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.tqdm", partial(tqdm.tqdm, disable=True))  # as by TQDM_DISABLE=1
    npz(tmp_path / "somemnist.npz")
    bank = med.medmnist("train", tmp_path, "somemnist.npz")
    assert [label_of(bank, c) for c in range(bank.classes)] == [{int(name)} for name in bank.names]


def test_another_file_of_the_same_name_is_another_cache(tmp_path: Path) -> None:
    npz(tmp_path / "somemnist.npz")
    before = med.medmnist("val", tmp_path, "somemnist.npz").items.clone()
    npz(tmp_path / "somemnist.npz", test_images=np.full((24, 5, 5, 3), 99, np.uint8))
    forget()
    assert not torch.equal(med.medmnist("val", tmp_path, "somemnist.npz").items, before)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "several labels": (
        {"val_labels": np.zeros((16, 14), int)},
        r"val_labels of .* has shape \(16, 14\) for 16 images; tasks need one",
    ),
    "too few labels": ({"val_labels": np.zeros((3, 1), int)}, r"val_labels of .* has shape \(3, 1\) for 16 images"),
    "no labels": ({"test_labels": None}, "not laid out like MedMNIST .*test_labels"),
    "no images": ({"train_images": None}, "not laid out like MedMNIST .*train_images"),
    "floats": ({"train_images": np.zeros((8, 5, 5, 3))}, "train_images is float64 of shape"),
    "volumes": ({"train_images": np.zeros((8, 5, 5, 5), np.uint8)}, "train_images is uint8 of shape"),
    "sizes": ({"val_images": np.zeros((16, 6, 6, 3), np.uint8)}, "its parts have images of shape"),
    "gap": ({"train_labels": np.full((8, 1), 9)}, "leave out 8"),
    "code": ({"train_labels": np.array([[print]] * 8, dtype=object)}, "damaged or not laid out like MedMNIST"),
}


@pytest.mark.parametrize("fault", BAD)
def test_other_files_are_refused_and_nothing_is_kept(fault: str, tmp_path: Path) -> None:
    changes, message = BAD[fault]
    npz(tmp_path / "bad.npz", **changes)
    with pytest.raises(UserError, match=message):
        med.medmnist("train", tmp_path, "bad.npz")
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_missing_and_damaged_files_are_one_sentence(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(
        UserError, match=r"there is no .*bad.npz; fetch" if content is None else "is damaged or not laid out like"
    ):
        med.medmnist("train", tmp_path, "bad.npz")


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_truncated_archive_is_one_sentence(kept: float, tmp_path: Path) -> None:
    npz(tmp_path / "bad.npz")
    data = (tmp_path / "bad.npz").read_bytes()
    hole = data[: int(len(data) * kept * 0.5)] + bytes(60) + data[int(len(data) * kept * 0.5) + 60 :]
    for damaged in (data[: int(len(data) * kept)], hole):
        (tmp_path / "bad.npz").write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged or not laid out like"):
            med.medmnist("train", tmp_path, "bad.npz")


def test_without_the_package_datasets_the_sentence_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install metalearning-toolkit\[huggingface\]"):
        hf.huggingface("train", "anything", tmp_path)


def save_hf(folder: Path, labels: str = "names", parts: tuple[str, ...] = ("train", "test"), missing: bool = False) -> Any:
    package = pytest.importorskip("datasets", reason="the package datasets is an extra")
    made = {}
    for number, part in enumerate(parts):
        order = [n for n in range(16) if not (missing and n % 8 == 3)]
        columns = {"picture": [Image.fromarray(pixels(n % 8, n, 4 + number)) for n in order], "kind": [n % 8 for n in order]}
        if labels == "texts":
            columns["kind"] = ["abcdefgh"[n % 8] for n in order]
        kind = (
            package.ClassLabel(names=list("abcdefgh"))
            if labels == "names"
            else package.Value({"texts": "string"}.get(labels, "int64"))
        )
        if labels == "unlabelled" and part == "test":
            columns["kind"] = [-1] * len(order)
        if labels == "unlabelled":
            kind = package.ClassLabel(names=list("abcdefgh"))
        made[part] = package.Dataset.from_dict(columns, package.Features({"picture": package.Image(), "kind": kind}))
    (package.DatasetDict(made) if len(made) > 1 else made[parts[0]]).save_to_disk(str(folder))
    return package


GIVEN = {"image": "picture", "label": "kind", "size": 6}


@pytest.mark.parametrize("labels", ["names", "texts", "numbers"])
@pytest.mark.parametrize("missing", [True, False])
@pytest.mark.parametrize("parts", [("train",), ("train", "test")])
def test_hugging_face_sets_are_pooled_and_divided(labels: str, missing: bool, parts: tuple[str, ...], tmp_path: Path) -> None:
    save_hf(tmp_path / "mine", labels, parts, missing)
    for _ in range(2):
        banks = [hf.huggingface(split, "mine", tmp_path, **GIVEN) for split in SPLITS]  # type: ignore[arg-type]
        names = [name for n, name in enumerate("01234567" if labels == "numbers" else "abcdefgh") if not (missing and n == 3)]
        assert sorted(name for bank in banks for name in bank.names) == names
        for bank in banks:
            assert set(bank.sizes.tolist()) == {2 * len(parts)}
            letters = ["abcdefgh01234567".index(name) % 8 for name in bank.names]
            assert [label_of(bank, c) for c in range(bank.classes)] == [{n} for n in letters]
        forget()
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": "image"}, "mine has no column image in train; its columns are picture, kind"),
        ({"label": "fine"}, "mine has no column fine in train"),
        ({"parts": "train,valid"}, "mine has no part valid; its parts are train, test"),
        ({}, "mine has items without a label in test; name the labelled parts as parts=train"),
    ],
)
def test_what_a_hugging_face_set_does_not_have_is_named(given: dict[str, str], message: str, tmp_path: Path) -> None:
    save_hf(tmp_path / "mine", "unlabelled")
    with pytest.raises(UserError, match=message):
        hf.huggingface("train", "mine", tmp_path, **(GIVEN | given))  # type: ignore[arg-type]
    assert hf.huggingface("train", str(tmp_path / "mine"), parts="train", **GIVEN).classes == 4  # type: ignore[arg-type]


def test_a_hugging_face_set_is_only_fetched_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("datasets", reason="the package datasets is an extra")
    asked = []

    def load(path: str, revision: str | None, download_config: Any) -> Any:
        asked.append((path, revision, download_config.local_files_only))
        raise ConnectionError("no network")

    monkeypatch.setattr(package, "load_dataset", load)
    for download in (False, True):
        with pytest.raises(
            UserError, match=r"somebody/some cannot be loaded by datasets \(ConnectionError: no network\)"
        ) as caught:
            hf.huggingface("train", "somebody/some", tmp_path, download=download, revision="abc")
        assert ("add --download" in str(caught.value)) is not download
    assert asked == [("somebody/some", "abc", True), ("somebody/some", "abc", False)]
