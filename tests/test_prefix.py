"""The front of a model once per task: the same gradient and curve, fewer passes, none where it would not be the same."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import convolutional, finite_differences, mean_objective, named, relative, stirred, task_batch
from toolkit import Batch, Learner, Meta, Plan, Task, UserError, algorithms, engine, evaluate, meta_gradient
from toolkit.engine import gradient_function
from toolkit.learner import support_loss
from toolkit.models.surgery import lora
from toolkit.modules import cut
from toolkit.prefix import Shortened, shortened
from toolkit.rules import Adam
from toolkit.task import generators, take


class Counting(nn.Module):
    """A layer that counts the passes of all its copies."""

    passes = [0]  # noqa: RUF012

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        self.passes[0] += 1
        return self.layer(x)  # type: ignore[no-any-return]


class Declared(nn.Module):
    """A model whose forward is its own, with the order of its layers said."""

    sequence = ("body", "act", "head")

    def __init__(self) -> None:
        super().__init__()
        for name, layer in named().named_children():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(x)))  # type: ignore[no-any-return]


def deep(norm: bool = False, drop: float = 0.0) -> nn.Module:
    body = nn.Sequential(nn.Linear(3, 4), *([nn.BatchNorm1d(4)] if norm else []), nn.Tanh(), nn.Dropout(drop))
    return named(body=body, middle=nn.Linear(4, 4), act=nn.Tanh(), head=nn.Linear(4, 2))


CASES: dict[str, Callable[[], tuple[Learner, Task]]] = {
    "head": lambda: (algorithms.anil(named(), inner_lr=0.3, inner_steps=3), task_batch()),
    "head by Adam": lambda: (algorithms.anil(named(), rule=Adam(0.1, eps=1e-3), inner_steps=3), task_batch()),
    "last layers": lambda: (algorithms.maml(deep(), adapts=("middle.*", "head.*"), inner_lr=0.3, inner_steps=2), task_batch()),
    "first order": lambda: (algorithms.anil(named(), inner_lr=0.3, inner_steps=3, order="first"), task_batch()),
    "truncated": lambda: (algorithms.anil(named(), inner_lr=0.3, inner_steps=3, order="truncated:1"), task_batch()),
    "convolutions": lambda: (
        algorithms.anil(convolutional(), adapts="5.*", inner_lr=0.3, inner_steps=3), task_batch(shape=(1, 8, 8))
    ),
    "support statistics": lambda: (
        algorithms.anil(convolutional(), adapts="5.*", inner_lr=0.3, inner_steps=2, batch_norm="support"),
        task_batch(shape=(1, 8, 8)),
    ),
    "minibatches": lambda: (algorithms.anil(named(), inner_lr=0.3, inner_steps=3, inner_batch=2), task_batch()),
    "late adapters": lambda: (
        algorithms.maml(lora(deep(), 2, "middle", peft=False), adapts="*lora_*", inner_lr=0.3, inner_steps=2), task_batch()
    ),
    "declared": lambda: (algorithms.anil(Declared(), inner_lr=0.3, inner_steps=2), task_batch()),
}  # fmt: skip
PLANS = [Plan("vmap"), Plan("loop"), Plan("threads", workers=2), Plan("vmap", memory="recompute"), Plan("loop", trace=True)]


def plainly(monkeypatch: pytest.MonkeyPatch, learner: Learner, meta: Meta, tasks: Task, plan: Plan = PLANS[0]) -> Any:
    """The gradient with the whole model at every step."""
    with monkeypatch.context() as patch:
        patch.setattr(engine, "shortened", lambda learner, *rest: learner)
        return gradient_function.__wrapped__(learner, plan)(meta, tasks)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_equals_that_of_the_whole_model(case: str, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, tasks = CASES[case]()
    meta, seen = stirred(learner), list[Learner]()
    monkeypatch.setattr(engine, "shortened", lambda *given: seen.append(shortened(*given)) or seen[-1])
    found, scores = gradient_function.__wrapped__(learner, plan)(meta, tasks)
    assert isinstance(seen[0], Shortened), "the case must be one that has a front"
    expected, theirs = plainly(monkeypatch, learner, meta, tasks)
    assert relative(found, expected) < 1e-10 and relative(scores, theirs) < 1e-10


@pytest.mark.parametrize("case", ["head", "convolutions"])
def test_the_gradient_is_exact(case: str) -> None:
    learner, tasks = CASES[case]()
    meta = stirred(learner)
    expected = finite_differences(mean_objective(learner, tasks), meta)
    assert relative(meta_gradient(learner, meta, tasks)[0], expected) < 1e-6


@pytest.mark.parametrize("trace", [False, True])
def test_the_curve_equals_that_of_the_whole_model(trace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, tasks = CASES["convolutions"]()
    meta = stirred(learner)

    def sampler(generator: torch.Generator) -> Task:
        return take(tasks, int(torch.randint(3, (1,), generator=generator)))

    found = evaluate(learner, meta, sampler, 9, 4, plan=Plan("vmap", trace=trace))
    for i, task in enumerate(take(tasks, j) for j in order_of(sampler, tasks)):
        by_hand = [learner.assess(meta, fast, task).loss for fast in learner.path(meta, task.support, 4)]
        assert relative(found.loss[i], torch.stack(by_hand)) < 1e-10


def order_of(sampler: Callable[[torch.Generator], Task], tasks: Task) -> list[int]:
    """Which of the tasks the test stream draws."""
    drawn = [sampler(generator) for generator in generators(0, "test", range(9))]
    return [next(j for j in range(3) if torch.equal(take(tasks, j).query.x, task.query.x)) for task in drawn]


@pytest.mark.parametrize("memory", ["unroll", "recompute"])
def test_passes_of_the_front_do_not_grow_with_the_steps(memory: str) -> None:
    passes = []
    for steps in (1, 10):
        model = named(body=Counting(nn.Linear(3, 4)), act=nn.Tanh(), head=nn.Linear(4, 2))
        learner = algorithms.anil(model, inner_lr=0.1, inner_steps=steps)
        gradient = gradient_function.__wrapped__(learner, Plan("vmap", memory=memory))  # type: ignore[arg-type]
        gradient(learner.init(), task_batch())  # the first batch looks whether both ways agree
        before = Counting.passes[0]
        gradient(learner.init(), task_batch())
        passes.append(Counting.passes[0] - before)
    assert passes == ([2, 2] if memory == "unroll" else [4, 4]), "support and query; again on the way back"


def forgetful(learner: Learner, meta: Meta, fast: Any, support: Batch, k: int) -> Tensor:
    """An inner loss that looks at the inputs itself."""
    x = support.x
    assert isinstance(x, Tensor)
    return support_loss(learner, meta, fast, support, k) + sum(p.square().sum() for p in fast.values()) * x.square().mean()


def unlike() -> dict[str, Learner]:
    """Learners that must run the whole model at every step."""
    return {
        "all adapts": algorithms.maml(named(), inner_steps=2),
        "no steps": algorithms.anil(named(), inner_steps=2),
        "an inner loss of inputs": replace(algorithms.anil(named(), inner_steps=2), inner=forgetful),
        "norm by minibatch": algorithms.anil(deep(norm=True), adapts="head.*", inner_steps=2, inner_batch=2),
        "norm per step": algorithms.anil(deep(norm=True), adapts="head.*", inner_steps=2, batch_norm="per_step"),
    }


@pytest.mark.parametrize("case", unlike())
def test_what_would_not_be_the_same_is_left_alone(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, tasks = unlike()[case], task_batch()
    steps = 0 if case == "no steps" else learner.steps

    def work(each: Learner, meta: Meta, one: Task) -> Any:
        return engine._unrolled(each, engine.lift_vmap, meta, one)

    own = shortened(learner, learner.init(), take(tasks, slice(0, 1)), steps, work)
    if isinstance(own, Shortened):  # cut before the norm
        assert {name for name, _ in own.front.named_parameters()} == {"body.0.weight", "body.0.bias"}
    expected, _ = plainly(monkeypatch, learner, learner.init(), tasks)
    assert relative(meta_gradient(learner, learner.init(), tasks)[0], expected) < 1e-10


def test_a_front_with_dropout_draws_masks_at_every_step() -> None:
    learner = algorithms.anil(deep(drop=0.5), inner_steps=2)
    one = take(task_batch(), slice(0, 1))
    cut_off = shortened(learner, learner.init(), one, 2, lambda each, meta, one: list(meta.params.values()))
    assert isinstance(cut_off, Shortened)
    names = {name for name, _ in cut_off.front.named_parameters()}
    assert "body.0.weight" in names and not any("2" in name for name in names)
    functional = Counting(nn.Identity())
    functional.forward = lambda x: F.dropout(x, 0.5)  # type: ignore[method-assign]
    own = algorithms.anil(named(body=nn.Sequential(nn.Linear(3, 4), functional), head=nn.Linear(4, 2)), inner_steps=2)
    assert shortened(own, own.init(), one, 2, lambda each, meta, one: []) is own


def test_a_declared_name_that_is_not_there_is_a_sentence() -> None:
    model = Declared()
    model.sequence = ("body", "activation", "head")  # type: ignore[assignment]
    with pytest.raises(
        UserError, match=r"declares the sequence .* but 'activation' is no submodule of it; name some of body, act"
    ):
        cut(model, ("head.weight",))


def test_shared_weights_and_hooks_stay_in_one_part() -> None:
    tied = named(first=nn.Linear(3, 3), act=nn.Tanh(), second=nn.Linear(3, 3), head=nn.Linear(3, 2))
    tied.second.weight = tied.first.weight  # type: ignore[union-attr, assignment]
    assert cut(tied, ("second.bias",)) is None
    hooked = named(first=nn.Sequential(nn.Linear(3, 3)), act=nn.Tanh(), head=nn.Linear(3, 2))
    hooked.register_forward_hook(lambda *given: None)
    assert cut(hooked, ("head.weight",)) is None
    parts = cut(named(), ("head.weight", "head.bias"))
    assert parts is not None
    x = torch.randn(5, 3, dtype=torch.float64)
    assert relative(parts[1](parts[0](x)), named()(x)) == 0
    assert list(itertools.chain(*(dict(part.named_parameters()) for part in parts))) == [
        "body.weight", "body.bias", "head.weight", "head.bias"
    ]  # fmt: skip
