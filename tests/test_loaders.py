"""DataLoaders as sub-tasks: what their tasks hold, that nothing but the generator decides, joint training, and clear errors."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)  # fmt: skip

from toolkit import UserError, algorithms, draw, evaluate, train
from toolkit.metrics import squared_error
from toolkit.models import BigModel
from toolkit.samplers import Loaders, MetaTask, joint_epochs
from toolkit.task import generators, take

SIZES = (7, 9, 8)


def source(number: int = 0, sizes: tuple[int, ...] = SIZES) -> TensorDataset:
    """x is (sub-task, class, item), y the class, in an order without pattern."""
    rows = [(number, c, i) for c, size in enumerate(sizes) for i in range(size)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(number))
    x = torch.tensor(rows, dtype=torch.float32)[order]
    return TensorDataset(x, x[:, 1].long())


def loader(number: int = 0, sizes: tuple[int, ...] = SIZES, **options: Any) -> DataLoader[Any]:
    return DataLoader(source(number, sizes), **{"batch_size": 4, "shuffle": True} | options)


def items(x: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in x.reshape(-1, 3).tolist()}


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("permute", [False, True])
def test_support_and_query_are_disjoint_examples_of_one_sub_task(per_class: bool, permute: bool) -> None:
    sampler = Loaders([loader(0), MetaTask(loader(1))], 2, 3, per_class, permute)
    seen = set()
    for g in generators(0, "train", range(60)):
        task = sampler(g)
        times = 3 if per_class else 1
        assert task.support.x.shape == (2 * times, 3) and task.query.x.shape == (3 * times, 3)
        both = items(task.support.x) | items(task.query.x)
        assert len(both) == 5 * times, "support and query share an example"
        assert len({row[0] for row in both}) == 1
        seen |= both
        if not permute:
            assert torch.equal(task.support.y, task.support.x[:, 1].long())
        if per_class:
            assert task.support.y.tolist() == [0, 0, 1, 1, 2, 2] and task.query.y.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert seen == items(source(0).tensors[0]) | items(source(1).tensors[0]), "every example of both turns up"


@pytest.mark.parametrize("per_class", [False, True])
def test_permuted_labels_are_one_order_per_task_and_every_order_comes(per_class: bool) -> None:
    orders = set()
    for g in generators(1, "train", range(80)):
        task = Loaders([loader()], 3, 4, per_class, permute=True)(g)
        pairs = {(int(x[1]), int(y)) for part in task for x, y in zip(part.x, part.y, strict=True)}
        assert len(pairs) == len({c for c, _ in pairs}) == len({y for _, y in pairs})
        if len(pairs) == 3:
            orders.add(tuple(y for _, y in sorted(pairs)))
    assert len(orders) == 6


def test_sub_tasks_are_taken_uniformly() -> None:
    sampler = Loaders([loader(0, (9, 9)), loader(1, (90, 90)), loader(2, (9, 9))], 1, 1)
    drawn = draw(sampler, 900, seed=3)
    counts = torch.bincount(drawn.support.x[:, 0, 0].long(), minlength=3)
    assert (counts - 300).abs().max() < 60  # over 4 standard deviations


def test_a_task_depends_on_its_number_alone() -> None:
    sampler = Loaders([loader(0), loader(1)], 2, 3, per_class=True, permute=True)
    whole = draw(sampler, 6, seed=5)
    torch.manual_seed(99)
    list(loader(0)), torch.rand(5)
    before = torch.get_rng_state()
    other = Loaders([loader(0, batch_size=1), loader(1, shuffle=False)], 2, 3, per_class=True, permute=True)
    late = draw(other, 2, seed=5, start=3)
    assert torch.equal(torch.get_rng_state(), before), "drawing left the global random state alone"
    for i in range(2):
        for a, b in zip(take(late, i), take(whole, 3 + i), strict=True):
            assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)


class Counting(Dataset[Any]):
    """Counts its reads; adds torch's random noise when told to."""

    def __init__(self, noise: float = 0.0) -> None:
        self.data, self.noise, self.reads = source(), noise, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        self.reads += 1
        x, y = self.data[i]
        return x + self.noise * torch.randn(3), y


def test_a_small_dataset_is_read_once_and_a_large_one_gives_the_same_tasks() -> None:
    small, large = Counting(), Counting()
    assert not small.reads
    for per_class in (False, True):
        settings: dict[str, Any] = {"shots": 2, "queries": 3, "per_class": per_class, "permute": True}
        kept = draw(Loaders([DataLoader(small)], **settings), 4, 0)
        read = draw(Loaders([DataLoader(large)], **settings, keep=5), 4, 0)
        assert torch.equal(kept.query.x, read.query.x) and torch.equal(kept.support.y, read.support.y)
    assert small.reads == 2 * 24, "once for each sampler"
    # Once for the labels, then only what each task takes: 5 examples, or 5 of each of 3 classes.
    assert large.reads == 2 * 24 + 4 * 5 + 4 * 15


@pytest.mark.parametrize("keep", [0, 100])
def test_augmentation_by_torch_cannot_make_a_task_differ(keep: int) -> None:
    first, again = (draw(Loaders([DataLoader(Counting(0.1))], 2, 3, keep=keep), 3, 0) for _ in range(2))
    assert torch.equal(first.support.x, again.support.x)
    if not keep:
        many = draw(Loaders([DataLoader(Counting(0.1))], 12, 12, keep=0), 2, 0)
        noise = many.support.x - many.support.x.round()
        assert noise.std() > 0.05 and not torch.equal(noise[0], noise[1])


def test_a_part_of_a_dataset_by_its_sampler() -> None:
    part = [i for i, y in enumerate(source().tensors[1]) if y != 2]
    for given in (
        loader(shuffle=False, sampler=SubsetRandomSampler(part)),
        DataLoader(source(), batch_sampler=BatchSampler(SubsetRandomSampler(part), 3, False)),
    ):
        drawn = draw(Loaders([given], 2, 2, per_class=True), 20, 0)
        assert set(drawn.query.y.flatten().tolist()) == {0, 1}


def test_collate_fn_makes_the_inputs() -> None:
    def collate(examples: list[tuple[Tensor, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
        x, y = torch.utils.data.default_collate(examples)
        return {"tokens": x.long(), "mask": x > 0}, y

    task = draw(Loaders([loader(collate_fn=collate)], 2, 3), 4, 0)
    assert isinstance(task.support.x, dict)
    assert task.support.x["tokens"].shape == (4, 2, 3) and task.query.x["mask"].dtype == torch.bool


def test_regression_targets_come_as_they_are() -> None:
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).unsqueeze(1)
    task = draw(Loaders([DataLoader(TensorDataset(x, 3 * x))], 5, 5), 3, 0)
    assert torch.equal(task.query.y, 3 * task.query.x)


def test_a_learner_trains_and_is_judged_on_them() -> None:
    sampler = Loaders([loader(0), loader(1)], 2, 3, per_class=True)
    learner = algorithms.maml(BigModel((3, 8, 3)), inner_lr=0.1)
    *_, last = train(learner, sampler, 40, 4, 1e-2)
    before, after = (evaluate(learner, meta, sampler, 20, 1) for meta in (learner.init(), last.meta))
    assert after.mean()[1] > before.mean()[1] + 0.3
    assert before.task_list_hash == after.task_list_hash


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(source())


class Endless(Dataset[Any]):
    def __getitem__(self, i: int) -> Any:
        return torch.zeros(3), torch.tensor(0)


def alone(examples: Any) -> Any:
    return torch.stack([x for x, _ in examples])


REFUSED: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "none": ([], {}, "no sub-tasks were given; give at least one"),
    "a dataset": ([source()], {}, "sub-task 0 is a TensorDataset; give a DataLoader"),
    "a stream": ([loader(), DataLoader(Stream(), 4)], {}, "dataset of sub-task 1 is a Stream without length and index"),
    "no length": ([DataLoader(Endless(), sampler=range(3))], {}, "is a Endless without length"),
    "no batches": ([loader(batch_size=None, shuffle=False)], {}, "chooses its examples by a NoneType"),
    "weighted": ([loader(shuffle=False, sampler=WeightedRandomSampler([1.0] * 24, 24))], {}, "by a WeightedRandomSampler"),
    "few": ([loader()], {"shots": 20, "queries": 5}, "need 25 examples, but sub-task 0 has 24; take fewer"),
    "few of a class": ([loader()], {"shots": 5, "queries": 3, "per_class": True}, "but class 0 of sub-task 0 has 7"),
    "no shots": ([loader()], {"shots": 0}, "0 shots and 3 queries: each must be at least 1"),
    "no pair": ([loader(collate_fn=alone)], {}, r"a batch of sub-task 0 is a Tensor; make it a pair \(x, y\)"),
    "three": ([loader(collate_fn=lambda e: (0, 0, 0))], {}, "a batch of sub-task 0 is a tuple of 3; make it a pair"),
    "x a list": ([loader(collate_fn=lambda e: ([1], alone(e)))], {}, "x of sub-task 0 is or holds a list; make it a tensor"),
    "y a number": ([loader(collate_fn=lambda e: (alone(e), 1))], {}, "y of sub-task 0 is or holds a int; make it a tensor"),
    "y a scalar": ([loader(collate_fn=lambda e: (alone(e), torch.tensor(1)))], {}, "holds a tensor without rows"),
    "rows": ([loader(collate_fn=lambda e: (alone(e)[:5], torch.zeros(5)))], {}, r"x of \(5, 3\) and y of \(5,\) from 24"),
    "float classes": (
        [DataLoader(TensorDataset(torch.zeros(9, 2), torch.zeros(9)))], {"permute": True}, "y of sub-task 0 is torch.float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_sentence(case: str) -> None:
    tasks, options, sentence = REFUSED[case]
    with pytest.raises(UserError, match=sentence) as caught:
        draw(Loaders(tasks, **{"shots": 2, "queries": 3} | options), 2, 0)
    assert "\n" not in str(caught.value)


def two_tasks(model: nn.Module | None = None, **options: Any) -> list[MetaTask]:
    model = model or BigModel((3, 16, 3))
    return [MetaTask(loader(0, **options), model), MetaTask(loader(1, (20, 20, 20), **options), model)]


def test_joint_training_is_adam_on_the_mean_loss_over_the_loaders() -> None:
    """Against a plain loop: 4 batches of the longer loader in an epoch, the shorter one begins again after 2."""
    model = BigModel((3, 16, 3))
    short, long = source(0, (4, 4)), source(1, (5, 5, 6))
    tasks = [MetaTask(DataLoader(data, 4), model) for data in (short, long)]
    found = [(epoch.losses, copy.deepcopy(epoch.params)) for epoch in joint_epochs(tasks, 3, 1e-2)]
    own = copy.deepcopy(model)
    optimizer = torch.optim.Adam(own.parameters(), 1e-2)
    loss_of = nn.CrossEntropyLoss()
    for losses, params in found:
        rows = []
        for i in range(4):
            a, b = (data[4 * k : 4 * k + 4] for data, k in ((short, i % 2), (long, i)))
            both = torch.stack([loss_of(own(x), y) for x, y in (a, b)])
            rows.append(both.detach())
            optimizer.zero_grad()
            both.mean().backward()
            optimizer.step()
        assert losses == pytest.approx(torch.stack(rows).mean(0).tolist(), rel=1e-5)
        for name, p in own.named_parameters():
            assert torch.allclose(p, params[name], atol=1e-6)


def test_a_hundred_epochs_learn_both_sub_tasks_and_leave_the_model_alone() -> None:
    tasks = two_tasks()
    before = copy.deepcopy(tasks[0].model.state_dict())
    records = list(joint_epochs(tasks, epochs=100, lr=1e-2))
    assert [record.epoch for record in records] == list(range(1, 101))
    assert max(records[-1].losses) < 0.2 < min(records[0].losses)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tasks[0].model.state_dict().items())
    for i, task in enumerate(tasks):
        x, y = source(i, SIZES if i == 0 else (20, 20, 20)).tensors
        assert (records[-1].model(x).argmax(1) == y).float().mean() > 0.95, task


def test_joint_training_repeats_from_its_seed_whatever_happens_between_epochs() -> None:
    def run(seed: int, disturb: bool) -> Any:
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        losses = []
        for epoch in joint_epochs(two_tasks(model), 3, 1e-2, seed):
            losses.append(epoch.losses)
            if disturb:
                torch.rand(11)
        return losses

    assert run(0, False) == run(0, True) != run(1, False)
    tasks, state = two_tasks(), torch.get_rng_state()
    list(joint_epochs(tasks, 1))
    assert torch.equal(torch.get_rng_state(), state)


def test_each_sub_task_has_a_loss_of_its_own_and_inputs_may_be_named() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.head(a + b)

    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    data = [({"a": row, "b": row}, row.sum().unsqueeze(0)) for row in x]
    model = Named()
    tasks = [MetaTask(DataLoader(data, 4), model, squared_error), MetaTask(DataLoader(data, 4), model, nn.L1Loss())]
    *_, last = joint_epochs(tasks, 100, 2e-2)
    assert max(last.losses) < 0.1
    assert torch.allclose(last.params["head.weight"], torch.full((1, 3), 0.5), atol=0.1)


def frozen() -> nn.Module:
    return BigModel((3, 3)).requires_grad_(False)


JOINT: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "none": ([], {}, "no sub-tasks were given"),
    "no model": ([MetaTask(loader())], {}, "needs one model that all sub-tasks share"),
    "two models": ([MetaTask(loader(), BigModel((3, 3))), MetaTask(loader(), BigModel((3, 3)))], {}, "give the same one"),
    "bare loader": ([MetaTask(loader(), BigModel((3, 3))), loader()], {}, "give the same one to every MetaTask"),
    "frozen": ([MetaTask(loader(), frozen())], {}, "every weight of the model is frozen"),
    "epochs": (two_tasks(), {"epochs": 0}, "0 epochs at rate 0.001; each must be positive"),
    "rate": (two_tasks(), {"lr": float("nan")}, "at rate nan; each must be positive"),
    "no batch": (two_tasks(batch_size=30, drop_last=True), {}, "the loader of sub-task 0 has no batch"),
    "no pair": (two_tasks(collate_fn=alone), {}, "a batch of sub-task 0 is a Tensor; make it a pair"),
    "not finite": (two_tasks(), {"lr": 1e30, "epochs": 20}, r"epoch \d+: the loss of sub-task \d is (nan|inf); lower the rate"),
}  # fmt: skip


@pytest.mark.parametrize("case", JOINT)
def test_what_joint_training_refuses(case: str) -> None:
    tasks, options, sentence = JOINT[case]
    with pytest.raises(UserError, match=sentence):
        list(joint_epochs(tasks, **{"epochs": 1} | options))


def test_big_model_flattens_images_and_has_a_body_and_a_head() -> None:
    model = BigModel()
    assert model(torch.rand(6, 1, 10, 10)).shape == model(torch.rand(6, 100)).shape == (6, 10)
    assert {n for n, _ in model.named_parameters()} == {"body.layer0.weight", "body.layer0.bias", "head.weight", "head.bias"}
    assert model.body.layer0.weight.std().item() == pytest.approx((2 / 100) ** 0.5, rel=0.05)
    deep = BigModel((12, 9, 8, 7, 3), seed=1)
    assert deep(torch.rand(2, 3, 4)).shape == (2, 3) and not deep.head.bias.any()
    assert torch.equal(deep.head.weight, BigModel((12, 9, 8, 7, 3), seed=1).head.weight)
    assert not torch.equal(deep.head.weight, BigModel((12, 9, 8, 7, 3), seed=2).head.weight)
    assert algorithms.anil(model).adapted_names == ("head.weight", "head.bias")


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0, 2)])
def test_big_model_needs_inputs_and_outputs(sizes: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="make no network; give the inputs"):
        BigModel(sizes)


def test_a_random_sampler_with_a_generator_is_not_moved() -> None:
    own = torch.Generator().manual_seed(3)
    state = own.get_state()
    draw(Loaders([DataLoader(source(), sampler=RandomSampler(source(), generator=own))], 1, 1), 3, 0)
    assert torch.equal(own.get_state(), state)
