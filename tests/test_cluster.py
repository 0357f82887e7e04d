"""--slurm: what it asks for, and a job of two processes by submitit's own executor on this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.cluster import Work, asked, submit, without
from toolkit.errors import UserError

ROOT = Path(__file__).parent.parent


def test_what_is_asked_for() -> None:
    wish = asked("nodes=2,gpus=8,minutes=600,partition=long")
    assert wish == {"nodes": 2, "gpus": 8, "processes": 8, "minutes": 600, "partition": "long"}
    assert asked("local=1, processes=2") == {"nodes": 1, "processes": 2, "local": 1}
    with pytest.raises(UserError, match="unknown key of --slurm 'node'; did you mean 'nodes'"):
        asked("node=2")
    with pytest.raises(UserError, match="--slurm gpus=many: gpus is a whole number, 1 or more; give one"):
        asked("gpus=many")


def test_the_flag_is_taken_out_of_the_command() -> None:
    assert without(["a.py", "--slurm", "nodes=2", "--seed", "1"], "--slurm") == ("a.py", "--seed", "1")
    assert without(["a.py", "--slurm=nodes=2", "--seed", "1"], "--slurm") == ("a.py", "--seed", "1")


def test_a_stopped_job_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    work = Work(("a.py", "--overwrite", "--seed", "1"))
    again = work.checkpoint().function
    assert again == Work(("a.py", "--seed", "1", "--resume")) and again.checkpoint().function == again
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert work.checkpoint().function == work  # the run folder tells what the job has begun: tests/test_harness.py


def test_without_slurm_it_says_so(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(UserError, match=r"--slurm: .*; or start the processes by torchrun"):
        submit(["a.py"], asked("nodes=2"), tmp_path)


def test_a_job_of_two_processes_fills_one_run_folder(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    sizes = ["--iterations", "2", "--validate-every", "2", "--val-tasks", "2", "--eval-tasks", "2", "--eval-steps", "1"]
    command = [sys.executable, str(ROOT / "experiments" / "sinusoid.py"), *sizes, "--tasks", "2", "--map", "loop"]
    asking = [*command, "--slurm", "local=1,processes=2,minutes=3", "--out", str(tmp_path / "run")]
    done = subprocess.run(asking, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("job "), done.stderr
    from submitit.local.local import LocalJob

    job = LocalJob(tmp_path / "results" / "slurm", done.stdout.split()[1].strip(";"), tasks=[0, 1])
    job.wait()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["processes"] == 2, job.stderr()
