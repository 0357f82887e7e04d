"""Around the meta-gradient: plans, random models, what the engine refuses, what it shares with the user's model, norms."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.conftest import convolutional, dense, finite_differences, mean_objective, relative, task_batch
from toolkit import Batch, Plan, Task, UserError, algorithms, draw, evaluate, meta_gradient
from toolkit.metrics import accuracy, squared_error
from toolkit.norms import Norms
from toolkit.objectives import EveryStep
from toolkit.plan import default_plan
from toolkit.samplers import Sinusoid
from toolkit.task import generators, take


class Lambda(nn.Module):
    """A network of named parts, put together by a function."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2)).double()


def functionally_dropping() -> nn.Module:
    return Lambda(lambda own, x: own.b(F.dropout(own.a(x), 0.5)), a=nn.Linear(3, 8), b=nn.Linear(8, 2)).double()


def attending(dropout: float = 0.0) -> nn.Module:
    attention = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)
    model = Lambda(
        lambda own, x: own.head(own.attention(*[own.embed(x)] * 3, need_weights=False)[0].mean(1)),
        embed=nn.Linear(2, 4), attention=attention, head=nn.Linear(4, 2),
    )  # fmt: skip
    return model.double()


def lstm() -> nn.Module:
    return Lambda(
        lambda own, x: own.head(own.body(x)[0][:, -1]), body=nn.LSTM(2, 3, batch_first=True), head=nn.Linear(3, 2)
    ).double()


def lstm_cell() -> nn.Module:
    return Lambda(lambda own, x: own.head(own.body(x)[0]), body=nn.LSTMCell(3, 3), head=nn.Linear(3, 2)).double()


def scaled_dot_product() -> nn.Module:
    def forward(own: Any, x: Tensor) -> Tensor:
        q, k, v = own.embed(x).chunk(3, -1)
        return own.head(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0].mean(1))  # type: ignore[no-any-return]

    return Lambda(forward, embed=nn.Linear(2, 12), head=nn.Linear(4, 2)).double()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, activation=F.gelu, batch_first=True)
    return Lambda(
        lambda own, x: own.head(own.layer(own.embed(x)).mean(1)), embed=nn.Linear(2, 4), layer=layer, head=nn.Linear(4, 2)
    ).double()


SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "attention": scaled_dot_product,
    "multi-head attention": attending,
    "encoder layer": encoder,
}
RANDOM: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dropout": (dropping, (3,)),
    "functional dropout": (functionally_dropping, (3,)),
    "attention with dropout": (lambda: attending(0.5), (5, 2)),
}
UNREPEATABLE = {
    "threads": Plan("threads", workers=2),
    "vmap recompute": Plan("vmap", memory="recompute"),
    "loop recompute": Plan("loop", memory="recompute"),
    "compiled": Plan("vmap", compile=True),
}


@pytest.mark.parametrize("plan", [Plan("vmap"), Plan("loop")], ids=lambda plan: plan.map)
@pytest.mark.parametrize("model", RANDOM)
def test_equal_tasks_get_masks_of_their_own(model: str, plan: Plan) -> None:
    build, shape = RANDOM[model]
    tasks = pytree.tree_map(lambda t: torch.stack([t[0], t[0]]), task_batch(shape=shape))
    learner = algorithms.maml(build(), inner_lr=0.1)
    _, metrics = meta_gradient(learner, learner.init(), tasks, plan)
    assert metrics.task_loss[0] != metrics.task_loss[1]


@pytest.mark.parametrize("plan", [Plan("vmap"), Plan("vmap", chunk=2), Plan("loop")], ids=lambda p: f"{p.map} {p.chunk}")
@pytest.mark.parametrize("model", RANDOM)
def test_masks_repeat_by_the_seed(model: str, plan: Plan) -> None:
    build, shape = RANDOM[model]
    learner, tasks = algorithms.maml(build(), inner_lr=0.1, inner_steps=2), task_batch(shape=shape)
    found = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        found.append(meta_gradient(learner, learner.init(), tasks, plan)[0])
    assert relative(found[1], found[0]) == 0
    assert relative(found[2], found[0]) > 1e-3


def test_every_step_and_the_query_set_draw_masks_of_their_own() -> None:
    seen: list[tuple[bool, ...]] = []

    def forward(own: Any, x: Tensor) -> Tensor:
        mask = F.dropout(torch.ones(x.shape[0], 16, dtype=x.dtype), 0.5)
        seen.append(tuple((mask != 0).flatten().tolist()))
        return own.b(own.a(x) * mask)  # type: ignore[no-any-return]

    model = Lambda(forward, a=nn.Linear(3, 16), b=nn.Linear(16, 2)).double()
    learner = algorithms.maml(model, inner_lr=0.1, inner_steps=3)
    tasks = task_batch(tasks=1, support=4, query=4)
    meta_gradient(learner, learner.init(), tasks, Plan("loop"))
    assert len(seen) == 4 == len(set(seen))


@pytest.mark.parametrize("plan", UNREPEATABLE)
@pytest.mark.parametrize("model", RANDOM)
def test_a_random_model_is_refused_where_masks_cannot_repeat(model: str, plan: str) -> None:
    build, shape = RANDOM[model]
    learner = algorithms.maml(build())
    with pytest.raises(UserError, match=r"draws random numbers.*use map 'vmap' or 'loop'"):
        meta_gradient(learner, learner.init(), task_batch(shape=shape), UNREPEATABLE[plan])


def test_the_default_plan_suits_the_model() -> None:
    images, numbers = task_batch(shape=(1, 8, 8)), task_batch()
    assert default_plan(algorithms.maml(dense()), numbers) == Plan("vmap")
    assert default_plan(algorithms.maml(lstm()), task_batch(shape=(5, 2))) == Plan("loop")
    assert default_plan(algorithms.maml(lstm_cell()), numbers) == Plan("loop")
    assert default_plan(algorithms.maml(convolutional()), images).map == "threads"
    for dropout, expected in ((nn.Dropout(0.5), "vmap"), (nn.Dropout2d(0.5), "vmap"), (nn.Dropout(0.0), "threads")):
        learner = algorithms.maml(nn.Sequential(dropout, convolutional()))
        assert default_plan(learner, images).map == expected
        assert default_plan(replace(learner, training=False), images).map == "threads"


@pytest.mark.parametrize(("images", "chunk"), [(4, 8), (10, 8), (30, 4), (80, 1), (200, 1)])
def test_larger_tasks_of_images_are_taken_fewer_at_a_time(images: int, chunk: int) -> None:
    tasks = task_batch(shape=(1, 28, 28), support=images // 2, query=images - images // 2)
    learner = algorithms.maml(nn.Sequential(nn.AdaptiveAvgPool2d(8), convolutional()))
    assert default_plan(learner, tasks) == Plan("threads", chunk=chunk)


def test_a_recurrent_network_is_exact_without_a_plan() -> None:
    learner = algorithms.maml(lstm(), inner_lr=0.5, inner_steps=2)
    tasks, meta = task_batch(shape=(4, 2)), learner.init()
    grads, _ = meta_gradient(learner, meta, tasks)
    assert relative(grads, finite_differences(mean_objective(learner, tasks), meta)) < 1e-6


@pytest.mark.parametrize("model", SEQUENCES)
def test_attention_is_exact_to_second_order(model: str) -> None:
    learner = algorithms.maml(SEQUENCES[model](), inner_lr=0.5)
    tasks, meta = task_batch(tasks=2, shape=(4, 2)), learner.init()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = finite_differences(mean_objective(learner, tasks), meta)
    for plan in (Plan("vmap"), Plan("loop")):
        grads, _ = meta_gradient(learner, meta, tasks, plan)
        assert relative(grads, expected) < 1e-6


@pytest.mark.parametrize("plan", [Plan("vmap"), Plan("loop")], ids=lambda plan: plan.map)
@pytest.mark.parametrize("model", SEQUENCES)
def test_attention_is_evaluated_like_a_loop_by_hand(model: str, plan: Plan) -> None:
    def sequences(generator: torch.Generator) -> Task:
        x = torch.randn(10, 4, 2, generator=generator, dtype=torch.float64)
        y = torch.randint(2, (10,), generator=generator)
        return Task(Batch(x[:4], y[:4]), Batch(x[4:], y[4:]))

    learner = algorithms.maml(SEQUENCES[model](), inner_lr=0.5)
    meta, tasks = learner.init(), draw(sequences, 3, 0, split="test")
    curve = evaluate(learner, meta, sequences, 3, 2, plan=plan)
    for i in range(3):
        task = take(tasks, i)
        by_hand = [learner.assess(meta, fast, task).loss for fast in learner.path(meta, task.support, 2)]
        assert relative(curve.loss[i], torch.stack(by_hand)) < 1e-10


@pytest.mark.parametrize("plan", [Plan("vmap"), Plan("loop"), Plan("threads", workers=2)], ids=lambda plan: plan.map)
def test_only_the_plain_formula_of_attention_is_used(plan: Plan) -> None:
    seen: list[bool] = []

    def forward(own: Any, x: Tensor) -> Tensor:
        fused = torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled()
        seen.append(torch.backends.cuda.math_sdp_enabled() and not fused)
        return own.head(x)  # type: ignore[no-any-return]

    def sampler(generator: torch.Generator) -> Task:
        return take(task_batch(), 0)

    learner = algorithms.maml(Lambda(forward, head=nn.Linear(3, 2)).double())
    before = torch.backends.cuda.flash_sdp_enabled()
    assert before, "a fused kernel must be allowed outside, or this test proves nothing"
    meta_gradient(learner, learner.init(), task_batch(), plan)
    inside = [*seen]
    seen.clear()
    evaluate(learner, learner.init(), sampler, 3, 1, plan=plan)
    assert inside and seen and all(inside) and all(seen)
    assert torch.backends.cuda.flash_sdp_enabled() == before


def test_convolutions_are_not_rounded() -> None:
    seen: list[str] = []

    def forward(own: Any, x: Tensor) -> Tensor:
        seen.append(torch.backends.cudnn.conv.fp32_precision)
        return own.head(x)  # type: ignore[no-any-return]

    learner = algorithms.maml(Lambda(forward, head=nn.Linear(3, 2)).double())

    def precisions() -> set[str]:
        seen.clear()
        meta_gradient(learner, learner.init(), task_batch())
        evaluate(learner, learner.init(), lambda generator: take(task_batch(), 0), 2, 1)
        return set(seen)

    before = torch.backends.cudnn.conv.fp32_precision
    assert before == "tf32", "rounding must be torch's default, or this test proves nothing"
    assert precisions() == {"none"}
    assert torch.backends.cudnn.conv.fp32_precision == before and torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        assert precisions() == {"ieee"} and torch.backends.cudnn.conv.fp32_precision == "ieee"
    finally:
        torch.backends.cudnn.allow_tf32 = True
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_a_frozen_parameter_is_left_out_and_the_rest_is_exact() -> None:
    model = dense()
    model[0].weight.requires_grad_(False)
    kept = model[0].weight.clone()
    learner = algorithms.maml(model, inner_lr=0.5, inner_steps=2)
    tasks, meta = task_batch(), learner.init()
    assert set(meta.params) == {"0.bias", "2.weight", "2.bias"} == set(learner.adapted_names)
    for plan in (Plan("vmap"), Plan("loop"), Plan("vmap", memory="recompute")):
        grads, _ = meta_gradient(learner, meta, tasks, plan)
        assert relative(grads, finite_differences(mean_objective(learner, tasks), meta)) < 1e-6
    assert torch.equal(model[0].weight, kept) and not model[0].weight.requires_grad
    with pytest.raises(UserError, match="matches no trained parameter"):
        algorithms.maml(model, adapts="0.weight")


@pytest.mark.parametrize("plan", [Plan("vmap"), Plan("loop"), Plan("threads", workers=2)], ids=lambda plan: plan.map)
@pytest.mark.parametrize("policy", ["batch", "support", "running"])
def test_the_users_model_is_shared_and_never_changed(policy: str, plan: Plan) -> None:
    model = convolutional()
    model(task_batch(shape=(1, 8, 8)).support.x[0])  # so that the running statistics are not fresh
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learner = algorithms.maml(model, inner_lr=0.5, batch_norm=policy)
    own = learner.model.state_dict(keep_vars=True)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert own[name].data_ptr() == tensor.data_ptr(), name
    meta_gradient(learner, learner.init(), task_batch(shape=(1, 8, 8)), plan)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(module.training for module in model.modules()) and all(p.grad is None for p in model.parameters())
    replace(learner, training=False)
    assert all(module.training for module in (*model.modules(), *learner.model.modules()))


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch 1d": (lambda: nn.BatchNorm1d(3, eps=1e-3), (6, 3)),
    "batch 1d of sequences": (lambda: nn.BatchNorm1d(3), (6, 3, 5)),
    "batch 2d": (lambda: nn.BatchNorm2d(3), (4, 3, 5, 5)),
    "batch 2d without affine": (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 5, 5)),
    "layer": (lambda: nn.LayerNorm(5, eps=1e-2), (4, 3, 5)),
    "layer of two axes": (lambda: nn.LayerNorm((3, 5)), (4, 3, 5)),
    "layer without bias": (lambda: nn.LayerNorm(5, bias=False), (4, 3, 5)),
    "layer without affine": (lambda: nn.LayerNorm(5, elementwise_affine=False), (4, 3, 5)),
    "instance": (lambda: nn.InstanceNorm2d(3, eps=1e-2), (4, 3, 5, 5)),
    "instance with affine": (lambda: nn.InstanceNorm2d(3, affine=True), (4, 3, 5, 5)),
    "instance 1d": (lambda: nn.InstanceNorm1d(3, affine=True), (4, 3, 5)),
    "instance with running statistics": (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (4, 3, 5, 5)),
    "group": (lambda: nn.GroupNorm(3, 6), (4, 6, 5, 5)),
}


def shaken(layer: nn.Module) -> nn.Module:
    """The layer in float64 with weights and running statistics that are not their defaults."""
    layer.double()
    for p in layer.parameters():
        p.data = torch.randn_like(p)
    for name, buffer in layer.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + (0.5 if "var" in name else -0.5))
    return layer


@pytest.mark.parametrize("norm", NORMS)
def test_norms_equal_torchs_own(norm: str) -> None:
    build, shape = NORMS[norm]
    layer, x = shaken(build()), 3 * torch.randn(shape, dtype=torch.float64) + 2
    for training in (True, False):
        layer.train(training)
        with Norms("batch" if training else "running"), torch.no_grad():
            found = layer(x)
        assert relative(found, layer(x)) < 1e-12, f"training={training}"  # last: it may update running statistics


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("policy", ["batch", "running"])
def test_batch_norm_of_large_half_precision_numbers_is_computed_in_single(policy: str, dtype: torch.dtype) -> None:
    x = (torch.randn(64, 3, 4, 4) * 400 + 1000).to(dtype)
    mean, variance = torch.full((3,), 1000.0), torch.full((3,), 160_000.0)
    weight, bias = torch.rand(3) + 0.5, torch.rand(3)
    expected = F.batch_norm(x.float(), mean.clone(), variance.clone(), weight, bias, training=policy == "batch")
    with Norms(policy):
        found = F.batch_norm(x, mean, variance, weight.to(dtype), bias.to(dtype), training=True)
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < (0.01 if dtype == torch.float16 else 0.1)


def test_the_running_policy_needs_running_statistics(caplog: pytest.LogCaptureFixture) -> None:
    without = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(UserError, match=r"batch norm '1' keeps no running statistics; use the policy 'batch' or 'support'"):
        algorithms.maml(without, batch_norm="running")
    algorithms.maml(without, batch_norm="support")
    with pytest.raises(UserError, match="did you mean 'running'"):
        algorithms.maml(without, batch_norm="runing")
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with caplog.at_level(logging.WARNING, "toolkit"):
        algorithms.maml(model)
        assert not caplog.records
        algorithms.maml(model, batch_norm="running")
        assert "normalisation has never been trained in 1" in caplog.text
        replace(algorithms.maml(model, batch_norm="running"), steps=2)
        assert len(caplog.records) == 1, "once for a model, however many learners are made of it"
        caplog.clear()
        model(torch.randn(4, 3))
        algorithms.maml(model, batch_norm="running")
        assert not caplog.records


@pytest.mark.parametrize("plan", [Plan("vmap"), Plan("loop", memory="recompute")], ids=lambda plan: plan.memory)
def test_every_step_with_one_weight_is_that_step(plan: Plan) -> None:
    tasks, meta = task_batch(), algorithms.maml(dense()).init()
    learners = {steps: algorithms.maml(dense(), inner_lr=0.3, inner_steps=steps) for steps in (1, 3)}
    ends = {steps: meta_gradient(learner, meta, tasks, plan) for steps, learner in learners.items()}
    for weights, steps in (((0.0, 0.0, 1.0), 3), ((1.0, 0.0, 0.0), 1)):
        grads, metrics = meta_gradient(replace(learners[3], objective=EveryStep(weights)), meta, tasks, plan)
        assert relative(grads, ends[steps][0]) < 1e-12
        assert relative(metrics, ends[3][1]) < 1e-12, "the scores are those of the last step whatever the weights"
    assert relative(ends[1][0], ends[3][0]) > 1e-3


@pytest.mark.parametrize(("weights", "steps"), [((1.0,), 2), ((1.0, 1.0), 1), ((), 0), ((), 1)])
def test_every_step_needs_one_weight_per_step(weights: tuple[float, ...], steps: int) -> None:
    learner = algorithms.maml(dense(), inner_steps=steps)
    with pytest.raises(UserError, match=f"{len(weights)} step weights for {steps} inner steps; give one weight per step"):
        replace(learner, objective=EveryStep(weights))


@pytest.mark.parametrize("weights", [(0.5, 0.6), (1.0, -1.0), (1.0, 1.0), (1.0, 1e-5)])
def test_every_step_refuses_weights_that_do_not_sum_to_one(weights: tuple[float, ...]) -> None:
    learner = algorithms.maml(dense(), inner_steps=2)
    with pytest.raises(UserError, match=rf"the step weights .* sum to {sum(weights):g}; make them sum to 1"):
        replace(learner, objective=EveryStep(weights))
    replace(learner, objective=EveryStep((1.25, -0.25)))


@pytest.mark.parametrize("objective", ["last step", "every step"])
def test_metrics_are_the_scores_at_the_end_of_the_path(objective: str) -> None:
    learner = algorithms.maml(dense(), inner_lr=0.3, inner_steps=2)
    learner = replace(learner, objective=EveryStep((0.9, 0.1))) if objective == "every step" else learner
    tasks, meta = task_batch(), learner.init()
    _, metrics = meta_gradient(learner, meta, tasks)
    for i in range(3):
        task = take(tasks, i)
        *_, fast = learner.path(meta, task.support)
        score = learner.assess(meta, fast, task)
        assert relative(metrics.task_loss[i], score.loss) < 1e-12 and metrics.task_metric[i] == score.metric
    assert metrics.loss == metrics.task_loss.mean() and metrics.metric == metrics.task_metric.mean()


BAD_PLANS: dict[str, tuple[dict[str, Any], str]] = {
    "map": ({"map": "vmaps"}, r"unknown map of a plan 'vmaps'; did you mean 'vmap'\?"),
    "memory": ({"memory": "recomputed"}, r"unknown memory of a plan 'recomputed'; did you mean 'recompute'\?"),
    "no workers": ({"map": "threads", "workers": 0}, "workers is 0; give 1 thread or more"),
    "empty pieces": ({"chunk": 0}, "chunk is 0; give 1 task or more"),
    "pieces of half a task": ({"chunk": 2.5}, "chunk is 2.5; give 1 task or more"),
    "half a worker": ({"map": "threads", "workers": "2"}, "workers is '2'; give 1 thread or more"),
    "loop by two": ({"map": "loop", "chunk": 2}, "takes tasks one by one, but chunk is 2"),
    "threads compiled": ({"map": "threads", "compile": True}, "a compiled plan cannot run in threads"),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_an_impossible_plan_is_a_sentence(case: str) -> None:
    arguments, sentence = BAD_PLANS[case]
    with pytest.raises(UserError, match=sentence):
        Plan(**arguments)


def test_the_smallest_plans_are_allowed() -> None:
    assert Plan("loop", chunk=1).chunk == 1 and Plan("threads", workers=1, chunk=1).workers == 1


def test_pieces_cover_the_batch_in_order() -> None:
    tasks = task_batch(tasks=5)
    for plan, sizes in (
        (Plan("vmap"), [5]),
        (Plan("vmap", chunk=2), [2, 2, 1]),
        (Plan("loop"), [1] * 5),
        (Plan("threads"), [1] * 5),
    ):
        pieces = list(plan.pieces(tasks))
        assert [piece.support.y.shape[0] for piece in pieces] == sizes
        assert torch.equal(torch.cat([piece.query.x for piece in pieces]), tasks.query.x)


def test_a_task_that_is_no_batch_is_refused() -> None:
    learner = algorithms.maml(dense())
    with pytest.raises(UserError, match=r"needs one task axis first.*\(4, 3\), \(4,\), \(6, 3\), \(6,\)"):
        meta_gradient(learner, learner.init(), take(task_batch(), 0))


class Wasteful:
    """A sampler whose `draw_many` returns two tasks whatever was asked for."""

    def __call__(self, generator: torch.Generator) -> Task:
        return Sinusoid()(generator)

    def draw_many(self, streams: Iterator[torch.Generator]) -> Task:
        return Sinusoid().draw_many(generators(0, "train", range(2)))


def of_numpy(generator: torch.Generator) -> Any:
    return pytree.tree_map(lambda t: t.numpy(), Sinusoid()(generator))


def of_tuples(generator: torch.Generator) -> Any:
    return tuple(tuple(batch) for batch in Sinusoid()(generator))


def with_tuples_inside(generator: torch.Generator) -> Any:
    return Task(*(tuple(batch) for batch in Sinusoid()(generator)))  # type: ignore[arg-type]


BAD_SAMPLERS: dict[str, tuple[Any, str]] = {
    "numpy": (of_numpy, "a task with a ndarray in it; x and y must be tensors"),
    "tuples": (of_tuples, r"returned a tuple; return Task\(support"),
    "tuples inside": (with_tuples_inside, r"return Task\(support"),
    "class": (Sinusoid, "Sinusoid is a class; draw from an instance of it"),
    "draw_many": (Wasteful(), "returned 2 tasks for 3 generators"),
}


@pytest.mark.parametrize("case", BAD_SAMPLERS)
def test_a_sampler_that_returns_no_task_is_a_sentence(case: str) -> None:
    sampler, sentence = BAD_SAMPLERS[case]
    with pytest.raises(UserError, match=sentence):
        draw(sampler, 3, seed=0)


def test_metrics_refuse_targets_of_the_wrong_kind() -> None:
    with pytest.raises(UserError, match="accuracy needs integer classes"):
        accuracy(torch.randn(4, 2), torch.ones(4))
    assert accuracy(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1])) == 0.5
    with pytest.raises(UserError, match=r"prediction of shape \(4, 1\) against y of shape \(4,\)"):
        squared_error(torch.randn(4, 1), torch.ones(4))


def test_every_pattern_of_adapts_must_match() -> None:
    with pytest.raises(UserError, match=r"adapts='head\.\*' matches no trained parameter; the model has 0\.weight, "):
        algorithms.maml(dense(), adapts=("0.*", "head.*"))
    assert algorithms.maml(dense(), adapts=("0.*", "2.bias")).adapted_names == ("0.weight", "0.bias", "2.bias")


def test_a_tied_parameter_is_selected_by_either_name() -> None:
    model = Lambda(lambda own, x: own.b(own.a(x).tanh())[:, :2], a=nn.Linear(3, 3), b=nn.Linear(3, 3)).double()
    model.b.weight = model.a.weight  # type: ignore[union-attr, assignment]
    learner = algorithms.maml(model, adapts="b.weight", inner_lr=0.5)
    assert learner.adapted_names == ("a.weight",) == algorithms.maml(model, adapts="a.weight").adapted_names
    tasks, meta = task_batch(), learner.init()
    grads, _ = meta_gradient(learner, meta, tasks)
    assert relative(grads, finite_differences(mean_objective(learner, tasks), meta)) < 1e-6


def test_every_batch_is_checked_not_only_the_first() -> None:
    learner, tasks = algorithms.maml(dense()), task_batch()
    meta = learner.init()
    meta_gradient(learner, meta, tasks)
    with pytest.raises(UserError, match="one task axis first"):
        meta_gradient(learner, meta, take(tasks, 0))


def test_what_draw_many_returns_is_checked() -> None:
    class Pairs:
        def __call__(self, generator: torch.Generator) -> Task:
            raise NotImplementedError

        def draw_many(self, generators: object) -> object:
            return (torch.zeros(1), torch.zeros(1))

    with pytest.raises(UserError, match="the sampler returned a tuple; return Task"):
        draw(Pairs(), 1, seed=0)
