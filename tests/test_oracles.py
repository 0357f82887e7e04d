"""Our meta-gradients against others' implementations (learn2learn, higher) and closed forms."""

import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import convolutional, dense, relative, task_batch
from toolkit import Batch, Learner, Meta, Plan, Task, UserError, algorithms, draw, meta_gradient, train
from toolkit.backend import BACKENDS, backend, learn2learn_gradient
from toolkit.metrics import cross_entropy, squared_error
from toolkit.rules import SGD, Adam, Clip, PerStep, RMSprop, Rule
from toolkit.samplers import Linear
from toolkit.task import count, take
from toolkit.tree import Params, tree_map

STEPS = [1, 3, 5]


def named(model: nn.Module) -> nn.Module:
    """A sequential model as two modules, `body` and `head`."""
    layers = list(model.children())
    return nn.Sequential(OrderedDict(body=nn.Sequential(*layers[:-1]), head=layers[-1]))


MODELS: dict[str, Callable[[], nn.Module]] = {"dense": lambda: named(dense()), "convolutional": lambda: named(convolutional())}


def tasks_for(model: str) -> Task:
    """Three tasks whose support sets have every class."""
    tasks = task_batch() if model == "dense" else task_batch(shape=(1, 8, 8))
    return tasks._replace(support=tasks.support._replace(y=torch.arange(4).remainder(2).expand(3, 4)))


def shaken(meta: Meta) -> Meta:
    """Other values than the model's own, and rates that differ from weight to weight."""
    noise = torch.Generator().manual_seed(4)
    return Meta(*(tree_map(lambda p: p * (1 + 0.2 * torch.randn(p.shape, generator=noise, dtype=p.dtype)), t) for t in meta))


@pytest.fixture(scope="session")
def l2l() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package: ModuleType = pytest.importorskip("learn2learn", reason="see requirements-learn2learn.txt")
    return package


METHODS: dict[str, Callable[..., Learner]] = {
    "maml": algorithms.maml,
    "fomaml": algorithms.fomaml,
    "anil": algorithms.anil,
    "first-order anil": lambda model, **given: algorithms.anil(model, order="first", **given),
    "meta_sgd": algorithms.meta_sgd,
    "first-order meta_sgd": lambda model, **given: algorithms.meta_sgd(model, order="first", **given),
    "meta_sgd of the head": lambda model, **given: algorithms.meta_sgd(model, adapts="head.*", **given),
}


def assert_backends_agree(learner: Learner, tasks: Task) -> Meta:
    """Compares twice, since the first call of the backend does more; returns the gradient."""
    meta = shaken(learner.init())
    expected, scores = meta_gradient(learner, meta, tasks)
    gradient = learn2learn_gradient(learner, Plan())
    for _ in range(2):
        grads, found = gradient(meta, tasks)
        for tree, own in zip(grads, expected, strict=True):
            assert {name: tensor.shape for name, tensor in tree.items()} == {name: t.shape for name, t in own.items()}
        assert relative(grads.params, expected.params) < 1e-12
        assert not expected.learned or relative(grads.learned, expected.learned) < 1e-12
        assert relative(found.task_loss, scores.task_loss) < 1e-12
        assert relative(found, scores) < 1e-12
    return grads


@pytest.mark.usefixtures("l2l")
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_the_learn2learn_backend_equals_our_engine(method: str, model: str, steps: int) -> None:
    learner = METHODS[method](MODELS[model](), inner_lr=0.3, inner_steps=steps)
    grads = assert_backends_agree(learner, tasks_for(model))
    assert all(tensor.any() for tensor in grads.params.values())
    assert bool(grads.learned) == ("meta_sgd" in method) and all(tensor.any() for tensor in grads.learned.values())


def small_tasks(generator: torch.Generator) -> Task:
    def batch(n: int) -> Batch:
        x = torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64)
        return Batch(x, torch.randint(2, (n,), generator=generator))

    return Task(batch(4), batch(6))


@pytest.mark.usefixtures("l2l")
@pytest.mark.parametrize("method", ["maml", "fomaml", "anil", "meta_sgd"])
def test_training_by_either_backend_gives_the_same_parameters(method: str) -> None:
    """The bias before batch norm is left out: its gradient is 0, and Adam would blow the rounding of it up to a step."""
    ends = {}
    for name in BACKENDS:
        network = MODELS["convolutional"]()
        network.get_submodule("body.0").register_parameter("bias", None)
        learner = METHODS[method](network, inner_lr=0.3, inner_steps=3)
        *_, last = train(learner, small_tasks, 5, 4, 0.05, gradient=backend(name))
        ends[name] = last.meta
        assert relative(last.meta, learner.init()) > 1e-2
    assert relative(ends["learn2learn"], ends["toolkit"]) < 1e-10


@pytest.mark.usefixtures("l2l")
def test_an_annealed_order_trains_by_the_order_of_each_iteration() -> None:
    ends = []
    for name in BACKENDS:
        learner = algorithms.maml(dense(), inner_lr=0.5, inner_steps=2, order="annealed:0.5")
        batches = (record.meta for record in train(learner, Classes(), 4, 2, 0.05, gradient=backend(name)))
        ends.append([tree_map(torch.clone, meta.params) for meta in batches])
    assert all(relative(a, b) < 1e-10 for a, b in zip(*ends, strict=True))


class Classes:
    """Two random classes of three numbers."""

    def __call__(self, generator: torch.Generator) -> Task:
        x = torch.randn(10, 3, generator=generator, dtype=torch.float64)
        y = torch.randint(2, (10,), generator=generator)
        return Task(Batch(x[:4], y[:4]), Batch(x[4:], y[4:]))


@pytest.mark.usefixtures("l2l")
@pytest.mark.parametrize("method", ["maml", "anil", "meta_sgd"])
def test_the_backend_leaves_the_given_model_alone(method: str) -> None:
    """learn2learn's forward passes update running statistics, parameters and gradients of the modules they are given."""
    network = MODELS["convolutional"]()
    learner = METHODS[method](network, inner_steps=2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    meta = shaken(learner.init())
    kept = tree_map(torch.clone, meta.params)
    first, _ = learn2learn_gradient(learner, Plan())(meta, tasks_for("convolutional"))
    again, _ = learn2learn_gradient(learner, Plan())(meta, tasks_for("convolutional"))
    for module in (network, learner.model):
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters())
    assert relative(meta.params, kept) == 0
    assert relative(again, first) == 0


@pytest.mark.usefixtures("l2l")
@pytest.mark.parametrize("method", METHODS)
def test_frozen_parameters_stay_out_of_both_loops(method: str) -> None:
    network = MODELS["convolutional"]()
    for name, p in network.named_parameters():
        p.requires_grad_(name not in ("body.0.weight", "body.1.bias", "head.bias"))
    grads = assert_backends_agree(METHODS[method](network, inner_lr=0.3, inner_steps=3), tasks_for("convolutional"))
    assert set(grads.params) == {"body.0.bias", "body.1.weight", "head.weight"}


class Pair(nn.Module):
    """A model of two named inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = (nn.Linear(n, m).double() for n, m in ((3, 4), (2, 4), (4, 2)))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        logits: Tensor = self.head((self.left(left) * self.right(right)).tanh())
        return logits


@pytest.mark.usefixtures("l2l")
@pytest.mark.parametrize("method", ["maml", "anil", "meta_sgd"])
def test_the_backend_takes_several_inputs_by_name(method: str) -> None:
    tasks = tasks_for("dense")
    assert isinstance(tasks.support.x, Tensor) and isinstance(tasks.query.x, Tensor)
    both = [{"right": x[..., :2].sin(), "left": x} for x in (tasks.support.x, tasks.query.x)]
    pairs = Task(tasks.support._replace(x=both[0]), tasks.query._replace(x=both[1]))
    assert_backends_agree(METHODS[method](Pair(), inner_lr=0.3, inner_steps=2), pairs)


class Attending(nn.Module):
    """Attention of the three numbers of an example to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(1, 4).double(), nn.Linear(12, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        q = self.body(x[..., None]).sin()
        mixed: Tensor = nn.functional.scaled_dot_product_attention(q, q, q.cos())
        logits: Tensor = self.head(mixed.flatten(1))
        return logits


@pytest.mark.usefixtures("l2l")
def test_attention_is_differentiated_twice() -> None:
    """The fused kernel, which torch would take, has no second derivative."""
    assert_backends_agree(algorithms.maml(Attending(), inner_lr=0.3, inner_steps=2), tasks_for("dense"))


@pytest.mark.usefixtures("l2l")
@pytest.mark.parametrize("method", ["anil", "meta_sgd"])
def test_the_first_call_of_the_backend_draws_no_more_random_numbers_than_others(method: str) -> None:
    layers = list(dense().children())
    learner = METHODS[method](named(nn.Sequential(*layers[:-1], nn.Dropout(0.5), layers[-1])), inner_steps=2)
    meta, gradient, found = learner.init(), learn2learn_gradient(learner, Plan()), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(gradient(meta, tasks_for("dense"))[0])
    assert relative(found[1], found[0]) == 0
    assert relative(found[2], found[0]) > 1e-2


class Tied(nn.Module):
    """Two layers with one weight, and a parameter without a use."""

    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(3, n).double() for n in (3, 3, 2))
        if unused:
            self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        else:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.first(x).tanh()).tanh())
        return logits


@pytest.mark.usefixtures("l2l")
@pytest.mark.parametrize("method", ["maml", "fomaml"])
@pytest.mark.parametrize("unused", [False, True])
def test_tied_and_unused_parameters(unused: bool, method: str) -> None:
    grads = assert_backends_agree(METHODS[method](Tied(unused), inner_lr=0.3, inner_steps=3), tasks_for("dense"))
    assert "second.weight" in grads.params or not unused
    assert not unused or not grads.params["unused"].any()


@pytest.mark.usefixtures("l2l")
def test_the_backend_without_steps_or_in_evaluation_mode() -> None:
    assert_backends_agree(algorithms.joint(MODELS["convolutional"]()), tasks_for("convolutional"))
    learner = algorithms.maml(convolutional(), inner_steps=2)
    assert_backends_agree(replace(learner, training=False), tasks_for("convolutional"))


def goes_on(model: nn.Module) -> nn.Module:
    """The model with a layer behind its head."""
    return nn.Sequential(OrderedDict([*model.named_children(), ("end", nn.LogSoftmax(-1))]))


REFUSED: dict[str, tuple[Callable[[nn.Module], Learner], str]] = {
    "start": (lambda m: algorithms.proto_maml(m), r"proto_maml: its start is Prototypes\(.*\), and only inherited is"),
    "objective": (lambda m: algorithms.reptile(m), "reptile: its objective is reptile, and only last_step is possible"),
    "every step": (
        lambda m: algorithms.maml_plus_plus(m, batch_norm="batch"),
        r"maml_plus_plus: its rule is PerStep\(.*\), and only SGD without momentum, at a fixed rate or a learned one per",
    ),
    "inner loss": (lambda m: algorithms.metal(m), r"metal: its inner loss is TaskLoss\(.*\), and only support_loss"),
    "momentum": (lambda m: algorithms.maml(m, rule=SGD(0.1, momentum=0.9)), r"its rule is SGD\(lr=0.1, momentum=0.9,"),
    "rate per tensor": (lambda m: algorithms.maml(m, rule=SGD(0.1, learn="tensor")), r"its rule is SGD\(.*learn='tensor'\)"),
    "rates per step": (lambda m: algorithms.maml(m, rule=PerStep(SGD(0.1, learn="weight"))), r"its rule is PerStep\("),
    "clipping": (lambda m: algorithms.maml(m, rule=Clip(SGD(0.1))), r"its rule is Clip\("),
    "adam": (lambda m: algorithms.maml(m, rule=Adam(0.1)), r"its rule is Adam\("),
    "implicit": (lambda m: algorithms.imaml(m), r"imaml: its objective is Implicit\(.*\), and only last_step"),
    "truncated": (lambda m: algorithms.maml(m, inner_steps=3, order="truncated:2"), "its order is 2, and only None or 0 is"),
    "minibatches": (lambda m: algorithms.maml(m, inner_batch=2), "its inner batch is 2, and only None is"),
    "support": (lambda m: algorithms.maml(m, batch_norm="support"), "its batch norm is 'support', and only 'batch' is"),
    "running": (lambda m: algorithms.maml(m, batch_norm="running"), "its batch norm is 'running', and only 'batch' is"),
    "per step": (lambda m: algorithms.maml(m, batch_norm="per_step"), "its batch norm is 'per_step', and only 'batch' is"),
    "phases": (lambda m: algorithms.maml(m, order="annealed:0.5"), "its number of phases is 2, and only 0 is"),
    "body": (
        lambda m: algorithms.boil(m),
        r"boil: its adapting part is body\.0\.weight, body\.0\.bias, and only all parameters or those under 'head\.' is",
    ),
    "part of the head": (lambda m: algorithms.maml(m, adapts="head.bias"), r"its adapting part is head\.bias, and only all"),
    "tied": (lambda m: algorithms.meta_sgd(Tied()), "its set of parameters with learned rates is tied, and only an untied one"),
}


@pytest.mark.usefixtures("l2l")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_the_backend_refuses_what_learn2learn_cannot_do(case: str) -> None:
    make, sentence = REFUSED[case]
    with pytest.raises(UserError, match=sentence) as raised:
        learn2learn_gradient(make(named(dense())), Plan())
    text = str(raised.value)
    assert text.startswith("learn2learn cannot compute ") and "\n" not in text
    assert text.endswith("is possible; use the backend 'toolkit', or a plain maml, fomaml, anil or meta_sgd")


@pytest.mark.usefixtures("l2l")
def test_the_backend_refuses_what_only_data_shows() -> None:
    """Without the look at a forward pass the first would be silently wrong, the second an error of torch."""
    tasks = tasks_for("dense")
    after = algorithms.anil(goes_on(named(dense())), inner_steps=1)
    with pytest.raises(UserError, match="the model goes on after its head 'head', and learn2learn would leave that out; end"):
        learn2learn_gradient(after, Plan())(after.init(), tasks)
    assert_backends_agree(algorithms.maml(goes_on(named(dense())), inner_steps=1), tasks)
    unused = algorithms.meta_sgd(Tied(unused=True), inner_steps=1)
    with pytest.raises(UserError, match="does not use unused, which learn2learn's MetaSGD cannot bear; freeze them"):
        learn2learn_gradient(unused, Plan())(unused.init(), tasks)


def test_a_missing_learn2learn_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "learn2learn", None)
    with pytest.raises(UserError, match=r"cannot be imported .*; run pip install -r requirements-learn2learn.txt, or use"):
        learn2learn_gradient(algorithms.maml(dense()), Plan())


def test_backends_by_name() -> None:
    assert backend("learn2learn") is learn2learn_gradient
    with pytest.raises(UserError, match=r"unknown backend 'learn2lern'; did you mean 'learn2learn'\? \(known: learn2learn, to"):
        backend("learn2lern")


IMPORTS = """
import sys, warnings
from torch import nn
from toolkit import Plan, algorithms
from toolkit.backend import learn2learn_gradient
assert "learn2learn" not in sys.modules
filters = list(warnings.filters)
learn2learn_gradient(algorithms.maml(nn.Linear(2, 2)), Plan())
assert "learn2learn" in sys.modules and warnings.filters == filters
"""


@pytest.mark.usefixtures("l2l")
def test_learn2learn_is_imported_late_and_in_silence() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", IMPORTS], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def through_tasks(tasks: Task, query_loss: Callable[[Task], Tensor]) -> Tensor:
    """The mean of `query_loss` over the tasks."""
    return torch.stack([query_loss(take(tasks, i)) for i in range(count(tasks))]).mean()


def gradients(value: Tensor, network: nn.Module) -> Params:
    """The gradient of `value` with respect to all parameters of `network`; 0 for those without a part in it."""
    names, leaves = zip(*network.named_parameters(), strict=True)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, leaves, grads, strict=True)}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("model", MODELS)
def test_equals_meta_sgd_of_learn2learn(l2l: Any, model: str, steps: int) -> None:
    network, tasks = MODELS[model](), tasks_for(model)
    learner = algorithms.meta_sgd(network, inner_lr=0.3, inner_steps=steps)
    grads, metrics = meta_gradient(learner, learner.init(), tasks)
    peer = l2l.algorithms.MetaSGD(network, lr=0.3)

    def query_loss(task: Task) -> Tensor:
        clone = peer.clone()
        for _ in range(steps):
            clone.adapt(cross_entropy(clone(task.support.x), task.support.y))
        return cross_entropy(clone(task.query.x), task.query.y)

    total = through_tasks(tasks, query_loss)
    total.backward()
    names = [name for name, _ in network.named_parameters()]
    assert relative(grads.params, {name: p.grad for name, p in network.named_parameters()}) < 1e-12
    assert relative(grads.learned, {f"lr/{n}": rate.grad for n, rate in zip(names, peer.lrs, strict=True)}) < 1e-12
    assert abs(metrics.loss - total) < 1e-12


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("model", MODELS)
def test_equals_anil_of_learn2learn(l2l: Any, model: str, steps: int) -> None:
    network, tasks = MODELS[model](), tasks_for(model)
    learner = algorithms.anil(network, inner_lr=0.3, inner_steps=steps)
    grads, metrics = meta_gradient(learner, learner.init(), tasks)
    features, head = network.get_submodule("body"), l2l.algorithms.MAML(network.get_submodule("head"), lr=0.3)

    def query_loss(task: Task) -> Tensor:
        clone, support = head.clone(), features(task.support.x)
        for _ in range(steps):
            clone.adapt(cross_entropy(clone(support), task.support.y))
        return cross_entropy(clone(features(task.query.x)), task.query.y)

    total = through_tasks(tasks, query_loss)
    assert relative(grads.params, gradients(total, network)) < 1e-12
    assert abs(metrics.loss - total) < 1e-12


def with_ones(x: object) -> Tensor:
    assert isinstance(x, Tensor)
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_implicit_gradient_equals_its_closed_form_on_linear_regression(damping: float) -> None:
    """With H = 2 A'A / n the proximal problem is solved by w* = (H + lam)^-1 (2 A'y / n + lam w_0), so its meta-gradient is
    lam (H + lam)^-1 grad(w*). Damping puts lam + damping into the gradient's system; w* stays."""
    lam, network = 1.5, nn.Linear(3, 1).double()
    learner = algorithms.imaml(
        network, loss=squared_error, metric=squared_error, inner_lr=0.1, inner_steps=300, lam=lam, cg_steps=6, damping=damping
    )
    tasks, meta = draw(Linear(3, 6, 7), 4, seed=0), learner.init()
    start = torch.cat([network.weight.T, network.bias[:, None]]).detach()
    expected, undamped, eye = torch.zeros_like(start), torch.zeros_like(start), torch.eye(4, dtype=torch.float64)
    for i in range(4):
        task = take(tasks, i)
        a, q = with_ones(task.support.x), with_ones(task.query.x)
        hessian = 2 * a.T @ a / 6
        end = torch.linalg.solve(hessian + lam * eye, 2 * a.T @ task.support.y / 6 + lam * start)
        *_, fast = learner.path(meta, task.support)
        assert relative(torch.cat([fast["weight"].T, fast["bias"][:, None]]), end) < 1e-12
        slope = 2 * q.T @ (q @ end - task.query.y) / 7
        expected += (lam + damping) * torch.linalg.solve(hessian + (lam + damping) * eye, slope) / 4
        undamped += lam * torch.linalg.solve(hessian + lam * eye, slope) / 4
    grads, _ = meta_gradient(learner, meta, tasks)
    found = torch.cat([grads.params["weight"].T, grads.params["bias"][:, None]])
    assert relative(found, expected) < 1e-8
    assert (relative(found, undamped) > 1e-2) == (damping > 0)


def test_implicit_gradient_of_shared_weights_equals_its_closed_form() -> None:
    """The bias is shared: the solution depends on it, and so does the query loss itself."""
    lam, network = 1.5, nn.Linear(3, 1).double()
    learner = algorithms.imaml(
        network, loss=squared_error, metric=squared_error, inner_lr=0.1, inner_steps=300, lam=lam, cg_steps=6, adapts="weight"
    )
    tasks = draw(Linear(3, 6, 7), 4, seed=0)

    def query_loss(task: Task) -> Tensor:
        a, q = task.support.x, task.query.x
        assert isinstance(a, Tensor) and isinstance(q, Tensor)
        right = 2 * a.T @ (task.support.y - network.bias) / 6 + lam * network.weight.T
        end = torch.linalg.solve(2 * a.T @ a / 6 + lam * torch.eye(3, dtype=torch.float64), right)
        return (q @ end + network.bias - task.query.y).square().mean()

    grads, _ = meta_gradient(learner, learner.init(), tasks)
    expected = gradients(through_tasks(tasks, query_loss), network)
    for name in ("weight", "bias"):
        assert relative(grads.params[name], expected[name]) < 1e-8


@pytest.mark.parametrize("model", MODELS)
def test_protonet_equals_its_closed_form(model: str) -> None:
    """Snell et al. 2017, equations 1 and 2: softmax over negative squared distances to the class means."""
    network, tasks = MODELS[model](), tasks_for(model)
    body = network.get_submodule("body")

    def query_loss(task: Task) -> Tensor:
        support, query, y = body(task.support.x), body(task.query.x), task.support.y
        means = torch.stack([support[y == c].mean(0) for c in range(2)])
        share = (-(query[:, None] - means[None]).square().sum(-1)).exp()
        share = share / share.sum(1, keepdim=True)
        return -share[torch.arange(6), task.query.y].log().mean()

    learner = algorithms.protonet(network)
    grads, metrics = meta_gradient(learner, learner.init(), tasks)
    total = through_tasks(tasks, query_loss)
    expected = gradients(total, network)
    assert relative(grads.params, expected) < 1e-12
    assert abs(metrics.loss - total) < 1e-12
    assert not grads.params["head.weight"].any() and not grads.params["head.bias"].any()


@pytest.mark.parametrize("model", MODELS)
def test_r2d2_equals_its_closed_form(model: str) -> None:
    """Bertinetto et al. 2019, equations 4 and 6: the primal form W = (X'X + lambda I)^-1 X'Y, where ours is the dual one."""
    network, tasks = MODELS[model](), tasks_for(model)
    body = network.get_submodule("body")
    learner = algorithms.r2d2(network)
    values = {"start/log_lambda": -0.4, "start/log_alpha": 0.7, "start/beta": 0.3}
    meta = learner.init()._replace(learned={n: torch.tensor(v, dtype=torch.float64) for n, v in values.items()})
    log_lambda, log_alpha, beta = own = [t.clone().requires_grad_() for t in meta.learned.values()]

    def query_loss(task: Task) -> Tensor:
        x, y = body(task.support.x), torch.eye(2, dtype=torch.float64)[task.support.y]
        inverse = torch.linalg.inv(x.T @ x + log_lambda.exp() * torch.eye(x.shape[1], dtype=torch.float64))
        return cross_entropy(log_alpha.exp() * body(task.query.x) @ inverse @ x.T @ y + beta, task.query.y)

    grads, metrics = meta_gradient(learner, meta, tasks)
    total = through_tasks(tasks, query_loss)
    rates = torch.autograd.grad(total, own[:2], retain_graph=True)
    assert relative(grads.params, gradients(total, network)) < 1e-12
    assert relative([grads.learned[name] for name in ("start/log_lambda", "start/log_alpha")], rates) < 1e-12
    assert abs(grads.learned["start/beta"]) < 1e-15, "a shift of all logits alike does not change a cross entropy"
    assert abs(metrics.loss - total) < 1e-12


@pytest.mark.parametrize("model", MODELS)
def test_joint_training_equals_the_plain_supervised_gradient(model: str) -> None:
    network, tasks = MODELS[model](), tasks_for(model)
    learner = algorithms.joint(network)
    grads, metrics = meta_gradient(learner, learner.init(), tasks)
    total = through_tasks(tasks, lambda task: cross_entropy(network(task.query.x), task.query.y))
    assert relative(grads.params, gradients(total, network)) < 1e-12
    assert abs(metrics.loss - total) < 1e-12


EPS = 1e-3
BETAS = (0.9, 0.99)
INNER: dict[str, Rule] = {
    "momentum": SGD(0.2, momentum=0.8),
    "nesterov": SGD(0.2, momentum=0.8, nesterov=True),
    "rmsprop": RMSprop(0.05, 0.9, EPS),
    "adam": Adam(0.05, BETAS, EPS),
}


def torch_optimizer(name: str, network: nn.Module) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(network.parameters(), 0.05, BETAS, EPS)
    if name == "rmsprop":
        return torch.optim.RMSprop(network.parameters(), 0.05, 0.9, EPS)
    return torch.optim.SGD(network.parameters(), 0.2, 0.8, nesterov=name == "nesterov")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rule", INNER)
def test_equals_higher(rule: str, model: str) -> None:
    """Its SGD and RMSprop are torch's formulas. Its Adam adds eps to the root of the second moment v before v is corrected:
    torch's and our sqrt(v / c) + eps, with c = 1 - beta2^k, is its sqrt(v) + eps' for eps' = eps sqrt(c), which it is given.
    Its warning on RMSprop concerns gradients of exactly 0."""
    higher = pytest.importorskip("higher", reason="higher is not installed; see the extra 'test'")
    network, tasks = MODELS[model](), tasks_for(model)
    learner = algorithms.maml(network, rule=INNER[rule], inner_steps=5)
    grads, metrics = meta_gradient(learner, learner.init(), tasks)

    def query_loss(task: Task) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Differentiable RMSprop suffers", UserWarning)
            optimizer = torch_optimizer(rule, network)
            with higher.innerloop_ctx(network, optimizer, copy_initial_weights=False) as (functional, steps):
                for k in range(5):
                    override = {"eps": [EPS * (1 - BETAS[1] ** (k + 1)) ** 0.5]} if rule == "adam" else None
                    steps.step(cross_entropy(functional(task.support.x), task.support.y), override=override)
                return cross_entropy(functional(task.query.x), task.query.y)

    total = through_tasks(tasks, query_loss)
    assert relative(grads.params, gradients(total, network)) < 1e-10
    assert abs(metrics.loss - total) < 1e-12
