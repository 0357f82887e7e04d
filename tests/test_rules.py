"""The inner update rules against torch.optim, alone, wrapped and in groups."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from toolkit import UserError
from toolkit.rules import SGD, Adam, FirstOrder, Groups, Rule
from toolkit.tree import Params

STEPS = 5
SHAPES = {"body.weight": (4, 3), "body.bias": (4,), "head.weight": (2, 4), "head.bias": (2,)}
RULES: dict[str, Rule] = {
    "sgd": SGD(0.3),
    "momentum": SGD(0.2, momentum=0.8),
    "nesterov": SGD(0.2, momentum=0.8, nesterov=True),
    "adam": Adam(0.05),
    "adam of other constants": Adam(0.3, betas=(0.5, 0.7), eps=1e-2),
}
Optimizers = dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]]
OPTIMIZERS: Optimizers = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.8),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.8, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adam of other constants": lambda p: torch.optim.Adam(p, lr=0.3, betas=(0.5, 0.7), eps=1e-2),
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
        fast, state = rule.update(learned, random_params(1 + step, names), state, fast)
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
    moved, new = RULES[rule].update({}, grads, state, fast)
    for before, after in zip(kept, (fast, grads, state), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(tensor.dtype == torch.float32 for tensor in moved.values())
    assert {name: (t.shape, t.dtype) for name, t in new.items()} == {name: (t.shape, t.dtype) for name, t in state.items()}


def test_state_holds_only_what_the_rule_needs() -> None:
    fast = random_params(0)
    assert SGD(0.3).init(fast) == {}
    assert list(SGD(0.3, momentum=0.5).init(fast)) == [f"velocity/{name}" for name in fast]
    assert all(tensor.is_floating_point() for tensor in Adam(0.1).init(fast).values())
    assert all(rule.learned(fast) == {} for rule in RULES.values())


GROUPED = Groups(("*bias", SGD(0.1, momentum=0.5)), ("head.*", SGD(0.4, learn=True)), ("*", Adam(0.05)))
ALONE = {
    "body.weight": Adam(0.05),
    "body.bias": SGD(0.1, momentum=0.5),
    "head.weight": SGD(0.4, learn=True),
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
    for call in (rule.init, rule.learned, lambda fast: rule.update({}, fast, {}, fast)):
        with pytest.raises(UserError, match=r"'body\.weight'.*'head\.\*', '\*bias'"):
            call(random_params(0))


@pytest.mark.parametrize("rule", [*RULES, "groups"])
def test_first_order_passes_values_unchanged_and_cuts_the_gradient(rule: str) -> None:
    inner = GROUPED if rule == "groups" else RULES[rule]
    assert furthest(walk(FirstOrder(inner)), walk(inner)) == 0
    for wrapped, passes in ((inner, True), (FirstOrder(inner), False)):
        start = {name: tensor.requires_grad_() for name, tensor in random_params(0).items()}
        slope = {name: tensor.requires_grad_() for name, tensor in random_params(1).items()}
        moved, state = wrapped.update(wrapped.learned(start), slope, wrapped.init(start), start)
        total = torch.stack([tensor.sum() for tensor in (*moved.values(), *state.values()) if tensor.requires_grad]).sum()
        through = torch.autograd.grad(total, list(slope.values()), retain_graph=True, allow_unused=True)
        assert all((g is not None and bool((g != 0).any())) == passes for g in through)
        kept = torch.autograd.grad(total, list(start.values()))
        assert all(torch.equal(g, torch.ones_like(g)) for g in kept), "the weights themselves stay in the graph"


def test_first_order_still_learns_rates() -> None:
    rule = FirstOrder(SGD(0.3, learn=True))
    fast, grads = random_params(0), random_params(1)
    learned = {name: rate.requires_grad_() for name, rate in rule.learned(fast).items()}
    moved, _ = rule.update(learned, grads, {}, fast)
    slopes = torch.autograd.grad(sum(tensor.sum() for tensor in moved.values()), list(learned.values()))
    for slope, grad in zip(slopes, grads.values(), strict=True):
        assert torch.allclose(slope, -grad.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_learned_rates_start_at_lr_and_are_used(momentum: float) -> None:
    rule = SGD(0.3, momentum=momentum, learn=True)
    learned = rule.learned(random_params(0))
    assert list(learned) == [f"lr/{name}" for name in SHAPES]
    assert all(rate.shape == () and rate.dtype == torch.float64 and rate == 0.3 for rate in learned.values())
    assert furthest(walk(rule), walk(SGD(0.3, momentum=momentum))) < 1e-15
    rates = {name: 0.1 * (1 + i) for i, name in enumerate(SHAPES)}
    path = walk(rule, learned={f"lr/{name}": torch.tensor(lr, dtype=torch.float64) for name, lr in rates.items()})
    for name, lr in rates.items():
        assert furthest([{name: p[name]} for p in path], walk(SGD(lr, momentum=momentum), (name,))) < 1e-15


def test_learned_rates_of_groups_reach_their_own_rule_only() -> None:
    rule = Groups(("head.*", SGD(0.4, learn=True)), ("*", SGD(0.2, learn=True)))
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


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(UserError, match="more than 0 for Nesterov"):
        SGD(0.1, nesterov=True)
