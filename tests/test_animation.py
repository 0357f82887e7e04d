"""Adaptation as a GIF: its frames, how long they stand, what changes between them, its size."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from experiments import quickstart, sinusoid
from toolkit import UserError
from toolkit.again import shown
from toolkit.plots.animation import animate
from toolkit.runs.folder import Run

pytestmark = pytest.mark.filterwarnings("error")


def images(steps: int, channels: int = 1, size: int = 28) -> dict[str, Tensor]:
    """5 ways, 1 shot, 3 queries a class; each step gets one class more right."""
    generator = torch.Generator().manual_seed(0)
    support_y, query_y = torch.arange(5), torch.arange(5).repeat(3)
    predicted = torch.stack([torch.where(query_y < k, query_y, (query_y + 1) % 5) for k in range(steps + 1)])
    return {
        "support_x": torch.rand(5, channels, size, size, generator=generator),
        "support_y": support_y,
        "query_x": torch.rand(15, channels, size, size, generator=generator),
        "query_y": query_y,
        "steps": torch.arange(steps + 1),
        "predictions": torch.nn.functional.one_hot(predicted, 5).float(),
    }


def scalars(steps: int) -> dict[str, Tensor]:
    """y = 2 x at unsorted queries; the slope of the fit grows to 2."""
    query_x = torch.linspace(-3, 3, 21)[torch.randperm(21, generator=torch.Generator().manual_seed(0))].unsqueeze(1)
    support_x = torch.tensor([[0.5], [-0.5]])
    return {
        "support_x": support_x, "support_y": 2 * support_x, "query_x": query_x, "query_y": 2 * query_x,
        "steps": torch.arange(steps + 1), "predictions": torch.stack([query_x * 2 * k / steps for k in range(steps + 1)]),
    }  # fmt: skip


def frames(path: Path) -> tuple[list[np.ndarray], list[int]]:
    shown, durations = [], []
    with Image.open(path) as gif:
        for k in range(gif.n_frames):  # type: ignore[attr-defined]
            gif.seek(k)
            shown.append(np.asarray(gif.convert("RGB")).astype(int))
            durations.append(gif.info["duration"])
    return shown, durations


@pytest.mark.parametrize("example", [images(3), scalars(3)], ids=["images", "scalars"])
def test_a_frame_for_every_step_and_the_last_stands_longer(example: dict[str, Tensor], tmp_path: Path) -> None:
    path = animate(example, "maml on toy, test task 0", tmp_path / "new" / "adaptation-0.gif")
    shown, durations = frames(path)
    assert path == tmp_path / "new" / "adaptation-0.gif" and durations == [500, 500, 500, 2000]
    assert all((np.abs(a - b).max(-1) > 60).sum() > 100 for a, b in pairwise(shown))
    with Image.open(path) as gif:
        assert gif.info["loop"] == 0


def test_the_same_example_gives_the_same_bytes(tmp_path: Path) -> None:
    for example in (images(2), scalars(2)):
        first, second = (animate(example, "t", tmp_path / name).read_bytes() for name in ("a.gif", "b.gif"))
        assert first == second


def test_a_long_title_does_not_change_the_size_between_frames(tmp_path: Path) -> None:
    for example in (images(2), scalars(2)):
        shown, _ = frames(animate(example, "a $title of many words " * 6, tmp_path / "long.gif"))
        assert len({frame.shape for frame in shown}) == 1 and len(shown) == 3


def test_colour_photographs_stay_below_a_megabyte(tmp_path: Path) -> None:
    """Noise, which compresses worst."""
    assert animate(images(10, 3, 84), "maml", tmp_path / "a.gif").stat().st_size < 1e6


def test_steps_that_change_nothing_and_a_fit_that_runs_away(tmp_path: Path) -> None:
    still = scalars(2)
    still["predictions"] = still["predictions"][:1].repeat(3, 1, 1)
    assert len(frames(animate(still, "t", tmp_path / "still.gif"))[0]) == 3
    wild = scalars(2)
    wild["predictions"][1:] *= torch.tensor([1e30, float("inf")]).view(2, 1, 1)
    assert len(frames(animate(wild, "t", tmp_path / "wild.gif"))[0]) == 3
    one = {key: tensor[:1] if key in ("steps", "predictions") else tensor for key, tensor in scalars(2).items()}
    assert frames(animate(one, "t", tmp_path / "one.gif"))[1] == [2000]


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    wide = scalars(2)
    wide["query_x"] = wide["query_x"].repeat(1, 2)
    with pytest.raises(UserError, match=r"images of classes, or x and y of shape \(n, 1\); this task's x has shape \(21, 2\)"):
        animate(wide, "t", tmp_path / "a.gif")
    vectors = images(2)
    vectors["support_x"] = vectors["support_x"].flatten(1)
    with pytest.raises(UserError, match="a task card needs images"):
        animate(vectors, "t", tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())


SHORT = {
    "iterations": 2, "validate_every": 2, "tasks": 2, "val_tasks": 2, "eval_tasks": 2, "eval_steps": 2, "compile": False,
}  # fmt: skip


def test_a_run_is_walked(tmp_path: Path) -> None:
    """All figures of a task of a finished run, of as many steps as its evaluation took; the same files each time."""
    sinusoid.main(sinusoid.Config(algorithm="maml", out=tmp_path / "run", **SHORT))  # type: ignore[arg-type]
    run = Run(tmp_path / "run")
    written = shown(run, 3, [], path=True, gif=True)
    assert {path.name for path in written} >= {"path-3.png", "path-3.pdf", "adaptation-3.gif"}
    assert len(frames(run.path / "adaptation-3.gif")[0]) == 3
    kept = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in shown(run, 3, [], path=True, gif=True)] == kept
    assert len(frames(shown(run, 0, ["--eval-steps", "4"], gif=True)[-1])[0]) == 5


def test_a_method_without_inner_steps_has_no_path_but_a_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = SHORT | {"queries": 1, "eval_queries": 1, "model": "conv4-32"}
    quickstart.main(quickstart.Config(algorithm="protonet", out=tmp_path / "run", **small))  # type: ignore[arg-type]
    with caplog.at_level("WARNING", "toolkit"):
        assert [file.name for file in shown(Run(tmp_path / "run"), 0, [], path=True)] == [
            "task-0.png",
            "task-0.pdf",
            "task-0.csv",
        ]
    assert "the weights of protonet do not move in 2 inner steps" in caplog.messages[-1]
    assert shown(Run(tmp_path / "run"), 0, [], gif=True)[-1].stat().st_size < 1e6
