"""Models, weights and tasks that are legitimate and unusual, each of which was once got wrong without a word."""

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import dense, finite_differences, mean_objective, named, relative, stirred, task_batch
from toolkit import Batch, Learner, Meta, Plan, Task, UserError, algorithms, evaluate, meta_gradient, train
from toolkit.adapted import adapt, load, merged, names, save
from toolkit.choose import candidates
from toolkit.distributed import ALONE
from toolkit.engine import gradient_function
from toolkit.intervals import paired
from toolkit.learner import support_loss
from toolkit.metrics import accuracy, cross_entropy
from toolkit.models.adapters import fold
from toolkit.models.surgery import lora
from toolkit.order import with_order
from toolkit.prefix import Shortened, shortened
from toolkit.randomness import states
from toolkit.rules import SGD, Groups, Proximal
from toolkit.sharded import restored
from toolkit.task import take

PLANS = [
    Plan("vmap"),
    Plan("vmap", chunk=2),
    Plan("loop"),
    Plan("threads", chunk=1, workers=2),
    Plan("vmap", memory="recompute"),
    Plan("loop", trace=True),
    Plan("vmap", trace=True),
]


def gradient(learner: Learner, plan: Plan, meta: Meta, tasks: Task) -> Meta:
    return gradient_function.__wrapped__(learner, plan)(meta, tasks)[0]  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One layer under two names, as shared embeddings are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.first(x).tanh()).tanh()).tanh())  # type: ignore[no-any-return]


def reused() -> nn.Module:
    act, layer = nn.Tanh(), nn.Linear(4, 4)
    return nn.Sequential(nn.Linear(3, 4), act, layer, act, layer, act, nn.Linear(4, 2))


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("make", [Twice, reused])
def test_a_layer_at_two_places_has_the_exact_gradient(make: Callable[[], nn.Module], plan: Plan) -> None:
    torch.manual_seed(0)
    learner, tasks = algorithms.maml(make().double(), inner_steps=2, inner_lr=0.3), task_batch()
    meta = stirred(learner)
    expected = finite_differences(mean_objective(learner, tasks), meta)
    assert relative(gradient(learner, plan, meta, tasks), expected) < 1e-6


@pytest.mark.parametrize("adapts", ["*", "head.*"])
def test_training_leaves_no_weights_in_a_layer_at_two_places(adapts: str) -> None:
    torch.manual_seed(0)
    learner = algorithms.maml(Twice().double(), adapts=adapts, inner_steps=1)
    before = learner.init()
    losses = []
    for _ in range(2):
        *_, last = train(learner, lambda generator: take(task_batch(), 0), iterations=2, tasks=2, meta_lr=0.1)
        losses.append(last.loss)
        assert relative(learner.init(), before) == 0
    assert losses[0] == losses[1]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.h, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head((2 * self.f(a) - self.h(b).sin()).tanh())  # type: ignore[no-any-return]


@pytest.mark.parametrize("plan", [Plan("vmap", trace=True), Plan("loop", trace=True)], ids=str)
def test_a_recording_knows_inputs_and_weights_by_name(plan: Plan) -> None:
    torch.manual_seed(0)
    learner, plain = algorithms.maml(TwoInputs().double(), inner_steps=1, inner_lr=0.3), task_batch()
    first, second = (
        Task(*(batch._replace(x={key: batch.x + (key == "b") for key in order}) for batch in plain)) for order in ("ab", "ba")
    )
    meta, compute = stirred(learner), gradient_function.__wrapped__(learner, plan)
    expected, _ = compute(meta, first)
    assert relative(compute(meta, second)[0], expected) < 1e-12
    turned = meta._replace(params=dict(reversed(meta.params.items())))
    found, _ = compute(turned, first)
    assert all(relative(found.params[name], slope) < 1e-12 for name, slope in expected.params.items())


@pytest.mark.parametrize("plan", [Plan("vmap", trace=True), Plan("loop", trace=True)], ids=str)
def test_a_recording_holds_for_its_strides(plan: Plan) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 2)).double()
    learner, tasks = algorithms.maml(model, inner_steps=1, inner_lr=0.3), task_batch(shape=(2, 3, 3))
    turned = Task(*(b._replace(x=b.x.transpose(-1, -2).contiguous().transpose(-1, -2)) for b in tasks))
    meta, compute = stirred(learner), gradient_function.__wrapped__(learner, plan)
    expected, _ = compute(meta, tasks)
    assert relative(compute(meta, turned)[0], expected) < 1e-12
    last = {n: p.to(memory_format=torch.channels_last) if p.dim() == 4 else p for n, p in meta.params.items()}
    found, _ = compute(meta._replace(params=last), tasks)
    assert relative(found, expected) < 1e-12
    assert all(found.params[name].stride() == p.stride() for name, p in last.items())


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_filling_of_an_embedding_has_no_gradient(plan: Plan) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 2, padding_idx=3), nn.Flatten(), nn.Linear(6, 2)).double()
    learner = algorithms.maml(model, inner_steps=3, inner_lr=0.5)
    x = torch.randint(7, (3, 10, 3), generator=torch.Generator().manual_seed(0))
    y = x.sum(-1) % 2
    tasks, meta = Task(Batch(x[:, :4], y[:, :4]), Batch(x[:, 4:], y[:, 4:])), stirred(learner)
    found = gradient(learner, plan, meta, tasks)
    assert torch.equal(found.params["0.weight"][3], torch.zeros(2, dtype=torch.float64))
    assert relative(found, gradient(learner, Plan("loop"), meta, tasks)) < 1e-10


@pytest.mark.parametrize("settings", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_an_embedding_that_is_no_function_is_refused(settings: dict[str, Any]) -> None:
    learner = algorithms.maml(nn.Sequential(nn.Embedding(7, 2, **settings), nn.Flatten(), nn.Linear(6, 2)))
    x, y = torch.randint(7, (2, 4, 3)), torch.randint(2, (2, 4))
    with pytest.raises(UserError, match=r"^an embedding with max_norm .* make it without$"):
        gradient(learner, Plan("loop"), learner.init(), Task(Batch(x, y), Batch(x, y)))


class Direct(nn.Module):
    """Norms by the functions of `torch` itself."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.head = kind, nn.Linear(3, 4), nn.Linear(4, 2)
        self.weight, self.bias = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.kind == "layer":
            h = torch.layer_norm(h, (4,), self.weight, self.bias)
        elif self.kind == "batch":
            h = torch.batch_norm(h, self.weight, self.bias, None, None, True, 0.1, 1e-5, False)
        else:
            three = torch.stack([h, h.sin(), h.square()], -1)
            h = torch.instance_norm(three, self.weight, self.bias, None, None, True, 0.1, 1e-5, False).sin().sum(-1)
        return self.head(h.tanh())  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["layer", "batch", "instance"])
def test_norms_called_as_functions_of_torch_are_exact_too(kind: str) -> None:
    torch.manual_seed(0)
    learner, tasks = algorithms.maml(Direct(kind).double(), inner_steps=2, inner_lr=0.3), task_batch()
    meta = stirred(learner)
    expected = finite_differences(mean_objective(learner, tasks), meta, 1e-6)
    assert relative(gradient(learner, Plan("vmap"), meta, tasks), expected) < 1e-6


def noisy(learner: Learner, meta: Meta, fast: dict[str, Tensor], support: Batch, k: int) -> Tensor:
    x = support.x
    assert isinstance(x, Tensor)
    return support_loss(learner, meta, fast, support._replace(x=x + 0.3 * torch.randn_like(x)), k)


def test_an_inner_loss_that_draws_is_seeded_and_not_recomputed() -> None:
    torch.manual_seed(0)
    learner = replace(algorithms.maml(dense(), inner_steps=2, inner_lr=0.5), inner=noisy)
    with pytest.raises(UserError, match="draws random numbers"):
        gradient(learner, Plan("loop", memory="recompute"), learner.init(), task_batch())
    runs = [[r.loss for r in train(learner, lambda g: take(task_batch(), 0), 2, 2, 0.1, plan=Plan("vmap"))] for _ in range(2)]
    assert runs[0] == runs[1]


def test_support_statistics_of_folded_inputs_are_refused() -> None:
    class Folds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            n, t, _ = x.shape
            return self.head(self.norm(self.a(x.reshape(n * t, 3))).tanh().reshape(n, t, 4).mean(1))  # type: ignore[no-any-return]

    tasks = task_batch(shape=(5, 3))
    for policy in ("batch", "support"):
        learner = algorithms.maml(Folds().double(), batch_norm=policy)
        if policy == "batch":
            assert gradient(learner, Plan("loop"), learner.init(), tasks)
        else:
            with pytest.raises(UserError, match=r"^batch norm got 50 examples where the task has 10"):
                gradient(learner, Plan("loop"), learner.init(), tasks)


def test_an_inner_loss_that_uses_inputs_a_little_keeps_the_whole_model() -> None:
    def decayed(learner: Learner, meta: Meta, fast: dict[str, Tensor], support: Batch, k: int) -> Tensor:
        x = support.x
        assert isinstance(x, Tensor)
        penalty = sum(p.square().sum() for p in fast.values())
        return support_loss(learner, meta, fast, support, k) + 1e-3 * x.square().mean() * penalty

    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    learner = replace(algorithms.anil(named(body=body, head=nn.Linear(4, 2)).float(), inner_steps=3), inner=decayed)
    tasks = Task(*(batch._replace(x=batch.x.float()) for batch in task_batch()))

    def work(each: Learner, meta: Meta, one: Task) -> Any:
        return [gradient(each, Plan("loop"), meta, one).params]

    one = take(tasks, slice(0, 1))
    assert shortened(learner, learner.init(), one, 3, work) is learner
    assert isinstance(shortened(replace(learner, inner=support_loss), learner.init(), one, 3, work), Shortened)


def test_metal_trains_by_an_annealed_order() -> None:
    learner = algorithms.metal(dense(), head="2", inner_steps=2, order="annealed:0.5")
    losses = [record.loss for record in train(learner, lambda g: take(task_batch(), 0), 4, 2, 0.01)]
    assert len(losses) == 4


@pytest.mark.parametrize(
    ("phases", "says"),
    [(((0.0, {}), (0.5, {"order": 7})), "last 7 of 2 inner steps"), (((0.0, {}), (0.5, {"ordr": 1})), "ordr")],
)
def test_phases_are_looked_at_before_training(phases: Any, says: str) -> None:
    learner = replace(algorithms.maml(dense(), inner_steps=2), phases=phases)
    with pytest.raises(UserError, match=says):
        next(train(learner, lambda g: take(task_batch(), 0), 4, 2, 0.01))


def test_another_order_leaves_nothing_of_the_first() -> None:
    assert with_order(algorithms.fomaml(dense()), "second").order is None
    first = with_order(algorithms.maml_plus_plus(dense(), inner_steps=2), "first")
    assert {first.at(progress).order for progress in (0.0, 0.5, 0.9)} == {0}
    assert with_order(algorithms.maml(dense(), order="annealed:0.3"), "second").at(0.1).order is None
    with pytest.raises(UserError, match="has phases of its own"):
        with_order(algorithms.maml_plus_plus(dense(), inner_steps=2), "annealed:0.3")


def test_rules_that_could_not_work_are_refused() -> None:
    with pytest.raises(UserError, match=r"'2\.\*' never applies"):
        algorithms.maml(dense(), rule=Groups(("*", SGD(0.1)), ("2.*", SGD(0.5))))
    with pytest.raises(UserError, match="proximal rule around another"):
        algorithms.imaml(dense(), rule=Proximal(SGD(0.1)))
    learner = algorithms.meta_sgd(dense(), inner_steps=1)
    with pytest.raises(UserError, match=r"no learned rate .*init\(\)"):
        gradient(learner, Plan("loop"), algorithms.maml(dense()).init(), task_batch())
    assert Plan("vmap", chunk=1, compile=True).smaller(4) == Plan("vmap", chunk=1, memory="recompute")


def test_regression_by_the_loss_of_classes_is_refused() -> None:
    y = torch.rand(4, 1)
    for function in (cross_entropy, accuracy):
        with pytest.raises(UserError, match="pass loss=squared_error, metric=squared_error"):
            function(torch.rand(4, 1), y)
    soft = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert float(cross_entropy(torch.zeros(2, 2), soft)) == pytest.approx(0.6931, abs=1e-4)


def test_accuracy_is_counted_and_not_rounded() -> None:
    prediction = torch.eye(2, dtype=torch.bfloat16)[
        torch.cat([torch.ones(73, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)])
    ]
    assert float(accuracy(prediction, torch.ones(75, dtype=torch.int64))) == pytest.approx(73 / 75, abs=1e-6)


@pytest.mark.parametrize("which", ["both", "one"])
def test_a_layer_at_two_places_is_folded_exactly(which: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(6, 3))
    tuned = lora(model, 2, "*", peft=False)
    if which == "one":  # as a library may wrap it
        tuned.set_submodule("2", tuned.get_submodule("0").base_layer)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.normal_()
    x = torch.randn(4, 6)
    with torch.no_grad():
        assert relative(tuned(x), model(x)) > 0.1
        assert relative(fold(tuned)(x), tuned(x)) < 1e-6
    assert tuned.get_submodule("2") is tuned.get_submodule("0") or which == "one"


def test_a_head_that_is_tied_is_refused_where_it_is_set() -> None:
    model = named(head=nn.Linear(5, 5), body=nn.Linear(5, 5))
    model.body.weight = model.head.weight
    with pytest.raises(UserError, match=r"^the head 'head' shares a weight with body\.weight"):
        algorithms.protonet(model)


def test_ties_over_seeds_are_ties() -> None:
    def parts(values: list[float]) -> Tensor:
        return (torch.tensor(values) / 75).double()

    a = torch.stack([parts([10.0] * 100), parts([12.0] * 100)])
    found = paired(a, torch.stack([parts([11.0] * 100)] * 2))
    assert (found.wins, found.ties, found.losses, found.p_sign) == (0, 100, 0, 1.0)
    better = paired(a + 1 / 75, torch.stack([parts([11.0] * 100)] * 2))
    assert (better.wins, better.ties) == (100, 0)


def test_a_damaged_shard_is_skipped(tmp_path: Path) -> None:
    first = save(tmp_path, {"a": {"w": torch.ones(2)}}, "x" * 32)
    save(tmp_path, {"b": {"w": torch.zeros(2)}}, "x" * 32)
    whole = first.read_bytes()
    start = whole.index(b"{")
    for place in range(start, start + 300, 7):
        data = bytearray(whole)
        data[place] ^= 2
        first.write_bytes(bytes(data))
        assert names(tmp_path) in (["b"], ["a", "b"])
        with suppress(UserError):
            assert torch.equal(load(tmp_path, "a", "x" * 32)["w"], torch.ones(2))
    first.write_bytes(whole)
    (tmp_path / "shard-backup.safetensors").write_bytes(whole)
    save(tmp_path, {"c": {"w": torch.ones(2)}}, "x" * 32)
    assert set(names(tmp_path)) == {"a", "b", "c"}


def test_a_layer_that_cannot_be_copied_is_a_sentence() -> None:
    with pytest.warns(FutureWarning):
        old = torch.nn.utils.weight_norm(nn.Linear(6, 5))
    with pytest.raises(UserError, match=r"parametrizations\.weight_norm"):
        algorithms.maml(named(body=old, head=nn.Linear(5, 3)))


def test_evaluation_of_a_layer_at_two_places() -> None:
    torch.manual_seed(0)
    learner = algorithms.anil(Twice().double(), inner_steps=1)
    curve = evaluate(learner, learner.init(), lambda generator: take(task_batch(), 0), tasks=3, steps=2)
    task = take(task_batch(), 0)
    fast = adapt(learner, learner.init(), task.support)
    expected = F.cross_entropy(learner.predict(learner.init(), fast, task.query.x), task.query.y)
    assert float(curve.loss[0, 1]) == pytest.approx(float(expected), abs=1e-9)


def test_wrong_objects_are_sentences() -> None:
    learner = algorithms.maml(dense(), inner_steps=1)
    *_, record = train(learner, lambda g: take(task_batch(), 0), 1, 2, 0.1)
    with pytest.raises(UserError, match=r"meta is a Record; give a Meta, as record\.meta is"):
        evaluate(learner, record, lambda g: take(task_batch(), 0), tasks=1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the sampler is a Task; give a function of a generator"):
        evaluate(learner, record.meta, task_batch(), tasks=1)  # type: ignore[arg-type]
    assert algorithms.maml(dense(), rule="*: sgd 0.4").rule == Groups(("*", SGD(0.4)))


def test_a_resumed_optimiser_lies_in_memory_as_its_weights_do() -> None:
    leaf = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    moment = torch.rand(2, 3, 4, 4)
    state = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": moment}}, "param_groups": []}
    found = restored(ALONE, state, [leaf])["state"][0]
    assert found["exp_avg"].stride() == leaf.stride() and torch.equal(found["exp_avg"], moment)
    assert found["step"] is state["state"][0]["step"]  # type: ignore[index]


class SometimesDeeper(nn.Module):
    """Stochastic depth, by random numbers of Python, numpy, or a generator of its own."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.generator = source, torch.Generator()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def drawn(self) -> float:
        if self.source == "the model":
            return float(torch.rand((), generator=self.generator))
        return random.random() if self.source == "Python" else float(np.random.rand())

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        return self.head(h + self.b(h).tanh() if self.drawn() > 0.5 else h)  # type: ignore[no-any-return]


@pytest.mark.parametrize("source", ["Python", "numpy", "the model"])
def test_random_numbers_that_are_not_torchs_are_noticed(source: str) -> None:
    torch.manual_seed(0)
    learner, tasks = algorithms.maml(SometimesDeeper(source).double(), inner_steps=2), task_batch()
    assert learner.rehearse(take(tasks, 0)) and not algorithms.maml(dense()).rehearse(take(tasks, 0))
    for plan in (Plan("threads"), Plan("vmap", memory="recompute"), Plan("loop", trace=True)):
        with pytest.raises(UserError, match="draws random numbers"):
            gradient(learner, plan, learner.init(), tasks)
    assert not any(plan.records for plan in candidates(learner, tasks))


@pytest.mark.parametrize("source", ["Python", "numpy"])
def test_random_numbers_that_are_not_torchs_are_the_same_in_each_training(source: str) -> None:
    torch.manual_seed(0)
    model, before, found = SometimesDeeper(source).double(), states(), []
    for _ in range(2):
        learner = algorithms.maml(model, inner_steps=1)
        records = train(learner, lambda generator: take(task_batch(), 0), iterations=6, tasks=2, meta_lr=0.1, plan=Plan("loop"))
        found.append([record.loss for record in records])
        assert states() == before
        random.random(), np.random.rand()
        before = states()
    assert found[0] == found[1]


class Wondering(nn.Module):
    """Dropout that stays on in evaluation, as for estimates of uncertainty."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.body(x).tanh(), 0.5, training=True))  # type: ignore[no-any-return]


def test_evaluation_by_random_numbers_is_the_same_each_time_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    learner = algorithms.maml(Wondering().double(), inner_steps=1)

    def judged(seed: int = 0, **asked: Any) -> Tensor:
        def sampler(generator: torch.Generator) -> Task:
            return take(task_batch(), 0)

        return evaluate(learner, learner.init(), sampler, tasks=70, steps=2, seed=seed, **asked).loss

    before = states()
    first = judged()
    assert states() == before
    torch.manual_seed(5)
    assert torch.equal(judged(trace=True), first) and not torch.equal(judged(seed=1), first)
    assert len(first[:, 2].unique()) == 70, "other numbers in each task"
    with pytest.raises(UserError, match="draws random numbers"):
        judged(plan=Plan("loop", trace=True))


def images() -> Task:
    g = torch.Generator().manual_seed(3)
    x, y = torch.rand(2, 4, 3, 6, 6, generator=g, dtype=torch.float64), torch.tensor([[0, 1, 0, 1]] * 2)
    return Task(Batch(x, y), Batch(x.flip(1), y.flip(1)))


@pytest.mark.parametrize("policy", ["batch", "running"])
def test_instance_norm_that_keeps_statistics_is_the_same_in_evaluation_and_merged(policy: str) -> None:
    """Nobody updates its statistics; before, training used those of the input, and evaluation the zeros and ones it had."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.ReLU())
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(64, 2)).double()
    learner, task = algorithms.maml(model, head="2", inner_steps=1, batch_norm=policy), take(images(), 0)
    meta = learner.init()
    for fast in learner.path(meta, task.support):
        found = [replace(learner, training=on).predict(meta, fast, task.query.x) for on in (True, False)]
        assert torch.equal(*found)
    assert relative(merged(learner, meta, fast)(task.query.x), found[0]) < 1e-12
    plain = replace(learner, model=nn.Sequential(*model.eval())).predict(meta, fast, task.query.x)
    assert torch.equal(plain, found[0])
    seen = F.instance_norm(x := model[0][0](task.query.x))
    expected = seen if policy == "batch" else x / (1 + model[0][1].eps) ** 0.5
    start = learner.predict(meta, {}, task.query.x)
    assert relative(start, model[2](expected.relu().flatten(1))) < 1e-12


def test_changes_of_buffers_that_are_dropped_are_told(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    learner = algorithms.maml(nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2)).double(), head="2", inner_steps=1)
    for _ in range(2):
        next(train(learner, lambda generator: take(task_batch(), 0), 1, 1, 0.1, plan=Plan("loop")))
    told = (
        "the model changes 0.parametrizations.weight.0._u, 0.parametrizations.weight.0._v when it is called; such changes are"
    )
    assert caplog.text.count(told) == 1
    caplog.clear()
    normed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)).double()
    algorithms.maml(normed, head="3", inner_steps=1).observe(take(images(), 0).support.x)
    assert not caplog.text


@pytest.mark.parametrize(
    ("prediction", "y", "said"),
    [
        ((4, 1), (4,), "one output tells no classes apart"),
        ((4, 1), (4, 1), r"predictions of shape \(4, 1\) do not fit classes of shape \(4, 1\)"),
        ((4,), (4,), r"predictions of shape \(4,\) do not fit"),
        ((4, 4), (4, 4), "do not fit"),
        ((5, 3), (4,), "do not fit"),
        ((2, 5, 3), (2, 5), "do not fit"),
    ],
)
@pytest.mark.parametrize("judge", [accuracy, cross_entropy])
def test_classes_that_do_not_fit_the_predictions_are_refused(
    judge: Callable[[Tensor, Tensor], Tensor], prediction: tuple[int, ...], y: tuple[int, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        judge(torch.randn(prediction), torch.zeros(y, dtype=torch.int64))


def test_classes_of_pixels_are_judged_as_torch_does() -> None:
    torch.manual_seed(0)
    prediction, y = torch.randn(2, 3, 3, 3), torch.randint(3, (2, 3, 3))
    assert accuracy(prediction, y) == (prediction.argmax(1) == y).float().mean()
    torch.testing.assert_close(cross_entropy(prediction, y), F.cross_entropy(prediction, y))
    learner = algorithms.maml(nn.Sequential(nn.Conv2d(3, 3, 1)), head="0", inner_steps=1)

    def sampler(generator: torch.Generator) -> Task:
        x = torch.rand(2, 3, 4, 4, generator=generator)
        return Task(Batch(x, x.argmax(1)), Batch(x.flip(0), x.flip(0).argmax(1)))

    curve = evaluate(learner, learner.init(), sampler, tasks=3, steps=1)
    assert curve.metric.shape == (3, 2) and curve.card == {}


def test_a_closure_that_changes_after_the_recording_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("toolkit.recorded.CHECKED", [4])
    temperature, tasks = [1.0], task_batch()
    learner = algorithms.maml(dense().double(), inner_steps=1, loss=lambda p, y: cross_entropy(p / temperature[0], y))
    for changes in (False, True):
        compute = gradient_function.__wrapped__(learner, Plan("vmap", trace=True))
        for _ in range(3):
            compute(learner.init(), tasks)
        temperature[0] += changes
        if changes:
            with pytest.raises(UserError, match="the recorded operations are no longer those of the model, loss and rule: its"):
                compute(learner.init(), tasks)
        else:
            compute(learner.init(), tasks)
        compute(learner.init(), tasks)


def test_a_recording_knows_the_precision_around_it() -> None:
    learner, tasks = algorithms.maml(dense().float(), inner_steps=1), task_batch()
    tasks = Task(*(batch._replace(x=batch.x.float()) for batch in tasks))
    compute = gradient_function.__wrapped__(learner, Plan("vmap", trace=True))
    with torch.autocast("cpu", torch.bfloat16):
        _, low = compute(learner.init(), tasks)
    _, high = compute(learner.init(), tasks)
    _, plain = gradient_function.__wrapped__(learner, Plan("vmap"))(learner.init(), tasks)
    assert high.loss == plain.loss != low.loss


@pytest.mark.parametrize("plan", [None, Plan("vmap", chunk=2)], ids=str)
def test_a_model_that_vmap_cannot_map_is_a_sentence(plan: Plan | None) -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    learner = algorithms.maml(nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2)).double(), head="2", inner_steps=1)
    with pytest.raises(UserError, match=r"the tasks cannot be mapped by vmap with this model \(.*\); use --map loop"):
        meta_gradient(learner, learner.init(), task_batch(), plan)
    _, metrics = meta_gradient(learner, learner.init(), task_batch(), Plan("loop"))
    assert metrics.loss.isfinite()
