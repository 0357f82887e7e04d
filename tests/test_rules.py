"""The inner update rules against torch.optim, alone, wrapped and in groups."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import dense, finite_differences, mean_objective, relative, task_batch
from toolkit import Learner, Meta, UserError, algorithms, draw, meta_gradient
from toolkit.metrics import squared_error
from toolkit.rules import SGD, Adam, Clip, Frozen, Groups, PerStep, Proximal, RMSprop, Rule
from toolkit.samplers import Linear
from toolkit.task import take
from toolkit.tree import Params, norm, tree_map

STEPS = 5
SHAPES = {"body.weight": (4, 3), "body.bias": (4,), "head.weight": (2, 4), "head.bias": (2,)}
RULES: dict[str, Rule] = {
    "sgd": SGD(0.3),
    "momentum": SGD(0.2, momentum=0.8),
    "nesterov": SGD(0.2, momentum=0.8, nesterov=True),
    "adam": Adam(0.05),
    "adam of other constants": Adam(0.3, betas=(0.5, 0.7), eps=1e-2),
    "rmsprop": RMSprop(0.05),
    "rmsprop of other constants": RMSprop(0.3, alpha=0.6, eps=1e-2),
}
Optimizers = dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]]
OPTIMIZERS: Optimizers = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.8),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.8, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adam of other constants": lambda p: torch.optim.Adam(p, lr=0.3, betas=(0.5, 0.7), eps=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
    "rmsprop of other constants": lambda p: torch.optim.RMSprop(p, lr=0.3, alpha=0.6, eps=1e-2),
}


def random_params(seed: int, names: tuple[str, ...] = tuple(SHAPES)) -> Params:
    g = torch.Generator().manual_seed(seed)
    whole = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in SHAPES.items()}
    return {name: whole[name] for name in names}


def walk(rule: Rule, names: tuple[str, ...] = tuple(SHAPES), learned: Params | None = None) -> list[Params]:
    """The weights after each step on a fixed sequence of gradients."""
    fast = random_params(0, names)
    learned = rule.learned(fast) if learned is None else learned
    state, path = rule.init(fast), []
    for step in range(STEPS):
        fast, state = rule.update(learned, random_params(1 + step, names), state, fast, step)
        path.append(fast)
    return path


def torch_walk(optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> list[Params]:
    params, path = random_params(0), []
    moving = optimizer(list(params.values()))
    for step in range(STEPS):
        for name, grad in random_params(1 + step).items():
            params[name].grad = grad
        moving.step()
        path.append({name: tensor.clone() for name, tensor in params.items()})
    return path


def furthest(a: list[Params], b: list[Params]) -> float:
    assert len(a) == len(b) == STEPS
    assert all(list(x) == list(y) for x, y in zip(a, b, strict=True))
    return max(float((x[name] - y[name]).abs().max()) for x, y in zip(a, b, strict=True) for name in x)


@pytest.mark.parametrize("rule", RULES)
def test_equals_torch_optim_at_every_step(rule: str) -> None:
    assert furthest(walk(RULES[rule]), torch_walk(OPTIMIZERS[rule])) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_keeps_dtype_and_never_writes_into_its_arguments(rule: str) -> None:
    fast = {name: tensor.float() for name, tensor in random_params(0).items()}
    grads = {name: tensor.float() for name, tensor in random_params(1).items()}
    state = RULES[rule].init(fast)
    kept = [{name: tensor.clone() for name, tensor in tree.items()} for tree in (fast, grads, state)]
    moved, new = RULES[rule].update({}, grads, state, fast, 0)
    for before, after in zip(kept, (fast, grads, state), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(tensor.dtype == torch.float32 for tensor in moved.values())
    assert {name: (t.shape, t.dtype) for name, t in new.items()} == {name: (t.shape, t.dtype) for name, t in state.items()}


def test_state_holds_only_what_the_rule_needs() -> None:
    fast = random_params(0)
    assert SGD(0.3).init(fast) == {}
    assert list(SGD(0.3, momentum=0.5).init(fast)) == [f"velocity/{name}" for name in fast]
    moments = [f"{moment}/{name}" for moment in ("first", "second") for name in fast]
    assert list(Adam(0.1).init(fast)) == moments and list(RMSprop(0.1).init(fast)) == moments[len(fast) :]
    assert all(
        not tensor.any() and tensor.shape == fast[key.split("/")[1]].shape for key, tensor in Adam(0.1).init(fast).items()
    )
    assert Frozen().init(fast) == Clip(SGD(0.1)).init(fast) == PerStep(SGD(0.1)).init(fast) == {}
    assert all(rule.learned(fast) == {} for rule in RULES.values())


GROUPED = Groups(("*bias", SGD(0.1, momentum=0.5)), ("head.*", SGD(0.4, learn="tensor")), ("*", Adam(0.05)))
ALONE = {
    "body.weight": Adam(0.05),
    "body.bias": SGD(0.1, momentum=0.5),
    "head.weight": SGD(0.4, learn="tensor"),
    "head.bias": SGD(0.1, momentum=0.5),
}


def test_groups_apply_the_first_matching_pattern_as_the_rules_alone() -> None:
    together = walk(GROUPED)
    for name, rule in ALONE.items():
        alone = walk(rule, (name,))
        assert furthest([{name: point[name]} for point in together], alone) == 0


def test_groups_in_another_order_are_another_rule() -> None:
    head_first = Groups(("head.*", SGD(0.4)), ("*bias", SGD(0.1)), ("*", SGD(0.2)))
    point = walk(head_first)[0]
    start, grads = random_params(0), random_params(1)
    for name, lr in {"head.bias": 0.4, "head.weight": 0.4, "body.bias": 0.1, "body.weight": 0.2}.items():
        assert torch.equal(point[name], start[name] - lr * grads[name])


def test_groups_of_the_same_rule_equal_the_rule_and_nest() -> None:
    for name, rule in RULES.items():
        flat = Groups(("*bias", rule), ("*", rule))
        nested = Groups(("head.*", Groups(("*bias", rule), ("*weight", rule))), ("*", rule))
        assert furthest(walk(flat), walk(rule)) == 0, name
        assert furthest(walk(nested), walk(rule)) == 0, name


def test_groups_name_the_parameter_without_a_rule() -> None:
    rule = Groups(("head.*", SGD(0.1)), ("*bias", SGD(0.2)))
    for call in (rule.init, rule.learned, lambda fast: rule.update({}, fast, {}, fast, 0)):
        with pytest.raises(UserError, match=r"'body\.weight'.*'head\.\*', '\*bias'"):
            call(random_params(0))


def network() -> nn.Module:
    """A smooth network with the parameters of `SHAPES`."""
    layers: Any = OrderedDict(body=nn.Linear(3, 4), squash=nn.Tanh(), head=nn.Linear(4, 2))
    return nn.Sequential(layers).double()


def end(learner: Learner, meta: Meta) -> Params:
    """The last point of the path on the first task of `task_batch`."""
    *_, fast = learner.path(meta, take(task_batch(), 0).support)
    return fast


@pytest.mark.parametrize("rule", [*RULES, "groups"])
def test_first_order_passes_values_unchanged_and_cuts_the_gradient(rule: str) -> None:
    inner = GROUPED if rule == "groups" else RULES[rule]
    exact = algorithms.maml(network(), rule=inner, inner_steps=3)
    first, meta = replace(exact, order=0), exact.init()
    assert relative(end(first, meta), end(exact, meta)) == 0
    slopes = {
        name: torch.func.grad(lambda meta, own=own: torch.stack([t.sum() for t in end(own, meta).values()]).sum())(meta).params
        for name, own in (("exact", exact), ("first", first))
    }
    assert all(torch.equal(g, torch.ones_like(g)) for g in slopes["first"].values()), "the weights themselves stay in the graph"
    assert all(bool(((g - 1).abs() > 1e-6).all()) for g in slopes["exact"].values())


def test_first_order_still_learns_rates() -> None:
    learner = algorithms.fomaml(network(), rule=SGD(0.3, learn="tensor"))
    meta, support = learner.init(), take(task_batch(), 0).support
    slopes = torch.func.grad(lambda meta: torch.stack([t.sum() for t in end(learner, meta).values()]).sum())(meta).learned
    losses = torch.func.grad(lambda fast: learner.loss(learner.predict(meta, fast, support.x), support.y))(meta.params)
    assert list(slopes) == [f"lr/{name}" for name in losses]
    for name, slope in losses.items():
        assert torch.allclose(slopes[f"lr/{name}"], -slope.sum(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_learned_rates_start_at_lr_and_are_used(momentum: float) -> None:
    rule = SGD(0.3, momentum=momentum, learn="tensor")
    learned = rule.learned(random_params(0))
    assert list(learned) == [f"lr/{name}" for name in SHAPES]
    assert all(rate.shape == () and rate.dtype == torch.float64 and rate == 0.3 for rate in learned.values())
    assert furthest(walk(rule), walk(SGD(0.3, momentum=momentum))) < 1e-15
    rates = {name: 0.1 * (1 + i) for i, name in enumerate(SHAPES)}
    path = walk(rule, learned={f"lr/{name}": torch.tensor(lr, dtype=torch.float64) for name, lr in rates.items()})
    for name, lr in rates.items():
        assert furthest([{name: p[name]} for p in path], walk(SGD(lr, momentum=momentum), (name,))) < 1e-15


def test_learned_rates_of_groups_reach_their_own_rule_only() -> None:
    rule = Groups(("head.*", SGD(0.4, learn="tensor")), ("*", SGD(0.2, learn="tensor")))
    learned = rule.learned(random_params(0))
    assert list(learned) == ["head.*/lr/head.weight", "head.*/lr/head.bias", "*/lr/body.weight", "*/lr/body.bias"]
    changed = learned | {"head.*/lr/head.bias": torch.tensor(0.0, dtype=torch.float64)}
    before, after = walk(rule), walk(rule, learned=changed)
    assert torch.equal(after[-1]["head.bias"], random_params(0)["head.bias"])
    for name in ("head.weight", "body.weight", "body.bias"):
        assert torch.equal(before[-1][name], after[-1][name])


@pytest.mark.parametrize("momentum", [1.0, 1.5, -0.1, float("nan")])
@pytest.mark.parametrize("nesterov", [False, True])
def test_bad_momentum_is_a_user_error(momentum: float, nesterov: bool) -> None:
    with pytest.raises(UserError, match=f"momentum is {momentum}"):
        SGD(0.1, momentum=momentum, nesterov=nesterov)


@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf"), "fast"])
@pytest.mark.parametrize("rule", [SGD, Adam, RMSprop, lambda lr: PerStep(SGD(lr), 2), lambda lr: Groups(("*", Adam(lr)))])
def test_a_bad_rate_is_a_user_error(rule: Callable[..., Rule], lr: Any) -> None:
    with pytest.raises(UserError, match=f"the inner rate is {lr!r}; give a number, 0 or more"):
        algorithms.maml(dense(), rule=rule(lr), inner_steps=2)


@pytest.mark.parametrize("steps", [2.5, -1, "2"])
def test_bad_numbers_of_steps_are_a_user_error(steps: Any) -> None:
    with pytest.raises(UserError, match=f"inner steps is {steps!r}; give a whole number, 0 or more"):
        algorithms.maml(dense(), inner_steps=steps)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(UserError, match="more than 0 for Nesterov"):
        SGD(0.1, nesterov=True)


def test_an_unknown_kind_of_learned_rate_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"unknown kind of learned rate 'weights'; did you mean 'weight'\?"):
        SGD(0.1, learn="weights")


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_rates_per_weight_have_its_shape_and_move_it_alone(momentum: float) -> None:
    """Meta-SGD, equation 2: w <- w - rate * g element by element."""
    rule = SGD(0.3, momentum=momentum, learn="weight")
    learned = rule.learned(random_params(0))
    assert {name: tuple(rate.shape) for name, rate in learned.items()} == {f"lr/{name}": s for name, s in SHAPES.items()}
    assert all(bool((rate == 0.3).all()) and rate.dtype == torch.float64 for rate in learned.values())
    assert furthest(walk(rule), walk(SGD(0.3, momentum=momentum))) < 1e-15
    rates = {name: tensor.abs() for name, tensor in random_params(99).items()}
    fast, velocity = random_params(0), tree_map(torch.zeros_like, random_params(0))
    for step, point in enumerate(walk(rule, learned={f"lr/{name}": rate for name, rate in rates.items()})):
        velocity = tree_map(lambda v, g: momentum * v + g, velocity, random_params(1 + step))
        fast = tree_map(lambda w, rate, v: w - rate * v, fast, rates, velocity)
        assert relative(point, fast) < 1e-14


def test_frozen_stays_at_its_start() -> None:
    start = random_params(0)
    for point in walk(Frozen()):
        assert list(point) == list(start) and all(torch.equal(point[name], start[name]) for name in start)
    mixed = walk(Groups(("head.*", Frozen()), ("*", SGD(0.3))))
    assert furthest([{n: p[n] for n in ("head.weight", "head.bias")} for p in mixed], [
        {n: start[n] for n in ("head.weight", "head.bias")}] * STEPS) == 0  # fmt: skip
    body = ("body.weight", "body.bias")
    assert furthest([{n: p[n] for n in body} for p in mixed], walk(SGD(0.3), body)) == 0
    assert Frozen().learned(start) == {} and Frozen() == Frozen()


def torch_clipped(longest: float) -> list[Params]:
    """torch.optim.SGD after `clip_grad_norm_`."""
    params, path = random_params(0), []
    moving = torch.optim.SGD(params.values(), lr=0.3)
    for step in range(STEPS):
        for name, grad in random_params(1 + step).items():
            params[name].grad = grad
        torch.nn.utils.clip_grad_norm_(params.values(), longest)
        moving.step()
        path.append({name: tensor.clone() for name, tensor in params.items()})
    return path


LENGTHS = [float(norm(random_params(1 + step))) for step in range(STEPS)]


@pytest.mark.parametrize("longest", [0.01, 1.0, 0.5 * (min(LENGTHS) + max(LENGTHS))])
def test_clip_equals_torchs_clipping(longest: float) -> None:
    assert longest < max(LENGTHS)
    clipped = walk(Clip(SGD(0.3), longest))
    assert furthest(clipped, torch_clipped(longest)) < 2e-6 * longest, "torch adds 1e-6 to the length"
    assert furthest(clipped, walk(SGD(0.3))) > 1e-2
    fast = random_params(0)
    for step, point in enumerate(clipped):
        scale = min(1, longest / LENGTHS[step])
        fast = tree_map(lambda w, g, scale=scale: w - 0.3 * scale * g, fast, random_params(1 + step))
        assert relative(point, fast) < 1e-14


def test_clip_leaves_shorter_gradients_bit_for_bit() -> None:
    for rule in RULES.values():
        assert furthest(walk(Clip(rule, max(LENGTHS) * (1 + 1e-9))), walk(rule)) == 0


def test_clip_in_a_group_measures_that_group_only() -> None:
    together = walk(Groups(("head.*", Clip(SGD(0.3), 0.5)), ("*", SGD(0.1))))
    head, body = ("head.weight", "head.bias"), ("body.weight", "body.bias")
    assert furthest([{n: p[n] for n in head} for p in together], walk(Clip(SGD(0.3), 0.5), head)) == 0
    assert furthest([{n: p[n] for n in body} for p in together], walk(SGD(0.1), body)) == 0


@pytest.mark.parametrize("rule", [Clip(SGD(0.3), 0.5), Clip(Adam(0.1), 0.5), RMSprop(0.1), Adam(0.1), Proximal(SGD(0.3))])
def test_a_zero_gradient_is_safe(rule: Rule) -> None:
    """Values do not move, and derivatives with respect to gradient and weights are finite."""
    start, zero = random_params(0), tree_map(torch.zeros_like, random_params(0))

    def total(grads: Params, fast: Params) -> Tensor:
        state = rule.init(fast)
        for k in range(2):
            fast, state = rule.update({}, grads, state, fast, k)
        return torch.stack([t.square().sum() for t in fast.values()]).sum()

    moved, _ = rule.update({}, zero, rule.init(start), start, 0)
    assert all(torch.equal(moved[name], start[name]) for name in start)
    by_grads, by_fast = torch.func.grad(total, argnums=(0, 1))(zero, start)
    assert all(g.isfinite().all() for g in (*by_grads.values(), *by_fast.values()))
    assert relative(by_fast, tree_map(lambda w: 2 * w, start)) < 1e-14


def test_clip_is_exact_in_finite_differences_where_it_cuts_and_where_not() -> None:
    """On one task: a path whose first step is cut and whose later ones are not, and one that is cut throughout."""
    tasks = task_batch(tasks=1)
    plain = algorithms.maml(dense(), inner_lr=0.5, inner_steps=3)
    meta, lengths = plain.init(), []
    for fast in plain.path(meta, take(tasks, 0).support):
        support = take(tasks, 0).support
        slope = torch.func.grad(lambda w, s=support: plain.loss(plain.predict(meta, w, s.x), s.y))(fast)
        lengths.append(float(norm(slope)))
    assert lengths[0] > 1.2 * lengths[2]
    for longest in (0.9 * lengths[0], 0.2 * min(lengths)):
        learner = algorithms.maml(dense(), rule=Clip(SGD(0.5), longest), inner_steps=3)
        grads, _ = meta_gradient(learner, meta, tasks)
        assert relative(grads, finite_differences(mean_objective(learner, tasks), meta)) < 1e-6
        assert relative(grads, meta_gradient(plain, meta, tasks)[0]) > 1e-3


@pytest.mark.parametrize("longest", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_length_to_clip_to_is_a_user_error(longest: float) -> None:
    with pytest.raises(UserError, match=f"the inner gradient's longest length is {longest}; give a positive number"):
        Clip(SGD(0.1), longest)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_proximal_equals_its_step_by_hand(momentum: float) -> None:
    """w <- w - lr v with v <- m v + g + lam (w - w_0)."""
    start = fast = random_params(0)
    velocity = tree_map(torch.zeros_like, start)
    for step, point in enumerate(walk(Proximal(SGD(0.3, momentum=momentum), lam=0.7))):
        pulled = tree_map(lambda g, w, w0: g + 0.7 * (w - w0), random_params(1 + step), fast, start)
        velocity = tree_map(lambda v, g: momentum * v + g, velocity, pulled)
        fast = tree_map(lambda w, v: w - 0.3 * v, fast, velocity)
        assert relative(point, fast) < 1e-14
    assert furthest(walk(Proximal(SGD(0.3), lam=0.0)), walk(SGD(0.3))) == 0
    assert furthest(walk(Proximal(SGD(0.3), lam=0.7))[:1] * STEPS, walk(SGD(0.3))[:1] * STEPS) == 0, "no pull at the start"


def test_proximal_keeps_its_anchor_and_the_state_of_the_rule() -> None:
    rule, fast = Proximal(Groups(("head.*", Adam(0.1)), ("*", SGD(0.1, momentum=0.5)))), random_params(0)
    state = rule.init(fast)
    assert {key for key in state if key.startswith("anchor/")} == {f"anchor/{name}" for name in fast}
    for k in range(3):
        fast, new = rule.update({}, random_params(1 + k), state, fast, k)
        assert set(new) == set(state)
        state = new
    assert all(torch.equal(state[f"anchor/{name}"], tensor) for name, tensor in random_params(0).items())


def test_proximal_ends_in_the_regularised_minimum() -> None:
    """Linear regression: w* = (X'X 2/n + lam I)^-1 (2/n X'y + lam w_0) minimises |Xw - y|^2 / n + lam / 2 |w - w_0|^2."""
    model, lam = nn.Linear(3, 1).double(), 1.5
    rule = Proximal(SGD(0.1), lam)
    learner = algorithms.maml(model, loss=squared_error, metric=squared_error, rule=rule, inner_steps=2000)
    task = take(draw(Linear(3, 5, 7), 1, seed=0), 0)
    *_, fast = learner.path(learner.init(), task.support)
    design = torch.cat([task.support.x, torch.ones(5, 1, dtype=torch.float64)], 1)
    start = torch.cat([model.weight.T, model.bias[:, None]]).detach()
    left = 2 / 5 * design.T @ design + lam * torch.eye(4, dtype=torch.float64)
    expected = torch.linalg.solve(left, 2 / 5 * design.T @ task.support.y + lam * start)
    assert relative(torch.cat([fast["weight"].T, fast["bias"][:, None]]), expected) < 1e-10


@pytest.mark.parametrize("inner", [SGD(0.3, learn="tensor"), SGD(0.3, learn="weight"), SGD(0.3, momentum=0.5, learn="tensor")])
def test_per_step_uses_the_values_of_each_step_and_then_the_last(inner: SGD) -> None:
    rule, start = PerStep(inner, steps=3), random_params(0)
    learned = rule.learned(start)
    assert list(learned) == [f"step{k}/lr/{name}" for k in range(3) for name in SHAPES]
    assert furthest(walk(rule), walk(inner)) == 0, "all steps start from the same rate"
    rates = [0.1, 0.02, 0.5]
    own = {key: torch.full_like(value, rates[int(key[4])]) for key, value in learned.items()}
    fast, velocity = start, tree_map(torch.zeros_like, start)
    for step, point in enumerate(walk(rule, learned=own)):
        velocity = tree_map(lambda v, g: inner.momentum * v + g, velocity, random_params(1 + step))
        fast = tree_map(lambda w, v, lr=[*rates, 0.5, 0.5][step]: w - lr * v, fast, velocity)
        assert relative(point, fast) < 1e-14, f"step {step}"


def test_per_step_tells_step_1_from_step_10() -> None:
    rule, start, grads = PerStep(SGD(0.3, learn="tensor"), steps=12), random_params(0), random_params(1)
    own = {key: torch.full_like(value, 1 + int(key.split("/")[0][4:])) for key, value in rule.learned(start).items()}
    for k, rate in ((0, 1), (1, 2), (2, 3), (10, 11), (11, 12), (12, 12), (40, 12)):
        moved, _ = rule.update(own, grads, {}, start, k)
        assert relative(moved, {name: start[name] - rate * grads[name] for name in start}) < 1e-14, f"step {k}"


def test_wrapped_rules_compose() -> None:
    """A clipped rule with rates per step, in a group, is what its parts do one after the other."""
    rule = Groups(("head.*", Clip(PerStep(SGD(0.3, learn="tensor"), 2), 0.5)), ("*", Proximal(Adam(0.05))))
    head, body = ("head.weight", "head.bias"), ("body.weight", "body.bias")
    together = walk(rule)
    assert furthest([{n: p[n] for n in head} for p in together], walk(Clip(SGD(0.3), 0.5), head)) == 0
    assert furthest([{n: p[n] for n in body} for p in together], walk(Proximal(Adam(0.05)), body)) == 0
    assert list(rule.learned(random_params(0))) == [f"head.*/step{k}/lr/{name}" for k in range(2) for name in head]


def test_a_pattern_that_matches_nothing_names_what_adapts() -> None:
    rule = Groups(("*norm*", Frozen()), ("*", SGD(0.1)))
    with pytest.raises(
        UserError, match=r"the rule pattern '\*norm\*' matches no parameter that adapts; these adapt: a\.w, b\.w$"
    ):
        rule.check(iter(["a.w", "b.w"]), 1)
    with pytest.raises(
        UserError, match=r"'\*norm\*' matches no parameter that adapts; these adapt: body\.weight, body\.bias, head"
    ):
        algorithms.maml(network(), rule=rule)
    with pytest.raises(UserError, match=r"'body\.\*' matches no .* these adapt: head\.weight, head\.bias$"):
        algorithms.anil(network(), rule=Clip(Groups(("head.*", SGD(0.1)), ("body.*", SGD(0.1)))))
    Groups(("a*", SGD(0.1)), ("*", SGD(0.1))).check(["a.w", "b.w"], 1)


@pytest.mark.parametrize("wrap", [lambda rule: rule, Clip, Proximal, lambda rule: Groups(("*bias", SGD(0.1)), ("*", rule))])
def test_more_rates_than_steps_are_refused_however_deep(wrap: Callable[[Rule], Rule]) -> None:
    for steps in (0, -1, 4):
        with pytest.raises(UserError, match=f"rates for {steps} steps, but the learner takes 3 inner steps; give at most one"):
            algorithms.maml(network(), rule=wrap(PerStep(SGD(0.1, learn="tensor"), steps)), inner_steps=3)
    for steps in (1, 2, 3):
        algorithms.maml(network(), rule=wrap(PerStep(SGD(0.1, learn="tensor"), steps)), inner_steps=3)
