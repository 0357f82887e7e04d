"""Inner update rules: how fast weights move, given their gradient. Frozen dataclasses with pure methods.

Every rule has
    learned(fast) -> Params            what the outer loop may learn of it, e.g. rates; may be empty
    init(fast) -> Params               its state before the first step (float tensors only, so that it can be differentiated)
    update(learned, grads, state, fast) -> (fast, state)
all differentiable, so the meta-gradient flows through momentum, Adam's moments and learned rates. Rules that wrap others
(`FirstOrder`, `Groups`) compose freely. Names in `learned` and `state` are "<what>/<parameter name>".
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.tree import Params, detach, matches, tree_map


class Rule(Protocol):
    """See the module text. `fast` and `grads` have the same names and shapes."""

    def learned(self, fast: Params) -> Params: ...
    def init(self, fast: Params) -> Params: ...
    def update(self, learned: Params, grads: Params, state: Params, fast: Params) -> tuple[Params, Params]: ...


@dataclass(frozen=True)
class SGD:
    """Gradient descent with momentum, the update of `torch.optim.SGD`: v <- m v + g; w <- w - lr v, or, with `nesterov`,
    w <- w - lr (g + m v).

    `learn` makes one rate per tensor a meta-parameter, starting from `lr` (Antoniou et al. 2019 learn one per tensor and
    step; here the steps share it).
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    learn: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1 or (self.nesterov and not self.momentum):
            raise UserError(f"momentum is {self.momentum}; give 0 <= momentum < 1, and more than 0 for Nesterov")

    def learned(self, fast: Params) -> Params:
        return {f"lr/{name}": tensor.new_full((), self.lr) for name, tensor in fast.items()} if self.learn else {}

    def init(self, fast: Params) -> Params:
        return {f"velocity/{name}": torch.zeros_like(tensor) for name, tensor in fast.items()} if self.momentum else {}

    def update(self, learned: Params, grads: Params, state: Params, fast: Params) -> tuple[Params, Params]:
        direction = grads
        if self.momentum:
            velocity = {name: self.momentum * state[f"velocity/{name}"] + grad for name, grad in grads.items()}
            state = {f"velocity/{name}": tensor for name, tensor in velocity.items()}
            direction = tree_map(lambda g, v: g + self.momentum * v, grads, velocity) if self.nesterov else velocity
        rates = {name: learned.get(f"lr/{name}", self.lr) for name in fast}
        return {name: tensor - rates[name] * direction[name] for name, tensor in fast.items()}, state


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015, algorithm 1), the update of `torch.optim.Adam`.

    Safe where a gradient is exactly 0, for example behind a dead ReLU: there the root of the second moment has no finite
    derivative, and the outer gradient would be NaN; we take that derivative as 0. The values are Adam's own.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def learned(self, fast: Params) -> Params:
        return {}

    def init(self, fast: Params) -> Params:
        first = {f"first/{name}": torch.zeros_like(tensor) for name, tensor in fast.items()}
        second = {f"second/{name}": torch.zeros_like(tensor) for name, tensor in fast.items()}
        # A float64 tensor, not an int: a float32 power of beta is too coarse, and a state of tensors alone can be mapped.
        return first | second | {"step": torch.zeros((), dtype=torch.float64, device=next(iter(fast.values())).device)}

    def update(self, learned: Params, grads: Params, state: Params, fast: Params) -> tuple[Params, Params]:
        beta1, beta2 = self.betas
        step = state["step"] + 1
        moved, new = {}, {"step": step}
        for name, grad in grads.items():
            first = new[f"first/{name}"] = beta1 * state[f"first/{name}"] + (1 - beta1) * grad
            second = new[f"second/{name}"] = beta2 * state[f"second/{name}"] + (1 - beta2) * grad.square()
            scale = (self.lr / (1 - beta1**step)).to(grad.dtype)
            root = _safe_sqrt(second) / (1 - beta2**step).sqrt().to(grad.dtype)
            moved[name] = fast[name] - scale * first / (root + self.eps)
        return moved, new


def _safe_sqrt(value: Tensor) -> Tensor:
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1).sqrt(), 0)


@dataclass(frozen=True)
class FirstOrder:
    """`rule` with the inner gradient taken as a constant: the meta-gradient ignores second derivatives (FOMAML, Finn et al.
    2017, section 5.2)."""

    rule: Rule

    def learned(self, fast: Params) -> Params:
        return self.rule.learned(fast)

    def init(self, fast: Params) -> Params:
        return self.rule.init(fast)

    def update(self, learned: Params, grads: Params, state: Params, fast: Params) -> tuple[Params, Params]:
        return self.rule.update(learned, detach(grads), state, fast)


@dataclass(frozen=True)
class Groups:
    """A rule per group of parameters: (glob pattern, rule) pairs, of which the first that matches a name applies.

        Groups(("*bias", SGD(0.1)), ("head.*", SGD(0.4, learn=True)), ("*", Adam(1e-3)))

    Raises UserError when a fast weight matches no pattern.
    """

    rules: tuple[tuple[str, Rule], ...] = field(default=())

    def __init__(self, *rules: tuple[str, Rule]) -> None:
        object.__setattr__(self, "rules", rules)

    def learned(self, fast: Params) -> Params:
        return {
            f"{pattern}/{key}": tensor
            for pattern, rule, group in self._split(fast)
            for key, tensor in rule.learned(group).items()
        }

    def init(self, fast: Params) -> Params:
        return {
            f"{pattern}/{key}": tensor for pattern, rule, group in self._split(fast) for key, tensor in rule.init(group).items()
        }

    def update(self, learned: Params, grads: Params, state: Params, fast: Params) -> tuple[Params, Params]:
        moved: Params = {}
        new: Params = {}
        for pattern, rule, group in self._split(fast):
            own_grads = {name: grads[name] for name in group}
            group, own_state = rule.update(_under(pattern, learned), own_grads, _under(pattern, state), group)
            moved |= group
            new |= {f"{pattern}/{key}": tensor for key, tensor in own_state.items()}
        return {name: moved[name] for name in fast}, new

    def _split(self, fast: Params) -> list[tuple[str, Rule, Params]]:
        groups: dict[int, Params] = {}
        for name, tensor in fast.items():
            index = next((i for i, (pattern, _) in enumerate(self.rules) if matches(name, pattern)), None)
            if index is None:
                patterns = ", ".join(repr(pattern) for pattern, _ in self.rules)
                raise UserError(f"no rule for parameter {name!r} among the patterns {patterns}; add one, for example '*'")
            groups.setdefault(index, {})[name] = tensor
        return [(*self.rules[index], group) for index, group in sorted(groups.items())]


def _under(prefix: str, tree: Params) -> Params:
    return {key.removeprefix(f"{prefix}/"): value for key, value in tree.items() if key.startswith(f"{prefix}/")}
