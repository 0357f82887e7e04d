"""The outer loop: which tasks and which numbers it takes, how it goes on from a state, what it leaves alone."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.conftest import flat, relative, task_batch
from toolkit import Learner, Meta, Plan, State, Task, UserError, algorithms, draw, meta_gradient, train
from toolkit.learner import Score
from toolkit.metrics import squared_error
from toolkit.objectives import last_step
from toolkit.rules import SGD
from toolkit.samplers import Linear
from toolkit.task import take
from toolkit.train import NotFinite
from toolkit.tree import Params

SAMPLER = Linear(3, 5, 7)


def learner_of(dropout: float = 0.0) -> Learner:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1)).double()
    return algorithms.maml(model, loss=squared_error, metric=squared_error, rule=SGD(0.05, learn="tensor"), inner_steps=2)


def weights(learner: Learner, iterations: int = 4, start: State | None = None, seed: int = 3, meta_lr: float = 0.01) -> Tensor:
    """The meta-parameters after each iteration, one row each."""
    records = train(learner, SAMPLER, iterations, 5, meta_lr, seed, start=start)
    return torch.stack([flat(record.meta) for record in records])


def state_after(learner: Learner, iteration: int, seed: int = 3) -> State:
    """The state after some iterations, cut off from the training it came from."""
    *_, record = train(learner, SAMPLER, iteration, 5, 0.01, seed)
    return copy.deepcopy(record.state)


@pytest.mark.parametrize("plan", [Plan("vmap"), Plan("loop"), Plan("threads", workers=2), Plan("loop", trace=True)], ids=str)
def test_weights_of_convolutions_move_as_adam_says(plan: Plan) -> None:
    """The fused Adam of torch pairs weights and slopes by their place in memory, and convolutions keep channels last."""
    tasks = task_batch(shape=(2, 8, 8))
    body = [nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Softplus(), nn.Conv2d(3, 4, 3, stride=2), nn.Flatten()]
    learner = algorithms.maml(nn.Sequential(*body, nn.Linear(36, 2)).double(), inner_lr=0.1)
    by_hand = learner.init()
    plain = torch.optim.Adam(pytree.tree_leaves(by_hand), 0.01, foreach=False, fused=False)
    for record in train(learner, lambda generator: take(tasks, 0), 3, 2, 0.01, plan=plan):
        grads, _ = meta_gradient(learner, by_hand, take(tasks, slice(0, 1)), Plan("loop"))
        assert all(g.stride() == p.stride() for g, p in zip(*map(pytree.tree_leaves, (grads, by_hand)), strict=True))
        for leaf, its in zip(*map(pytree.tree_leaves, (by_hand, grads)), strict=True):
            leaf.grad = its
        plain.step()
        # Biases before batch norm have no slope, and Adam makes steps of rounding.
        moved = [{k: v for k, v in meta.params.items() if k != "0.bias"} for meta in (record.meta, by_hand)]
        assert relative(*moved) < 1e-9


def numbers(state: State) -> Tensor:
    """All numbers that a state holds, Adam's moments included."""
    return flat((state.meta, state.optimizer["state"]))


def test_the_first_step_moves_every_weight_by_the_rate() -> None:
    learner = learner_of()
    grads, metrics = meta_gradient(learner, learner.init(), draw(SAMPLER, 5, 3))
    (record,) = train(learner, SAMPLER, 1, 5, 0.01, seed=3)
    moved, direction = flat(record.meta) - flat(learner.init()), flat(grads)
    assert direction.abs().min() > 1e-5, "every weight must have a gradient, or this test proves less"
    assert torch.allclose(moved, -0.01 * direction.sign(), rtol=1e-3)
    assert (record.iteration, record.loss, record.metric) == (1, metrics.loss.item(), metrics.metric.item())
    assert record.state.iteration == 1 and 0 < record.seconds < 60


def test_equals_adam_by_hand_over_the_tasks_of_the_stream() -> None:
    learner = learner_of()
    meta = learner.init()
    leaves = pytree.tree_leaves(meta)
    optimizer = torch.optim.Adam(leaves, lr=0.01)
    records = train(learner, SAMPLER, 4, 5, 0.01, seed=3)
    for i in range(4):
        grads, metrics = meta_gradient(learner, meta, draw(SAMPLER, 5, 3, start=5 * i, split="train"))
        for leaf, gradient in zip(leaves, pytree.tree_leaves(grads), strict=True):
            leaf.grad = gradient
        optimizer.step()
        record = next(records)
        assert record.iteration == i + 1
        assert record.loss == pytest.approx(metrics.loss.item(), rel=1e-12)
        assert relative(record.meta, meta) < 1e-12
    assert next(records, None) is None


def test_the_seed_decides_the_tasks() -> None:
    learner = learner_of()
    assert torch.equal(weights(learner), weights(learner))
    assert not torch.equal(weights(learner, 1), weights(learner, 1, seed=4))
    losses = [[record.loss for record in train(learner, SAMPLER, 2, 5, 0.01, seed)] for seed in (3, 4)]
    assert len({loss for pair in losses for loss in pair}) == 4


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_going_on_from_a_state_equals_the_whole_and_leaves_the_state_alone(dropout: float) -> None:
    learner = learner_of(dropout)
    whole, start = weights(learner, 6), state_after(learner, 3)
    kept = copy.deepcopy(start)
    for _ in range(2):
        assert torch.equal(weights(learner, 6, start), whole[3:])
        assert torch.equal(numbers(start), numbers(kept)) and start.iteration == 3
        assert start.optimizer["param_groups"] == kept.optimizer["param_groups"]
    assert not len(list(train(learner, SAMPLER, 3, 5, 0.01, 3, start=start))), "nothing is left to do"


def test_a_new_rate_is_used_on_going_on() -> None:
    learner = learner_of()
    start = state_after(learner, 3)
    small, large = (weights(learner, 4, start, meta_lr=rate)[0] - flat(start.meta) for rate in (0.001, 0.1))
    assert relative(large, 100 * small) < 1e-10
    assert start.optimizer["param_groups"][0]["lr"] == 0.01


def test_the_learners_model_and_the_start_it_gives_are_unchanged() -> None:
    learner = learner_of()
    before, meta = copy.deepcopy(learner.model.state_dict()), flat(learner.init())
    rows = weights(learner)
    assert not torch.equal(rows[-1], meta)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.model.state_dict().items())
    assert torch.equal(flat(learner.init()), meta) and all(p.grad is None for p in learner.model.parameters())


@pytest.mark.parametrize(
    "bad", [(0, 5, 0.01), (-1, 5, 0.01), (4, 0, 0.01), (4, 5, 0.0), (4, 5, -0.01), (4, 5, torch.inf), (4, 5, torch.nan)]
)
def test_bad_numbers_are_refused_at_the_call(bad: tuple[int, int, float]) -> None:
    with pytest.raises(UserError, match="each must be positive"):
        train(learner_of(), SAMPLER, *bad)


def broken_from(call: int) -> Callable[..., tuple[Tensor, Score]]:
    """The usual objective, but that from one of its calls on its gradient, and not its value, is NaN."""
    calls: list[int] = []

    def objective(own: Learner, meta: Meta, path: Iterable[Params], task: Task) -> tuple[Tensor, Score]:
        calls.append(1)
        value, score = last_step(own, meta, path, task)
        zero = torch.stack([(p * 0).sum() for p in meta.params.values()]).sum()
        return (value + zero.sqrt() if len(calls) >= call else value), score

    return objective


def test_a_gradient_that_is_not_finite_stops_before_the_update_though_the_loss_is() -> None:
    learner = replace(learner_of(), objective=broken_from(3))
    seen = []
    with pytest.raises(NotFinite, match=r"iteration 3: the meta-gradient is not finite; lower --inner-lr or --meta-lr"):
        for record in train(learner, SAMPLER, 9, 5, 0.01, seed=3, plan=Plan("vmap")):
            seen.append((record.state, flat(record.meta).clone()))
    (_, first), (state, second) = seen
    assert torch.equal(flat(state.meta), second) and not torch.equal(first, second)
    assert second.isfinite().all() and state.iteration == 2


def test_masks_of_dropout_do_not_depend_on_the_callers_random_state() -> None:
    learner, found = learner_of(0.5), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(weights(learner))
    assert torch.equal(*found)
    assert not torch.equal(found[0], weights(learner_of(0.0)))


def fixed(generator: torch.Generator) -> Task:
    """The same task whatever the generator says."""
    task = take(task_batch(), 0)
    return pytree.tree_map(lambda t: t if t.is_floating_point() else t[:, None].double(), task)


def test_masks_of_dropout_differ_between_iterations_and_seeds() -> None:
    learner = learner_of(0.5)
    losses = [record.loss for seed in (0, 1) for record in train(learner, fixed, 4, 2, 1e-12, seed)]
    assert len({round(loss, 6) for loss in losses}) == 8
    still = [record.loss for record in train(learner_of(0.0), fixed, 4, 2, 1e-12)]
    assert max(still) - min(still) < 1e-9


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_global_random_state_is_left_alone(dropout: float) -> None:
    learner = learner_of(dropout)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for _ in train(learner, SAMPLER, 3, 5, 0.01):
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)
