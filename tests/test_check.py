"""`check_sampler`: each fault is caught by the check that is named after it, and clean samplers have none."""

import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from toolkit import Batch, Task, TaskSampler, UserError, draw
from toolkit.data.bank import ClassBank, with_rotations
from toolkit.samplers import AllClasses, Augmented, Episodes, Linear, Loaders, Mixed, Sinusoid, crop_flip
from toolkit.samplers.audit import BATCH, hashes
from toolkit.samplers.check import Report, check_sampler
from toolkit.samplers.identity import numbered
from toolkit.task import IGNORED, Padded, take


def bank(classes: int = 12, each: int = 8, seed: int = 0, name: str = "class") -> ClassBank:
    """Random images of 6 x 6 pixels."""
    pixels = torch.randint(256, (classes * each, 1, 6, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return ClassBank(pixels, torch.arange(classes + 1) * each, tuple(f"{name}-{c}" for c in range(classes)), "toy")


BANK = bank()
LOOSE = Episodes(BANK, 3, 2, 3)
DOUBLED = replace(BANK, items=BANK.items[torch.arange(96) // 2])


def clean(generator: torch.Generator) -> Task:
    """A faultless function: 3 ways, 1 shot, 2 queries of 4 numbers each."""
    x = torch.randn(9, 4, generator=generator)
    return Task(Batch(x[:3], torch.arange(3)), Batch(x[3:], torch.arange(3).repeat(2)))


def tokens(generator: torch.Generator) -> Task:
    def batch(n: int) -> Batch:
        x = torch.randint(10_000, (n, 6), generator=generator)
        return Batch({"tokens": x, "mask": x > 100}, torch.arange(3).repeat(n // 3))

    return Task(batch(3), batch(6))


def padded(generator: torch.Generator) -> Task:
    """Tasks of 2 or 3 ways, filled up to 3."""

    def fill(batch: Batch) -> Batch:
        real = batch.y < ways
        return Batch(Padded(batch.x * real[:, None], real), torch.where(real, batch.y, IGNORED))

    ways = int(torch.randint(2, 4, (), generator=generator))
    support, query = clean(generator)
    return Task(fill(support), fill(query))


@dataclass(frozen=True)
class Pixels:
    """Coordinates of a grid without replacement, and a number at each: inputs of few values."""

    size: int = 30

    def __call__(self, generator: torch.Generator) -> Task:
        x = torch.randperm(self.size, generator=generator)[:20].float()[:, None] / self.size
        y = torch.randn(20, 1, generator=generator)
        return Task(Batch(x[:10], y[:10]), Batch(x[10:], y[10:]))


def loaders() -> Loaders:
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    return Loaders([DataLoader(TensorDataset(x, torch.arange(60) % 5), 4)], 1, 4, per_class=True, permute=True)


CLEAN: dict[str, Callable[[], TaskSampler]] = {
    "episodes": lambda: LOOSE,
    "one way": lambda: Episodes(BANK, 1, 2, 2),
    "episodes with rotations": lambda: Episodes(with_rotations(BANK), 5, 1, 3),
    "episodes of floats": lambda: Episodes(replace(BANK, items=BANK.items.float() / 255), 3, 1, 2),
    "episodes of tokens": lambda: Episodes(replace(BANK, items=BANK.items.flatten(1).long()), 3, 1, 2),
    "sinusoid": Sinusoid,
    "linear": Linear,
    "loaders": loaders,
    "function": lambda: clean,
    "dict": lambda: tokens,
    "augmented": lambda: Augmented(LOOSE, crop_flip),
    "augmented copies": lambda: Augmented(LOOSE, crop_flip, copies=2, queries=False),
    "padded": lambda: padded,
    "pixels": Pixels,
    "mixed": lambda: Mixed([LOOSE, Episodes(bank(seed=1), 3, 2, 3)]),
    "mixed, of a bank with equal items": lambda: Mixed([LOOSE, Episodes(DOUBLED, 3, 2, 3)]),
}


@pytest.mark.parametrize("name", CLEAN)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_clean_sampler_has_no_fault(name: str, seed: int) -> None:
    report = check_sampler(CLEAN[name](), 100, seed)
    assert report.ok and report.faults == (), str(report)
    assert report.tasks_per_second > 0
    shown = {
        "linear": ["dtype"],
        "mixed, of a bank with equal items": ["disjoint by content"],
        "augmented copies": ["disjoint by content"],
        "padded": ["labels"],
    }
    # The number of items of a label varies where tasks are padded: not here, but Linear is float64 by design.
    notes = [finding.check for finding in report.findings if finding.level == "note"]
    assert set(notes) <= set(shown.get(name, [])), str(report)


def changed(**parts: Callable[[Tensor], Tensor]) -> TaskSampler:
    """The clean function with some of its tensors changed."""

    def sampler(generator: torch.Generator) -> Task:
        (a, b), (c, d) = clean(generator)
        given = {"support_x": a, "support_y": b, "query_x": c, "query_y": d}
        a, b, c, d = (parts[name](value) if name in parts else value for name, value in given.items())
        return Task(Batch(a, b), Batch(c, d))

    return sampler


def raising(generator: torch.Generator) -> Task:
    raise KeyError("no such\nfile")


def leaving(generator: torch.Generator) -> Task:
    raise SystemExit("gone")


def support_in_query(generator: torch.Generator) -> Task:
    support, query = clean(generator)
    return Task(support, Batch(torch.cat([query.x[:5], support.x[2:]]), query.y))  # type: ignore[index, list-item]


@dataclass(frozen=True)
class Replacing:
    """Draws items with replacement from a bank."""

    bank: ClassBank

    def __call__(self, generator: torch.Generator) -> Task:
        classes = torch.randperm(self.bank.classes, generator=generator)[:2]
        places = torch.randint(8, (2, 4), generator=generator)
        x = self.bank.read(self.bank.first[classes][:, None] + places).float() / 255
        return Task(Batch(x[:, 0], torch.arange(2)), Batch(x[:, 1:].flatten(0, 1), torch.arange(2).repeat_interleave(3)))


@dataclass(frozen=True)
class Fixed:
    """Labels of a task that are the number of the class in the bank, in one way or another."""

    bank: ClassBank
    order: bool = False

    def __call__(self, generator: torch.Generator) -> Task:
        inner = Episodes(self.bank, 3, 1, 2) if self.order else Episodes(self.bank.select([0, 1, 2]), 3, 1, 2)
        support, query = inner(generator)
        brightness = support.x.flatten(1)[:, 0]  # type: ignore[union-attr]
        rank = brightness.argsort().argsort()
        return Task(support._replace(y=rank), query._replace(y=rank[query.y]))


def dark(items: int = 96) -> ClassBank:
    """A bank whose classes are ordered by brightness, which all their pixels show."""
    pixels = torch.arange(items, dtype=torch.float32)[:, None, None, None].expand(-1, 1, 6, 6).contiguous()
    return replace(BANK, items=pixels)


class Counting:
    """Hands out tasks by the number of the call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, generator: torch.Generator) -> Task:
        self.calls += 1
        return clean(torch.Generator().manual_seed(self.calls))


@dataclass(frozen=True)
class BatchesOfTheirOwn:
    """Draws batches by one generator only."""

    def __call__(self, generator: torch.Generator) -> Task:
        return clean(generator)

    def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
        many = list(generators)
        return draw(lambda _: clean(many[0]), len(many), 0)


@dataclass(frozen=True)
class FewerTasks:
    def __call__(self, generator: torch.Generator) -> Task:
        return clean(generator)

    def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
        return draw(clean, max(1, len(list(generators)) - 1), 0)


@dataclass(frozen=True)
class Expanded:
    def __call__(self, generator: torch.Generator) -> Task:
        return take(self.draw_many(iter([generator])), 0)

    def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
        x = torch.stack([torch.randn(9, 4, generator=g) for g in generators])
        y = [torch.arange(3).expand(len(x), -1).repeat(1, 1), torch.arange(3).repeat(2).expand(len(x), -1)]
        return Task(Batch(x[:, :3], y[0]), Batch(x[:, 3:], y[1]))


def same_always(generator: torch.Generator) -> Task:
    return clean(torch.Generator().manual_seed(0))


def ignores_the_seed(generator: torch.Generator) -> Task:
    """One of two tasks."""
    return clean(torch.Generator().manual_seed(int(torch.randint(2, (), generator=generator))))


def torch_global(generator: torch.Generator) -> Task:
    x = torch.randn(9, 4)
    return Task(Batch(x[:3], torch.arange(3)), Batch(x[3:], torch.arange(3).repeat(2)))


def python_global(generator: torch.Generator) -> Task:
    shift = random.random()
    return changed(support_x=lambda x: x + shift, query_x=lambda x: x + shift)(generator)


def numpy_global(generator: torch.Generator) -> Task:
    shift = np.random.rand()
    return changed(support_x=lambda x: x + shift, query_x=lambda x: x + shift)(generator)


def global_read_behind_a_fork(generator: torch.Generator) -> Task:
    with torch.random.fork_rng(devices=[]):
        shift = torch.rand(())
    return changed(support_x=lambda x: x + shift, query_x=lambda x: x + shift)(generator)


def global_reseeded(generator: torch.Generator) -> Task:
    torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
    return torch_global(generator)


DATA = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))


def views_of_data(generator: torch.Generator) -> Task:
    start = int(torch.randint(41, (), generator=generator))
    x = DATA[start : start + 9]
    return Task(Batch(x[:3], torch.arange(3)), Batch(x[3:], torch.arange(3).repeat(2)))


def labels_in_one_place(generator: torch.Generator) -> Task:
    y = torch.arange(3)
    x = torch.randn(6, 4, generator=generator)
    return Task(Batch(x[:3], y), Batch(x[3:], y))


@dataclass(frozen=True)
class ViewOfBank:
    bank: ClassBank

    def __call__(self, generator: torch.Generator) -> Task:
        start = int(torch.randint(80, (), generator=generator))
        x = self.bank.items[start : start + 9]
        return Task(Batch(x[:3], torch.arange(3)), Batch(x[3:], torch.arange(3).repeat(2)))


def ragged(generator: torch.Generator) -> Task:
    n = int(torch.randint(1, 4, (), generator=generator))
    return changed(query_x=lambda x: x[: 3 * n], query_y=lambda y: y[: 3 * n])(generator)


def half_the_time_double(generator: torch.Generator) -> Task:
    double = bool(torch.rand((), generator=generator) < 0.1)
    return changed(support_x=lambda x: x.double() if double else x)(generator)


def nan_at_times(generator: torch.Generator) -> Task:
    rare = bool(torch.rand((), generator=generator) < 0.05)
    return changed(query_x=lambda x: x.index_fill(0, torch.tensor([4]), float("nan")) if rare else x)(generator)


def labelled_filling(generator: torch.Generator) -> Task:
    support, query = padded(generator)
    return Task(support, query._replace(y=query.y.clamp(min=0)))


@dataclass(frozen=True)
class Leaking:
    """Wraps a sampler, and puts a support item into the query set."""

    sampler: TaskSampler

    def __call__(self, generator: torch.Generator) -> Task:
        support, query = self.sampler(generator)
        return Task(support, Batch(torch.cat([support.x[:1], query.x[1:]]), query.y))  # type: ignore[index, list-item]


DISJOINT = {"disjoint by content", "disjoint by identity"}
# What is wrong: the sampler, the checks that must say so, and a part of the sentence.
FAULTS: dict[str, tuple[Any, set[str], str]] = {
    "raises": (raising, {"runs"}, r"KeyError: 'no such\\nfile', in task 0 \(seed 5, split 'val'\); replay"),
    "exits": (leaving, {"runs"}, "SystemExit: gone"),
    "no task": (lambda g: (1, 2), {"type"}, "returned a tuple"),
    "no batch": (lambda g: Task((1, 2), (3, 4)), {"type"}, "support is a tuple"),  # type: ignore[arg-type]
    "array": (changed(query_x=lambda x: x.numpy()), {"type"}, "x of query is a ndarray"),  # type: ignore[arg-type, return-value]
    "list": (changed(support_x=lambda x: [x, x]), {"type"}, "x of support is a list of 2"),  # type: ignore[arg-type, return-value]
    "sparse": (changed(support_x=lambda x: x.to_sparse()), {"type"}, "x of support is a sparse tensor"),
    "labels no tensor": (changed(query_y=lambda y: y.tolist()), {"type"}, "y of query is a list"),
    "another number of tasks": (FewerTasks(), {"type"}, "for 32 generators, not one task for each"),
    "fewer targets": (changed(query_y=lambda y: y[:5]), {"sizes"}, r"query\.x \(6, 4\), query\.y \(5,\)"),
    "empty query": (changed(query_x=lambda x: x[:0], query_y=lambda y: y[:0]), {"sizes"}, r"query\.x \(0, 4\)"),
    "target without rows": (changed(support_y=lambda y: y[0]), {"sizes"}, r"support\.y \(\)"),
    "items of two shapes": (changed(query_x=lambda x: x[:, :2]), {"sizes"}, "items differ in shape"),
    "ragged": (ragged, {"stable"}, r"tasks 0 and \d+ differ: float32 of shape \(\d, 4\) against float32 of shape"),
    "changing dtype": (half_the_time_double, {"stable"}, "float32 of shape .* against float64"),
    "NaN": (nan_at_times, {"dtype"}, "of 100 tasks hold NaN or infinite numbers, first task"),
    "short integers": (changed(support_y=lambda y: y.int(), query_y=lambda y: y.int()), {"dtype"}, "y is int32"),
    "targets of two kinds": (changed(query_y=lambda y: y.float()), {"dtype"}, "int64 in the support set and float32"),
    "negative label": (changed(support_y=lambda y: y - 1, query_y=lambda y: y - 1), {"labels"}, "negative labels"),
    "labels from 1": (changed(support_y=lambda y: y + 1, query_y=lambda y: y + 1), {"labels"}, "labels with gaps"),
    "label gap": (changed(support_y=lambda y: y * 2, query_y=lambda y: y * 2), {"labels"}, "100 of 100 .* first is task 0"),
    "huge label": (changed(query_y=lambda y: y.where(y < 2, 10**12)), {"labels"}, "query labels that no support item has"),
    "query class unknown": (changed(support_y=lambda y: y.clamp(max=1)), {"labels"}, "query labels that no support item has"),
    "nothing to judge": (changed(query_y=lambda y: y * 0 + IGNORED), {"labels"}, "query set without labels"),
    "labelled filling": (labelled_filling, {"labels"}, "filling with a label"),
    "support in query": (support_in_query, {"disjoint by content"}, "support item of equal content is again .* 100 of 100"),
    "twice in the query": (changed(query_x=lambda x: x[[0, 1, 2, 3, 4, 0]]), {"disjoint by content"}, "is twice in one set"),
    "with replacement": (Replacing(BANK), DISJOINT, "support item is again in the query set"),
    "leak in a wrapper": (Leaking(Episodes(BANK, 3, 1, 2)), {"disjoint by content"}, "support item of equal content"),
    "labels by heart": (Fixed(dark()), {"label meaning"}, "each class has the same label in every task"),
    "counts calls": (Counting(), {"deterministic"}, "drawn again, from an equal generator, is another task"),
    "one generator for a batch": (BatchesOfTheirOwn(), {"deterministic"}, r"task \d+ drawn alone is another"),
    "always the same": (same_always, {"different"}, "every task is the same"),
    "torch's global numbers": (torch_global, {"global random"}, "moves the global random numbers of torch;"),
    "python's global numbers": (python_global, {"global random"}, "moves the global random numbers of Python;"),
    "numpy's global numbers": (numpy_global, {"global random"}, "moves the global random numbers of numpy;"),
    "global numbers in a fork": (global_read_behind_a_fork, {"global random"}, "change with the global random numbers"),
    "global numbers reseeded": (global_reseeded, {"global random"}, "moves the global random numbers of torch;"),
    "views of data": (views_of_data, {"sharing"}, "lies in the memory of another"),
    "views of the bank": (ViewOfBank(replace(BANK, items=BANK.items.float())), {"sharing"}, "is a view of the bank"),
    "labels in one place": (labels_in_one_place, {"sharing"}, r"changing support\.y in place changes query\.y"),
    "labels in one place in a batch": (Expanded(), {"sharing"}, r"tasks of a batch share the memory of query\.y"),
    "gradient": (changed(support_x=lambda x: x.requires_grad_()), {"gradient-free"}, r"support\.x requires a gradient"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_by_the_check_of_its_name_and_by_no_other(name: str) -> None:
    sampler, checks, sentence = FAULTS[name]
    report = check_sampler(sampler, 100, seed=5, split="val")
    assert not report.ok and set(report.faults) == checks, str(report)
    texts = [finding.text for finding in report.findings if finding.level == "fault"]
    assert any(re.search(sentence, text) for text in texts), texts
    assert all("\n" not in text for text in texts)


def finding(report: Report, check: str) -> tuple[str, str]:
    [found] = [(level, text) for name, level, text in report.findings if name == check]
    return found


def test_a_failure_late_in_the_stream_is_replayed_by_the_call_in_the_report() -> None:
    def rare(generator: torch.Generator) -> Task:
        if torch.rand((), generator=generator) < 0.02:
            raise RuntimeError("rare")
        return clean(generator)

    @dataclass(frozen=True)
    class Batched:
        def __call__(self, generator: torch.Generator) -> Task:
            return rare(generator)

        def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
            return draw(lambda _: rare(next(generators)), BATCH, 0)

    calls = set[str]()
    for sampler in (rare, Batched()):
        report = check_sampler(sampler, 320, seed=3)
        assert report.faults == ("runs",)
        text = finding(report, "runs")[1]
        assert text.startswith("RuntimeError: rare, in task ") and "tasks after it were not looked at" in text
        call = text.split("replay it with ")[1].split(";")[0]
        calls.add(call)
        with pytest.raises(RuntimeError, match="rare"):
            eval(call, {"draw": draw, "sampler": sampler})
    assert len(calls) == 1
    start = int(call.split("start=")[1].strip(")"))
    assert start > BATCH, "the first batch is whole, so that the other checks have tasks"
    draw(rare, start, 3)


def test_a_failure_of_batches_alone_names_the_batch() -> None:
    @dataclass(frozen=True)
    class Batched:
        def __call__(self, generator: torch.Generator) -> Task:
            return clean(generator)

        def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
            raise RuntimeError("broken")

    text = finding(check_sampler(Batched(), 40, seed=3, split="test"), "runs")[1]
    assert text.startswith(
        "RuntimeError: broken, in draw_many for tasks 0 to 31; replay it with draw(sampler, 32, 3, start=0, sp"
    )


def test_a_sampler_that_fails_only_when_it_is_called_again_is_reported() -> None:
    sampler = Counting()

    def limited(generator: torch.Generator) -> Task:
        sampler.calls += 1
        if sampler.calls > 70:
            raise RuntimeError("used up")
        return clean(generator)

    report = check_sampler(limited, 64)
    assert report.faults == ("runs",) and "used up" in finding(report, "runs")[1]


def test_tensors_that_cannot_be_read_are_a_fault_and_no_error() -> None:
    class Odd(Tensor):
        @classmethod
        def __torch_function__(cls, *arguments: object, **more: object) -> None:
            raise RuntimeError("no such\noperation" + 1000 * "!")

    report = check_sampler(changed(query_x=lambda x: x.as_subclass(Odd)), 10)  # type: ignore[arg-type]
    assert report.faults == ("type",) and len(finding(report, "type")[1]) < 500
    assert finding(report, "type")[1].startswith("tasks cannot be read (RuntimeError: no such operation!!")


def test_a_sampler_that_ignores_the_seed_is_different_only_by_index() -> None:
    @dataclass(frozen=True)
    class ByIndex:
        def __call__(self, generator: torch.Generator) -> Task:
            return clean(torch.Generator().manual_seed(INDEX[generator.initial_seed()]))

    from toolkit.task import stream_seed

    INDEX = {stream_seed(seed, "train", i): i for seed in (0, 1) for i in range(100)}
    report = check_sampler(ByIndex(), 60)
    assert report.faults == ("different",) and "seed 1 gives the tasks of seed 0" in finding(report, "different")[1]


def test_few_different_tasks_are_a_note() -> None:
    level, text = finding(check_sampler(ignores_the_seed, 60), "different")
    assert level == "note" and text == "only 2 of 60 tasks are different"


def test_a_report_needs_no_more_than_one_task() -> None:
    assert check_sampler(clean, 1).ok


def test_global_random_numbers_are_left_as_they_were() -> None:
    for sampler in (torch_global, python_global, numpy_global, raising):
        torch.manual_seed(1), random.seed(2), np.random.seed(3)
        expected = torch.rand(3), random.random(), np.random.rand()
        torch.manual_seed(1), random.seed(2), np.random.seed(3)
        check_sampler(sampler, 20)
        assert torch.equal(torch.rand(3), expected[0])
        assert (random.random(), np.random.rand()) == expected[1:]


@pytest.mark.parametrize("sampler", [views_of_data, ViewOfBank(BANK), LOOSE, labels_in_one_place])
def test_what_tasks_are_drawn_from_is_never_changed(sampler: TaskSampler) -> None:
    before = DATA.clone(), BANK.items.clone(), BANK.first.clone()
    check_sampler(sampler, 40)
    assert all(map(torch.equal, before, (DATA, BANK.items, BANK.first)))


def test_a_task_that_is_remembered_and_used_again_is_sharing() -> None:
    kept = dict[int, Task]()

    def cached(generator: torch.Generator) -> Task:
        task = kept.setdefault(generator.initial_seed(), clean(generator))
        return Task(*(Batch(batch.x + 0, batch.y + 0) for batch in task)) if len(kept) > 1000 else task  # type: ignore[operator]

    assert check_sampler(cached, 40).faults == ("sharing",)


def test_a_sampler_that_goes_on_from_the_task_it_gave_away_is_sharing() -> None:
    """Copies come out, but they are made from what the caller was given before."""
    last = list[Task]()

    def going_on(generator: torch.Generator) -> Task:
        task = clean(generator)
        if last and last[0].support.y.sum() != 3:
            task = changed(support_x=lambda x: x + 1)(generator)
        last[:] = [task]
        return task

    report = check_sampler(going_on, 40)
    assert report.faults == ("sharing",) and "changes the next one drawn" in finding(report, "sharing")[1]


def test_equal_items_of_a_bank_are_a_note_where_identity_tells_them_apart() -> None:
    items = BANK.items.clone()
    items[1::2] = items[::2]
    twins = replace(BANK, items=items)
    report = check_sampler(Episodes(twins, 3, 2, 3), 50)
    assert report.ok and finding(report, "disjoint by identity")[0] == "ok"
    level, text = finding(report, "disjoint by content")
    assert level == "note" and text.startswith("the data hold equal items: a support item of equal content is again")


def test_a_class_twice_in_a_bank_is_found_by_identity() -> None:
    twice = BANK.select([0, 1, 0, 2])
    report = check_sampler(Episodes(twice, 4, 1, 7), 20)
    assert set(report.faults) == DISJOINT, str(report)


def test_turned_items_are_items_of_their_own_and_the_same_turn_is_not() -> None:
    square = with_rotations(bank(4))
    assert check_sampler(Episodes(square, 16, 2, 3), 30).ok
    assert set(check_sampler(Episodes(square.select([0, 4, 8, 4]), 4, 4, 4), 30).faults) == DISJOINT
    whole = numbered(square)
    assert whole.rows is None and square.rows is not None
    assert torch.equal(whole.items.flatten(1).amin(1).long(), square.rows)
    assert whole.items.shape == (square.entries, 1, 6, 6)


def test_a_bank_that_cannot_be_exchanged_leaves_content_to_judge() -> None:
    @dataclass(frozen=True)
    class Choosy(Replacing):
        def __post_init__(self) -> None:
            if self.bank.items.dtype != torch.uint8:
                raise TypeError("pixels only")

    report = check_sampler(Choosy(BANK), 50)
    assert report.faults == ("disjoint by content",)
    assert finding(report, "disjoint by identity")[0] == "note"
    assert "TypeError: pixels only" in finding(report, "disjoint by identity")[1]

    @dataclass(frozen=True)
    class Noisy(Replacing):
        def __call__(self, generator: torch.Generator) -> Task:
            task = super().__call__(generator)
            noisy = task.support.x + torch.rand(1, 1, 6, generator=generator)  # type: ignore[operator]
            return task._replace(support=task.support._replace(x=noisy))

    assert "do not show which items" in finding(check_sampler(Noisy(BANK), 50), "disjoint by identity")[1]


def test_labels_in_the_order_of_the_bank_are_a_note_and_too_few_tasks_too() -> None:
    level, text = finding(check_sampler(Fixed(dark(), order=True), 100), "label meaning")
    assert level == "note" and text.startswith("labels follow the order of the classes in the bank (correlation 0.")
    level, text = finding(check_sampler(Episodes(bank(100, 5), 3, 1, 2), 5), "label meaning")
    assert level == "note" and "look at more tasks" in text


def test_a_fault_by_design_is_a_note() -> None:
    @dataclass(frozen=True)
    class Unmeant(AllClasses):
        by_design: ClassVar[tuple[str, ...]] = ()

    assert set(check_sampler(Unmeant(BANK), 60).faults) == {"labels", "label meaning", *DISJOINT}
    report = check_sampler(AllClasses(BANK), 60)
    assert report.ok and finding(report, "label meaning")[1].startswith("by design: each class has the same label")

    class Hiding(Counting):
        by_design = ("deterministic",)

    assert check_sampler(Hiding(), 40).faults == ("deterministic",), "how tasks are drawn has no excuse"


def test_imbalance_and_unusual_dtypes_are_notes() -> None:
    lopsided = changed(query_y=lambda y: torch.tensor([0, 0, 0, 0, 1, 2]))
    report = check_sampler(lopsided, 20)
    assert report.ok and finding(report, "labels") == (
        "note", "3 labels a task, each with 1 support and 1 to 4 query items: imbalanced"
    )  # fmt: skip
    report = check_sampler(changed(support_x=lambda x: x.double(), query_x=lambda x: x.double()), 20)
    assert report.ok and finding(report, "dtype")[1].startswith("support.x, query.x is float64")
    report = check_sampler(changed(support_x=lambda x: (99 * x).byte(), query_x=lambda x: (99 * x).byte()), 20)
    assert report.ok and finding(report, "dtype") == ("note", "support.x, query.x is uint8: networks take floats")


def test_items_without_a_label_are_items_all_the_same() -> None:
    def unlabelled(generator: torch.Generator) -> Task:
        support, query = clean(generator)
        more = torch.randn(4, 4, generator=generator)
        return Task(Batch(torch.cat([support.x, more]), torch.cat([support.y, torch.full((4,), IGNORED)])), query)  # type: ignore[list-item]

    assert check_sampler(unlabelled, 40).ok

    def leaking(generator: torch.Generator) -> Task:
        (x, y), query = unlabelled(generator)
        return Task(Batch(torch.cat([x[:-1], query.x[:1]]), y), query)  # type: ignore[index, list-item]

    assert check_sampler(leaking, 40).faults == ("disjoint by content",)


def test_coordinates_that_meet_by_chance_are_a_note_and_often_a_fault() -> None:
    def coarse(steps: int) -> Callable[[torch.Generator], Task]:
        def sampler(generator: torch.Generator) -> Task:
            x = torch.randint(steps, (20, 1), generator=generator) / steps
            y = torch.randn(20, 1, generator=generator)
            return Task(Batch(x[:10], y[:10]), Batch(x[10:], y[10:]))

        return sampler

    assert check_sampler(coarse(1000), 200).faults == ("disjoint by content",)
    found = [finding(check_sampler(coarse(60_000), 200, seed), "disjoint by content")[0] for seed in range(4)]
    assert "note" in found and "fault" not in found


SPLITS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "same classes": (
        lambda: Episodes(BANK.select([3, 4, 5]), 3, 1, 2), "fault", "train and val share 3 classes: 'class-3', 'class-4', 'cla",
    ),
    "other names": (
        lambda: Episodes(replace(BANK.select([3, 4, 5]), names=("a", "b", "c")), 3, 1, 2), "fault",
        "train and val share 3 classes under other names, such as 'class-3', by equal items",
    ),
    "one equal item": (
        lambda: Episodes(replace(bank(5, 8, 1, "b"), items=torch.cat([BANK.items[:1], bank(5, 8, 1).items[1:]])), 3, 1, 2),
        "note",
        "train and val share no class, but 1 item(s) have equal contents in both",
    ),
    "apart": (lambda: Episodes(bank(5, 8, 1, "other"), 3, 1, 2), "ok", "train, val share nothing that could be found"),
    "no bank, same items": (
        lambda: lambda g: Episodes(BANK, 3, 1, 2)(g), "fault", "different items drawn from train and val are in both",
    ),
    "no bank, apart": (lambda: lambda g: Episodes(bank(5, 8, 1), 3, 1, 2)(g), "ok", "nothing"),
    "numbers": (Sinusoid, "ok", "nothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_what_splits_share_is_told(name: str) -> None:
    make, level, sentence = SPLITS[name]
    report = check_sampler(LOOSE, 40, splits={"val": make()})
    found, text = finding(report, "leakage")
    assert (found, report.ok) == (level, level != "fault") and sentence in text, text


def test_all_pairs_of_splits_are_looked_at_and_one_that_fails_is_named() -> None:
    other = Episodes(bank(5, 8, 1, "other"), 3, 1, 2)
    report = check_sampler(LOOSE, 40, splits={"val": other, "test": other})
    assert finding(report, "leakage") == ("fault", "val and test share 5 classes: 'other-0', 'other-1', 'other-2' and 2 more")
    report = check_sampler(LOOSE, 40, splits={"val": raising})
    assert report.faults == ("runs",) and "split 'val'" in finding(report, "runs")[1]


def test_mixtures_whose_splits_cross_leak() -> None:
    one, other = Episodes(bank(5, 8, 1, "one"), 3, 1, 2), Episodes(bank(5, 8, 3, "other"), 3, 1, 2)
    third = Episodes(bank(5, 8, 2, "third"), 3, 1, 2)
    report = check_sampler(Mixed([one, third]), 40, splits={"test": Mixed([other, third])})
    assert finding(report, "leakage")[0] == "fault" and "share 5 classes: 'third-0'" in finding(report, "leakage")[1]


def test_without_other_splits_leakage_is_not_judged() -> None:
    assert "leakage" not in [found.check for found in check_sampler(LOOSE, 20).findings]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((Episodes,), "the sampler of 'train' is the class Episodes; give something to call"),
        ((3,), "the sampler of 'train' is a int; give something to call"),
        ((clean, 0), "cannot check 0 tasks; look at 1 or more"),
        ((clean, 5, 0, {"val": 3}), "the sampler of 'val' is a int"),
        ((clean, 5, 0, {"train": clean}), "the split 'train' is given twice"),
    ],
)
def test_bad_arguments_are_a_user_error(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{sentence}"):
        check_sampler(*arguments)


def test_the_report_is_an_aligned_table_and_progress_is_told() -> None:
    drawn = list[int]()
    report = check_sampler(support_in_query, 70, progress=drawn.append)
    assert drawn == [32, 32, 6]
    head, *lines = str(report).splitlines()
    assert head == "support_in_query, split 'train': 1 fault, no notes"
    checks = [found.check for found in report.findings]
    assert checks == [
        "runs", "type", "sizes", "stable", "dtype", "labels", "disjoint by content", "deterministic", "different",
        "global random", "sharing", "gradient-free", "speed",
    ]  # fmt: skip
    assert [line[:21].strip() for line in lines if line[:21].strip()] == checks
    assert {line[21:28].strip() for line in lines} == {"ok", "fault", ""}
    assert all(len(line) <= 120 and line[27] == " " and line[28] != " " for line in lines)


def test_hashes_tell_rows_apart_that_differ_in_one_bit() -> None:
    row = torch.randint(256, (20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    flipped = row.repeat(161, 1)
    for bit in range(160):
        flipped[bit, bit // 8] ^= 1 << bit % 8
    assert len(hashes(flipped).unique()) == 161
    numbers = torch.arange(500.0)
    grid = torch.stack([numbers.repeat_interleave(100), numbers[:100].repeat(500)], 1)
    for rows in (grid, grid.double(), grid.half().float(), (grid * 2**20).long()):
        assert len(hashes(rows).unique()) == len(rows.unique(dim=0))
    assert torch.equal(hashes(grid), hashes(grid.clone()))


@pytest.mark.slow
def test_ten_thousand_episodes_are_audited_in_well_under_a_minute() -> None:
    items = torch.randint(256, (4000, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    many = ClassBank(items, torch.arange(201) * 20, tuple(map(str, range(200))))
    start = time.perf_counter()
    report = check_sampler(Episodes(many), 10_000)
    assert report.ok and finding(report, "disjoint by content")[1] == "no two items of any of 10000 tasks are equal"
    assert time.perf_counter() - start < 45


def test_a_mixture_is_judged_by_each_of_its_samplers() -> None:
    overlapping = Overlapping(BANK, 3, 2, 3)
    report = check_sampler(Mixed([LOOSE, overlapping]), 100)
    assert {"disjoint by identity", "disjoint by content"} <= set(report.faults), str(report)


class Repeating(Episodes):
    """Episodes whose first two support items are one."""

    def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
        support, query = super().draw_many(generators)
        x = support.x.clone()
        x[:, 1] = x[:, 0]
        return Task(Batch(x, support.y), query)


def test_an_item_twice_in_one_set_is_seen_by_identity() -> None:
    report = check_sampler(Repeating(BANK, 3, 2, 3), 40)
    assert set(DISJOINT) <= set(report.faults) and "an item is twice in one set" in finding(report, "disjoint by identity")[1]


def test_numbers_of_very_large_banks_stay_apart() -> None:
    rows = 2**24 + torch.arange(4)
    whole = ClassBank(torch.zeros(1, 1), torch.tensor([0, 4]), ("a",), rows=rows)
    assert numbered(whole).items.flatten().long().tolist() == rows.tolist()


class Overlapping(Episodes):
    """Episodes whose first query item of each task is a support item."""

    def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
        support, query = super().draw_many(generators)
        x = query.x.clone()
        x[:, 0] = support.x[:, 0]
        return Task(support, Batch(x, query.y))
