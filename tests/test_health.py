"""`toolkit doctor` without a model: every check answers in a sentence, within seconds, whatever is missing."""

import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from toolkit import health, plugins
from toolkit.health import Check, checks
from toolkit.probe import failure, mismatch, total, undisturbed, words

NAMES = [
    "versions", "devices", "second order", "two processes", "compiler", "data", "optional packages", "results folder",
    "disk and memory",
]  # fmt: skip


def test_all_is_well_here_within_seconds(tmp_path: Path) -> None:
    began = time.perf_counter()
    found = list(checks(tmp_path))
    assert time.perf_counter() - began < 60  # 15 where no other work is done
    assert [check.name for check in found] == NAMES
    assert all(check.ok is not False for check in found if check.name not in ("two processes", "results folder")), found
    assert all(check.line and "\n" not in check.line for check in found)
    assert re.search(r"python 3\.\d+\.\d+, torch \d", found[0].line)


def test_two_processes_that_do_not_meet_are_one_sentence() -> None:
    ok, line = health._two_processes(patience=0.01)
    assert ok is False and line.startswith("two processes") and "\n" not in line


def test_two_processes_that_fail_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PAIR", "raise RuntimeError('no network')")
    assert health._two_processes() == (False, "two processes could not add a number (RuntimeError: no network)")


def test_a_check_that_raises_is_its_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> tuple[bool, str]:
        raise OSError("the disk is gone.\nLook for it.")

    monkeypatch.setattr(health, "_two_processes", broken)
    found = {check.name: check for check in checks(tmp_path)}
    assert found["two processes"] == Check("two processes", False, "OSError: the disk is gone")


def test_data_are_found_by_their_files(tmp_path: Path) -> None:
    for place in (
        "omniglot-py/images_background.zip", "omniglot-py/images_evaluation.zip", "clinc150.json.gz",
        "mini-imagenet/images.zip", "splits/mini_imagenet_train.csv.gz", "splits/mini_imagenet_val.csv.gz",
        "mini-imagenet/test.csv", "bloodmnist.npz", "train_32x32.mat", "tiered-imagenet/train.csv",
    ):  # fmt: skip
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    ok, line = health._data(tmp_path)
    here, absent = line.split("; not there: ")
    assert ok is None
    assert (
        here == f"in {tmp_path}: omniglot-vinyals, omniglot-background, clinc150, clinc150-wordpieces, mini-imagenet, medmnist"
    )
    assert {"svhn", "tiered-imagenet", "cifar-fs"} <= set(absent.split("; ")[0].split(", "))
    assert "none" in health._data(tmp_path / "nowhere")[1]


def test_every_dataset_with_a_place_of_its_own_is_looked_for() -> None:
    asked = {"glyphs", "folder", "csv-lists", "torchvision", "pickled", "huggingface"}
    ours = {entry.name for entry in plugins._entries("datasets") if entry.value.startswith("toolkit.")}
    assert set(health.FILES) == ours - asked


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "NEEDED", ("torch", "no-such-package"))
    ok, line = health._versions()
    assert not ok and "no-such-package missing; install" in line


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    ok, line = health._compiler()
    assert ok is None and "no C++ compiler" in line


def test_a_folder_that_is_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "results").touch()
    ok, line = health._writable(tmp_path / "results")
    assert not ok and "--out" in line
    assert health._writable(tmp_path / "new" / "results") == (True, f"{tmp_path / 'new' / 'results'} can be written")
    assert not (tmp_path / "new").exists()


def test_mismatch_tells_wrong_slopes_from_right_ones() -> None:
    at = {"a": torch.randn(3, dtype=torch.float64), "b": torch.randn(2, 2, dtype=torch.float64)}

    def value(tree: dict[str, torch.Tensor]) -> torch.Tensor:
        return tree["a"].sin().sum() * tree["b"].square().sum()

    right = torch.func.grad(value)(at)
    assert mismatch(value, right, at) < 1e-7
    assert mismatch(value, right | {"b": 1.001 * right["b"]}, at) > 1e-5
    assert mismatch(value, {name: torch.zeros_like(t) for name, t in at.items()}, at) > 0.5
    assert mismatch(lambda tree: tree["a"].sum() * 0 + 1, {name: torch.zeros_like(t) for name, t in at.items()}, at) == 0


def test_mismatch_sees_past_a_jump_nearby() -> None:
    at = {"a": torch.tensor([1.0 + 3e-7], dtype=torch.float64)}
    assert mismatch(lambda tree: (tree["a"] + (tree["a"] > 1)).sum(), {"a": torch.ones_like(at["a"])}, at) < 1e-5


def test_words_and_failure() -> None:
    assert words(ValueError("first.\n Second sentence.")) == "ValueError: first"
    assert words(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert failure(int, "3") == "" and failure(int, "x").startswith("ValueError: invalid literal")
    assert float(total({"a": torch.zeros(3), "n": torch.ones(2, dtype=torch.int64)})) == 0


def test_undisturbed_keeps_random_states_after_an_exception_too() -> None:
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    with pytest.raises(ZeroDivisionError), undisturbed():
        print(torch.rand(1), random.random(), np.random.rand(), 1 / 0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), str(np.random.get_state()))
