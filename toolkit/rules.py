"""Inner update rules: how fast weights move, given their gradient. Frozen dataclasses with pure methods.

Every rule has
    learned(fast) -> Params            what the outer loop may learn of it, e.g. rates; may be empty
    init(fast) -> Params               its state before the first step (float tensors only, so that it can be differentiated)
    update(learned, grads, state, fast, k) -> (fast, state)        step k = 0, 1, ...
    check(names, steps)                raises UserError when it does not fit these parameters or this number of steps
all differentiable, so the meta-gradient flows through momentum, Adam's moments and learned rates. Rules that wrap others
(`PerStep`, `Clip`, `Proximal`, `Groups`) compose freely. Names in `learned` and `state` are "<what>/<parameter name>".
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from toolkit.errors import UserError, unknown
from toolkit.tree import Params, matches, tree_map, under

LEARN = ("tensor", "weight")


class Rule(Protocol):
    """See the module text. `fast` and `grads` have the same names and shapes."""

    def learned(self, fast: Params) -> Params: ...
    def init(self, fast: Params) -> Params: ...
    def update(self, learned: Params, grads: Params, state: Params, fast: Params, k: int) -> tuple[Params, Params]: ...
    def check(self, names: Iterable[str], steps: int) -> None: ...


class _Plain:
    """A rule that has nothing to learn, keeps no state and fits everything, unless it says otherwise."""

    def learned(self, fast: Params) -> Params:
        return {}

    def init(self, fast: Params) -> Params:
        return {}

    def check(self, names: Iterable[str], steps: int) -> None:
        lr = getattr(self, "lr", 0.0)
        if not isinstance(lr, int | float) or not 0 <= lr < float("inf"):
            raise UserError(f"the inner rate is {lr!r}; give a number, 0 or more")


@dataclass(frozen=True)
class Frozen(_Plain):
    """Nothing moves: the path stays at its start."""

    def update(self, learned: Params, grads: Params, state: Params, fast: Params, k: int) -> tuple[Params, Params]:
        return fast, state


@dataclass(frozen=True)
class SGD(_Plain):
    """Gradient descent with momentum, the update of `torch.optim.SGD`: v <- m v + g; w <- w - lr v, or, with `nesterov`,
    w <- w - lr (g + m v).

    `learn` makes rates meta-parameters that start from `lr`: "tensor" one per tensor, "weight" one per weight (Meta-SGD, Li et
    al. 2017, equation 2). `PerStep` gives every step its own (Antoniou et al. 2019).
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    learn: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1 or (self.nesterov and not self.momentum):
            raise UserError(f"momentum is {self.momentum}; give 0 <= momentum < 1, and more than 0 for Nesterov")
        if self.learn not in (None, *LEARN):
            raise unknown("kind of learned rate", str(self.learn), LEARN)

    def learned(self, fast: Params) -> Params:
        shape = {"tensor": lambda tensor: (), "weight": lambda tensor: tensor.shape}.get(self.learn or "")
        return {f"lr/{name}": tensor.new_full(shape(tensor), self.lr) for name, tensor in fast.items()} if shape else {}

    def init(self, fast: Params) -> Params:
        return {f"velocity/{name}": torch.zeros_like(tensor) for name, tensor in fast.items()} if self.momentum else {}

    def update(self, learned: Params, grads: Params, state: Params, fast: Params, k: int) -> tuple[Params, Params]:
        direction = grads
        if self.momentum:
            velocity = {name: self.momentum * state[f"velocity/{name}"] + grad for name, grad in grads.items()}
            state = {f"velocity/{name}": tensor for name, tensor in velocity.items()}
            direction = tree_map(lambda g, v: g + self.momentum * v, grads, velocity) if self.nesterov else velocity
        try:
            rates = {name: learned[f"lr/{name}"] if self.learn else self.lr for name in fast}
        except KeyError as error:
            raise UserError(f"the meta-parameters have no learned rate {error}; make them with this learner's init()") from None
        return {name: tensor - rates[name] * direction[name] for name, tensor in fast.items()}, state


@dataclass(frozen=True)
class RMSprop(_Plain):
    """RMSprop (Tieleman & Hinton 2012), the update of `torch.optim.RMSprop`; safe at zero gradients, as `Adam` is."""

    lr: float
    alpha: float = 0.99
    eps: float = 1e-8

    def init(self, fast: Params) -> Params:
        return {f"second/{name}": torch.zeros_like(tensor) for name, tensor in fast.items()}

    def update(self, learned: Params, grads: Params, state: Params, fast: Params, k: int) -> tuple[Params, Params]:
        second = {name: self.alpha * state[f"second/{name}"] + (1 - self.alpha) * g.square() for name, g in grads.items()}
        moved = {name: fast[name] - self.lr * g / (_safe_sqrt(second[name]) + self.eps) for name, g in grads.items()}
        return moved, {f"second/{name}": tensor for name, tensor in second.items()}


@dataclass(frozen=True)
class Adam(_Plain):
    """Adam (Kingma & Ba 2015, algorithm 1), the update of `torch.optim.Adam`.

    Safe where a gradient is exactly 0, for example behind a dead ReLU: there the root of the second moment has no finite
    derivative, and the outer gradient would be NaN; we take that derivative as 0. The values are Adam's own.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def init(self, fast: Params) -> Params:
        first = {f"first/{name}": torch.zeros_like(tensor) for name, tensor in fast.items()}
        return first | {f"second/{name}": torch.zeros_like(tensor) for name, tensor in fast.items()}

    def update(self, learned: Params, grads: Params, state: Params, fast: Params, k: int) -> tuple[Params, Params]:
        (beta1, beta2), moved, new = self.betas, dict[str, Tensor](), dict[str, Tensor]()
        scale, correction = self.lr / (1 - beta1 ** (k + 1)), (1 - beta2 ** (k + 1)) ** 0.5
        for name, grad in grads.items():
            first = new[f"first/{name}"] = beta1 * state[f"first/{name}"] + (1 - beta1) * grad
            second = new[f"second/{name}"] = beta2 * state[f"second/{name}"] + (1 - beta2) * grad.square()
            moved[name] = fast[name] - scale * first / (_safe_sqrt(second) / correction + self.eps)
        return moved, {key: new[key] for key in state}


def _safe_sqrt(value: Tensor) -> Tensor:
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1).sqrt(), 0)


@dataclass(frozen=True)
class Wrapped:
    """A rule around another one, `rule`, to which it leaves all that it does not say itself."""

    rule: Rule

    def learned(self, fast: Params) -> Params:
        return self.rule.learned(fast)

    def init(self, fast: Params) -> Params:
        return self.rule.init(fast)

    def check(self, names: Iterable[str], steps: int) -> None:
        self.rule.check(names, steps)


@dataclass(frozen=True)
class Clip(Wrapped):
    """`rule` with the task's inner gradient scaled down to Euclidean length `norm` where it is longer. A scaled gradient is
    differentiated as such."""

    norm: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.norm < float("inf"):
            raise UserError(f"the inner gradient's longest length is {self.norm}; give a positive number")

    def update(self, learned: Params, grads: Params, state: Params, fast: Params, k: int) -> tuple[Params, Params]:
        length = _safe_sqrt(torch.stack([g.square().sum() for g in grads.values()]).sum())
        scale = self.norm / length.clamp(min=self.norm)
        return self.rule.update(learned, tree_map(lambda g: g * scale, grads), state, fast, k)


@dataclass(frozen=True)
class Proximal(Wrapped):
    """`rule` on the support loss plus lam / 2 |w - w_0|^2, w_0 being the path's start (Rajeswaran et al. 2019, equation 3)."""

    lam: float = 2.0

    def __post_init__(self) -> None:
        if isinstance(self.rule, Proximal):
            raise UserError("a proximal rule around another one has no meaning; give it once, with the sum of both lam")

    def init(self, fast: Params) -> Params:
        return self.rule.init(fast) | {f"anchor/{name}": tensor for name, tensor in fast.items()}

    def update(self, learned: Params, grads: Params, state: Params, fast: Params, k: int) -> tuple[Params, Params]:
        anchor = {f"anchor/{name}": state[f"anchor/{name}"] for name in fast}
        pulled = {name: grad + self.lam * (fast[name] - anchor[f"anchor/{name}"]) for name, grad in grads.items()}
        own = {key: tensor for key, tensor in state.items() if key not in anchor}
        fast, new = self.rule.update(learned, pulled, own, fast, k)
        return fast, new | anchor


@dataclass(frozen=True)
class PerStep(Wrapped):
    """`rule` with learned values of its own for each of `steps` steps (Antoniou et al. 2019, section 4: "LSLR"); later steps
    use the last ones. Raises UserError for more steps than the learner takes."""

    steps: int = 1

    def learned(self, fast: Params) -> Params:
        return {f"step{k}/{key}": value for k in range(self.steps) for key, value in self.rule.learned(fast).items()}

    def update(self, learned: Params, grads: Params, state: Params, fast: Params, k: int) -> tuple[Params, Params]:
        return self.rule.update(under(f"step{min(k, self.steps - 1)}/", learned), grads, state, fast, k)

    def check(self, names: Iterable[str], steps: int) -> None:
        if not 0 < self.steps <= max(steps, 1):
            raise UserError(
                f"rates for {self.steps} steps, but the learner takes {steps} inner steps; give at most one per step"
            )
        self.rule.check(names, steps)


@dataclass(frozen=True)
class Groups:
    """A rule per group of parameters: (glob pattern, rule) pairs, of which the first that matches a name applies.

        Groups(("*bias", SGD(0.1)), ("head.*", SGD(0.4, learn="tensor")), ("*", Adam(1e-3)))

    Raises UserError when a fast weight matches no pattern, and `check` when a pattern matches no fast weight.
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

    def update(self, learned: Params, grads: Params, state: Params, fast: Params, k: int) -> tuple[Params, Params]:
        moved: Params = {}
        new: Params = {}
        for pattern, rule, group in self._split(fast):
            own_grads = {name: grads[name] for name in group}
            group, own_state = rule.update(under(f"{pattern}/", learned), own_grads, under(f"{pattern}/", state), group, k)
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

    def check(self, names: Iterable[str], steps: int) -> None:
        names = list(names)
        patterns = [pattern for pattern, _ in self.rules]
        for pattern in patterns:
            if not any(matches(name, pattern) for name in names):
                raise UserError(
                    f"the rule pattern {pattern!r} matches no parameter that adapts; these adapt: {', '.join(names)}"
                )
        if after := patterns[[*patterns, "*"].index("*") + 1 :]:
            raise UserError(f"the rule pattern {after[0]!r} never applies, since '*' before it matches all; put it before '*'")
        for _, rule, group in self._split(dict.fromkeys(names, torch.empty(0))):
            rule.check(group, steps)
