"""The README's code runs as printed."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from experiments import quickstart
from toolkit import cli
from toolkit.flags import launch
from toolkit.parts import assemble

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_blocks_run(capsys) -> None:  # type: ignore[no-untyped-def]
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block.replace("iterations=1000", "iterations=20").replace("tasks=600", "tasks=30"), names)
    assert "tensor(" in capsys.readouterr().out


def test_the_plug_in_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for line in README.splitlines() if "my_sampler.py" in line]
    assert [line.split()[:2] for line in lines] == [
        ["toolkit", "new"], ["toolkit", "check-sampler"], ["python", "experiments/quickstart.py"]
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for line in lines[:2]:
        monkeypatch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit) as done:
            cli.main()
        assert done.value.code == 0, line
    monkeypatch.setattr(sys, "argv", lines[2].split()[1:])
    seen: list[quickstart.Config] = []
    launch(quickstart.Config, seen.append, {}, "")
    _, _, tasks = assemble(seen[0])
    assert (tasks.test.ways, tasks.test.gap) == (5, 3)  # type: ignore[attr-defined]


def words(pattern: str) -> list[list[str]]:
    """The commands of the README that match, without their comments."""
    return [shlex.split(line, comments=True) for line in README.splitlines() if re.match(pattern, line)]


EXPERIMENTS = words(r"python experiments/")


@pytest.mark.parametrize("command", EXPERIMENTS, ids=" ".join)
def test_the_experiments_take_their_flags(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word, as far as the training, which takes hours."""
    module = importlib.import_module(command[1].removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(sys, "argv", command[1:])
    seen: list[object] = []
    launch(module.Config, seen.append, getattr(module, "PRESETS", {}), "")
    (config,) = seen
    flags = [word.removeprefix("--").replace("-", "_") for word in command[2:] if word.startswith("--")]
    assert all(hasattr(config, flag.split(".")[0]) for flag in flags)


AFTER = words(r"toolkit (?!new|check-sampler|plan)")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    (place / "my_net.py").write_text(
        "from torch import nn\n\n\ndef Net(inputs, outputs):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 8), nn.Tanh(), nn.Linear(8, outputs))\n"
    )
    short = {"iterations": 2, "validate_every": 2, "tasks": 2, "val_tasks": 2, "eval_tasks": 6, "eval_steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toolkit.plots.save.draw_run", lambda folder: [])  # figures have tests of their own
        for name, method in (("RUN", "maml"), ("RUN_A", "maml"), ("RUN_B", "anil")):
            given = short | {"queries": 1, "eval_queries": 1, "model": "mlp"}
            quickstart.main(quickstart.Config(algorithm=method, out=place / name, **given))  # type: ignore[arg-type]
    return place


@pytest.mark.parametrize("command", AFTER, ids=" ".join)
def test_the_commands_after_a_run_run(command: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word, with runs that are called so."""
    monkeypatch.chdir(runs)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0


def test_all_commands_are_looked_at() -> None:
    assert len(EXPERIMENTS) >= 7 and len(AFTER) == 8


def test_every_link_and_experiment_exists() -> None:
    root = Path(__file__).parent.parent
    for target in [*re.findall(r"\]\(([^)#]+)\)", README), *re.findall(r"python (experiments/\w+\.py)", README)]:
        assert (root / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 150
