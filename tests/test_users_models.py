"""Modules that do more than map an input to an output by their weights: what they do is kept out, put right or refused."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import named, relative, task_batch
from toolkit import Batch, Plan, Task, UserError, algorithms, evaluate, meta_gradient, train
from toolkit.adapted import adapt, merged
from toolkit.engine import gradient_function
from toolkit.evaluate import calibrate
from toolkit.models.adapters import fold
from toolkit.models.surgery import lora
from toolkit.order import with_order
from toolkit.rules import SGD
from toolkit.task import take

TASKS = task_batch()
ONE = take(TASKS, 0)


def sampler(generator: torch.Generator) -> Task:
    return ONE


class Net(nn.Module):
    """A body and a head of names, with something behind the head."""

    def __init__(self, after: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.after = nn.Linear(3, 6), nn.Linear(6, 2), after

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).tanh())
        return out if self.after is None else self.after(out)


@pytest.mark.parametrize("method", ["protonet", "proto_maml", "r2d2", "matching_net", "nearest_centroid"])
@pytest.mark.parametrize("after", [lambda y: y + 3.0, partial(F.log_softmax, dim=-1)], ids=["shift", "log_softmax"])
def test_what_stands_behind_the_head_is_no_part_of_the_features(method: str, after: Callable[[Tensor], Tensor]) -> None:
    """Neither a shift of all logits nor a softmax twice changes a probability."""
    make = algorithms.METHODS[method]
    more = {"classes": 2} if method == "nearest_centroid" else {}
    plain, other = (make(Net(a).double(), **more) for a in (None, after))
    one, two = (evaluate(own, own.init(), sampler, 2, 0).loss for own in (plain, other))
    assert torch.allclose(one, two, atol=1e-12) and one.isfinite().all()


class Clamped(nn.Linear):
    """Clips its weights as a constraint of its norm would."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.2, 0.2)
        return super().forward(x)


class Renormed(nn.Linear):
    """The same by way of `data`, as EEGNet is often written."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.2)
        return super().forward(x)


class Swapped(nn.Linear):
    """Puts a frozen parameter in the place of its weight by way of `data`."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.other = nn.Parameter(torch.zeros(4, 3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.other
        return super().forward(x)


def test_a_parameter_is_no_way_around_the_refusal() -> None:
    learner = algorithms.anil(named(a=Swapped(), head=nn.Linear(4, 2)))
    with pytest.raises(UserError, match="by which a weight changes unseen"):
        meta_gradient(learner, learner.init(), TASKS, Plan("loop"))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("plan", [Plan("vmap"), Plan("loop"), Plan("threads"), Plan("loop", trace=True)], ids=str)
def test_weights_that_change_in_a_forward_pass_are_refused(plan: Plan) -> None:
    learner = algorithms.maml(named(a=Clamped(3, 4), b=nn.Tanh(), head=nn.Linear(4, 2)))
    for work in (
        lambda: meta_gradient(learner, learner.init(), TASKS, plan),
        lambda: evaluate(learner, learner.init(), sampler, 2, 1, plan=plan),
        lambda: list(train(learner, sampler, 1, 2, 1e-3, plan=plan)),
    ):
        with pytest.raises(UserError, match=r"the model changes its own weights in place when it is called \(a.weight\)"):
            work()
    frozen = algorithms.anil(named(a=Renormed(3, 4), b=nn.Tanh(), head=nn.Linear(4, 2)))
    with pytest.raises(UserError, match=r"by which a weight changes unseen; make it of another one, as torch.nn.utils.par"):
        list(train(frozen, sampler, 1, 2, 1e-3, plan=plan))


class Standardised(nn.Conv2d):
    """A convolution by its standardised weight, as in ResNets without batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / (weight.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt(), self.bias)


def test_a_layer_with_a_forward_of_its_own_keeps_its_update_beside_it() -> None:
    model = named(a=Standardised(1, 4, 3), b=nn.Flatten(), head=nn.Linear(144, 2))
    made = lora(model, 2, peft=False)
    for name, p in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    folded = fold(made)
    assert relative(folded(x), made(x)) < 1e-12 and relative(made(x), model(x)) > 1e-2
    assert type(folded.get_submodule("head")) is nn.Linear and "a.lora_A.weight" in dict(folded.named_parameters())


def test_adapters_keep_the_mode_of_the_layer_that_they_are_around() -> None:
    encoder = nn.TransformerEncoderLayer(4, 1, 8, dropout=0.5, batch_first=True)
    model = named(up=nn.Linear(3, 4), there=nn.Unflatten(1, (1, 4)), a=encoder, back=nn.Flatten(), head=nn.Linear(4, 2)).eval()
    made, x = lora(model, 2, peft=False), torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(made(x), model(x)) and not any(m.training for m in made.modules())
    assert not algorithms.lora_maml(model, rank=2, peft=False).rehearse(ONE)
    mixed = lora(model.train(), 2, peft=False)
    assert all(m.training for m in mixed.modules())


class Closed(nn.Module):
    """Keeps a function that closes over it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.block = lambda x: self.b(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.a(x).tanh()))  # type: ignore[no-any-return]


def hooked(holds: Any) -> nn.Module:
    model = Net()
    kept = model if holds == "model" else model.body.weight if holds == "weight" else holds
    model.body.register_forward_hook(lambda module, x, y: (y, kept)[0] * 2)
    return model


def test_functions_that_hold_on_to_the_model_are_refused() -> None:
    """In a copy they would go on with the weights of the original; others, and methods, are left in peace."""
    for model in (Closed(), hooked("model"), hooked("weight")):
        with pytest.raises(
            UserError, match=r"keeps a function \(.*lambda.*\) that holds on to the model's own layers or weights"
        ):
            algorithms.maml(model)
    model = hooked(3.0)
    model.after = model.head.named_parameters  # a bound method is copied with its module
    algorithms.maml(model)


class Merging(nn.Linear):
    """Adds an update into its weight in evaluation mode and takes it out in training, as loralib does."""

    def train(self, mode: bool = True) -> "Merging":
        if mode != self.training:
            self.weight.data += 0.1 if not mode else -0.1
        return super().train(mode)


def test_evaluation_mode_does_not_call_what_a_module_does_on_its_way_there() -> None:
    model = named(a=Merging(3, 4), b=nn.Tanh(), head=nn.Linear(4, 2))
    before = model.a.weight.detach().clone()  # type: ignore[union-attr]
    learner = algorithms.maml(model, inner_lr=0.1)
    curve = evaluate(learner, learner.init(), sampler, 2, 2)
    assert torch.equal(model.a.weight, before) and (curve.loss[:, 0] != curve.loss[:, 2]).all()  # type: ignore[union-attr]
    module = merged(learner, learner.init(), adapt(learner, learner.init(), ONE.support))
    assert torch.equal(model.a.weight, before) and not module.training  # type: ignore[union-attr]
    with torch.no_grad():
        assert float(curve.loss[0, 1]) == pytest.approx(float(F.cross_entropy(module(ONE.query.x), ONE.query.y)), rel=1e-9)


class Masked(nn.Module):
    """An encoder of tokens, the last of which is filling."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.up, self.encoder, self.head = nn.Linear(1, 4), nn.TransformerEncoder(layer, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        filling = torch.tensor([False, False, True]).expand(len(x), 3)
        return self.head(self.encoder(self.up(x.unsqueeze(-1)), src_key_padding_mask=filling).mean(1))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*nested tensor")
def test_an_encoder_does_the_same_in_evaluation_and_merged() -> None:
    learner = algorithms.maml(Masked().double(), inner_lr=0.1)
    meta = learner.init()
    curve = evaluate(learner, meta, sampler, 2, 1)
    module = merged(learner, meta, adapt(learner, meta, ONE.support))
    with torch.no_grad():
        found = float(F.cross_entropy(module(ONE.query.x), ONE.query.y))
    assert float(curve.loss[0, 1]) == pytest.approx(found, rel=1e-9)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_norms_in_scripted_modules_are_of_first_order_and_not_merged() -> None:
    torch.manual_seed(0)
    for layers, second in ((nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), False), (nn.Linear(3, 4), True)):
        models = [named(a=a, t=nn.Tanh(), head=nn.Linear(4, 2)) for a in (layers, torch.jit.script(layers.double()))]
        models[1].load_state_dict(models[0].state_dict())
        for plan in (Plan("vmap"), Plan("loop"), Plan("loop", trace=True), Plan("vmap", memory="recompute")):
            first = [algorithms.fomaml(model, inner_steps=2) for model in models]
            assert relative(*(meta_gradient(own, own.init(), TASKS, plan)[0] for own in first)) < 1e-12
            exact = [algorithms.maml(model, inner_steps=2) for model in models]
            if second:
                assert relative(*(meta_gradient(own, own.init(), TASKS, plan)[0] for own in exact)) < 1e-12
                continue
            with pytest.raises(
                UserError, match=r"the scripted module 'a' has a norm, .*; give the module that was scripted, or"
            ):
                meta_gradient(exact[1], exact[1].init(), TASKS, plan)
        assert torch.equal(*(evaluate(own, own.init(), sampler, 2, 2).loss for own in exact))
        with pytest.raises(
            UserError, match="the scripted module 'a' keeps its own weights in every copy; merge one that is not"
        ):
            merged(exact[1], exact[1].init(), adapt(exact[1], exact[1].init(), ONE.support))


class Native(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.native_layer_norm(x, [4], None, None, 1e-5)[0]


class Hooked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 1.0
        y.register_hook(lambda g: g * 0.5)
        return y


@pytest.mark.parametrize(
    ("layer", "says"), [(Native, "native_layer_norm, whose second"), (Hooked, "Tensor.register_hook, but")]
)
def test_what_no_plan_sees_alike_is_refused(layer: type[nn.Module], says: str) -> None:
    learner = algorithms.maml(named(a=nn.Linear(3, 4), b=layer(), head=nn.Linear(4, 2)))
    for plan in (Plan("vmap"), Plan("loop"), Plan("loop", memory="recompute")):
        with pytest.raises(UserError, match=says):
            gradient_function.__wrapped__(learner, plan)(learner.init(), TASKS)


class Remembering(nn.Module):
    """Keeps a moving scale and what it last saw as plain attributes, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.calls, self.last = 1.0, 0, torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.scale, self.last = 0.9 * self.scale + 0.01 * self.calls, x
        return x * self.scale


@pytest.mark.parametrize("plan", [Plan("vmap"), Plan("loop"), Plan("threads", chunk=1)], ids=str)
def test_attributes_that_a_module_sets_leave_no_trace(plan: Plan) -> None:
    learner = algorithms.maml(named(a=nn.Linear(3, 4), b=Remembering(), head=nn.Linear(4, 2)), inner_steps=2)
    once, again = (evaluate(learner, learner.init(), sampler, 3, 2, plan=plan).loss for _ in range(2))
    assert torch.equal(once, again) and all(torch.equal(row, once[0]) for row in once[1:])
    first, second = (meta_gradient(learner, learner.init(), TASKS, plan)[0] for _ in range(2))
    assert relative(first, second) == 0
    list(train(learner, sampler, 2, 2, 1e-3, plan=plan))
    memory = learner.model.get_submodule("b")
    assert (memory.calls, memory.scale) == (0, 1.0) and memory.last.numel() == 1  # type: ignore[operator]


def test_a_batch_norm_at_two_places_has_no_statistics_of_a_point() -> None:
    norm = nn.BatchNorm1d(4)
    model = named(a=nn.Linear(3, 4), n=norm, b=nn.Linear(4, 4), m=norm, head=nn.Linear(4, 2))
    learner = algorithms.maml_plus_plus(model, inner_steps=1)
    with pytest.raises(UserError, match="batch norm 'n' runs twice in a pass, with statistics of its own each time; use two"):
        calibrate(learner, learner.init(), sampler, 2)
    support = algorithms.maml(model, batch_norm="support")
    with pytest.raises(UserError, match="batch norm 'n' runs twice in a pass"):
        merged(support, support.init(), adapt(support, support.init(), ONE.support), ONE.support.x)


def test_a_part_that_would_not_learn_is_refused() -> None:
    model, learned = Net(), SGD(0.1, learn="weight")
    for make, what in (
        (lambda: algorithms.imaml(model, rule=learned), "an implicit gradient"),
        (lambda: algorithms.meta_sgd(model, order="implicit"), "an implicit gradient"),
        (lambda: algorithms.alfa(model, order="implicit"), "an implicit gradient"),
        (lambda: algorithms.reptile(model, rule=learned), "Reptile's difference of weights"),
    ):
        with pytest.raises(
            UserError, match=f"{what} does not reach what the rule would learn .*; take a rule that learns nothing"
        ):
            make()
    plus = algorithms.maml_plus_plus(model, inner_steps=2)
    with pytest.raises(UserError, match="objectives of its own phases, which order 'implicit' would replace; take it without"):
        with_order(plus, "implicit")


@pytest.mark.parametrize("method", ["imaml", "alfa", "meta_curvature", "kfo"])
def test_a_rule_may_be_a_line_in_every_method_that_takes_one(method: str) -> None:
    line, rule = (algorithms.METHODS[method](Net(), rule=one, inner_steps=2) for one in ("sgd 0.1", SGD(0.1)))
    assert line.rule == rule.rule


def test_threads_have_the_precision_of_who_calls() -> None:
    """As where a user trains under an autocast of his own."""
    learner = algorithms.maml(Net())
    tasks = Task(*(Batch(x.float(), y) for x, y in TASKS))
    plain = meta_gradient(learner, learner.init(), tasks, Plan("loop"))[1].task_loss
    with torch.autocast("cpu", torch.bfloat16):
        threads, loop = (meta_gradient(learner, learner.init(), tasks, Plan(m))[1].task_loss for m in ("threads", "loop"))
    assert torch.equal(threads, loop) and not torch.equal(loop, plain)


class Complex(nn.Module):
    """Magnitudes of a complex product, as of signals."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.complex128))
        self.head = nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.to(self.w.dtype) @ self.w).abs())  # type: ignore[no-any-return]


def test_complex_weights_are_trained() -> None:
    first, *_, last = train(algorithms.maml(Complex(), inner_lr=0.1), sampler, 20, 2, 1e-2)
    assert last.loss < 0.9 * first.loss and last.meta.params["w"].is_complex()


def test_weights_without_a_size_are_a_sentence() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)).double()
    with pytest.raises(UserError, match=r"weights of the model have no size yet \(0.weight, 0.bias\); call it once with an ex"):
        algorithms.maml(model)
    model(ONE.support.x)
    assert meta_gradient(algorithms.maml(model), algorithms.maml(model).init(), TASKS)[1].loss.isfinite()
