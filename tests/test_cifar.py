"""CIFAR-FS and FC100: their splits, what is read from a fake zip and a fake torchvision folder, and damaged ones."""

import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from toolkit import UserError
from toolkit.data import cifar as module
from toolkit.data.bank import ClassBank
from toolkit.data.cifar import SPLITS, cifar_fs, cifar_fs_30, fc100, fc100_30

SIZES = {"cifar-fs": [64, 16, 20], "fc100": [60, 20, 20]}
LISTS = {name: json.loads((resources.files("toolkit.data") / "splits" / f"{name}.json").read_text()) for name in SIZES}
NAMES = sorted(name for names in LISTS["cifar-fs"].values() for name in names)
EACH = 3  # images of a class in the fakes


def pixels(c: int, i: int) -> "np.ndarray[Any, Any]":
    """Image `i` of class number `c`, of shape (32, 32, 3)."""
    return np.random.default_rng(1000 * c + i).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def expected(name: str) -> torch.Tensor:
    c = NAMES.index(name)
    return torch.stack([torch.from_numpy(pixels(c, i)).permute(2, 0, 1) for i in range(EACH)])


def strip(c: int, count: int = EACH) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.concatenate([pixels(c, i) for i in range(count)])).save(data, "WEBP", lossless=True)
    return data.getvalue()


@pytest.fixture(scope="module")
def members() -> dict[str, bytes]:
    """The content of a cifar100_fewshot.zip with three images of each class."""
    return {"index.json": json.dumps({"classes": {name: {} for name in NAMES}}).encode()} | {
        f"strips/{name}.webp": strip(c) for c, name in enumerate(NAMES)
    }


def pack(path: Path, members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty data root and cache, and a process that has read nothing yet."""
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    forget()
    (tmp_path / "root").mkdir()
    yield tmp_path / "root"
    forget()


def forget() -> None:
    module._from_zip.cache_clear()
    module._from_torchvision.cache_clear()


@pytest.fixture
def zipped(root: Path, members: dict[str, bytes]) -> Path:
    pack(root / "cifar100_fewshot.zip", members)
    return root


@pytest.fixture
def unpacked(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cifar-100-python of three images a class, two in train and one in test, in no order, whose md5 torchvision expects."""
    folder = root / "cifar-100-python"
    folder.mkdir()
    content = {}
    for part, drawn in (("train", [0, 1]), ("test", [2])):
        chosen = [(c, i) for i in drawn for c in torch.randperm(100, generator=torch.Generator().manual_seed(i)).tolist()]
        data = np.stack([pixels(c, i).transpose(2, 0, 1).reshape(-1) for c, i in chosen])
        content[part] = {"data": data, "fine_labels": [c for c, _ in chosen]}
    content["meta"] = {"fine_label_names": NAMES}
    listed = {}
    for part, value in content.items():
        data = pickle.dumps(value)
        (folder / part).write_bytes(data)
        listed[part] = hashlib.md5(data).hexdigest()
    peer = torchvision.datasets.CIFAR100
    monkeypatch.setattr(peer, "train_list", [["train", listed["train"]]])
    monkeypatch.setattr(peer, "test_list", [["test", listed["test"]]])
    monkeypatch.setattr(peer, "meta", peer.meta | {"md5": listed["meta"]})
    return root


Make = Callable[..., ClassBank]
FROM_ZIP: dict[str, Make] = {"cifar-fs": cifar_fs_30, "fc100": fc100_30}
FROM_FOLDER: dict[str, Make] = {"cifar-fs": cifar_fs, "fc100": fc100}


def test_split_lists_share_no_class_and_cover_all() -> None:
    for name, lists in LISTS.items():
        assert [len(lists[split]) for split in SPLITS] == SIZES[name] and list(lists) == list(SPLITS)
        assert all(not set(a) & set(b) for a, b in combinations(lists.values(), 2))
        assert set().union(*lists.values()) == set(NAMES) and len(NAMES) == len(set(NAMES)) == 100


def check(name: str, make: Make, root: Path, source: str) -> None:
    for split in SPLITS:
        bank = make(split, root)
        assert list(bank.names) == LISTS[name][split] and bank.source == f"{source} {split}"
        assert bank.items.shape == (100 * EACH, 3, 32, 32) and bank.items.dtype == torch.uint8
        assert bank.sizes.tolist() == [EACH] * bank.classes
        for c, each in enumerate(bank.names):
            found = bank.read(torch.arange(int(bank.first[c]), int(bank.first[c + 1])))
            assert torch.equal(found, expected(each)), each


@pytest.mark.parametrize("name", SIZES)
def test_the_zip_gives_each_class_its_images(name: str, zipped: Path) -> None:
    check(name, FROM_ZIP[name], zipped, f"{name}-30")


@pytest.mark.parametrize("name", SIZES)
def test_torchvisions_folder_gives_each_class_its_images(name: str, unpacked: Path) -> None:
    check(name, FROM_FOLDER[name], unpacked, name)


def test_images_are_decoded_once_for_both_splits(zipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[int]()
    plain = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(1) or plain(*a, **k))
    for split in SPLITS:
        cifar_fs_30(split, zipped)
        forget()
        fc100_30(split, zipped)
    assert len(opened) == 100


def test_another_zip_is_another_entry_of_the_cache(zipped: Path, members: dict[str, bytes]) -> None:
    before = cifar_fs_30("test", zipped)
    forget()
    pack(zipped / "cifar100_fewshot.zip", members | {f"strips/{NAMES[0]}.webp": strip(7)})
    assert not torch.equal(cifar_fs_30("test", zipped).items, before.items)


def flipped(data: bytes) -> bytes:
    """One byte changed in the middle of the last picture."""
    at = data.rindex(b"WEBP") + 200
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


def spoiled(path: Path, damage: str, members: dict[str, bytes]) -> None:
    data, some = path.read_bytes(), f"strips/{NAMES[50]}.webp"
    changed: dict[str, dict[str, bytes]] = {
        "no index": {k: v for k, v in members.items() if k != "index.json"},
        "index no JSON": members | {"index.json": b"{"},
        "index of another form": members | {"index.json": b"[1]"},
        "a class less": members | {"index.json": json.dumps({"classes": {name: {} for name in NAMES[1:]}}).encode()},
        "no strip": {k: v for k, v in members.items() if k != some},
        "strip no picture": members | {some: b"text"},
        "strip cut short": members | {some: members[some][:-400]},
        "strip of another size": members | {some: strip(50, 2)},
        "strip of another shape": members | {some: encoded(np.zeros((40, 40, 3), np.uint8))},
    }
    if damage in changed:
        pack(path, changed[damage])
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
    elif damage == "damaged inside deflate":
        pack(path, members, zipfile.ZIP_DEFLATED)
        with zipfile.ZipFile(path) as archive:
            at = archive.getinfo(some).header_offset + 30 + len(some)
        data = path.read_bytes()
        path.write_bytes(data[:at] + b"\xff" * 40 + data[at + 40 :])
    else:
        path.write_bytes({"flipped byte": flipped(data), "cut short": data[:-60], "empty": b""}.get(damage, b"<html>"))


def encoded(image: "np.ndarray[Any, Any]") -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "WEBP", lossless=True)
    return data.getvalue()


DAMAGE = [
    "flipped byte", "cut short", "empty", "no zip", "a folder", "no index", "index no JSON", "index of another form",
    "a class less", "no strip", "strip no picture", "strip cut short", "strip of another size", "strip of another shape",
    "damaged inside deflate",
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_zip_is_one_sentence_and_is_never_cached(zipped: Path, damage: str, members: dict[str, bytes]) -> None:
    spoiled(zipped / "cifar100_fewshot.zip", damage, members)
    with pytest.raises(UserError, match=r"cifar100_fewshot\.zip is damaged or .*; copy it anew$") as caught:
        cifar_fs_30("train", zipped)
    assert "\n" not in str(caught.value)
    assert not list(Path(os.environ["TOOLKIT_CACHE"]).glob("*"))


@pytest.mark.parametrize("damage", ["flipped byte", "no file", "no meta"])
def test_a_damaged_folder_is_one_sentence_and_is_never_cached(unpacked: Path, damage: str) -> None:
    path = unpacked / "cifar-100-python" / ("meta" if damage == "no meta" else "test")
    data = path.read_bytes()
    path.unlink()
    if damage == "flipped byte":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(
        UserError, match=r"^CIFAR-100 cannot be read from \S+ \(.*\); add --download to fetch it anew$"
    ) as caught:
        fc100("val", unpacked)
    assert "\n" not in str(caught.value)
    assert not list(Path(os.environ["TOOLKIT_CACHE"]).glob("*"))


@pytest.mark.parametrize("make", [cifar_fs, fc100])
def test_a_root_without_data_names_the_ways_out(make: Make, root: Path, members: dict[str, bytes]) -> None:
    with pytest.raises(UserError, match=r"^there is no \S+cifar-100-python; add --download, or give .* with --data-root$"):
        make("train", root)
    pack(root / "cifar100_fewshot.zip", members)
    with pytest.raises(UserError, match=r"cifar100_fewshot\.zip is there: use the names that end in -30$"):
        make("train", root)


@pytest.mark.parametrize("make", [cifar_fs_30, fc100_30])
def test_a_root_without_the_zip_is_named(make: Make, root: Path) -> None:
    with pytest.raises(
        UserError, match=r"^there is no \S+cifar100_fewshot\.zip; give the folder that holds it with --data-root$"
    ):
        make("train", root)


def test_a_misspelt_split_gets_a_suggestion(zipped: Path) -> None:
    with pytest.raises(UserError, match="unknown split 'tran'; did you mean 'train'"):
        cifar_fs_30("tran", zipped)


needs_real = pytest.mark.skipif("TOOLKIT_DATA" not in os.environ, reason="set TOOLKIT_DATA to the data root")
REAL = partial(Path, os.environ.get("TOOLKIT_DATA", "nowhere"))


@needs_real
def test_the_lists_agree_with_those_in_the_real_zip() -> None:
    with zipfile.ZipFile(REAL("cifar100_fewshot.zip")) as archive:
        classes = json.loads(archive.read("index.json"))["classes"]
    assert len(classes) == 100
    for name, key in (("cifar-fs", "cifar_fs"), ("fc100", "fc100")):
        for split in SPLITS:
            assert {c for c, entry in classes.items() if entry[key] == split} == set(LISTS[name][split])


@needs_real
def test_fc100_splits_share_no_superclass() -> None:
    with zipfile.ZipFile(REAL("cifar100_fewshot.zip")) as archive:
        classes = json.loads(archive.read("index.json"))["classes"]
    above = [{classes[c]["superclass"] for c in LISTS["fc100"][split]} for split in SPLITS]
    assert all(not a & b for a, b in combinations(above, 2)) and list(map(len, above)) == [12, 4, 4]


@needs_real
def test_the_real_zip_has_180_images_of_each_class() -> None:
    bank = fc100_30("val", REAL())
    assert bank.items.shape == (18_000, 3, 32, 32) and bank.sizes.eq(180).all()
