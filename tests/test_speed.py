"""The speed table: rates as measured, every subject drawing the same kind of tasks, and refusals in a sentence."""

import json
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import speed
from experiments.speed import Config, Images, Row
from experiments.tools import speed_steps
from toolkit.data.bank import ClassBank
from toolkit.flags import launch
from toolkit.models import mlp
from toolkit.plots.speed import bars, number
from toolkit.task import take


@pytest.fixture
def bank() -> ClassBank:
    items = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).repeat(1, 1, 4, 4)
    return ClassBank(items, torch.tensor([0, 20, 40, 60]), ("a", "b", "c"), "toy").select([2, 0])


def test_rates_are_work_per_second_and_ratios_are_to_the_base() -> None:
    def work(amount: int, seconds: float) -> Any:
        def once() -> int:
            time.sleep(seconds)
            return amount

        return once

    rows = speed._table(
        "samplers", "toy", {"slow": work(1, 0.01), "fast": work(20, 0.01)}, "tasks/s", "slow", Config(rounds=3, seconds=0.05)
    )
    slow, fast = rows
    assert 50 < slow.value <= 100 and slow.ratio == 1 and slow.low <= slow.value <= slow.high
    assert fast.ratio == pytest.approx(fast.value / slow.value) and 10 < fast.ratio < 40


def test_the_peers_see_the_items_of_the_bank_with_their_classes(bank: ClassBank) -> None:
    images = Images(bank)
    assert len(images) == 40 and images.get_labels() == [0] * 20 + [1] * 20
    x, y = images[3]
    assert x.dtype == torch.float32 and torch.equal(x, torch.full((1, 4, 4), 43 / 255)) and y == 0
    assert images[25][0].flatten()[0] == torch.tensor(5 / 255)


def test_every_call_draws_new_tasks(bank: ClassBank, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int] = []
    monkeypatch.setattr(speed, "draw", lambda sampler, tasks, seed, start: starts.append(start))
    once = speed._ours(bank, (2, 1, 3), 32)
    assert once() == once() == 32 and starts == [0, 32]


def test_learn2learn_draws_tasks_of_the_same_size(bank: ClassBank) -> None:
    pytest.importorskip("learn2learn")
    once = speed._learn2learn(Images(bank), (2, 1, 3))
    assert once() == 1


def rows() -> list[Row]:
    return [
        Row("samplers", f"work {i}", who, value * (i + 1), "tasks/s", value / 2, value * 3, value / 10)
        for i in range(2)
        for who, value in (("ours", 1234.5), ("theirs", 10.0))
    ]


def test_the_table_and_the_figure_hold_the_rows() -> None:
    text = speed.markdown(rows(), {"samplers": {"processor": "X", "torch": "2"}}, Config(rounds=7))
    assert "`make speed`" in text and "medians of 7 rounds" in text
    assert "| work 1 | ours | 2,469 tasks/s (617 to 3,704) | 123 |" in text and "processor X, torch 2." in text
    figure = bars([vars(row) for row in rows()], "samplers")
    drawn = [patch.get_width() for patch in figure.axes[0].patches]
    assert drawn == [row.value for row in rows()]
    assert [t.get_text() for t in figure.axes[0].texts] == [f"{r.subject}  {number(r.value)} ({r.ratio:.3g}×)" for r in rows()]


@pytest.mark.parametrize("peer", ["learn2learn", "higher"])
@pytest.mark.parametrize("name", ["sinusoid, 25 tasks, K = 5", "ANIL, Omniglot (stride 2), 32 tasks, 5+5"])
def test_ours_and_the_peers_do_the_same_work(name: str, peer: str) -> None:
    """The losses of three training steps agree, so gradients and updates do."""
    pytest.importorskip(peer)
    work = next(work for work in speed_steps.workloads() if work.name == name)
    if peer not in work.peers:
        pytest.skip(f"{peer} is not measured here")
    ours, theirs = speed_steps.ours(work, work.plans[0], "cpu"), speed_steps.peer(work, peer, "cpu")
    assert [ours() for _ in range(3)] == pytest.approx([theirs() for _ in range(3)], rel=1e-3)


def test_the_networks_of_the_peers_are_the_same_functions() -> None:
    for work in speed_steps.workloads():
        if work.usual is not work.model:
            x = take(work.tasks(), 0).support.x
            ours, theirs = work.model(), work.usual()
            assert ours.state_dict().keys() == theirs.state_dict().keys()
            assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_the_floor_counts_products() -> None:
    """Of one linear layer, by hand: forward, its gradient, and what second order adds to them, in multiples of 2 n m."""
    work = next(work for work in speed_steps.workloads() if work.name == "sinusoid, 25 tasks, K = 1")
    small = replace(work, model=partial(mlp, (1, 1)), tasks=speed_steps.sines(3))
    products = 2 * 10  # of ten numbers with one weight
    counted = speed_steps.floor(small) / 3 / products
    assert counted == int(counted) and 4 <= counted <= 7


def test_the_committed_table_is_the_one_of_its_numbers() -> None:
    folder = Path(__file__).parent.parent / "results" / "speed"
    found = json.loads((folder / "speed.json").read_text())
    text = speed.markdown([Row(**row) for row in found["rows"]], found["machine"], Config(**found["config"]))
    assert (folder / "speed.md").read_text() == text
    readme = " ".join((folder.parent.parent / "README.md").read_text().split())
    assert speed.highlights([Row(**row) for row in found["rows"]]) in readme


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--only", "sampler"], "unknown section 'sampler'; did you mean 'samplers'"),
        (["--rounds", "0"], "0 rounds of 0.5 seconds; give at least 1 and more than 0"),
        ([], "easyfsl, a peer, is not installed; `make speed` installs all peers"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    flags: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(package: str) -> str:
        if package == "easyfsl":
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(speed, "version", absent)
    monkeypatch.setattr(sys, "argv", ["speed.py", *flags])
    with pytest.raises(SystemExit):
        launch(Config, speed.main, {}, "")
    assert sentence in capsys.readouterr().err
