"""How the outer loop moves: schedules, clipping, plain descent, and the same after a resume."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.conftest import flat, relative
from toolkit import Learner, State, UserError, algorithms, draw, meta_gradient, train
from toolkit.metrics import squared_error
from toolkit.outer import Outer
from toolkit.rules import SGD
from toolkit.samplers import Linear

SAMPLER = Linear(3, 5, 7)


def learner_of(outer: Outer | None = None) -> Learner:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    rule = SGD(0.05, learn="tensor")
    return algorithms.maml(model, loss=squared_error, metric=squared_error, rule=rule, inner_steps=2, outer=outer)


def rows(outer: Outer | None, iterations: int = 6, meta_lr: float = 0.01, start: State | None = None) -> Tensor:
    """The meta-parameters after each iteration, one row each."""
    records = train(learner_of(outer), SAMPLER, iterations, 5, meta_lr, start=start)
    return torch.stack([flat(record.meta) for record in records])


def descent(rates: list[float], longest: float | None = None) -> Tensor:
    """Plain descent by hand at these rates, with torch's own clipping; one row per iteration."""
    learner, path = learner_of(), []
    meta = learner.init()
    leaves = [leaf.requires_grad_() for leaf in pytree.tree_leaves(meta)]
    for i, rate in enumerate(rates):
        grads, _ = meta_gradient(learner, pytree.tree_map(Tensor.detach, meta), draw(SAMPLER, 5, 0, start=5 * i))
        for leaf, gradient in zip(leaves, pytree.tree_leaves(grads), strict=True):
            leaf.grad = gradient.clone()
        if longest is not None:
            torch.nn.utils.clip_grad_norm_(leaves, longest)
        with torch.no_grad():
            for leaf in leaves:
                leaf -= rate * leaf.grad
        path.append(flat(meta))
    return torch.stack(path)


RATES = {
    "constant": {0: 1.0, 50: 1.0, 99: 1.0},
    "linear": {0: 1.0, 50: 0.5, 99: 0.01},
    "cosine": {
        0: 1.0,
        50: 0.505,
        25: 0.01 + 0.99 * (1 + math.sqrt(0.5)) / 2,
        99: 0.01 + 0.99 * (1 + math.cos(0.99 * math.pi)) / 2,
    },
}


@pytest.mark.parametrize("schedule", RATES)
@pytest.mark.parametrize("meta_lr", [1.0, 3e-3])
def test_rates_at_the_start_the_middle_and_the_end(schedule: str, meta_lr: float) -> None:
    outer = Outer(schedule=schedule)
    for iteration, share in RATES[schedule].items():
        assert outer.rate(meta_lr, iteration, 100) == pytest.approx(meta_lr * share, rel=1e-12)
    rates = [outer.rate(meta_lr, i, 100) for i in range(100)]
    assert all(a >= b > 0 for a, b in pairwise(rates))
    assert outer.rate(meta_lr, 0, 1) == meta_lr
    assert (rates[0] > rates[-1]) == (schedule != "constant")


def test_a_cosine_ends_at_a_hundredth() -> None:
    assert Outer(schedule="cosine").rate(1e-3, 100_000 - 1, 100_000) == pytest.approx(1e-5, rel=1e-4)


@pytest.mark.parametrize("schedule", RATES)
def test_plain_descent_follows_the_schedule(schedule: str) -> None:
    outer = Outer("sgd", schedule)
    expected = descent([outer.rate(0.1, i, 6) for i in range(6)])
    assert relative(rows(outer, meta_lr=0.1), expected) < 1e-12
    assert schedule == "constant" or relative(rows(Outer("sgd"), meta_lr=0.1), expected) > 1e-3


@pytest.mark.parametrize("schedule", RATES)
def test_adam_follows_the_schedule(schedule: str) -> None:
    """torch.optim.Adam with the rate set by hand before every step."""
    outer = Outer(schedule=schedule)
    learner, path = learner_of(), []
    meta = learner.init()
    leaves = pytree.tree_leaves(meta)
    optimizer = torch.optim.Adam(leaves)
    for i in range(6):
        grads, _ = meta_gradient(learner, meta, draw(SAMPLER, 5, 0, start=5 * i))
        for leaf, gradient in zip(leaves, pytree.tree_leaves(grads), strict=True):
            leaf.grad = gradient
        optimizer.param_groups[0]["lr"] = outer.rate(0.01, i, 6)
        optimizer.step()
        path.append(flat(meta))
    assert relative(rows(outer), torch.stack(path)) < 1e-12


def test_plain_adam_is_the_default() -> None:
    assert learner_of().outer == Outer("adam", "constant", None)
    assert torch.equal(rows(None), rows(Outer("adam", "constant")))


def lengths() -> Tensor:
    """The lengths of the meta-gradients of plain descent at rate 0.1, one per iteration."""
    path = torch.cat([flat(learner_of().init()).unsqueeze(0), descent([0.1] * 6)])
    return (path[1:] - path[:-1]).norm(dim=1) / 0.1


@pytest.mark.parametrize("share", [0.01, 0.5, 1.5])
def test_clipping_equals_torchs(share: float) -> None:
    """A length below all, within, and above some of the meta-gradients' own."""
    longest = share * float(lengths().median())
    assert bool((lengths() > longest).any())
    found = rows(Outer("sgd", clip=longest), meta_lr=0.1)
    assert relative(found, descent([0.1] * 6, longest)) < 1e-5, "torch adds 1e-6 to the length"
    assert relative(found, descent([0.1] * 6)) > 1e-4
    moves = torch.cat([flat(learner_of().init()).unsqueeze(0), found]).diff(dim=0).norm(dim=1)
    assert bool((moves <= 0.1 * longest * (1 + 1e-12)).all())
    assert moves[0] == pytest.approx(0.1 * min(longest, float(lengths()[0])), rel=1e-12)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_length_that_is_never_reached_changes_nothing(optimizer: str) -> None:
    assert torch.equal(rows(Outer(optimizer, clip=1e6)), rows(Outer(optimizer)))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("schedule", RATES)
def test_going_on_gives_the_same_rates(schedule: str, optimizer: str) -> None:
    outer = Outer(optimizer, schedule, clip=0.5)
    whole = rows(outer)
    records = train(learner_of(outer), SAMPLER, 6, 5, 0.01)
    states = [copy.deepcopy(next(records).state) for _ in range(3)]
    assert [state.optimizer["param_groups"][0]["lr"] for state in states] == [outer.rate(0.01, i, 6) for i in range(3)]
    assert torch.equal(rows(outer, start=states[-1]), whole[3:])
    assert not torch.equal(rows(outer, 7, start=states[-1])[:3], whole[3:]) or schedule == "constant"


def test_a_method_brings_its_own_outer_loop_unless_another_is_given() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    assert algorithms.reptile(model).outer == Outer("sgd", "linear")
    assert algorithms.reptile(model, outer=Outer("adam", clip=1.0)).outer == Outer("adam", clip=1.0)
    assert replace(algorithms.maml(model), outer=Outer("sgd")).outer.optimizer == "sgd"


BAD = {
    "unknown optimiser": (("adm",), r"unknown meta optimizer 'adm'; did you mean 'adam'\? \(known: adam, sgd\)"),
    "unknown schedule": (
        ("adam", "cosin"),
        r"unknown schedule 'cosin'; did you mean 'cosine'\? \(known: constant, cosine, lin",
    ),
    "clip to nothing": (("adam", "constant", 0.0), r"the meta-gradient's longest length is 0\.0; give a positive number"),
    "clip below nothing": (("adam", "constant", -1.0), r"longest length is -1\.0; give a positive number"),
    "clip to nan": (("adam", "constant", math.nan), "longest length is nan; give a positive number"),
    "clip to infinity": (("adam", "constant", math.inf), "longest length is inf; give a positive number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_sentences(case: str) -> None:
    arguments, sentence = BAD[case]
    with pytest.raises(UserError, match=sentence):
        Outer(*arguments)
