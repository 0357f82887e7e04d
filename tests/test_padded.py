"""Tasks of varying ways and shots: drawn uniformly, filled up with what no method, plan or evaluation may see."""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from tests.conftest import flat, named, relative, stirred
from tests.test_contract import PLANS, arguments
from tests.test_samplers import SIZES, bank, decode
from toolkit import Batch, Learner, Meta, Plan, Task, UserError, algorithms, draw, evaluate, meta_gradient
from toolkit.algorithms import METHODS, PRETRAINED
from toolkit.data.bank import ClassBank
from toolkit.evaluate import calibrate, predictions
from toolkit.metrics import accuracy, cross_entropy, of_ways
from toolkit.samplers.variable import VariableEpisodes
from toolkit.task import IGNORED, Padded, stack, take
from toolkit.tree import Params, tree_map

WAYS = 4
TRAINED = [name for name in METHODS if name not in PRETRAINED]


def padded(x: object) -> Padded:
    assert isinstance(x, Padded)
    return x


# What is drawn.

TOY = {
    "imbalanced": VariableEpisodes(bank(), ways=5, shots=4, queries=3, min_shots=2),
    "balanced": VariableEpisodes(bank(), ways=5, shots=4, queries=3, balanced=True),
    "one size": VariableEpisodes(bank(), ways=3, shots=2, queries=2, min_ways=3, min_shots=2),
}


@pytest.mark.parametrize("name", TOY)
def test_ten_thousand_variable_tasks_are_disjoint_with_every_class_in_both_sets(name: str) -> None:
    sampler = TOY[name]
    tasks = draw(sampler, 10_000, seed=0)
    ids = []
    for (x, y), items in zip(tasks, (sampler.shots, sampler.queries), strict=True):
        x, labels = padded(x), torch.arange(sampler.ways).repeat_interleave(items)
        assert x.x.shape == (10_000, sampler.ways * items, 1, 1, 2) and x.x.dtype == torch.float32
        assert torch.equal(y, torch.where(x.real, labels, IGNORED)) and y.dtype == torch.int64
        assert not x.x[~x.real].any()
        classes, numbers = decode(x.x)
        ids.append((1000 * classes + numbers).masked_fill(~x.real, -1))
        for label in range(sampler.ways):
            assert (torch.where(y == label, classes, 99).amin(1) >= torch.where(y == label, classes, -1).amax(1)).all()
    both = torch.cat(ids, 1).sort(1).values
    assert ((both[:, 1:] != both[:, :-1]) | (both[:, 1:] < 0)).all(), "no item twice"
    of_label = [torch.stack([(each.y == c).sum(1) for c in range(sampler.ways)], 1) for each in tasks]
    present = of_label[1] > 0
    assert torch.equal(of_label[0] > 0, present) and (of_label[1][present] == sampler.queries).all()
    assert (present.int().diff(dim=1) <= 0).all(), "labels are 0 .. ways - 1"
    first = [(each // 1000)[:, :: each.shape[1] // sampler.ways] for each in ids]
    assert torch.equal(*first), "a label is the same class in both sets"
    classes = first[0].masked_fill(~present, -1).sort(1).values
    assert ((classes.diff(dim=1) > 0) | (classes[:, 1:] < 0)).all(), "labels are different classes"


def counts(tasks: Task) -> tuple[Tensor, Tensor]:
    """The number of ways of each task, and the shots of each label (tasks, most ways)."""
    shots = torch.stack([(tasks.support.y == label).sum(1) for label in range(int(tasks.support.y.max()) + 1)], 1)
    return (shots > 0).sum(1), shots


def test_ways_and_shots_are_uniform_and_shots_of_classes_are_drawn_apart() -> None:
    sampler = VariableEpisodes(bank(), ways=5, shots=4, queries=2, min_ways=3)
    ways, shots = counts(draw(sampler, 6000, seed=0))
    assert ways.min() == 3 and ways.max() == sampler.outputs and chisquare(ways.bincount()[3:]).pvalue > 1e-3
    for label in range(5):
        own = shots[:, label][shots[:, label] > 0]
        assert chisquare(own.bincount(minlength=5)[1:]).pvalue > 1e-3
    pairs = (5 * shots[:, 0] + shots[:, 1]).bincount(minlength=25).view(5, 5)
    assert chisquare(pairs[1:, 1:].flatten()).pvalue > 1e-3
    assert chisquare((5 * ways + shots[:, 0]).bincount(minlength=30).view(6, 5)[3:, 1:].flatten()).pvalue > 1e-3


def test_balanced_tasks_have_one_number_of_shots_drawn_uniformly() -> None:
    ways, shots = counts(draw(VariableEpisodes(bank(), ways=4, shots=4, queries=2, min_shots=2, balanced=True), 6000, seed=0))
    for task, many in zip(shots.tolist(), ways.tolist(), strict=True):
        assert len(set(task[:many])) == 1
    assert chisquare(shots[:, 0].bincount()[2:]).pvalue > 1e-3


def test_classes_are_uniform_over_labels_and_items_over_their_classes() -> None:
    tasks = draw(VariableEpisodes(bank(), ways=3, shots=3, queries=2), 7000, seed=0)
    for (x, y), ends in zip(tasks, (3, 2), strict=True):
        classes, items = decode(padded(x).x)
        for label in range(3):
            begin = label * ends
            seen = classes[:, begin][y[:, begin] == label]
            assert chisquare(seen.bincount(minlength=len(SIZES))).pvalue > 1e-3
        for c, size in enumerate(SIZES):
            assert chisquare(items[(classes == c) & (y >= 0)].bincount(minlength=size)).pvalue > 1e-3


@pytest.mark.parametrize("balanced", [False, True])
def test_a_class_of_few_items_limits_its_own_shots_and_all_when_balanced(balanced: bool) -> None:
    small = bank((5, 12, 4, 12))
    tasks = draw(VariableEpisodes(small, ways=3, shots=6, queries=3, min_shots=2, balanced=balanced), 3000, seed=0)
    classes, _ = decode(padded(tasks.query.x).x[:, ::3])
    ways, shots = counts(tasks)
    present = torch.arange(3) < ways[:, None]
    for c, most in ((0, 2), (2, 1)):
        here = (classes == c) & present
        assert (shots[here] == most).all() if not balanced else (shots[here].amax() == most)
    large = ((classes % 2 == 1) | ~present).all(1) if balanced else torch.ones(3000, dtype=torch.bool)
    own = shots[large][((classes % 2 == 1) & present)[large]]
    assert own.bincount().nonzero().flatten().tolist() == [2, 3, 4, 5, 6]


def test_pixels_become_floats_and_floats_are_kept() -> None:
    floats = replace(bank(), items=torch.randn(58, 3, dtype=torch.float64))
    x = padded(draw(VariableEpisodes(floats, ways=3, shots=2, queries=2), 2, seed=0).support.x)
    assert x.x.dtype == torch.float64 and torch.isin(x.x[x.real], floats.items).all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"ways": 3, "min_ways": 4}, "^tasks of 4 to 3 ways; give min_ways from 1 to the most ways, which are 3$"),
        ({"ways": 3, "min_ways": 0}, "^tasks of 0 to 3 ways; give min_ways from 1"),
        ({"ways": 3, "shots": 2, "min_shots": 3}, "^tasks of 3 to 2 shots; give min_shots from 1 to the most shots"),
        ({"ways": 8}, "^8 ways need 8 classes, but toy has 7; use --ways 7 or fewer$"),
        ({"ways": 3, "shots": 0}, "0 shots, 3 queries: each must be at least 1"),
        ({"ways": 3, "queries": 0}, "0 queries: each must be at least 1"),
        ({"ways": 3, "queries": 6}, "^1 shots and 6 queries need 7 images per class, but class 'class-0' of toy has 6; use "),
    ],
)
def test_variable_tasks_that_cannot_be_are_a_user_error(settings: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        VariableEpisodes(bank(), **{"queries": 3, "shots": 4, **settings})


# What methods see of it.


def blobs() -> ClassBank:
    """Seven classes of eight points around a centre, three float64 numbers each."""
    g = torch.Generator().manual_seed(0)
    points = 2 * torch.randn(7, 1, 3, generator=g, dtype=torch.float64) + torch.randn(7, 8, 3, generator=g, dtype=torch.float64)
    return ClassBank(points.flatten(0, 1), torch.arange(8) * 8, tuple("abcdefg"), "blobs")


SAMPLER = VariableEpisodes(blobs(), ways=WAYS, shots=3, queries=2)


def loud(generator: torch.Generator) -> Task:
    """Tasks whose filling is not zero but large, so that it tells wherever it counts."""
    return Task(*(Batch(_loud(padded(x), generator), y) for x, y in SAMPLER(generator)))


def _loud(x: Padded, generator: torch.Generator) -> Padded:
    noise = 20 * torch.randn(x.x.shape, generator=generator, dtype=x.x.dtype)
    return x._replace(x=torch.where(x.real.unsqueeze(-1), x.x, noise))


def ragged(tasks: int = 5, seed: int = 1) -> Task:
    found = draw(loud, tasks, seed)
    ways, shots = counts(found)
    assert len(ways.unique()) > 1 and len(shots[shots > 0].unique()) > 1
    return found


def unpadded(task: Task) -> Task:
    """One task without its filling, as plain tensors."""
    return Task(*(Batch(padded(x).x[padded(x).real], y[padded(x).real]) for x, y in task))


def each(tasks: Task) -> list[Task]:
    return [unpadded(take(tasks, i)) for i in range(len(tasks.support.y))]


def network(outputs: int = WAYS) -> nn.Module:
    return named(body=nn.Linear(3, 6), norm=nn.BatchNorm1d(6), act=nn.Tanh(), head=nn.Linear(6, outputs))


def built(name: str, **changed: Any) -> Learner:
    score = {"loss": of_ways(cross_entropy), "metric": of_ways(accuracy)}
    return algorithms.build(name, network(), 7, **(arguments(name) | score | changed))


def means(trees: list[Meta]) -> Meta:
    mean: Meta = Meta(*(tree_map(lambda *values: torch.stack(values).mean(0), *parts) for parts in zip(*trees, strict=True)))
    return mean


def check_loop(learner: Learner) -> None:
    """The gradient and the scores of a padded batch, in one pass, are those of its tasks alone and without filling."""
    meta, tasks = stirred(learner), ragged()
    grads, scores = meta_gradient(learner, meta, tasks, Plan("vmap"))
    alone = [meta_gradient(learner, meta, stack([task]), Plan("loop")) for task in each(tasks)]
    assert flat(grads).norm() > 0
    assert relative(grads, means([own for own, _ in alone])) < 1e-10
    assert relative(scores.task_loss, [own.task_loss for _, own in alone]) < 1e-10
    assert relative(scores.task_metric, [own.task_metric for _, own in alone]) < 1e-10


@pytest.mark.parametrize("name", TRAINED)
def test_the_gradient_of_a_ragged_batch_equals_the_loop_without_filling(name: str) -> None:
    check_loop(built(name))


@pytest.mark.parametrize("name", ["maml", "proto_maml", "metal"])
@pytest.mark.parametrize("policy", ["support", "per_step", "per_step_batch"])
def test_so_it_does_with_every_policy_of_batch_norm(name: str, policy: str) -> None:
    check_loop(built(name, batch_norm=policy))


@pytest.mark.parametrize("name", ["maml", "maml_plus_plus", "r2d2", "metal"])
def test_plans_agree_on_ragged_batches(name: str) -> None:
    learner, tasks = built(name), ragged()
    meta = stirred(learner)
    expected, scores = meta_gradient(learner, meta, tasks, Plan("loop"))
    for plan in PLANS.values():
        grads, found = meta_gradient(learner, meta, tasks, plan)
        assert relative(grads, expected) < 1e-10 and relative(found.task_loss, scores.task_loss) < 1e-10, plan


def cut(params: Params, ways: int) -> Params:
    """The weights of a model whose head ends at class `ways` - 1."""
    return {name: p[:ways] if name.startswith("head.") else p for name, p in params.items()}


def cut_learner(name: str, ways: int) -> Learner:
    return algorithms.build(name, network(ways), **arguments(name))


@pytest.mark.parametrize("name", ["maml", "protonet"])
def test_it_equals_models_whose_heads_end_at_each_tasks_own_classes(name: str) -> None:
    learner, tasks = built(name), ragged()
    meta, alone = stirred(learner), []
    grads, scores = meta_gradient(learner, meta, tasks, Plan("vmap"))
    for task, loss in zip(each(tasks), scores.task_loss, strict=True):
        ways = int(task.support.y.max()) + 1
        own, found = meta_gradient(cut_learner(name, ways), Meta(cut(meta.params, ways), {}), stack([task]), Plan("loop"))
        whole = tree_map(torch.zeros_like, meta.params)
        for n, p in cut(whole, ways).items():
            p += own.params[n]
        alone.append(Meta(whole, {}))
        assert relative(found.task_loss, loss) < 1e-10
    assert relative(grads, means(alone)) < 1e-10


# Evaluation.


def check_curves(learner: Learner, meta: Meta, permutations: int = 1, plan: Plan | None = None) -> None:
    """A padded evaluation has the curves of its tasks alone and without filling."""
    curve = evaluate(
        learner, meta, loud, 5, steps=3, seed=1, split="train", plan=plan or Plan("vmap"), permutations=permutations
    )
    for i, task in enumerate(each(ragged())):
        own = evaluate(learner, meta, Fixed(task), 1, steps=3, plan=Plan("loop"), permutations=permutations)
        assert relative(curve.loss[i], own.loss[0]) < 1e-10 and torch.equal(curve.metric[i], own.metric[0])


@dataclass(frozen=True)
class Fixed:
    """A sampler of one task."""

    task: Task

    def __call__(self, generator: torch.Generator) -> Task:
        return self.task


@pytest.mark.parametrize("name", METHODS)
def test_an_evaluation_of_padded_tasks_equals_the_loop_without_filling(name: str) -> None:
    learner = built(name, batch_norm="batch")
    check_curves(learner, stirred(learner))


@pytest.mark.parametrize("plan", [Plan("loop"), Plan("threads", workers=2)])
def test_so_it_does_under_other_plans(plan: Plan) -> None:
    learner = built("maml")
    check_curves(learner, stirred(learner), plan=plan)


@pytest.mark.parametrize("policy", ["support", "per_step"])
def test_so_it_does_with_statistics_of_the_support_set_or_of_training(policy: str) -> None:
    learner = built("maml", batch_norm=policy)
    meta = calibrate(learner, stirred(learner), loud, tasks=5, seed=1)
    check_curves(learner, meta)
    if policy == "per_step":
        alone = [calibrate(learner, meta, Fixed(task), tasks=1).stats for task in each(ragged())]
        assert relative(meta.stats, tree_map(lambda *values: torch.stack(values).mean(0), *alone)) < 1e-12


@pytest.mark.parametrize("name", ["maml", "protonet"])
def test_label_orders_of_padded_tasks_equal_the_loop_without_filling(name: str) -> None:
    learner = built(name)
    check_curves(learner, stirred(learner), permutations=4)


def test_label_orders_change_the_places_of_a_tasks_own_classes_only() -> None:
    """By hand, with models whose heads end at each task's last class."""
    learner = built("maml")
    meta, generator = stirred(learner), torch.Generator().manual_seed(0)
    drawn = [list(range(WAYS)), *(torch.randperm(WAYS, generator=generator).tolist() for _ in range(5))]
    curve = evaluate(learner, meta, loud, 5, steps=2, seed=1, split="train", permutations=6)
    for i, task in enumerate(each(ragged())):
        ways, total = int(task.support.y.max()) + 1, torch.zeros(1)
        own = cut_learner("maml", ways)
        for order in drawn:
            ranks = torch.tensor([sorted(order[:ways]).index(place) for place in order[:ways]])
            turned = task._replace(support=task.support._replace(y=ranks[task.support.y]))
            found = predictions(own, Meta(cut(meta.params, ways), {}), turned, (0, 1, 2)).softmax(-1)
            total = total + found[..., ranks] / 6
        losses = [cross_entropy(point.log(), task.query.y) for point in total]
        assert relative(curve.loss[i], losses) < 1e-10
        assert torch.equal(curve.metric[i], torch.stack([accuracy(point, task.query.y) for point in total]))


def test_prototypes_do_not_care_for_label_orders_of_padded_tasks() -> None:
    learner = built("protonet")
    meta = stirred(learner)
    one, many = (evaluate(learner, meta, loud, 5, 0, permutations=n).loss for n in (1, 4))
    assert relative(many, one) < 1e-12


# What cannot take padded tasks says so.


def test_minibatches_of_padded_tasks_are_refused() -> None:
    learner = built("maml", inner_batch=2)
    with pytest.raises(UserError, match=r"^inner minibatches of 2 would mix filling with examples; leave inner_batch out"):
        meta_gradient(learner, learner.init(), ragged())


def test_learn2learn_refuses_padded_tasks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("learn2learn", reason="see requirements-learn2learn.txt")
    from toolkit.backend import learn2learn_gradient

    learner = built("maml")
    with pytest.raises(UserError, match=r"^learn2learn would count the filling of padded tasks; use the backend 'toolkit', or"):
        learn2learn_gradient(learner, Plan())(learner.init(), ragged())
