"""The mixture of adapted models against loops and hand computation: it sums to 1, its weights are what they should be."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import convolutional, dense, named, task_batch
from toolkit import Batch, Learner, Meta, UserError, algorithms, evaluate
from toolkit.evaluate import calibrate
from toolkit.metrics import accuracy, squared_error
from toolkit.mixture import Components, adapt, by_likelihood, fit_weights, log_probabilities, mix, uniform
from toolkit.models import mlp
from toolkit.task import Task, take

C = 3


def setting(model: nn.Module | None = None, **options: object) -> tuple[Learner, Meta, Components, Task]:
    """A learner of two inner steps, three models that it adapted, and the tasks whose support sets they saw."""
    learner = algorithms.maml(model or dense(), inner_lr=0.7, inner_steps=2, **options)
    tasks = task_batch(C)
    meta = learner.init()
    return learner, meta, adapt(learner, meta, tasks.support), tasks


def by_hand(learner: Learner, meta: Meta, task: Task, x: Tensor, steps: int = 2) -> Tensor:
    """P(y|x, theta_c) after the inner steps on one task's support set."""
    *_, fast = learner.path(meta, task.support, steps)
    return learner.predict(meta, fast, x, task.support.x, steps).softmax(-1)


def some(examples: int = 7, shape: tuple[int, ...] = (3,)) -> Tensor:
    return torch.randn(examples, *shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


PER_QUERY = torch.rand(7, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
WEIGHTS = {
    "one for all": torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
    "by query": PER_QUERY / PER_QUERY.sum(1, keepdim=True),
    "uniform": uniform(C),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_mixture_equals_a_loop_over_components_and_sums_to_one(kind: str) -> None:
    learner, meta, components, tasks = setting()
    weights, x = WEIGHTS[kind], some()
    found = mix(learner, meta, components, x, weights).exp()
    expected = torch.zeros(7, 2, dtype=torch.float64)
    for i in range(7):
        for c in range(C):
            weight = weights[i, c] if weights.dim() == 2 else weights[c]
            expected[i] += weight * by_hand(learner, meta, take(tasks, c), x)[i]
    assert (found - expected.detach()).abs().max() < 1e-12
    assert (found.sum(1) - 1).abs().max() < 1e-12


def test_uniform_weights_are_the_printed_formula_divided_by_c() -> None:
    learner, meta, components, tasks = setting()
    x = some()
    printed = torch.stack([by_hand(learner, meta, take(tasks, c), x) for c in range(C)]).sum(0)
    assert (printed.sum(1) - C).abs().max() < 1e-12
    assert (mix(learner, meta, components, x, uniform(C)).exp() - printed / C).abs().max() < 1e-12


def test_one_hot_weights_are_that_component_exactly() -> None:
    learner, meta, components, tasks = setting()
    logs = log_probabilities(learner, meta, components, some())
    assert logs.shape == (C, 7, 2)
    for c in range(C):
        assert torch.equal(mix(learner, meta, components, some(), torch.eye(C)[c]), logs[c])
        assert (logs[c].exp() - by_hand(learner, meta, take(tasks, c), some())).abs().max() < 1e-12


def test_single_precision_agrees_with_double_and_extreme_scores_stay_finite() -> None:
    learner, meta, components, tasks = setting()
    single = replace(learner, model=dense().float())
    low = adapt(single, single.init(), Batch(tasks.support.x.float(), tasks.support.y))
    x, weights = some(), WEIGHTS["one for all"]
    found = mix(single, single.init(), low, x.float(), weights)
    assert found.dtype == torch.float32
    assert (found - mix(learner, meta, components, x, weights)).abs().max() < 1e-5
    assert (found.exp().sum(1) - 1).abs().max() < 1e-6
    sure = low._replace(fast={name: 1e4 * p for name, p in low.fast.items()})
    far = mix(single, single.init(), sure, x.float(), torch.eye(C)[0])
    assert far.isfinite().all() and far.min() < -1e3


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_adapted_weights_are_those_of_the_path(steps: int) -> None:
    learner, meta, _, tasks = setting()
    components = adapt(learner, meta, tasks.support, steps)
    for c in range(C):
        *_, fast = learner.path(meta, take(tasks, c).support, steps)
        assert all(torch.allclose(components.fast[name][c], p, rtol=0, atol=1e-13) for name, p in fast.items())
    assert not any(p.requires_grad for p in components.fast.values())


@pytest.mark.parametrize("policy", ["batch", "support", "running", "per_step"])
def test_batch_norm_is_as_in_evaluation(policy: str) -> None:
    """The accuracy and loss of a component on its own query set are those that `evaluate` finds."""
    tasks = task_batch(C, (1, 8, 8), support=6, query=8)
    model = convolutional()
    model(tasks.support.x[0])  # running statistics of its own
    learner = algorithms.maml(model, inner_lr=0.3, inner_steps=2, batch_norm=policy)

    def sampler(generator: torch.Generator) -> Task:
        return take(tasks, int(generator.initial_seed() % C))

    meta = calibrate(learner, learner.init(), sampler, tasks=5)
    curve = evaluate(learner, meta, sampler, 6, 2)
    components = adapt(learner, meta, tasks.support)
    own = []
    for c in range(C):
        query = take(tasks, c).query
        prediction = mix(learner, meta, components, query.x, torch.eye(C)[c])
        own.append((nn.functional.nll_loss(prediction, query.y).item(), accuracy(prediction, query.y).item()))
    for loss, metric in zip(curve.loss[:, -1].tolist(), curve.metric[:, -1].tolist(), strict=True):
        assert any(loss == pytest.approx(a, abs=1e-12) and metric == b for a, b in own)


def test_dropout_is_off_and_attention_has_its_plain_formula() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(3, 1, batch_first=True), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.unsqueeze(1)
            return self.head(self.attention(rows, rows, rows)[0].squeeze(1))

    torch.manual_seed(0)
    for model in (named(body=nn.Linear(3, 4), drop=nn.Dropout(0.5), head=nn.Linear(4, 2)), Attending().double()):
        learner, meta, components, tasks = setting(model)
        again = adapt(learner, meta, tasks.support)
        assert all(torch.equal(components.fast[name], p) for name, p in again.fast.items())
        first, second = (mix(learner, meta, components, some(), uniform(C)) for _ in range(2))
        assert torch.equal(first, second) and (first.exp().sum(1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("prior", [None, torch.tensor([0.7, 0.1, 0.2])])
def test_weights_by_likelihood_are_bayes_rule_by_hand(prior: Tensor | None) -> None:
    learner, meta, components, tasks = setting()
    support = take(tasks, 1).query
    scores = []
    for c in range(C):
        score = 1.0 if prior is None else float(prior[c])
        for row, y in zip(by_hand(learner, meta, take(tasks, c), support.x), support.y, strict=True):
            score *= float(row[y])
        scores.append(score)
    found = by_likelihood(learner, meta, components, support, prior)
    assert found.tolist() == pytest.approx([score / sum(scores) for score in scores], abs=1e-7 if prior is not None else 1e-12)


def test_no_labelled_example_leaves_the_prior_and_a_prior_of_0_stays() -> None:
    learner, meta, components, tasks = setting()
    prior = torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64)
    nothing = Batch(some(0), torch.zeros(0, dtype=torch.int64))
    assert torch.allclose(by_likelihood(learner, meta, components, nothing, prior), prior)
    assert by_likelihood(learner, meta, components, take(tasks, 2).support, prior)[2] == 0


def test_likelihood_finds_the_sub_task_of_many_examples_without_underflow() -> None:
    learner, meta, components, _ = setting()
    x = some(4000)
    for c in range(C):
        y = torch.distributions.Categorical(logits=log_probabilities(learner, meta, components, x)[c]).sample()
        assert by_likelihood(learner, meta, components, Batch(x, y))[c] > 0.99


def likelihood(learner: Learner, meta: Meta, components: Components, batch: Batch, weights: Tensor) -> float:
    return float(-nn.functional.nll_loss(mix(learner, meta, components, batch.x, weights), batch.y))


def drawn(weights: Tensor, examples: int) -> tuple[Learner, Meta, Components, Batch]:
    """Three models of unlike predictions, and labels drawn from their mixture with these weights."""
    learner, meta, components, _ = setting()
    fast = {name: p * torch.tensor([3.0, -3.0, 1.0]).view(-1, *[1] * (p.dim() - 1)) for name, p in components.fast.items()}
    components = components._replace(fast=fast)
    x = some(examples)
    torch.manual_seed(4)
    y = torch.distributions.Categorical(logits=mix(learner, meta, components, x, weights)).sample()
    return learner, meta, components, Batch(x, y)


def test_em_never_lowers_the_likelihood_and_its_step_is_the_closed_form() -> None:
    learner, meta, components, batch = drawn(torch.tensor([0.1, 0.3, 0.6]), 200)
    share = log_probabilities(learner, meta, components, batch.x).exp()[:, torch.arange(200), batch.y]
    weights, values = uniform(C), []
    for iterations in range(30):
        found = fit_weights(learner, meta, components, batch, iterations)
        assert (found - weights).abs().max() < 1e-12
        values.append(likelihood(learner, meta, components, batch, found))
        weights = (weights.unsqueeze(1) * share / (weights @ share)).mean(1)
    assert all(b >= a - 1e-14 for a, b in pairwise(values))
    assert values[-1] > values[0] + 1e-3


@pytest.mark.parametrize("weights", [[0.1, 0.3, 0.6], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
def test_em_recovers_known_weights(weights: list[float]) -> None:
    known = torch.tensor(weights, dtype=torch.float64)
    learner, meta, components, batch = drawn(known, 20_000)
    found = fit_weights(learner, meta, components, batch, 500)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert (found - known).abs().max() < 0.05
    best = likelihood(learner, meta, components, batch, found)
    assert best >= likelihood(learner, meta, components, batch, known) - 1e-7
    for c in range(C):  # a maximum: no step towards a single component goes up
        assert likelihood(learner, meta, components, batch, 0.99 * found + 0.01 * torch.eye(C)[c]) <= best + 1e-6


def test_inputs_may_be_dicts() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = dense()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.head(a + b)

    tasks = task_batch(C)
    learner = algorithms.maml(Named(), inner_lr=0.5)
    halves = Batch({"a": tasks.support.x / 2, "b": tasks.support.x / 2}, tasks.support.y)
    components = adapt(learner, learner.init(), halves)
    plain = algorithms.maml(dense(), inner_lr=0.5)
    expected = mix(plain, plain.init(), adapt(plain, plain.init(), tasks.support), some(), uniform(C))
    found = mix(learner, learner.init(), components, {"a": some() / 2, "b": some() / 2}, uniform(C))
    assert (found - expected).abs().max() < 1e-12


def test_regression_and_weights_that_are_none_are_one_sentence() -> None:
    learner, meta, components, tasks = setting()
    x, y = some(), torch.zeros(7, dtype=torch.int64)
    line = algorithms.maml(mlp((3, 4, 1)).double(), loss=squared_error, metric=squared_error)
    floats = Batch(tasks.support.x, tasks.support.x[..., :1])
    single = adapt(line, line.init(), Batch(tasks.support.x, tasks.support.y), 0)
    cases = {
        "class probabilities, but y holds floats": lambda: adapt(line, line.init(), floats),
        r"2 or more classes, but the model gives \(7, 1\)": lambda: mix(line, line.init(), single, x, uniform(C)),
        r"weights of shape \(2,\) do not fit; with 3 components give shape \(3,\) or \(7, 3\)": lambda: mix(
            learner, meta, components, x, uniform(2)
        ),
        r"weights of shape \(6, 3\) do not fit": lambda: mix(learner, meta, components, x, uniform(C).expand(6, -1)),
        "with a sum of 3 are no probabilities": lambda: mix(learner, meta, components, x, torch.ones(C)),
        "weights between -1 and 1 ": lambda: mix(learner, meta, components, x, torch.tensor([1.0, 1.0, -1.0])),
        r"with 3 components give shape \(3,\)$": lambda: by_likelihood(learner, meta, components, Batch(x, y), uniform(2)),
        "but y holds floats": lambda: by_likelihood(learner, meta, components, Batch(x, y.double())),
        "y holds floats; give integer": lambda: fit_weights(learner, meta, components, Batch(x, y.double())),
        "100 iterations on 0 examples": lambda: fit_weights(learner, meta, components, Batch(x[:0], y[:0])),
        "-1 iterations on 7 examples": lambda: fit_weights(learner, meta, components, Batch(x, y), -1),
        "0 components have no weights": lambda: uniform(0),
        "-1 inner steps; give 0 or more": lambda: adapt(learner, meta, tasks.support, -1),
        "have no equal leading axis of sub-tasks": lambda: adapt(learner, meta, tasks.support._replace(y=y)),
    }
    for sentence, call in cases.items():
        with pytest.raises(UserError, match=sentence):
            call()
    assert math.isclose(float(mix(learner, meta, components, x, uniform(C)).exp().sum()), 7)
