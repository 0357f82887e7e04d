"""Several processes against one: the same gradient, the same bits when they add in order, and no hang when one is lost."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import processes
from tests.conftest import relative
from toolkit.distributed import ALONE, Group, added, here
from toolkit.errors import UserError
from toolkit.processes import own_gpu
from toolkit.runs.folder import Run

ROOT = Path(__file__).parent.parent


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start(command: list[str], size: int, only: int | None = None, port: str | None = None) -> list["subprocess.Popen[str]"]:
    """The command in `size` processes, or `only` in one of them, with the variables that torchrun sets."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port or free_port(), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (range(size) if only is None else [only])
    ]


def finished(running: list["subprocess.Popen[str]"], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    try:
        texts = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(running, texts, strict=True)]


def found_by(case: str, size: int, folder: Path) -> list[Any]:
    """What each of `size` processes finds, by rank."""
    for code, _, errors in finished(start(["-m", "tests.processes", case, str(folder)], size)):
        assert code == 0, errors
        assert "Warning" not in errors, errors
    return [torch.load(folder / f"{rank}-of-{size}.pt") for rank in range(size)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    threads = torch.get_num_threads()
    try:
        return processes.everything(ALONE)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 4))])
def test_several_processes_find_what_one_finds(size: int, alone: dict[str, Any], tmp_path: Path) -> None:
    ranks = found_by("everything", size, tmp_path)
    for found in ranks:
        for name, tensors in alone["exact"].items():
            assert relative(found["exact"][name], tensors) < 1e-12, name
        for name, tensors in alone["ordered"].items():
            assert all(torch.equal(a, b) for a, b in zip(found["ordered"][name], tensors, strict=True)), name
        for name, tensors in alone["fast"].items():
            assert relative(found["fast"][name], tensors) < 1e-9, name
            assert all(torch.equal(a, b) for a, b in zip(found["fast"][name], ranks[0]["fast"][name], strict=True)), name
        for part in ("weights", "moments"):
            assert all(torch.equal(a, b) for a, b in zip(found["parts"][part], alone["parts"][part], strict=True)), part
    numbers = sum(tensor.numel() for tensor in alone["parts"]["moments"])
    single = sum(tensor.dim() == 0 for tensor in alone["parts"]["moments"])  # which every process has
    assert single and sum(found["parts"]["kept"] for found in ranks) == numbers + (size - 1) * single
    assert max(found["parts"]["kept"] for found in ranks) < 1.3 * numbers / size
    for rank, talk in enumerate(each["talk"] for each in ranks):
        assert talk["first"] == "by 0" and talk["gathered"] == list(range(size)) and talk["any"] == (True, False), rank
        why, differs, drifted, few = talk["said"]
        assert why == "only process 0 knows why"
        assert differs == "process 1 has --seed 7, and process 0 has 0; start them alike"
        assert drifted.startswith("process 1 has after iteration 100 weights of hash ") and "newest checkpoint" in drifted
        assert few == f"{size} processes cannot share {size - 1} tasks; start at most {size - 1}, or give more --tasks"
    for said in zip(*(each["talk"]["repeated"] for each in ranks), strict=True):
        assert sorted(said) == [False, *[True] * (size - 1)]  # one of them says it


def test_a_port_that_is_taken_is_a_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ((code, _, errors),) = finished(start(["experiments/sinusoid.py"], 2, only=0, port=port))
    assert (
        code == 2 and errors.startswith(f"error: the processes could not meet at 127.0.0.1:{port} (") and "Trace" not in errors
    )


def test_parts_on_a_shared_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cpu:gloo,cuda:gloo")
    assert here(sharded=True).sharded and not here(device="cuda").sharded
    with pytest.raises(UserError, match="--shard keeps parts on GPUs of their own, but processes share one; start as many as"):
        here(sharded=True, device="cuda:0")
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    assert here(sharded=True, device="cuda:0").sharded


def test_processes_take_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    assert torch.cuda.is_available() or own_gpu() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid=f"card {taken[-1]}"))
    names = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        names.append(own_gpu())
    assert names == ["card 0", "card 1", "card 0"]


def test_a_lost_process_ends_the_others_with_a_sentence(tmp_path: Path) -> None:
    first, last = finished(start(["-m", "tests.processes", "lost", str(tmp_path)], 2), 60)
    assert last[0] == 9 and first[0] == 0, first[2]
    found = torch.load(tmp_path / "0-of-2.pt")
    assert found["said"].startswith("Lost: another of the 2 processes is gone (") and found["seconds"] < 30


@pytest.mark.parametrize(
    ("case", "rank", "who"),
    [("hung", 1, "process 1"), ("hung_first", 0, "process 0, or torchrun if it keeps the notes of all,")],
)
def test_a_process_that_hangs_ends_the_others_with_a_sentence(case: str, rank: int, who: str, tmp_path: Path) -> None:
    running = start(["-m", "tests.processes", case, str(tmp_path)], 2)
    _, errors = running[1 - rank].communicate(timeout=60)
    running[rank].kill()
    running[rank].communicate()
    assert running[1 - rank].returncode == 1
    assert f"error: {who} has given no sign of life for " in errors and " s; the same command with --resume goes on" in errors


@pytest.mark.slow
def test_of_a_process_that_takes_long_the_others_say_that_they_wait(tmp_path: Path) -> None:
    ends = finished(start(["-m", "tests.processes", "hung_within", str(tmp_path)], 2), 60)
    assert [code for code, *_ in ends] == [0, 0]
    said = [line for *_, errors in ends for line in errors.splitlines() if "wait for another" in line]
    why = "process 1: some of the 2 processes wait for another for more than 2 s: it takes long, or it hangs"
    assert said == [f"{why}; after 2 hours the run would end"]


@pytest.mark.slow
def test_who_is_done_does_not_wait_for_a_process_that_hangs(tmp_path: Path) -> None:
    running = start(["-m", "tests.processes", "hung_left", str(tmp_path)], 2)
    _, errors = running[1].communicate(timeout=60)
    running[0].kill()
    running[0].communicate()
    assert running[1].returncode == 1 and "process 0, or torchrun if it keeps the notes of all, does not answer" in errors


def test_the_parts_of_a_batch_cover_it_once() -> None:
    for total in range(1, 12):
        for piece in range(1, 5):
            for size in range(1, -(-total // piece) + 1):
                parts = [Group(rank, size).part(total, piece) for rank in range(size)]
                assert [i for part in parts for i in part] == list(range(total)) and all(map(len, parts))
                assert all(part.start % piece == 0 for part in parts)
    with pytest.raises(
        UserError, match=r"3 processes cannot share 5 tasks in pieces of 4; start at most 2, .* smaller --chunk"
    ):
        Group(0, 3).part(5, 4)


def test_sums_go_from_left_to_right() -> None:
    parts = [{"a": torch.tensor([value])} for value in (1e8, 1.0, -1e8)]
    assert added(parts)["a"] == (parts[0]["a"] + parts[1]["a"]) + parts[2]["a"] == 0


COMMAND = ["experiments/quickstart.py", "--iterations", "6", "--validate-every", "3", "--val-tasks", "4", "--eval-tasks", "6"]
COMMAND += ["--eval-steps", "2", "--tasks", "4", "--reduce", "ordered", "--no-trace"]


@pytest.mark.slow  # in the default suite tests/test_cluster.py has a whole run by two, and the bits are compared above
def test_a_run_by_two_processes_has_the_bits_of_one(tmp_path: Path) -> None:
    """And writes what one process would, once."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for code, _, errors in finished(start([*COMMAND, "--out", str(whole)], 1)):
        assert code == 0, errors
    for (code, output, errors), rank in zip(finished(start([*COMMAND, "--out", str(parts)], 2)), (0, 1), strict=True):
        assert code == 0, errors
        assert ("run folder" in output) == (rank == 0)
        assert "train" not in errors or rank == 0
    assert torch.equal(Run(parts).curve.loss, Run(whole).curve.loss)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in Run(parts).metrics]
    assert rows == [{k: v for k, v in row.items() if k != "seconds"} for row in Run(whole).metrics]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_run_goes_on_by_another_number_of_processes_with_the_same_bits(killed: int, tmp_path: Path) -> None:
    command = [word if word != "6" else "60" for word in COMMAND]
    for code, _, errors in finished(start([*command, "--out", str(tmp_path / "whole")], 1)):
        assert code == 0, errors
    parts = ["--out", str(tmp_path / "parts")]
    running = start([*command, *parts], 2)
    while not list((tmp_path / "parts").glob("checkpoints/step-*")):
        assert running[0].poll() is None
    running[killed].send_signal(signal.SIGKILL)
    code, _, errors = finished(running, 60)[1 - killed]
    assert code == 2 and "error: another of the 2 processes is gone" in errors and "Traceback" not in errors
    assert ("is saved" in errors) == (killed == 1), "only process 0 writes"
    assert "; the same command with --resume goes on from the newest checkpoint" in errors
    for size in (3, 1):  # the second finds nothing left to train
        for code, _, errors in finished(start([*command, *parts, "--resume"], size)):
            assert code == 0, errors
        assert torch.equal(Run(tmp_path / "parts").curve.loss, Run(tmp_path / "whole").curve.loss)


def test_a_process_that_never_starts_ends_the_others(tmp_path: Path) -> None:
    code, _, errors = finished(start(["-m", "tests.processes", "absent", str(tmp_path)], 2, only=0), 60)[0]
    assert code == 1 and "of 2 processes not all started within 1 s" in errors
