"""The README's code runs as printed."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_blocks_run(capsys) -> None:  # type: ignore[no-untyped-def]
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block.replace("iterations=1000", "iterations=20").replace("tasks=600", "tasks=30"), names)
    assert "tensor(" in capsys.readouterr().out


def test_every_link_and_experiment_exists() -> None:
    root = Path(__file__).parent.parent
    for target in [*re.findall(r"\]\(([^)#]+)\)", README), *re.findall(r"python (experiments/\w+\.py)", README)]:
        assert (root / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 150
