"""Omniglot: reading its zips, the cache, the splits, rotations, the download, and (where it is at hand) the real data."""

import hashlib
import io
import os
import socket
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from toolkit import UserError
from toolkit.data import omniglot as module
from toolkit.data.bank import ClassBank
from toolkit.data.omniglot import KNOWN_MD5, PARTS, PROTOCOLS, SPLITS, omniglot

# Few characters, but some in every split of both protocols; the fifth background alphabet is Latin.
GREEK, OTHERS = ["background/Greek/character01", "background/Greek/character02"], ["background/Korean/character09"]
CHARACTERS = {
    "images_background": (
        "Armenian/character03",
        "Greek/character01",
        "Greek/character02",
        "Hebrew/character07",
        "Korean/character09",
        "Latin/character11",
    ),
    "images_evaluation": ("Angelic/character01", "Keble/character05"),
}
ARMENIAN, HEBREW, LATIN = "background/Armenian/character03", "background/Hebrew/character07", "background/Latin/character11"
EXPECTED = {
    ("vinyals", "train"): [*GREEK, *OTHERS, LATIN, "evaluation/Angelic/character01"],
    ("vinyals", "val"): [ARMENIAN, HEBREW],
    ("vinyals", "test"): ["evaluation/Keble/character05"],
    ("background", "train"): [ARMENIAN, *GREEK, HEBREW, *OTHERS],
    ("background", "val"): [LATIN],
    ("background", "test"): ["evaluation/Angelic/character01", "evaluation/Keble/character05"],
}
PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
SEPARATE = ((0, 1), (0, 2), (1, 2))


def drawing(character: int, drawer: int) -> Image.Image:
    """Black ink on white paper in the top left part: a bar whose length is the character's and whose place the drawer's."""
    pixels = np.ones((105, 105), dtype=bool)
    pixels[8 + drawer : 24 + drawer, 8 : 32 + 8 * character] = False
    return Image.fromarray(pixels).convert("1")


def write_zips(folder: Path) -> dict[str, str]:
    """Fake Omniglot zips under `folder`, with their md5."""
    folder.mkdir(parents=True)
    digests, character = {}, 0
    for part, characters in CHARACTERS.items():
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
            # Not in sorted order, and with the folder entries that Lake's own zips have.
            for name in reversed(characters):
                archive.writestr(f"{part}/{name}/", b"")
                character += 1
                for drawer in range(20, 0, -1):
                    png = io.BytesIO()
                    drawing(character, drawer).save(png, "PNG")
                    archive.writestr(f"{part}/{name}/{character:04}_{drawer:02}.png", png.getvalue())
        digests[part] = hashlib.md5((folder / f"{part}.zip").read_bytes()).hexdigest()
    return digests


@pytest.fixture(scope="module")
def fake_zips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("lake") / "zips"
    return folder, write_zips(folder)


@pytest.fixture(autouse=True)
def fresh_memory() -> Iterator[None]:
    module._from_cache.cache_clear()
    yield
    module._from_cache.cache_clear()


@pytest.fixture
def empty(tmp_path: Path, fake_zips: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data root and cache; only the fake zips count as Omniglot."""
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "KNOWN_MD5", {part: ("another", digest) for part, digest in fake_zips[1].items()})
    return tmp_path / "root"


@pytest.fixture
def root(empty: Path, fake_zips: tuple[Path, dict[str, str]]) -> Path:
    """A data root with the fake zips."""
    folder = empty / "omniglot-py"
    folder.mkdir(parents=True)
    for path in fake_zips[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return empty


def whole(bank: ClassBank) -> torch.Tensor:
    """All items of a bank, class by class."""
    return bank.read(torch.arange(bank.entries))


def all_splits(root: Path, protocol: str, rotations: bool = False) -> list[ClassBank]:
    return [omniglot(split, root, protocol, rotations) for split in SPLITS]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("split", SPLITS)
def test_splits_hold_their_characters_and_the_right_drawings(root: Path, protocol: str, split: str) -> None:
    bank = omniglot(split, root, protocol, rotations=False)
    assert list(bank.names) == EXPECTED[protocol, split]
    assert bank.source == f"omniglot {protocol} {split}"
    assert whole(bank).shape == (20 * bank.classes, 1, 28, 28)
    assert whole(bank).dtype == torch.uint8
    assert bank.sizes.tolist() == [20] * bank.classes
    numbers = {
        f"{part.removeprefix('images_')}/{name}": number
        for number, (part, name) in enumerate(((p, n) for p in PARTS for n in reversed(CHARACTERS[p])), 1)
    }
    for c, name in enumerate(bank.names):
        for drawer in (1, 2, 20):
            small = drawing(numbers[name], drawer).convert("L").resize((28, 28), Image.Resampling.LANCZOS)
            assert np.array_equal(whole(bank)[20 * c + drawer - 1, 0].numpy(), 255 - np.asarray(small))


def test_ink_is_high_and_paper_is_zero(root: Path) -> None:
    """The bar of the first drawing covers rows 9 to 24 and, at least, columns 8 to 39 of 105."""
    first = whole(omniglot("test", root, rotations=False))[0, 0]
    assert (first[4:6, 4:10] >= 240).all()
    assert (first[14:] == 0).all() and (first[:, 26:] == 0).all()


def test_another_size_is_another_entry_of_the_cache(root: Path) -> None:
    assert omniglot("val", root, size=28).items.shape[-2:] == (28, 28)
    assert omniglot("val", root, size=20).items.shape[-2:] == (20, 20)
    assert omniglot("val", root, size=28).items.shape[-2:] == (28, 28)


def test_images_are_decoded_once_and_then_read_from_the_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = omniglot("train", root)
    module._from_cache.cache_clear()

    def never(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(module, "_decode", never)
    after = omniglot("train", root)
    assert torch.equal(before.items, after.items)
    assert torch.equal(before.first, after.first)
    assert before.names == after.names


def test_a_damaged_cache_is_made_anew_with_a_warning(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = omniglot("train", root)
    (path,) = Path(os.environ["TOOLKIT_CACHE"]).glob("*.safetensors")
    for damage in (lambda data: data[:-100], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: b""):
        path.write_bytes(damage(path.read_bytes()))
        module._from_cache.cache_clear()
        caplog.clear()
        assert torch.equal(omniglot("train", root).items, before.items)
        assert "is damaged" in caplog.text
    module._from_cache.cache_clear()
    caplog.clear()
    omniglot("train", root)
    assert not caplog.text


def test_a_cache_that_cannot_be_written_costs_a_warning_only(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "a file").write_text("in the way")
    monkeypatch.setenv("TOOLKIT_CACHE", str(root / "a file" / "cache"))
    assert omniglot("test", root, rotations=False).classes == 1
    assert "set TOOLKIT_CACHE" in caplog.text


def test_rotations_are_classes_of_their_own(root: Path) -> None:
    plain, turned = omniglot("train", root, rotations=False), omniglot("train", root, rotations=True)
    c, n = plain.classes, len(whole(plain))
    assert turned.classes == len(set(turned.names)) == 4 * c
    assert turned.sizes.tolist() == [20] * 4 * c
    for k in range(4):
        for i in range(c):
            rows = slice(int(turned.first[k * c + i]), int(turned.first[k * c + i + 1]))
            upright = whole(plain)[20 * i : 20 * i + 20, 0].numpy()
            assert np.array_equal(whole(turned)[rows, 0].numpy(), np.rot90(upright, k, axes=(1, 2)))
            assert turned.names[k * c + i] == plain.names[i] + (f" {90 * k} deg" if k else "")
        assert k == 0 or not torch.equal(whole(turned)[k * n : (k + 1) * n], whole(plain))
    assert omniglot("train", root).classes == 4 * c, "rotations are the default"


def test_a_missing_root_names_both_ways_out(empty: Path) -> None:
    with pytest.raises(UserError, match=r"--data-root.*--download") as caught:
        omniglot("train", empty)
    assert "images_background.zip" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_missing_zip_is_named(root: Path) -> None:
    (root / "omniglot-py" / "images_evaluation.zip").unlink()
    with pytest.raises(UserError, match=r"images_evaluation\.zip.*--data-root"):
        omniglot("train", root)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", ["flipped byte", "cut short", "empty", "not a zip"])
def test_a_damaged_zip_is_a_user_error_and_is_never_cached(root: Path, part: str, damage: str) -> None:
    path = root / "omniglot-py" / f"{part}.zip"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"flipped byte": bytes(data), "cut short": bytes(data[:-50]), "empty": b""}.get(damage, b"<html>"))
    with pytest.raises(UserError, match=rf"{part}\.zip is damaged or not Omniglot.*--download"):
        omniglot("train", root)
    assert not list(Path(os.environ["TOOLKIT_CACHE"]).glob("**/*.safetensors"))


def test_a_misspelt_split_or_protocol_gets_a_suggestion(empty: Path) -> None:
    with pytest.raises(UserError, match="unknown split 'tests'; did you mean 'test'"):
        omniglot("tests", empty)
    with pytest.raises(UserError, match="unknown Omniglot protocol 'vinyal'; did you mean 'vinyals'"):
        omniglot("train", empty, protocol="vinyal")


class Server:
    """The fake zips over HTTP on this machine, and the paths that were asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []

        class Handler(SimpleHTTPRequestHandler):
            def log_message(own, format: str, *args: object) -> None:
                if own.command == "GET":
                    self.asked.append(own.path)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(fake_zips: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    own = Server(fake_zips[0])
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torchvision.datasets.Omniglot, "download_url_prefix", own.url)
    monkeypatch.setattr(torchvision.datasets.Omniglot, "zips_md5", fake_zips[1])
    yield own
    own.close()


def test_download_fetches_both_zips_once(empty: Path, server: Server) -> None:
    bank = omniglot("train", empty, rotations=False, download=True)
    assert list(bank.names) == EXPECTED["vinyals", "train"]
    assert set(server.asked) == {"/images_background.zip", "/images_evaluation.zip"}
    server.asked.clear()
    module._from_cache.cache_clear()
    omniglot("test", empty, download=True)
    omniglot("test", empty, download=False)
    assert server.asked == []


def test_download_is_not_tried_unless_asked_for(empty: Path, server: Server) -> None:
    with pytest.raises(UserError, match="--download"):
        omniglot("train", empty)
    assert server.asked == []


def test_download_fetches_only_what_is_missing(root: Path, server: Server) -> None:
    (root / "omniglot-py" / "images_evaluation.zip").unlink()
    assert omniglot("test", root, rotations=False, download=True).classes == 1
    assert set(server.asked) == {"/images_evaluation.zip"}


def test_a_download_with_the_wrong_md5_is_a_user_error(empty: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.Omniglot, "zips_md5", dict.fromkeys(PARTS, "0" * 32))
    with pytest.raises(UserError, match="could not be downloaded") as caught:
        omniglot("train", empty, download=True)
    assert "by hand from" in str(caught.value)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_server_without_the_file_is_a_user_error(empty: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.Omniglot, "download_url_prefix", f"{server.url}/nowhere")
    with pytest.raises(UserError, match=r"could not be downloaded.*404"):
        omniglot("train", empty, download=True)


def test_no_server_at_all_is_a_user_error(empty: Path, server: Server) -> None:
    server.close()
    with pytest.raises(UserError, match="could not be downloaded"):
        omniglot("train", empty, download=True)


def test_the_md5_of_lakes_own_zips_are_those_of_torchvision() -> None:
    assert {part: known[0] for part, known in KNOWN_MD5.items()} == torchvision.datasets.Omniglot.zips_md5


def test_a_server_that_does_not_speak_http_is_a_user_error(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"SSH-2.0-OpenSSH\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(torchvision.datasets.Omniglot, "download_url_prefix", url)
        for name in PROXIES:
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(UserError, match="could not be downloaded"):
            omniglot("train", empty, download=True)
        thread.join()


REAL = Path(os.environ.get("TOOLKIT_DATA") or Path(__file__).resolve().parents[1].parent / "shared" / "data")
needs_real = pytest.mark.skipif(
    not (REAL / "omniglot-py").is_dir(), reason="the real Omniglot is not here; set TOOLKIT_DATA to the data root"
)


@needs_real
@pytest.mark.parametrize(("protocol", "counts"), [("vinyals", [1028, 172, 423]), ("background", [731, 233, 659])])
def test_real_splits_are_disjoint_and_cover_all_characters(protocol: str, counts: list[int]) -> None:
    banks = all_splits(REAL, protocol)
    assert [bank.classes for bank in banks] == counts
    names = [set(bank.names) for bank in banks]
    assert all(not names[a] & names[b] for a, b in SEPARATE)
    assert len(set.union(*names)) == 1623
    assert all(bank.sizes.eq(20).all() and whole(bank).shape == (20 * bank.classes, 1, 28, 28) for bank in banks)
    assert all(name.startswith("evaluation/") for name in banks[2].names)


@needs_real
def test_real_background_splits_share_no_alphabet() -> None:
    alphabets = [{name.split("/")[1] for name in bank.names} for bank in all_splits(REAL, "background")]
    assert [len(some) for some in alphabets] == [24, 6, 20]
    assert all(not alphabets[a] & alphabets[b] for a, b in SEPARATE)


@needs_real
def test_real_rotations_make_four_times_the_classes() -> None:
    for bank, classes in zip(all_splits(REAL, "vinyals", rotations=True), (1028, 172, 423), strict=True):
        assert bank.classes == len(set(bank.names)) == 4 * classes
        assert len(whole(bank)) == 80 * classes


@needs_real
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_real_images_equal_those_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision's own loader and a Lanczos resize, for three drawings of three characters."""
    chosen = {
        "background/Greek/character24": 4, "background/Tifinagh/character01": 20, "evaluation/ULOG/character13": 11,
    }  # fmt: skip
    (tmp_path / "omniglot-py").mkdir()
    for part in PARTS:
        source = REAL / "omniglot-py" / f"{part}.zip"
        (tmp_path / "omniglot-py" / source.name).symlink_to(source)
        with zipfile.ZipFile(source) as archive:
            wanted = tuple(f"images_{name}/" for name in chosen)
            archive.extractall(tmp_path / "omniglot-py", [m for m in archive.namelist() if m.startswith(wanted)])
    three = all_splits(REAL, "vinyals")
    for name, drawer in chosen.items():
        part, character = name.split("/", 1)
        path = tmp_path / "omniglot-py" / f"images_{part}.zip"
        digests = {f"images_{part}": hashlib.md5(path.read_bytes()).hexdigest()}
        monkeypatch.setattr(torchvision.datasets.Omniglot, "zips_md5", digests)
        peer = torchvision.datasets.Omniglot(str(tmp_path), background=part == "background")
        index = next(
            i for i, (file, c) in enumerate(peer._flat_character_images)
            if peer._characters[c] == character and file.endswith(f"_{drawer:02}.png")
        )  # fmt: skip
        expected = 255 - np.asarray(peer[index][0].resize((28, 28), Image.Resampling.LANCZOS))
        (bank,) = (bank for bank in three if name in bank.names)
        found = whole(bank)[int(bank.first[bank.names.index(name)]) + drawer - 1, 0]
        assert np.array_equal(found.numpy(), expected)
        assert 0 < found.float().mean() < 128, "ink is high, and there is less ink than paper"
