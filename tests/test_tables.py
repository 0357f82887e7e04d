"""Tables of results: their cells from the runs, bold only where it is earned, and files that ask for them."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_comparison import method
from toolkit import UserError
from toolkit.runs import tables
from toolkit.runs.folder import Run
from toolkit.runs.tables import COLUMNS, cells, fill, latex, markdown, of_runs, read

FULL = {"batch_norm": "batch", "transductive": True, "sampler": "glyphs"}


def run(folder: Path, algorithm: str, values: torch.Tensor, **changed: Any) -> Run:
    return method(folder, algorithm, values.tolist(), **FULL | changed)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Three methods on the same 40 tasks: b is better than a on nearly all, c like b; two seeds of a."""
    g = torch.Generator().manual_seed(0)
    a = 0.5 + 0.1 * torch.rand(40, 2, generator=g, dtype=torch.float64)
    near = 0.1 * torch.rand(40, 2, generator=g, dtype=torch.float64)
    run(tmp_path / "reference" / "a-seed0", "maml", a)
    run(tmp_path / "reference" / "a-seed1", "maml", a + 0.001, seed=1)
    run(tmp_path / "reference" / "b", "anil", a + 0.1 + near)
    run(tmp_path / "reference" / "c", "protonet", a + 0.1 + near.flip(0))
    return tmp_path


def file(place: Path, *rows: dict[str, Any]) -> Path:
    whole = [{"tasks": "glyphs", "seeds": None, "command": "make & go_1", "published": None} | row for row in rows]
    (place / "tables").mkdir(exist_ok=True)
    (place / "tables" / "t.json").write_text(json.dumps({"rows": whole}))
    return place / "tables" / "t.json"


def test_cells_are_those_of_the_runs_over_seeds(place: Path) -> None:
    (row,) = cells(read(file(place, {"folder": "a", "seeds": 3, "published": "98.7 ± 0.4"})))
    values = torch.stack([Run(place / "reference" / f"a-seed{s}").curve.metric for s in (0, 1)])
    assert row["as trained"].startswith(f"{100 * float(values[:, :, 1].mean()):.2f} ± ")
    assert row["before"].startswith(f"{100 * float(values[:, :, 0].mean()):.2f} ± ")
    expected = {"seeds": "2", "test tasks": "40", "method": "maml", "published": "98.7 ± 0.4", "command": "`make & go_1`"}
    assert {key: row[key] for key in expected} == expected and row["batch norm"] == "batch (transductive)"


def test_bold_is_the_best_where_it_is_clear_of_all_others(place: Path) -> None:
    def bold(*folders: str) -> list[str]:
        rows = read(file(place, *({"folder": name} for name in folders)))
        return [row["method"] for row in cells(rows) if row["as trained"].startswith("**")]

    (place / "reference" / "a-seed0").rename(place / "reference" / "a")
    assert bold("a", "b") == ["anil"]
    assert bold("a", "b", "c") == [], "b and c are alike, so none is the best"
    assert bold("b") == []
    other = json.loads((place / "reference" / "b" / "curve.json").read_text()) | {"task_list_hash": "others"}
    (place / "reference" / "b" / "curve.json").write_text(json.dumps(other))
    assert bold("a", "b") == [], "other tasks cannot be compared"


def test_of_an_unknown_metric_none_is_bold(tmp_path: Path) -> None:
    values = torch.rand(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    runs = [run(tmp_path / n, n, values + d, name="macro recall") for n, d in (("maml", 0.5), ("anil", 0.1))]
    assert not any("**" in row["as trained"] for row in cells(of_runs(runs)))


def test_the_share_of_lost_tasks_is_what_the_mean_leaves_out(tmp_path: Path) -> None:
    values = torch.rand(10, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    runs = []
    for seed, lost in enumerate((slice(0, 2), slice(2, 4))):
        own = values.clone()
        own[lost] = math.nan
        runs.append(run(tmp_path / f"{seed}", "maml", own, name="squared error", seed=seed))
    (row,) = cells(of_runs(runs))
    kept = values[4:, 1]
    assert row["as trained"].startswith(f"{kept.mean():.3f} ± ") and row["as trained"].endswith("40.0% of tasks lost")
    assert f"(median {kept.quantile(0.5):.3f})" in row["as trained"]


def test_bold_is_the_smallest_error(tmp_path: Path) -> None:
    values = torch.rand(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    runs = [run(tmp_path / n, n, values + d, name="squared error") for n, d in (("maml", 0.5), ("anil", 0.1))]
    rows = of_runs(runs)
    assert [row["as trained"].startswith("**") for row in cells(rows)] == [False, True]
    assert f"(median {statistics.median((values + 0.1)[:, 1].tolist()):.3f})" in cells(rows)[1]["as trained"]


def test_a_result_that_lost_tasks_is_not_bold_and_says_so(place: Path) -> None:
    values = Run(place / "reference" / "a-seed0").curve.metric + 0.3
    values[:6, 1] = torch.nan
    run(place / "reference" / "lossy", "anil", values)
    (lossy, sound) = cells(read(file(place, {"folder": "lossy"}, {"folder": "a-seed0"})))
    assert lossy["as trained"].endswith(", 15.0% of tasks lost") and "**" not in lossy["as trained"] + sound["as trained"]
    assert "lost" not in lossy["before"] + sound["as trained"]
    values[:6, 1] = 0.9
    run(place / "reference" / "whole", "anil", values)
    assert cells(read(file(place, {"folder": "whole"}, {"folder": "a-seed0"})))[0]["as trained"].startswith("**")


def test_a_test_of_fewer_steps_than_training_says_so_and_nothing_is_bold(place: Path) -> None:
    values = Run(place / "reference" / "b").curve.metric[:, 1:]
    run(place / "reference" / "short", "protonet", values + 0.3, steps=2)
    (short, whole) = cells(read(file(place, {"folder": "short"}, {"folder": "a-seed0"})))
    assert short["as trained"].endswith(" (after 0 of 2 steps)") and "**" not in short["as trained"] + whole["as trained"]


def test_one_task_has_no_interval(tmp_path: Path) -> None:
    rows = of_runs([run(tmp_path / "one", "maml", torch.tensor([[0.2, 0.5]]))])
    assert cells(rows)[0]["as trained"] == "50.00 ± ?"


def test_signs_of_markdown_and_latex_are_escaped(place: Path) -> None:
    rows = read(file(place, {"folder": "b", "tasks": r"a^b\c | <d> ~ {e}"}))
    assert markdown(rows, ["tasks"]).splitlines()[-1] == r"| a^b\c \| <d> ~ {e} |"
    expected = r"a\textasciicircum{}b\textbackslash{}c \textbar{} \textless{}d\textgreater{} \textasciitilde{} \{e\} \\"
    assert expected in latex(rows, ["tasks"])


def test_rows_whose_runs_are_not_there_are_left_out(place: Path) -> None:
    rows = read(file(place, {"folder": "b"}, {"folder": "not made yet"}, {"folder": "nor this", "seeds": 3}))
    assert [row.entry.method for row in rows] == ["anil"]


def test_markdown_and_latex_hold_the_same_cells(place: Path) -> None:
    rows = read(file(place, {"folder": "a-seed0", "tasks": "50 % of_it"}, {"folder": "b", "tasks": "50 % of_it"}))
    head, rule, *lines = markdown(rows, ["tasks", "method", "as trained", "command"]).splitlines()
    assert head == "| tasks | method | as trained | command |" and set(rule) == set("| -")
    assert [line.split(" | ")[1] for line in lines] == ["maml", "anil"] and "**" in lines[1]
    text = latex(rows, ["tasks", "method", "as trained", "command"])
    assert text.startswith("\\begin{tabular}{llll}\n\\toprule\n") and text.endswith("\\bottomrule\n\\end{tabular}")
    number = lines[1].split("**")[1].replace("±", "$\\pm$")
    assert f"50 \\% of\\_it & anil & \\textbf{{{number}}} & \\texttt{{make \\& go\\_1}} \\\\" in text


def test_a_file_gets_the_tables_that_it_asks_for_and_nothing_else_changes(place: Path) -> None:
    file(place, {"folder": "b"})
    asked = "# Title\n\n<!-- table: tables/t.json | method, seeds -->\nold\n\nold\n<!-- end -->\ntext\n"
    (place / "README.md").write_text(asked)
    assert fill(place / "README.md")
    filled = "| method | seeds |\n| --- | --- |\n| anil | 1 |"
    assert (place / "README.md").read_text() == asked.replace("old\n\nold", filled)
    assert not fill(place / "README.md")
    (place / "README.md").write_text(asked.replace(" | method, seeds", ""))
    assert fill(place / "README.md") and all(name in (place / "README.md").read_text() for name in COLUMNS)


def test_empty_places_are_filled_one_by_one(place: Path) -> None:
    """A place without a line in it must not reach for the end of the next one."""
    file(place, {"folder": "b"})
    asked = (
        "<!-- table: tables/t.json | method -->\n<!-- end -->\nbetween\n<!-- table: tables/t.json | seeds -->\n<!-- end -->\n"
    )
    (place / "README.md").write_text(asked)
    fill(place / "README.md")
    text = (place / "README.md").read_text()
    assert text.count("<!-- table: ") == text.count("<!-- end -->") == 2 and "between" in text
    assert "| anil |" in text and "| seeds |" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no table of results"), ("[]", "is no table of results"),
        ('{"rows": [{"tasks": "x"}]}', "its rows need tasks, folder, seeds, command, published"),
    ],
)  # fmt: skip
def test_what_is_no_table(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=said):
        read(tmp_path / "t.json")


def test_what_else_is_refused(place: Path) -> None:
    with pytest.raises(UserError, match=r"there is no table .*no.json; give a table file"):
        read(place / "no.json")
    (place / "plain.md").write_text("no table")
    with pytest.raises(UserError, match=r"plain\.md asks for no table; put <!-- table: FILE -->"):
        fill(place / "plain.md")
    with pytest.raises(UserError, match=r"unknown column 'seed'.*did you mean 'seeds'"):
        tables.checked(["seed"])


def test_a_damaged_run_is_left_out_with_a_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolkit.cli import main

    (place / "reference" / "c" / "curve.json").write_text("{")
    good, bad = (str(place / "reference" / name) for name in ("b", "c"))
    monkeypatch.setattr("sys.argv", ["toolkit", "table", good, bad])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    out, said = capsys.readouterr()
    assert "anil" in out and "protonet" not in out
    assert said.startswith("left out: ") and "curve.json is damaged" in said and said.count("\n") == 1
