"""learn2learn's Tasksets as samplers: tasks fixed by (seed, split, index), no global random state read or changed."""

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import TensorDataset

from toolkit import Task, UserError, draw, plugins
from toolkit.data.convert import from_tensors
from toolkit.samplers.tasksets import FromTaskset, as_metadataset, seeded
from toolkit.task import take

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    l2l = pytest.importorskip("learn2learn", reason="see requirements-learn2learn.txt")

WAYS, SHOTS, QUERIES = 3, 2, 4


class Noisy(TensorDataset):
    """Items that carry their class and number, and noise from each of the three global generators."""

    def __getitem__(self, i: int) -> Any:
        x, y = super().__getitem__(i)
        noise = torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(()))], dtype=torch.float64)
        return torch.cat([x, noise]), y


def data(kind: type[TensorDataset] = TensorDataset, classes: int = 6, each: int = 10) -> Any:
    y = torch.arange(classes).repeat_interleave(each)
    x = torch.stack([y, torch.arange(classes * each)], 1).double()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return l2l.data.MetaDataset(kind(x[order], y[order]))


def steps(dataset: Any, each: int = SHOTS + QUERIES, fused: bool = True) -> list[Any]:
    t = l2l.data.transforms
    chosen = [t.FusedNWaysKShots(dataset, n=WAYS, k=each)] if fused else [t.NWays(dataset, WAYS), t.KShots(dataset, each)]
    return [*chosen, t.LoadData(dataset), t.RemapLabels(dataset)]


def taskset(kind: type[TensorDataset] = TensorDataset, tasks: int = -1, fused: bool = True) -> Any:
    dataset = data(kind)
    return l2l.data.Taskset(dataset, steps(dataset, fused=fused), num_tasks=tasks)


def same(a: Task, b: Task) -> bool:
    return all(torch.equal(x, y) for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True))


def global_state() -> list[Any]:
    kind, keys, *rest = np.random.get_state()
    return [random.getstate(), (kind, keys.tolist(), *rest), torch.get_rng_state().tolist()]


@pytest.mark.parametrize("fused", [True, False])
def test_support_and_query_are_ordered_by_label_disjoint_and_of_one_class_each(fused: bool) -> None:
    tasks = draw(FromTaskset(taskset(fused=fused), SHOTS), 20, seed=0)
    assert tasks.support.y.tolist() == [[0, 0, 1, 1, 2, 2]] * 20
    assert tasks.query.y.tolist() == [[0] * 4 + [1] * 4 + [2] * 4] * 20
    assert tasks.support.x.shape == (20, 6, 2)
    for i in range(20):
        (sx, sy), (qx, qy) = take(tasks, i)
        assert not set(sx[:, 1].tolist()) & set(qx[:, 1].tolist())
        classes = [set(sx[sy == n, 0].tolist()) | set(qx[qy == n, 0].tolist()) for n in range(WAYS)]
        assert [len(found) for found in classes] == [1] * WAYS
        assert len(set.union(*classes)) == WAYS


@pytest.mark.parametrize("tasks", [-1, 1, 4])
def test_a_task_is_fixed_by_its_number_whatever_came_before(tasks: int) -> None:
    sampler = FromTaskset(taskset(Noisy, tasks), SHOTS)
    expected = draw(sampler, 10, seed=3)
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    again = FromTaskset(taskset(Noisy, tasks), SHOTS)
    again.taskset.sample()
    for i in reversed(range(10)):
        assert same(take(draw(again, 1, seed=3, start=i), 0), take(expected, i))
    assert not same(draw(again, 10, seed=4), expected)
    assert not same(draw(again, 10, seed=3, split="val"), expected)


@pytest.mark.parametrize("tasks", [-1, 4])
def test_global_random_state_is_as_before_even_when_the_taskset_fails(tasks: int) -> None:
    bad = taskset(Noisy, tasks)
    sampler = FromTaskset(bad, SHOTS)
    before = global_state()
    draw(sampler, 3, seed=0)
    assert global_state() == before

    def fails(batch: list[Any]) -> Any:
        random.random(), np.random.rand(), torch.rand(1)
        raise RuntimeError("cannot collate")

    bad.task_collate = fails
    with pytest.raises(RuntimeError, match="cannot collate"):
        draw(sampler, 3, seed=0)
    assert global_state() == before
    with pytest.raises(UserError, match=r"the Taskset cannot make a task \(RuntimeError: cannot collate\)"):
        FromTaskset(bad, SHOTS)
    assert global_state() == before


def test_every_seed_gives_other_numbers_in_all_three_generators() -> None:
    found = []
    for seed in (0, 1, 2**32 + 2, 2**61 + 3):
        with seeded(seed):
            found.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert all(len(set(column)) == 4 for column in zip(*found, strict=True))


def test_the_cache_of_descriptions_is_neither_read_nor_filled() -> None:
    kept = taskset(tasks=4)
    sampler = FromTaskset(kept, SHOTS)
    expected = draw(sampler, 5, seed=0)
    assert kept.sampled_descriptions == {}
    for i in range(4):
        kept[i]
    assert same(draw(sampler, 5, seed=0), expected)


def described(tasks: Task) -> set[tuple[float, ...]]:
    """What makes a task, without the noise on its items."""
    return {tuple(x[:, :2].flatten().tolist()) for x in torch.cat([tasks.support.x, tasks.query.x], 1)}


def test_a_taskset_of_n_tasks_has_n_tasks_that_a_seed_fixes_with_fresh_noise() -> None:
    tasks = draw(FromTaskset(taskset(Noisy, 4), SHOTS), 60, seed=0)
    assert len(described(tasks)) == 4
    assert len({tuple(x.flatten().tolist()) for x in tasks.support.x}) == 60
    assert described(draw(FromTaskset(taskset(Noisy, 4), SHOTS), 60, seed=7)) == described(tasks)
    assert not described(draw(FromTaskset(taskset(Noisy, 4), SHOTS, seed=1), 60, seed=0)) & described(tasks)
    assert len(described(draw(FromTaskset(taskset(Noisy), SHOTS), 60, seed=0))) == 60


def test_inputs_may_be_dicts() -> None:
    made = taskset()
    collate = made.task_collate
    made.task_collate = lambda batch: [{"x": collate(batch)[0]}, collate(batch)[1]]
    task = draw(FromTaskset(made, SHOTS), 2, seed=0)
    assert isinstance(task.support.x, dict) and task.support.x["x"].shape == (2, 6, 2)


BAD: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "uneven": (lambda x, y: (x[1:], y[1:]), "made 5 to 6 examples per label"),
    "from 1": (lambda x, y: (x, y + 1), "labels from 1 to 3, not all of 0 .. ways - 1; end its transforms with RemapLabels"),
    "gap": (lambda x, y: (x, y * 2), "labels from 0 to 4, not all"),
    "huge": (lambda x, y: (x, y * 10**12), "labels from 0 to 2000000000000, not all"),
    "negative": (lambda x, y: (x, y - 1), "labels from -1 to 1, not all"),
    "floats": (lambda x, y: (x, y.float()), "made labels of torch.float32 and shape .18,.; it must make one integer"),
    "one-hot": (lambda x, y: (x, torch.eye(3)[y].long()), "made labels of torch.int64 and shape .18, 3."),
    "triple": (lambda x, y: (x, y, y), "made a tuple; its tasks must be pairs"),
    "tensor": (lambda x, y: x, "made a Tensor; its tasks must be pairs"),
    "list": (lambda x, y: (x, y.tolist()), "made a tuple; its tasks must be pairs"),
    "too few": (lambda x, y: (x[:3], torch.arange(3)), "made 1 examples per label, and 2 are for the support set"),
    "none for queries": (
        lambda x, y: (x[:6], torch.arange(6) // 2),
        "made 2 examples per label, and 2 are for the support set",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_batches_that_are_no_tasks_are_refused_when_the_sampler_is_made(kind: str) -> None:
    change, message = BAD[kind]
    made = taskset()
    collate = made.task_collate

    def sorted_batch(batch: Any) -> Any:
        x, y = collate(batch)
        order = y.argsort()
        return change(x[order], y[order])

    made.task_collate = sorted_batch
    with pytest.raises(UserError, match=message):
        FromTaskset(made, SHOTS)


def test_more_classes_or_items_than_there_are_is_one_sentence() -> None:
    dataset = data(classes=2)
    with pytest.raises(UserError, match=r"the Taskset cannot make a task .ValueError: Sample larger than population"):
        FromTaskset(l2l.data.Taskset(dataset, steps(dataset)), SHOTS)


@pytest.mark.parametrize(
    ("given", "message"), [((None, 1), "a NoneType is no Taskset"), ((object(), 0), "0 shots; give at least 1")]
)
def test_wrong_arguments_are_refused(given: tuple[Any, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FromTaskset(*given)


def test_a_bank_becomes_a_metadataset_with_the_items_of_its_entries() -> None:
    x = torch.arange(40, dtype=torch.uint8).view(10, 1, 2, 2)
    bank = from_tensors(x, torch.tensor([1, 0, 2, 1, 0, 2, 1, 0, 2, 1]))
    dataset = as_metadataset(bank)
    assert len(dataset) == 10 and dataset.labels == [0, 1, 2]
    for i in range(10):
        item, label = dataset[i]
        assert torch.equal(item, bank.read(torch.tensor(i)).float() / 255)
        assert dataset.indices_to_labels[i] == label == int(torch.searchsorted(bank.first, i, right=True)) - 1
    sampler = FromTaskset(l2l.data.Taskset(dataset, steps(dataset, each=3)), 1)
    assert draw(sampler, 2, seed=0).query.x.shape == (2, 6, 1, 2, 2)


MINE = """
from learn2learn.data import MetaDataset, Taskset, transforms as t
from toolkit.samplers.tasksets import FromTaskset
from tests.test_tasksets import data

def tasks(split, ways, shots, queries):
    mine = data(classes={"train": 6, "val": 4, "test": 5}[split])
    steps = [t.FusedNWaysKShots(mine, ways, shots + queries), t.LoadData(mine), t.RemapLabels(mine)]
    return FromTaskset(Taskset(mine, steps), shots)
"""


def test_a_function_of_a_few_lines_in_a_file_of_the_user_is_a_sampler(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(MINE)
    make = plugins.resolve(f"{tmp_path / 'my.py'}:tasks", "samplers")
    given = {"split": "val", "ways": 4, "shots": 1, "queries": 2, "data_root": "data", "download": False}
    sampler = plugins.call(make, given, {}, "--sampler")
    assert draw(sampler, 2, seed=0, split="val").query.x.shape == (2, 8, 2)
