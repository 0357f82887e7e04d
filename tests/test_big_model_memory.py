"""What a big model's meta-gradient needs: the table, and all rows on a small transformer."""

import json
from pathlib import Path

import pytest

from experiments.big_model_memory import ROWS, Config, main, table, tasks_of

SMALL = """from collections import OrderedDict
from torch import nn
from torchvision.models import VisionTransformer


def make(outputs):
    body = VisionTransformer(16, 8, 2, 2, 16, 32)
    body.heads = nn.Identity()
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(16, outputs)))
"""


def test_the_table_says_what_a_further_task_costs() -> None:
    known = {"adapter bytes": 2**20, "model bytes": 2**28}
    rows = [known | {"subject": ROWS[0][0], "tasks": n, "bytes": 2**30 + 2**20 * n, "seconds": 1.4} for n in (1, 3)]
    text = table([*rows, known | {"subject": "another", "tasks": 1, "failed": "needs more than 1 GiB"}])
    assert "| toolkit, steps recomputed | 3 | 1.00 | 1 |" in text
    assert "| another | 1 | needs more than 1 GiB |  |" in text
    assert "A further task costs 1 MiB (0.00 of the first); its adapters are 1.00 MiB, the model 256 MiB." in text


def test_the_tasks_are_five_way_one_shot() -> None:
    tasks = tasks_of(Config(size=16), 3)
    assert tasks.support.x.shape == (3, 5, 3, 16, 16) and tasks.query.y.shape == (3, 25)  # type: ignore[union-attr]
    assert all(sorted(y.tolist()) == [0, 1, 2, 3, 4] for y in tasks.support.y)


@pytest.mark.slow
def test_all_rows_of_a_small_transformer(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(SMALL)
    main(Config(model=f"{tmp_path / 'small.py'}:make", size=16, rank=2, steps=2, gib=4.0, threads=1, out=tmp_path))
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert [(row["subject"], row["tasks"]) for row in rows] == list(ROWS)
    failed = {row["subject"]: row["failed"] for row in rows if "failed" in row}
    assert list(failed) == ["learn2learn, as it is"]
    assert "derivative for aten::_scaled_dot_product" in failed["learn2learn, as it is"]
    assert (tmp_path / "memory.md").exists()
