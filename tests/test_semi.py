"""Semi-supervised tasks: what has no label is disjoint from the rest, of the right classes, and counts in no score."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from tests.conftest import named, relative, stirred
from tests.test_contract import arguments
from tests.test_samplers import SIZES, bank, decode
from toolkit import Batch, Learner, Plan, Task, UserError, algorithms, draw, evaluate, meta_gradient
from toolkit.algorithms import METHODS, PRETRAINED
from toolkit.data.bank import ClassBank
from toolkit.evaluate import predictions
from toolkit.metrics import accuracy, cross_entropy
from toolkit.samplers import Episodes
from toolkit.samplers.semi import SemiEpisodes
from toolkit.task import IGNORED, take

TOY = {
    "unlabelled": SemiEpisodes(bank(), ways=3, shots=1, queries=2, unlabelled=3),
    "distractors": SemiEpisodes(bank(), ways=3, shots=2, queries=1, unlabelled=2, distractors=4),
    "everything": SemiEpisodes(bank(), ways=2, shots=1, queries=2, unlabelled=2, distractors=3, distractor_queries=4),
    "queries only": SemiEpisodes(bank(), ways=2, shots=1, queries=2, unlabelled=0, distractors=2, distractor_queries=1),
    "plain": SemiEpisodes(bank(), ways=3, shots=2, queries=3, unlabelled=0),
}


@pytest.mark.parametrize("name", TOY)
def test_ten_thousand_semi_supervised_tasks_are_disjoint_and_of_the_right_classes(name: str) -> None:
    s = TOY[name]
    tasks = draw(s, 10_000, seed=0)
    hidden, strangers = (s.ways + s.distractors) * s.unlabelled, s.distractors * s.distractor_queries
    for batch, items, rest in ((tasks.support, s.shots, hidden), (tasks.query, s.queries, strangers)):
        labels = torch.cat([torch.arange(s.ways).repeat_interleave(items), torch.full((rest,), IGNORED)])
        assert torch.equal(batch.y, labels.expand(10_000, -1))
        assert batch.x.shape == (10_000, s.ways * items + rest, 1, 1, 2) and batch.x.dtype == torch.float32
    (support, support_items), (query, query_items) = decode(tasks.support.x), decode(tasks.query.x)
    ids = torch.cat([1000 * support + support_items, 1000 * query + query_items], 1).sort(1).values
    assert (ids.diff(dim=1) > 0).all(), "no item twice"
    own = support[:, : s.ways * s.shots : s.shots]
    assert torch.equal(support[:, : s.ways * s.shots], own.repeat_interleave(s.shots, 1))
    assert torch.equal(query[:, : s.ways * s.queries], own.repeat_interleave(s.queries, 1))
    unlabelled = support[:, s.ways * s.shots :].view(10_000, s.ways + s.distractors, s.unlabelled)
    others = query[:, s.ways * s.queries :].view(10_000, s.distractors, s.distractor_queries)
    if s.unlabelled:
        assert torch.equal(unlabelled, unlabelled[..., :1].expand_as(unlabelled))
        assert torch.equal(unlabelled[:, : s.ways, 0], own)
    if s.distractor_queries:
        assert torch.equal(others, others[..., :1].expand_as(others))
    if s.unlabelled and s.distractor_queries:
        assert torch.equal(others[..., 0], unlabelled[:, s.ways :, 0])
    further = unlabelled[:, s.ways :, 0] if s.unlabelled else others[..., 0] if s.distractor_queries else own[:, :0]
    assert (torch.cat([own, further], 1).sort(1).values.diff(dim=1) > 0).all(), "all classes differ"


def test_classes_are_uniform_over_places_and_items_over_their_classes() -> None:
    sampler = SemiEpisodes(bank(), ways=2, shots=1, queries=1, unlabelled=2, distractors=2, distractor_queries=2)
    tasks = draw(sampler, 7000, seed=0)
    (classes, items), (others, other_items) = decode(tasks.support.x), decode(tasks.query.x)
    for place in (0, 1, 2, 4, 6, 8):
        assert chisquare(classes[:, place].bincount(minlength=len(SIZES))).pvalue > 1e-3
    for c, size in enumerate(SIZES):
        parts = (items[:, :2][classes[:, :2] == c], items[:, 2:6][classes[:, 2:6] == c], items[:, 6:][classes[:, 6:] == c])
        for part in (*parts, other_items[:, :2][others[:, :2] == c], other_items[:, 2:][others[:, 2:] == c]):
            assert chisquare(part.bincount(minlength=size)).pvalue > 1e-3


def test_pixels_become_floats_and_floats_are_kept() -> None:
    sampler = SemiEpisodes(replace(bank(), items=torch.randn(58, 3, dtype=torch.float64)), 3, 1, 2, 2, 1)
    x = draw(sampler, 2, seed=0).support.x
    assert isinstance(x, torch.Tensor) and x.dtype == torch.float64 and torch.isin(x, sampler.bank.items).all()


def test_every_item_of_a_class_can_be_used_up_and_no_more() -> None:
    for settings in ({"unlabelled": 3}, {"distractors": 2, "unlabelled": 1, "distractor_queries": 4}):
        SemiEpisodes(bank((5, 5, 5, 5)), ways=2, shots=1, queries=1, **settings)
        with pytest.raises(UserError, match="has 5; use"):
            SemiEpisodes(bank((5, 5, 5, 4 + 1)), ways=2, shots=1, queries=1, **settings | {"unlabelled": 4})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"unlabelled": -1}, "^-1 unlabelled items, 0 distractors, 0 distractor queries: each must be at least 0$"),
        ({"distractors": -1}, "-1 distractors, 0 distractor queries: each must be at least 0$"),
        ({"distractor_queries": -2}, "-2 distractor queries: each must be at least 0$"),
        ({"shots": 0}, "0 shots, 2 queries: each must be at least 1$"),
        ({"ways": 8}, "^8 ways need 8 classes, but toy has 7; use --ways 7 or fewer$"),
        ({"distractors": 5}, "^3 ways and 5 distractors need 8 classes, but toy has 7; use distractors=4 or fewer$"),
        ({"distractors": 2, "unlabelled": 0}, "^2 distractor classes without any item would do nothing; give unlabelled or "),
        ({"distractor_queries": 2}, "^2 distractor queries are of distractor classes, and there are 0; give distractors$"),
        ({"unlabelled": 4}, r"^1 shots, 2 queries, 4 unlabelled .* need 7 images per class, but class 'class-0' of toy has 6; "
                            "use unlabelled=3 or fewer$"),
        ({"distractors": 1, "distractor_queries": 5}, "need 7 images per class.* use distractor_queries=4 or fewer$"),
    ],
)  # fmt: skip
def test_semi_supervised_tasks_that_cannot_be_are_a_user_error(settings: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        SemiEpisodes(bank(), **{"ways": 3, "shots": 1, "queries": 2, "unlabelled": 2, **settings})


# What methods make of it.


def blobs() -> ClassBank:
    g = torch.Generator().manual_seed(0)
    points = 2 * torch.randn(7, 1, 3, generator=g, dtype=torch.float64) + torch.randn(7, 9, 3, generator=g, dtype=torch.float64)
    return ClassBank(points.flatten(0, 1), torch.arange(8) * 9, tuple("abcdefg"), "blobs")


SAMPLER = SemiEpisodes(blobs(), ways=2, shots=2, queries=3, unlabelled=2, distractors=2, distractor_queries=2)


def labelled(tasks: Task) -> Task:
    """The tasks without what has no label."""
    return Task(*(Batch(x[:, : int((y[0] >= 0).sum())], y[:, : int((y[0] >= 0).sum())]) for x, y in tasks))


def built(name: str, norm: bool = False, **changed: object) -> Learner:
    layers = {"norm": nn.BatchNorm1d(4)} if norm else {}
    model = named(body=nn.Linear(3, 4), **layers, act=nn.Tanh(), head=nn.Linear(4, 2))
    return algorithms.build(name, model, 7, **(arguments(name) | changed))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in (*PRETRAINED, "metal")])
def test_without_batch_norm_methods_that_learn_from_labels_are_as_if_the_rest_was_not_there(name: str) -> None:
    learner, tasks = built(name), draw(SAMPLER, 3, seed=0)
    meta = stirred(learner)
    (grads, scores), (expected, own) = (meta_gradient(learner, meta, t, Plan("vmap")) for t in (tasks, labelled(tasks)))
    assert relative(grads, expected) < 1e-10
    assert relative(scores.task_loss, own.task_loss) < 1e-10 and torch.equal(scores.task_metric, own.task_metric)


@pytest.mark.parametrize(("name", "norm"), [("metal", False), ("maml", True)])
def test_a_learned_loss_and_batch_norm_see_what_has_no_label(name: str, norm: bool) -> None:
    learner, tasks = built(name, norm), draw(SAMPLER, 3, seed=0)
    meta = stirred(learner)
    both = [meta_gradient(learner, meta, each, Plan("vmap"))[0] for each in (tasks, labelled(tasks))]
    assert relative(*both) > 1e-3


def test_predictions_for_distractor_queries_can_be_looked_at() -> None:
    learner, task = built("protonet"), SAMPLER(torch.Generator().manual_seed(0))
    meta = stirred(learner)
    found = predictions(learner, meta, task, (0,))
    known = predictions(learner, meta, take(labelled(draw(lambda _: task, 1, 0)), 0), (0,))
    assert found.shape == (1, 10, 2) and relative(found[:, :6], known) < 1e-12 and found[:, 6:].isfinite().all()


def test_label_orders_leave_what_has_no_label_without_one() -> None:
    learner = built("maml")
    meta, alone = stirred(learner), SemiEpisodes(blobs(), ways=2, shots=2, queries=3, unlabelled=4)
    with_rest = evaluate(learner, meta, alone, 4, 2, permutations=3)

    def without(generator: torch.Generator) -> Task:
        return take(labelled(alone.draw_many(iter([generator]))), 0)

    expected = evaluate(learner, meta, without, 4, 2, permutations=3)
    assert relative(with_rest.loss, expected.loss) < 1e-12 and torch.equal(with_rest.metric, expected.metric)


def test_a_minibatch_without_any_label_moves_nothing() -> None:
    learner = built("maml", inner_batch=1, inner_steps=4)
    task = SemiEpisodes(blobs(), ways=2, shots=1, queries=3, unlabelled=2)(torch.Generator().manual_seed(0))
    points = list(learner.path(learner.init(), task.support))
    moved = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in pairwise(points)]
    assert True in moved and False in moved
    assert all(p.isfinite().all() for p in points[-1].values())


def test_a_loss_of_no_labels_is_0_and_others_are_as_in_torch() -> None:
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randn(6, 3, generator=g), torch.tensor([0, 2, IGNORED, 1, IGNORED, 2])
    assert torch.equal(cross_entropy(logits, y), nn.functional.cross_entropy(logits, y))
    assert torch.equal(cross_entropy(logits[y >= 0], y[y >= 0]), nn.functional.cross_entropy(logits, y))
    nothing = torch.full((6,), IGNORED)
    assert cross_entropy(logits, nothing) == 0 and accuracy(logits, nothing) == 0
    shares = torch.rand(6, 3, generator=g).softmax(1)
    assert torch.equal(cross_entropy(logits, shares), nn.functional.cross_entropy(logits, shares))


def test_plain_settings_give_the_counts_of_episodes() -> None:
    ours, theirs = (draw(s, 1, 0) for s in (TOY["plain"], Episodes(bank(), ways=3, shots=2, queries=3)))
    assert torch.equal(ours.support.y, theirs.support.y) and torch.equal(ours.query.y, theirs.query.y)
