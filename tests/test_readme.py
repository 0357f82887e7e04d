"""The README's code runs as printed."""

import re
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


def test_every_link_and_experiment_exists() -> None:
    root = Path(__file__).parent.parent
    for target in [*re.findall(r"\]\(([^)#]+)\)", README), *re.findall(r"python (experiments/\w+\.py)", README)]:
        assert (root / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 150
