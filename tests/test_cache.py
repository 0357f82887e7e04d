"""The cache: whole or not there, checked when opened, mapped without a copy, larger than memory, and never in the way."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from toolkit import UserError, draw
from toolkit.data import stored as module
from toolkit.data.bank import ClassBank
from toolkit.data.cache import cached, sha256
from toolkit.data.stored import Write, stored
from toolkit.samplers import Episodes

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def never(*_: object) -> Any:
    raise AssertionError("made again")


def tensors() -> dict[str, Tensor]:
    return {"images": torch.arange(1000, dtype=torch.uint8).view(10, 4, 25), "first": torch.tensor([0, 3, 10])}


def pixels(i: int) -> "np.ndarray[Any, Any]":
    return np.random.default_rng(i).integers(0, 256, (3, 4, 5), dtype=np.uint8)


def fill(write: Write) -> dict[str, Any]:
    for i in range(20):
        write(pixels(i))
    return {"counts": [5, 15], "bad": None}


def items() -> Tensor:
    return torch.stack([torch.from_numpy(pixels(i)) for i in range(20)])


def make(fill: Callable[[Write], dict[str, Any]] = fill) -> tuple[Tensor, dict[str, Any]]:
    return stored("toy", 20, (3, 4, 5), fill)


def script(code: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A Python process with the toolkit on its path."""
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=given)


def test_tensors_are_made_once_and_then_read(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, read = cached("toy-v1", tensors), cached("toy-v1", never)
    assert made.keys() == read.keys() and all(torch.equal(made[key], read[key]) for key in made)
    assert {path.name for path in place.iterdir()} == {"toy-v1.safetensors", "toy-v1.sha256"}
    assert not caplog.text


def test_a_file_of_an_older_version_still_opens(place: Path) -> None:
    """Written as the toolkit did at first: serialised in memory, with the checksum of the bytes beside it."""
    place.mkdir()
    (place / "old.safetensors").write_bytes(save(tensors()))
    (place / "old.sha256").write_bytes(sha256(place / "old.safetensors").encode())
    assert torch.equal(cached("old", never)["images"], tensors()["images"])


def anonymous() -> int:
    """Bytes of memory of this process that no file stands behind."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory of a process")
def test_reading_makes_no_copy_in_memory() -> None:
    size = 64 * 2**20
    cached("large", lambda: {"images": torch.ones(size, dtype=torch.uint8)})
    tracemalloc.start()
    before = anonymous()
    images = cached("large", never)["images"]
    assert int(images[::4096].sum()) == size // 4096
    grown, (_, peak) = anonymous() - before, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < size / 10 and peak < size / 10


@pytest.mark.parametrize("damage", ["cut short", "a flipped bit", "empty", "no checksum", "no safetensors"])
def test_a_damaged_file_is_made_anew_with_a_warning(place: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cached("toy", tensors)
    path, checksum = place / "toy.safetensors", place / "toy.sha256"
    data = path.read_bytes()
    bad = {
        "cut short": data[:-9],
        "a flipped bit": data[:-1] + bytes([data[-1] ^ 1]),
        "empty": b"",
        "no safetensors": b"x" * 99,
    }
    path.unlink()  # what is mapped must not change under its readers
    path.write_bytes(bad.get(damage, data))
    if damage == "no checksum":
        checksum.unlink()
    if damage == "no safetensors":
        checksum.write_text(sha256(path))
    assert torch.equal(cached("toy", tensors)["images"], tensors()["images"])
    assert "toy.safetensors is damaged; making it anew" in caplog.text
    assert torch.equal(cached("toy", never)["first"], tensors()["first"])


def test_a_file_whose_checksum_cannot_be_written_is_not_left_behind(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    (place / "toy.sha256" / "in the way").mkdir(parents=True)
    assert torch.equal(cached("toy", tensors)["images"], tensors()["images"])
    assert [path.name for path in place.iterdir()] == ["toy.sha256"] and "cannot write the cache" in caplog.text


def test_items_are_written_once_and_then_mapped_for_reading(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    (made, notes), (read, again) = make(), make(never)
    assert torch.equal(made, items()) and torch.equal(read, items()) and read.dtype == torch.uint8
    assert notes == again == {"counts": [5, 15], "bad": None}
    assert {path.name for path in place.rglob("*")} == {"toy.bank", "items.bin", "index.json"}
    if Path("/proc/self/maps").exists():
        kinds = {
            line.split()[1] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("toy.bank/items.bin")
        }
        assert kinds == {"r--s"}, "a private mapping would count as memory of the process"
    assert not caplog.text


@pytest.mark.parametrize("count", [0, 1, 19])
def test_fewer_items_than_announced_may_come(count: int) -> None:
    def few(write: Write) -> dict[str, Any]:
        for i in range(count):
            write(pixels(i))
        return {}

    for fill in (few, never):
        found, _ = make(fill)
        assert found.shape == (count, 3, 4, 5) and torch.equal(found, items()[:count])


def test_an_empty_item_shape_and_no_items_are_no_special_cases() -> None:
    assert stored("none", 0, (3, 4, 5), lambda write: {})[0].shape == (0, 3, 4, 5)


@pytest.mark.parametrize("stage", [0, 7, 20])
def test_an_error_while_filling_comes_through_and_leaves_nothing(place: Path, stage: int) -> None:
    def broken(write: Write) -> dict[str, Any]:
        for i in range(stage):
            write(pixels(i))
        raise KeyboardInterrupt("enough") if stage == 7 else OSError("an image is not there")

    with pytest.raises((KeyboardInterrupt, OSError), match=r"enough|an image is not there"):
        make(broken)
    assert not list(place.iterdir())
    assert torch.equal(make()[0], items())


@pytest.mark.parametrize("item", [np.zeros((3, 4, 5), np.int16), np.zeros((3, 5, 4), np.uint8), np.zeros(60, np.uint8)])
def test_an_item_that_does_not_fit_is_refused(place: Path, item: "np.ndarray[Any, Any]") -> None:
    def wrong(write: Write) -> dict[str, Any]:
        write(item)
        return {}

    with pytest.raises(UserError, match=r"was written to a bank of uint8 \(3, 4, 5\)"):
        make(wrong)
    assert not list(place.iterdir())


def test_an_item_need_not_be_contiguous() -> None:
    def strided(write: Write) -> dict[str, Any]:
        for i in range(20):
            write(np.asfortranarray(pixels(i)))
        return {}

    assert torch.equal(make(strided)[0], items())


KILLED = """
import os, signal, sys, numpy as np
from toolkit.data.stored import stored
def fill(write):
    for i in range(10):
        write(np.zeros((3, 4, 5), np.uint8))
    print(sorted(str(p) for p in os.listdir(os.environ["TOOLKIT_CACHE"])), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
stored("toy", 20, (3, 4, 5), fill)
"""


def test_a_build_that_is_killed_leaves_nothing_that_counts(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    done = script(KILLED)
    assert done.returncode == -9 and done.stdout.strip() == "['.toy.bank.tmp']", done.stderr
    assert torch.equal(make()[0], items())
    assert [path.name for path in place.iterdir()] == ["toy.bank"], "and what it left is cleared away"
    assert not caplog.text


def edit_index(path: Path, key: str, value: object) -> None:
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {key: value}))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "first bit": lambda folder: flip(folder / "items.bin", 0),
    "last bit": lambda folder: flip(folder / "items.bin", -1),
    "cut short": lambda folder: os.truncate(folder / "items.bin", 1199),
    "too long": lambda folder: os.truncate(folder / "items.bin", 1201),
    "no items": lambda folder: (folder / "items.bin").unlink(),
    "no index": lambda folder: (folder / "index.json").unlink(),
    "no JSON": lambda folder: (folder / "index.json").write_text("{"),
    "another JSON": lambda folder: (folder / "index.json").write_text("[1]"),
    "other notes": lambda folder: edit_index(folder / "index.json", "notes", {"counts": [6, 14]}),
    "another shape": lambda folder: edit_index(folder / "index.json", "shape", [20, 5, 4, 3]),
}


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_made_anew_with_a_warning(place: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    make()
    DAMAGE[damage](place / "toy.bank")
    found, notes = make()
    assert torch.equal(found, items()) and notes == {"counts": [5, 15], "bad": None}
    assert "toy.bank is damaged; making it anew" in caplog.text
    caplog.clear()
    assert torch.equal(make(never)[0], items())
    assert [path.name for path in place.iterdir()] == ["toy.bank"] and not caplog.text


@pytest.mark.parametrize("byte", [0, 15, 394, 409, 789, 1184, 1199])
def test_blocks_spread_through_a_large_file_are_checked(place: Path, byte: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks of 16 bytes in 1,200: from 0, 394, 789 and 1,184 on."""
    for name, value in {"WHOLE": 1199, "BLOCKS": 4, "BLOCK": 16}.items():
        monkeypatch.setattr(module, name, value)
    make()
    whole = sha256(place / "toy.bank" / "items.bin")
    assert json.loads((place / "toy.bank" / "index.json").read_text())["items"] != whole
    make(never)
    flip(place / "toy.bank" / "items.bin", byte)
    with pytest.raises(AssertionError, match="made again"):
        make(never)


def test_who_wants_the_same_waits_for_who_makes_it() -> None:
    entered, leave, found = threading.Event(), threading.Event(), list[Tensor]()

    def slow(write: Write) -> dict[str, Any]:
        entered.set()
        assert leave.wait(20)
        return fill(write)

    first = threading.Thread(target=lambda: found.append(make(slow)[0]))
    second = threading.Thread(target=lambda: found.append(make(never)[0]))
    first.start()
    assert entered.wait(20)
    second.start()
    second.join(0.3)
    assert second.is_alive()
    leave.set()
    for thread in (first, second):
        thread.join(20)
    assert len(found) == 2 and all(torch.equal(each, items()) for each in found)


@pytest.mark.parametrize("obstacle", ["a file", "a full disk"])
def test_a_cache_that_cannot_be_written_falls_back_to_memory(
    place: Path, obstacle: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if obstacle == "a file":
        place.write_text("in the way")
    else:
        usage = shutil.disk_usage(place.parent)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1199))
    found, notes = make()
    assert torch.equal(found, items()) and notes["counts"] == [5, 15]
    assert "cannot write the cache" in caplog.text and "set TOOLKIT_CACHE" in caplog.text
    assert not place.is_dir() or not list(place.iterdir())
    assert torch.equal(stored("toy", 23, (3, 4, 5), fill)[0], items()), "as many as came, not as were announced"
    monkeypatch.setattr(module, "_memory", lambda: 2399)
    with pytest.raises(UserError, match=r"toy\.bank cannot be written .* too much for memory; set TOOLKIT_CACHE"):
        make()
    cached("toy", tensors)


FULL = """
import resource, torch
import tests.test_cache as t
resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))
assert torch.equal(t.make()[0], t.items())
assert torch.equal(t.cached("toy", t.tensors)["images"], t.tensors()["images"])
"""


def test_a_disk_that_fills_up_while_writing_costs_a_warning(place: Path) -> None:
    done = script(FULL)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot write the cache") == 2 and not list(place.iterdir()), done.stderr


def test_episodes_from_a_mapped_bank_are_those_from_memory() -> None:
    first = torch.tensor([0, 5, 12, 20])
    make()
    banks = [ClassBank(each, first, ("a", "b", "c"), "toy").select([2, 0]) for each in (items(), make(never)[0])]
    tasks = [draw(Episodes(bank, 2, 1, 3), 30, seed=1) for bank in banks]
    assert torch.equal(tasks[0].support.x, tasks[1].support.x) and torch.equal(tasks[0].query.x, tasks[1].query.x)


LARGE = """
import resource, sys, numpy as np, torch
from toolkit import draw
from toolkit.data.bank import ClassBank
from toolkit.data.stored import stored
from toolkit.samplers import Episodes
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_DATA, (10**9, 10**9))
try:
    np.ones(10**9, np.uint8)
    sys.exit("the limit is none")
except MemoryError:
    pass
COUNT, CLASSES = 142_000, 100  # times 3 x 84 x 84: 3.006 GB
def image(i):
    item = np.full((3, 84, 84), i % 251, np.uint8)
    item[0, 0, :4] = np.frombuffer(np.uint32(i).tobytes(), np.uint8)
    return item
def fill(write):
    for i in range(COUNT):
        write(image(i))
    return {}
def never(write):
    sys.exit("made again")
for each in (fill, never):
    items, _ = stored("large", COUNT, (3, 84, 84), each)
    bank = ClassBank(items, torch.arange(CLASSES + 1) * (COUNT // CLASSES), tuple(map(str, range(CLASSES))))
    sampler, seen = Episodes(bank, 5, 1, 15), set()
    for start in range(0, 1000, 10):
        tasks = draw(sampler, 10, seed=0, start=start)
        numbers = (tasks.query.x[:, :, 0, 0, :4] * 255).round().long() @ torch.tensor([1, 2**8, 2**16, 2**24])
        shown = (tasks.query.x[:, :, 1, 5, 5] * 255).round().long()
        assert (shown == numbers % 251).all() and numbers.max() < COUNT
        seen |= set(numbers.flatten().tolist())
    assert len(seen) > 50_000
assert items.numel() > 3_000_000_000
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep this limit")
def test_a_bank_of_3_gb_is_built_and_sampled_with_1_gb_of_memory(place: Path) -> None:
    done = script(LARGE)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(place)
