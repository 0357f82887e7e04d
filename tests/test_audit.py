"""The published audit: it finds what is planted, and the page says what the figures say."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from experiments.tools import audit
from experiments.tools.audit_tables import BEGIN, END, FIGURES, LISTED, PAGE, made_part, page, tables
from toolkit.data.bank import ClassBank, with_rotations
from toolkit.plugins import names
from toolkit.samplers import AllClasses, Augmented, Episodes, Sinusoid
from toolkit.task import Batch, Task, TaskSampler, draw, take

FOUND = json.loads(FIGURES.read_text())


def banks() -> dict[str, ClassBank]:
    """Three splits of 6 classes of 4 random images."""
    pixels = torch.randint(256, (3, 24, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    first = torch.arange(7) * 4
    return {s: ClassBank(pixels[i], first, tuple(f"{s} {c}" for c in range(6)), s) for i, s in enumerate(audit.SPLITS)}


def counts(found: dict[str, ClassBank], split: str = "train") -> tuple[int, ...]:
    """Pairs of equal items of a split: in one class, in two, turned, turned onto itself."""
    rows = audit.dataset_rows("toy", found, audit.equal_pairs("toy", found))
    row = next(row for row in rows if row["split"] == split)
    return tuple(row[key] for key in ("same class", "two classes", "turned", "itself"))


def turned(found: dict[str, ClassBank]) -> dict[str, ClassBank]:
    return {split: with_rotations(bank) for split, bank in found.items()}


def test_random_images_have_no_equal_items() -> None:
    assert not audit.equal_pairs("toy", banks())
    assert not audit.equal_pairs("toy", turned(banks()))


@pytest.mark.parametrize("rotations", [False, True])
def test_a_planted_duplicate_is_counted_once_and_by_its_classes(rotations: bool) -> None:
    found = banks()
    items = found["train"].items
    items[1], items[9] = items[0], items[20]
    assert counts(turned(found) if rotations else found) == (1, 1, 0, 0)
    assert counts(turned(found) if rotations else found, "test") == (0, 0, 0, 0)


def test_equal_drawings_are_named_by_their_classes_unturned() -> None:
    found = banks()
    found["train"].items[:12] = found["train"].items[12:]
    assert counts(turned(found)) == (0, 12, 0, 0)
    assert not [pair for pair in audit.equal_pairs("toy", turned(found)) if "deg" in f"{pair.one} {pair.other}"]


def test_three_equal_items_are_three_pairs() -> None:
    found = banks()
    found["val"].items[4:7] = found["val"].items[0]
    assert counts(found, "val") == (3, 3, 0, 0)


def test_a_duplicate_across_splits_is_a_pair_of_two_splits_with_both_classes() -> None:
    found = banks()
    found["test"].items[23] = found["train"].items[5]
    [pair] = audit.equal_pairs("toy", found)
    assert pair == audit.Pair("toy", "equal", ("train", "train 1"), ("test", "test 5"))
    assert counts(found) == counts(found, "test") == (0, 0, 0, 0)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_drawing_turned_onto_another_is_counted_apart_and_once(quarters: int) -> None:
    found = banks()
    found["train"].items[8] = found["train"].items[0].rot90(quarters, (-2, -1))
    assert counts(found) == (0, 0, 0, 0)
    assert counts(turned(found)) == (0, 0, 1, 0)
    found["val"].items[3] = found["test"].items[2].rot90(quarters, (-2, -1))
    across = [p for p in audit.equal_pairs("toy", turned(found)) if p.one[0] != p.other[0]]
    assert [(p.kind, p.one[0], p.other[0]) for p in across] == [("turned", "val", "test")]


def test_a_drawing_that_equals_its_own_turn_is_counted_apart() -> None:
    found = banks()
    found["train"].items[7] = 9
    assert counts(turned(found)) == (0, 0, 0, 1)


def test_items_are_compared_by_value_and_not_by_hash_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "hashes", lambda rows: torch.zeros(len(rows), dtype=torch.int64))
    found = banks()
    found["train"].items[1] = found["train"].items[0]
    assert len(audit.equal_pairs("toy", found)) == 1


def test_rows_count_classes_with_turns_and_items_without() -> None:
    row = audit.dataset_rows("toy", turned(banks()), [])[0]
    assert (row["classes"], row["entries"], row["items"], row["turns"]) == (24, 96, 24, True)
    assert not audit.dataset_rows("toy", banks(), [])[0]["turns"]


@dataclass(frozen=True)
class Leaky:
    """Episodes whose first query item is a support item."""

    bank: ClassBank

    def __call__(self, generator: torch.Generator) -> Task:
        return take(self.draw_many(iter([generator])), 0)

    def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
        task = Episodes(self.bank, 3, 1, 2).draw_many(generators)
        assert isinstance(task.query.x, torch.Tensor) and isinstance(task.support.x, torch.Tensor)
        return task._replace(query=Batch(torch.cat([task.support.x[:, :1], task.query.x[:, 1:]], 1), task.query.y))


def row(make: Callable[[ClassBank], TaskSampler], found: dict[str, ClassBank] | None = None) -> dict[str, object]:
    given = found or banks()
    return audit.audited("toy", "toy", "train", lambda split: make(given[split]), 100)


def test_a_clean_sampler_has_no_faults_and_all_its_tasks() -> None:
    found = row(lambda bank: Episodes(bank, 3, 1, 2))
    assert found["faults"] == [] and found["tasks"] == 100
    assert found["identity"] == found["content"] == found["twice"] == 0 and not found["by design"]


def test_a_planted_overlap_is_a_fault_in_every_task() -> None:
    found = row(Leaky)
    assert {"disjoint by identity", "disjoint by content"} <= set(found["faults"])  # type: ignore[call-overload]
    assert found["identity"] == found["content"] == 100


def test_equal_items_of_the_data_overlap_by_content_alone() -> None:
    found = banks()
    for c in range(6):
        found["train"].items[4 * c + 1] = found["train"].items[4 * c]
    planted = row(lambda bank: Episodes(bank, 3, 1, 2), found)
    assert planted["identity"] == 0 and 0 < planted["content"] <= 100 and planted["faults"] == []  # type: ignore[operator]


def test_copies_that_equal_their_original_are_twice_in_a_set_and_no_overlap() -> None:
    found = row(lambda bank: Augmented(Episodes(bank, 3, 1, 2), lambda images, generator: images, copies=1, queries=False))
    assert found["content"] == found["identity"] == 0 and found["twice"] == 100


def test_splits_that_share_classes_are_a_fault_of_the_training_row() -> None:
    found = banks()
    found["test"] = replace(found["test"], names=found["train"].names)
    assert row(lambda bank: Episodes(bank, 3, 1, 2), found)["faults"] == ["leakage"]


def test_a_family_has_no_identity_and_all_classes_repeats_by_design() -> None:
    family = audit.audited("toy", "-", "train", lambda split: Sinusoid(), 50)
    assert family["identity"] is None and family["faults"] == [] and family["content"] == 0
    design = row(AllClasses)
    assert design["by design"] and design["identity"] and design["faults"] == []


def test_a_sampler_that_fails_has_no_tasks() -> None:
    def fails(generator: torch.Generator) -> Task:
        raise ValueError("no")

    found = audit.audited("toy", "-", "train", lambda split: fails, 10)
    assert found["faults"] == ["runs"] and found["tasks"] == 0


def test_the_loaders_of_the_audit_hold_the_classes_of_glyphs() -> None:
    tasks = draw(audit.SAMPLERS["Loaders", "glyphs"]("test", Path("unused")), 4, seed=0)
    assert tasks.support.x.shape == (4, 5, 1, 28, 28) and tasks.query.y.shape == (4, 75)  # type: ignore[union-attr]


def test_the_page_is_what_the_figures_say() -> None:
    assert made_part(PAGE.read_text()) == tables(FOUND)


def test_the_published_audit_is_whole_and_clean() -> None:
    assert [(r["sampler"], r["dataset"], r["split"]) for r in FOUND["samplers"]] == audit.jobs()
    for found in FOUND["samplers"]:
        assert found["tasks"] == 10_000 and found["faults"] == [], found
        assert found["by design"] == (found["sampler"] == "AllClasses")
        assert found["by design"] or not found["identity"], found
    equal = {pair["dataset"] for pair in FOUND["pairs"]}
    assert all(equal & set(f["dataset"].split(", ")) for f in FOUND["samplers"] if f["content"] and not f["by design"])
    assert [(r["dataset"], r["split"]) for r in FOUND["datasets"]] == [(d, s) for d in audit.DATASETS for s in audit.SPLITS]


def test_tables_show_counts_names_and_what_has_none() -> None:
    found = FOUND | {"samplers": [dict(FOUND["samplers"][0], faults=["runs"], identity=None, content=1234, tasks=9999)]}
    made = tables(found)
    assert "| 9,999 | runs | - | 1,234 |" in made
    assert "| girl (train) | baby (test) |" in made and "| cifar-fs-30 | 1 | 3 | 0 | - | - | - |" in made
    many = tables(found | {"pairs": FOUND["pairs"] * 10})
    assert f"{len(FOUND['pairs']) * 10 - LISTED} more are in datasets.json." in many
    assert sum(" | equal | " in line for line in many.splitlines()) == LISTED


def test_only_what_is_between_the_markers_is_replaced() -> None:
    changed = page(f"above\n{BEGIN}\nold\n{END}\nbelow\n", "new")
    assert changed == f"above\n{BEGIN}\n\nnew\n\n{END}\nbelow\n" and made_part(changed) == "new"
    assert page(changed, "new") == changed


def test_every_dataset_by_name_is_on_the_page() -> None:
    text = PAGE.read_text()
    assert not [name for name in names("datasets") if f"| `{name}` |" not in text]


@pytest.mark.skipif("TOOLKIT_DATA" not in os.environ, reason="needs the data folder, as TOOLKIT_DATA")
@pytest.mark.parametrize("dataset", audit.DATASETS)
def test_the_published_counts_are_those_of_the_data(dataset: str) -> None:
    found = {split: audit.bank_of(dataset, split, Path(os.environ["TOOLKIT_DATA"])) for split in audit.SPLITS}
    pairs = audit.equal_pairs(dataset, found)
    assert audit.dataset_rows(dataset, found, pairs) == [r for r in FOUND["datasets"] if r["dataset"] == dataset]
    assert json.loads(json.dumps([p._asdict() for p in pairs])) == [p for p in FOUND["pairs"] if p["dataset"] == dataset]
