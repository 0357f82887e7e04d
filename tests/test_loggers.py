"""Sinks of others: TensorBoard's files read back, and the plug-ins for services that stay on the machine."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit import UserError
from toolkit.runs.loggers import loggers

ROOT = Path(__file__).parent.parent
ROWS = [
    {"iteration": 10.0, "loss": 1.5, "metric": 0.25, "seconds": 1.0},
    {"iteration": 20.0, "val_loss": 1.25, "val_metric": 0.5},
    {"iteration": 20.0, "rate/head.weight": 0.4},
]


def test_tensorboard_gets_every_number_under_its_group(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (logger,) = loggers(["tensorboard"], tmp_path, {}, 0)
    for row in ROWS:
        logger(row)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {
        "training/loss": [(10, 1.5)], "training/metric": [(10, 0.25)], "training/seconds": [(10, 1.0)],
        "validation/loss": [(20, 1.25)], "validation/metric": [(20, 0.5)], "rates/head.weight": [(20, pytest.approx(0.4))],
    }  # fmt: skip


def test_a_resumed_run_keeps_the_points_of_its_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, iterations in ((0, (10, 20, 30)), (20, (30, 40))):  # what came after iteration 20 is written anew
        (logger,) = loggers(["tensorboard"], tmp_path, {}, start)
        for i in iterations:
            logger({"iteration": float(i), "loss": float(start + i)})
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("training/loss")
    assert [(event.step, event.value) for event in found] == [(10, 10), (20, 20), (30, 50), (40, 60)]


def test_tensorboard_without_the_package_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"--logger tensorboard needs a package .*; pip install tensorboard"):
        loggers(["tensorboard"], tmp_path, {}, 0)


@pytest.mark.parametrize(
    ("package", "plug_in", "left"),
    [
        ("wandb", "offline_wandb.py:Wandb", "wandb/offline-run-*/run-*.wandb"),
        ("trackio", "local_trackio.py:Trackio", "home/**/*.db"),
    ],
)
def test_a_plug_in_for_a_service_keeps_a_run_on_this_machine(tmp_path: Path, package: str, plug_in: str, left: str) -> None:
    """In a process of its own, since these packages start threads and servers; there is no network to reach."""
    pytest.importorskip(package)
    code = (
        "import sys; from pathlib import Path; from toolkit.runs.loggers import loggers\n"
        f"(logger,) = loggers(['experiments/loggers/{plug_in}'], Path({str(tmp_path)!r}), {{'seed': 1, 'out': None}}, 0)\n"
        f"for row in {ROWS!r}: logger(row)\n"
    )
    place: dict[str, Any] = {"HF_HOME": str(tmp_path / "home"), "TRACKIO_DIR": str(tmp_path / "home" / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | place, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob(left)), sorted(tmp_path.rglob("*"))
    assert len((ROOT / "experiments" / "loggers" / plug_in.split(":")[0]).read_text().splitlines()) <= 40
