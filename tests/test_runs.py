"""Run folders and checkpoints: what survives, what is noticed, what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from experiments import omniglot
from tests.conftest import dense, flat
from toolkit import Meta, UserError, algorithms
from toolkit.runs import checkpoint
from toolkit.runs.entry import prepare, settle
from toolkit.runs.folder import LATER, NOT_HASHED, Run, config_hash, result_step, source_hash, write_json

META = algorithms.maml(dense()).init()
STATE: dict[str, Any] = {"iteration": 7, "meta": META._asdict(), "optimizer": {"state": {}, "param_groups": []}}
ROOT = Path(__file__).parent.parent
# A short run with frequent checkpoints; every flag that matters for speed is small.
SHORT = [
    "--iterations", "60", "--validate-every", "7", "--val-tasks", "5", "--eval-tasks", "6", "--eval-steps", "2", "--no-compile",
]  # fmt: skip


def save(folder: Path, iteration: int = 7, identity: str = "a") -> Path:
    return checkpoint.save(folder, iteration, META, STATE | {"iteration": iteration}, identity)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path)
    loaded = checkpoint.load_newest(tmp_path, "a")
    assert loaded is not None
    weights, state = loaded
    assert set(weights.params) == set(META.params)
    assert all(torch.equal(weights.params[name], META.params[name]) for name in META.params)
    assert torch.equal(flat(Meta(**state["meta"])), flat(META)) and state["iteration"] == 7


def test_the_newest_two_checkpoints_are_kept_and_stale_files_swept(tmp_path: Path) -> None:
    (tmp_path / ".step-00000001.tmp").mkdir()
    for iteration in (1, 2, 3):
        save(tmp_path, iteration)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt", "manifest.json"])
def test_a_flipped_bit_or_a_cut_is_noticed_and_the_older_checkpoint_used(tmp_path: Path, name: str) -> None:
    random = Random(0)
    for trial in range(30):
        save(tmp_path, 1)
        path = save(tmp_path, 2) / name
        data = bytearray(path.read_bytes())
        if trial % 3 == 0:
            data = data[: random.randrange(len(data))]
        else:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(data)
        loaded = checkpoint.load_newest(tmp_path, "a")
        assert loaded is not None
        weights, state = loaded
        harmless = name == "manifest.json" and state["iteration"] == 2  # such as a bit of white space
        assert torch.equal(flat(weights), flat(META)) and (state["iteration"] == 1 or harmless)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Gadget:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "canary"),)

    checkpoint.save(tmp_path / "c", 1, META, {"gadget": Gadget()}, "a")
    with pytest.raises(UserError, match="more than plain values"):
        checkpoint.load_newest(tmp_path / "c", "a")
    assert not (tmp_path / "canary").exists()


def test_an_error_of_the_disk_is_raised_and_the_older_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(handle: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, 2)
    monkeypatch.undo()
    loaded = checkpoint.load_newest(tmp_path, "a")
    assert loaded is not None and loaded[1]["iteration"] == 1


def test_another_configuration_or_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    with pytest.raises(UserError, match="another configuration"):
        checkpoint.load_newest(tmp_path, "b")
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    save(tmp_path, 8)
    monkeypatch.undo()
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load_newest(tmp_path, "a")


def test_run_folders_are_never_mixed_up(tmp_path: Path) -> None:
    config = {"inner_lr": 0.4, "out": "here"}
    run = tmp_path / "run"
    prepare(run, config, resume=False, overwrite=False)
    with pytest.raises(UserError, match="exists; continue it with --resume"):
        prepare(run, config, resume=False, overwrite=False)
    with pytest.raises(UserError, match=r"--inner-lr 0\.4, not 0\.1"):
        prepare(run, config | {"inner_lr": 0.1}, resume=True, overwrite=False)
    prepare(run, config | {"out": "there"}, resume=True, overwrite=False)
    (run / "old").touch()
    prepare(run, config | {"inner_lr": 0.1}, resume=False, overwrite=True)
    assert not (run / "old").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(UserError, match="is not a run folder"):
        prepare(tmp_path / "photos", config, resume=False, overwrite=True)
    assert config_hash(config) == config_hash(config | {"out": "there"}) != config_hash(config | {"inner_lr": 0.1})


def test_missing_and_damaged_files_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        _ = Run(tmp_path / "none").summary
    with pytest.raises(UserError, match=r"is no run folder, it has no config\.json"):
        _ = Run(tmp_path).summary
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no summary\.json; the run has not come so far"):
        _ = Run(tmp_path).summary
    with pytest.raises(UserError, match=r"there is no run folder .*config\.json, which is a file"):
        _ = Run(tmp_path / "config.json").summary
    for damaged in (b"{", b"[]", b"null", b'{"a": "\xff"}'):
        (tmp_path / "summary.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"summary\.json is damaged"):
            _ = Run(tmp_path).summary
    with pytest.raises(UserError, match=r"has no curve\.json, though the run is finished"):
        _ = Run(tmp_path).curve


def test_an_example_without_a_part_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    save_file({"support_x": torch.zeros(1)}, tmp_path / "example.safetensors")
    with pytest.raises(UserError, match=r"example\.safetensors is damaged \(it has no predictions\)"):
        _ = Run(tmp_path).example


TEST = {"tasks": 2, "steps": [0, 1], "metric": "accuracy", "mean": [0.2, 0.5], "ci95": [0.1, None]}


@pytest.mark.parametrize(
    "changed",
    [
        {"algorithm": None}, {"sampler": 3}, {"test": TEST | {"mean": [0.2]}}, {"test": TEST | {"mean": [0.2, "high"]}},
        {"test": {k: v for k, v in TEST.items() if k != "ci95"}}, {"test": TEST | {"steps": []}}, {"test": TEST | {"tasks": 0}},
        {"test": [1]}, {"test": TEST | {"metric": None}},
    ],
)  # fmt: skip
def test_a_summary_that_was_edited_is_one_sentence(tmp_path: Path, changed: dict[str, Any]) -> None:
    sound = {"algorithm": "maml", "sampler": "glyphs", "test": TEST}
    (tmp_path / "summary.json").write_text(json.dumps(sound))
    assert Run(tmp_path).result == sound
    (tmp_path / "summary.json").write_text(json.dumps(sound | changed))
    with pytest.raises(UserError, match=r"summary\.json is damaged \(.*\); restore it or repeat the run"):
        _ = Run(tmp_path).result


@pytest.mark.parametrize("line", ['"x"', '{"loss": 1}', '{"iteration": 3, "loss": "low"}', "[]", "{", "\xff"])
def test_a_journal_names_its_damaged_line_and_a_torn_end_is_no_damage(tmp_path: Path, line: str) -> None:
    sound = '{"iteration": 1, "loss": null}'
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text(f"{sound}\n{line}\n{sound}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged \(line 2 is no row of a run"):
        _ = Run(tmp_path).metrics
    (tmp_path / "metrics.jsonl").write_text(f"{sound}\n{line}")
    assert Run(tmp_path).metrics == [{"iteration": 1, "loss": None}]
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="line 2"):  # nobody is writing any more
        _ = Run(tmp_path).metrics


def sinusoid(out: Path, *flags: str) -> subprocess.Popen[str]:
    """The sinusoid experiment as a user starts it, in a process of its own."""
    command = [sys.executable, "experiments/sinusoid.py", "--out", str(out), *SHORT, *flags]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def finished(out: Path, *flags: str) -> str:
    process = sinusoid(out, *flags)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors


def weights(out: Path) -> dict[str, Any]:
    """What a run ended with, but for its timing."""
    loaded = checkpoint.load_newest(out / "checkpoints")
    assert loaded is not None
    best, state = loaded
    curve = (out / "curve.json").read_text()
    return {"best": flat(best), "meta": flat(state["meta"]), "curve": curve, "selected": state["selected"]}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    tensors = torch.equal(a["best"], b["best"]) and torch.equal(a["meta"], b["meta"])
    return tensors and a["curve"] == b["curve"] and a["selected"] == b["selected"]


def kill_and_resume(tmp_path: Path, times: int, seed: int, *flags: str) -> None:
    """Kills a run at `times` random moments, resuming after each, and compares its end with the unbroken run."""
    random = Random(seed)
    finished(tmp_path / "whole", *flags)
    whole, broken = weights(tmp_path / "whole"), tmp_path / "broken"
    kills = 0
    while kills < times:
        process = sinusoid(broken, "--resume", *flags)
        checkpoints = broken / "checkpoints"
        before = set(checkpoints.glob("step-*"))
        # Most of a short process is start-up; wait until it trains, then strike at a random moment of it.
        while process.poll() is None and set(checkpoints.glob("step-*")) == before:
            time.sleep(0.005)
        time.sleep(random.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            kills += 1
        if (broken / "summary.json").exists():
            assert same(weights(broken), whole)
            shutil.rmtree(broken)
    finished(broken, "--resume", *flags)
    assert same(weights(broken), whole)
    rows = [row["iteration"] for row in Run(broken).metrics if "loss" in row]
    assert rows == sorted(set(rows)), "a resume must not repeat rows of metrics.jsonl"
    assert not list((broken / "checkpoints").glob(".step-*"))


@pytest.mark.slow  # runs of every kind that are cut off are in tests/test_harness.py
def test_a_killed_run_ends_like_the_unbroken_one(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 2, 0)


@pytest.mark.slow
def test_twenty_kills_end_like_the_unbroken_run(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 20, 1, "--iterations", "2000", "--validate-every", "20")


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path: Path) -> None:
    process = sinusoid(tmp_path / "run", "--iterations", "100000", "--validate-every", "100000")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.05)
    time.sleep(1)
    with pytest.raises(UserError, match="another process is at work in"):
        prepare(tmp_path / "run", {}, resume=False, overwrite=True)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "--resume goes on" in errors and "Traceback" not in errors
    assert checkpoint.load_newest(tmp_path / "run" / "checkpoints") is not None


# The flags of a run of the first version, and the identity that its summary.json and checkpoints carry.
FIRST: dict[str, Any] = {
    "experiment": "omniglot", "algorithm": "maml", "sampler": "omniglot-vinyals", "model": "conv4", "shots": 1, "queries": 1,
    "eval_queries": 1, "inner_lr": 0.4, "inner_steps": 1, "meta_lr": 0.001, "tasks": 32, "iterations": 15000, "val_tasks": 200,
    "validate_every": 500, "eval_tasks": 1000, "eval_steps": 10, "eval_seed": 0, "seed": 0, "device": "cpu", "map": "auto",
    "chunk": None, "memory": "unroll", "compile": True, "out": None, "resume": False, "overwrite": False, "debug": False,
    "preset": "default", "ways": 5, "batch_norm": "batch", "data_root": "data", "download": False,
}  # fmt: skip
IDENTITY = "31cb7d3d4857f3b2"


def now(**changes: Any) -> dict[str, Any]:
    """What config.json holds today for the same flags, the policy of the learner put in by the harness."""
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(omniglot.Config()).items()}
    return {"experiment": "omniglot"} | flags | {"batch_norm": "batch"} | changes


def first_run(folder: Path) -> Path:
    folder.mkdir()
    write_json(folder / "config.json", FIRST)
    return folder


def test_the_identity_of_a_run_of_the_first_version_is_that_of_the_same_flags_now() -> None:
    assert config_hash(FIRST) == IDENTITY == config_hash(now())
    assert now().keys() - FIRST.keys() <= LATER.keys() | set(NOT_HASHED), "a new flag belongs into LATER"
    assert all(now()[key] == LATER[key] or list(now()[key]) == LATER[key] for key in LATER)


def test_a_run_of_the_first_version_is_resumed_with_the_same_flags(tmp_path: Path) -> None:
    prepare(first_run(tmp_path / "run"), now(resume=True, out="there"), resume=True, overwrite=False)
    found = Run(tmp_path / "run").config
    assert config_hash(found) == IDENTITY and LATER.keys() <= found.keys()
    prepare(tmp_path / "run", now(), resume=True, overwrite=False)


OTHERS: dict[str, Any] = {
    "order": "first", "method": ("lam=1",), "rule": "adam 0.1", "inner_batch": 1, "inner_clip": 1.0, "head": "top",
    "meta_optimizer": "sgd", "meta_schedule": "cosine", "meta_clip": 1.0, "permutations": 3, "backend": "learn2learn",
    "train_shots": 5, "dataset": "glyphs", "sampler_args": ("gap=3",), "dataset_args": ("size=14",), "model_args": ("width=8",),
    "train_ways": 7, "augment": "crop-flip", "support_copies": 2, "trace": False,
    "autocast": "bfloat16", "adapts": "*bias", "freeze": "norm", "lora": 2, "lora_layers": "body*", "prompts": 3,
    "pretrained": "default", "reduce": "ordered",
}  # fmt: skip


def test_every_later_flag_has_another_value_here() -> None:
    assert OTHERS.keys() == LATER.keys()


@pytest.mark.parametrize("name", [*OTHERS, "batch_norm"])
def test_a_run_of_the_first_version_is_not_resumed_with_another_flag(name: str, tmp_path: Path) -> None:
    changed = now(**{name: OTHERS.get(name, "support")})
    assert config_hash(changed) != IDENTITY
    folder = first_run(tmp_path / "run")
    flag = "--" + name.replace("_", "-")
    with pytest.raises(
        UserError, match=f"was made with {flag} .*; resume with the same flags, or choose another --out"
    ) as caught:
        prepare(folder, changed, resume=True, overwrite=False)
    assert "\n" not in str(caught.value)
    assert json.loads((folder / "config.json").read_text()) == FIRST, "what is refused changes nothing"


def test_another_number_of_test_tasks_names_the_command_for_it(tmp_path: Path) -> None:
    folder = first_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"or test the finished run anew by `toolkit evaluate .*run`$"):
        prepare(folder, now(eval_tasks=now()["eval_tasks"] + 1), resume=True, overwrite=False)


def test_a_checkpoint_of_the_first_version_holds_no_statistics_and_loads(tmp_path: Path) -> None:
    parts = {"params": META.params, "learned": META.learned}
    checkpoint.save(tmp_path, 7, Meta(**parts), STATE | {"meta": parts}, IDENTITY)
    loaded = checkpoint.load_newest(tmp_path, config_hash(now()))
    assert loaded is not None
    for meta in (loaded[0], Meta(**loaded[1]["meta"])):
        assert meta.stats == {} and torch.equal(flat(meta), flat(META))


def test_statistics_of_batch_norm_come_back_bit_for_bit(tmp_path: Path) -> None:
    stats = {"point0/norm.running_mean": torch.rand(3), "point1/norm.running_var": torch.rand(3, dtype=torch.float64)}
    checkpoint.save(tmp_path, 7, META._replace(stats=stats), STATE, "a")
    loaded = checkpoint.load_newest(tmp_path, "a")
    assert loaded is not None and list(loaded[0].stats) == list(stats)
    assert all(torch.equal(loaded[0].stats[name], tensor) for name, tensor in stats.items())


def test_what_a_run_replaces_is_kept_until_that_one_is_sure(tmp_path: Path) -> None:
    run = tmp_path / "run"
    prepare(run, {"seed": 0}, resume=False, overwrite=False)
    (run / "old").touch()
    prepare(run, {"seed": 1}, resume=False, overwrite=True)
    settle(run)
    assert (run / "old").exists() and Run(run).config == {"seed": 0}
    prepare(run, {"seed": 1}, resume=False, overwrite=True)
    (run / "summary.json").touch()
    settle(run)
    assert list(tmp_path.iterdir()) == [run] and Run(run).config == {"seed": 1} and not (run / "old").exists()
    settle(run)
    assert Run(run).config == {"seed": 1}, "nothing is aside"


IN = """
import sys, time
from pathlib import Path
from toolkit.files import alone_in
with alone_in(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_which_another_process_is_at_work_is_left_alone(tmp_path: Path) -> None:
    run, config = tmp_path / "run", {"seed": 1}
    prepare(run, config, resume=False, overwrite=False)
    (run / "old").touch()
    prepare(run, {"seed": 2}, resume=False, overwrite=True)  # which has saved nothing yet, so the first is aside
    there = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = subprocess.Popen([sys.executable, "-c", IN, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        for resume in (True, False):
            with pytest.raises(UserError, match=r"another process is at work in .*run; wait until it has ended, or choose ano"):
                prepare(run, {"seed": 2}, resume=resume, overwrite=not resume)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == there
    finally:
        other.kill()
        other.communicate()
    prepare(run, {"seed": 1}, resume=True, overwrite=False)  # the lock went with the process, and the first is back
    assert Run(run).config == config


RIVALS = """
import multiprocessing, os, shutil, sys
from pathlib import Path
from toolkit.errors import UserError
from toolkit.runs.entry import entered, refuse
from toolkit.runs.folder import write_json

PLACE, CONFIG = Path(sys.argv[1]) / "run", {"seed": 1}

def work(ready, ended, told):
    ready.wait()
    try:
        refuse(PLACE, CONFIG, False, True)
        with entered(PLACE, CONFIG, False, True):
            write_json(PLACE / "summary.json", {"by": os.getpid()})
            told.put("")
            ended.wait()  # so that nobody comes after it
    except (UserError, OSError) as error:
        told.put(str(error))
        ended.wait()

for trial in range(15):
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir()
    write_json(PLACE / "config.json", CONFIG)
    write_json(PLACE / "summary.json", {"by": 0})
    ready, ended, told = (*(multiprocessing.Barrier(4, timeout=20) for _ in range(2)), multiprocessing.Queue())
    rivals = [multiprocessing.Process(target=work, args=(ready, ended, told), daemon=True) for _ in range(4)]
    for rival in rivals: rival.start()
    said = sorted(told.get(timeout=20) for _ in rivals)
    for rival in rivals: rival.join()
    assert said[0] == "" and all("another process is at work in" in each for each in said[1:]), said
    assert [path.name for path in PLACE.parent.iterdir()] == ["run"] and '"by": 0' not in (PLACE / "summary.json").read_text()
"""


def test_of_several_that_replace_a_run_at_once_one_does(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", RIVALS, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


FORKED = """
import os, sys, time
from pathlib import Path
from toolkit.files import alone_in
folder = Path(sys.argv[1])
with alone_in(folder):
    if not (child := os.fork()):
        time.sleep(60)
with alone_in(folder):
    print("in again")
os.kill(child, 9)
"""


def test_a_forked_process_does_not_keep_a_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, str(tmp_path)], capture_output=True, text=True, timeout=50
    )
    assert done.stdout == "in again\n", done.stderr


def test_to_go_on_and_to_replace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--resume goes on with the run that is there, --overwrite replaces it; give one"):
        prepare(tmp_path / "run", {"seed": 1}, resume=True, overwrite=True)


def test_a_disk_that_is_full_costs_nothing_of_what_was_to_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    prepare(run, {"seed": 0}, resume=False, overwrite=False)
    monkeypatch.setattr("toolkit.runs.entry.write_json", lambda *given: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        prepare(run, {"seed": 1}, resume=False, overwrite=True)
    assert Run(run).config == {"seed": 0} and list(tmp_path.iterdir()) == [run]


def test_a_run_killed_once_it_had_saved_something_is_not_replaced_by_an_older_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    prepare(run, {"seed": 0}, resume=False, overwrite=False)
    prepare(run, {"seed": 1}, resume=False, overwrite=True)
    checkpoint.save(run / "checkpoints", 7, META, STATE, "a")  # and killed before anything else
    prepare(run, {"seed": 1}, resume=True, overwrite=False)
    assert Run(run).config == {"seed": 1} and list(tmp_path.iterdir()) == [run]
    prepare(run, {"seed": 2}, resume=False, overwrite=True)
    settle(run)  # by Ctrl-C
    assert Run(run).config == {"seed": 1}


def test_the_code_that_runs_is_also_that_of_plug_ins(tmp_path: Path) -> None:
    from toolkit import plugins

    before, file = source_hash(), tmp_path / "mine.py"
    file.write_text("def net(): ...")
    plugins.resolve(f"{file}:net", "models")
    with_net = source_hash()
    file.write_text("def net(): return 1")
    assert len({before, with_net, source_hash()}) == 3


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ({"inner_steps": 1, "test": {"mean": [0.2, 0.5, 0.6]}}, 1),
        ({"inner_steps": 9, "test": {"mean": [0.2, 0.5, 0.6]}}, 2),
        ({"inner_steps": 0, "test": {"mean": [0.2, 0.5, 0.6]}}, 2),
        ({"inner_steps": 0, "test": {"mean": [0.5, 0.4, 0.5]}}, 0),
        ({"inner_steps": 0, "test": {"mean": [None, None]}}, 0),
        ({"inner_steps": None, "test": {"mean": [0.2]}}, None),
        ({"inner_steps": 1}, None),
    ],
)
def test_the_steps_of_a_result(summary: dict[str, Any], expected: int | None) -> None:
    assert result_step(summary) == expected


def test_of_runs_replaced_before_they_saved_anything_the_first_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a process was killed in between, by links, and from within."""
    (tmp_path / "disk").mkdir()
    run = tmp_path / "run"
    prepare(tmp_path / "disk" / "run", {"seed": 0}, resume=False, overwrite=False)
    run.symlink_to(tmp_path / "disk" / "run")
    for seed in (1, 2):
        prepare(run, {"seed": seed}, resume=False, overwrite=True)  # killed
    settle(run)
    assert Run(run).config == {"seed": 0}
    prepare(run, {"seed": 1}, resume=False, overwrite=True)
    shutil.rmtree(tmp_path / "disk" / "run")  # by the user, who begins anew and finds what was there first
    with pytest.raises(UserError, match="exists; continue it with --resume"):
        prepare(run, {"seed": 3}, resume=False, overwrite=False)
    assert Run(run).config == {"seed": 0} and len(list((tmp_path / "disk").iterdir())) == 1
    monkeypatch.chdir(run)
    prepare(Path("."), {"seed": 0}, resume=True, overwrite=False)
    settle(Path("."))
    with pytest.raises(UserError, match=r"cannot replace .*run from within it; change to another folder first"):
        prepare(Path("."), {"seed": 4}, resume=False, overwrite=True)


class Odd(nn.Module):
    """Frozen and trained weights, a buffer of the inputs' size, and a state that is no tensor."""

    def __init__(self, size: int = 3, shift: float = 0.0, outputs: int = 2) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 2), nn.Linear(2, outputs)
        nn.init.constant_(self.body.weight, shift)
        nn.init.zeros_(self.head.weight)
        self.register_buffer("positions", torch.arange(size))
        for p in self.parameters():
            p.requires_grad_(False)
        self.head.bias.requires_grad_(True)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: Any) -> None: ...


def test_what_stands_beside_a_checkpoint_is_told_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {"beside": checkpoint.beside(Odd())}

    def check(**changes: Any) -> None:
        torch.manual_seed(0)
        checkpoint.check_beside(tmp_path, state, checkpoint.beside(Odd(**changes)))

    check()
    check(size=7)
    with pytest.raises(UserError, match=r"other frozen weights than the model has now, body\.weight for one"):
        check(shift=1.0)
    with pytest.raises(UserError, match=r"does not fit .*: its frozen head\.weight is \(2, 2\), and they want \(5, 2\)"):
        check(outputs=5)
    checkpoint.check_beside(tmp_path, {}, checkpoint.beside(Odd(outputs=5)))  # as older checkpoints are
