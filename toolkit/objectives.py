"""What the outer loop minimises: functions (learner, meta, path, task) -> (scalar to differentiate, query score at the end).

`path` gives the fast weights after 0, 1, ..., K steps, in this order. An objective whose derivative is not the plain one
(`reptile`, `Implicit`) still has the value of the query loss: it carries a gradient that it is handed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, vjp

from toolkit.errors import UserError
from toolkit.learner import Learner, Meta, Score
from toolkit.modules import listed
from toolkit.task import Task
from toolkit.tree import Params, detach, dot, tree_map


def last_step(learner: Learner, meta: Meta, path: Iterable[Params], task: Task) -> tuple[Tensor, Score]:
    """The query loss after the last step (Finn et al. 2017, equation 1)."""
    *_, fast = path
    score = learner.assess(meta, fast, task)
    return score.loss, score


@dataclass(frozen=True)
class EveryStep:
    """The query losses after steps 1..K, weighted (Antoniou et al. 2019, equation 4). `weights` has K entries of sum 1."""

    weights: tuple[float, ...]

    def check(self, learner: Learner) -> None:
        if learner.steps != len(self.weights) or not self.weights:
            raise UserError(f"{len(self.weights)} step weights for {learner.steps} inner steps; give one weight per step")
        if abs(sum(self.weights) - 1) > 1e-6:
            raise UserError(f"the step weights {self.weights} sum to {sum(self.weights):g}; make them sum to 1")

    def __call__(self, learner: Learner, meta: Meta, path: Iterable[Params], task: Task) -> tuple[Tensor, Score]:
        scores = [learner.assess(meta, fast, task, k) for k, fast in enumerate(path) if k]
        value = sum((w * score.loss for w, score in zip(self.weights, scores, strict=True)), scores[0].loss * 0)
        return value, scores[-1]


def annealed_weights(steps: int, progress: float) -> tuple[float, ...]:
    """Step weights that go from equal (`progress` 0) to nearly all on the last step (1): the others fall to 0.03 / K, the
    floor in the code of Antoniou et al. 2019 (section 4, "multi-step loss optimization")."""
    early = max((1 - progress) / steps, 0.03 / steps)
    return (early,) * (steps - 1) + (1 - (steps - 1) * early,)


def with_gradient(value: Tensor, params: Params, grads: Params) -> Tensor:
    """A scalar with the value of `value` and the gradient `grads` with respect to `params`."""
    return value.detach() + dot(tree_map(lambda p: p - p.detach(), params), detach(grads))


def reptile(learner: Learner, meta: Meta, path: Iterable[Params], task: Task) -> tuple[Tensor, Score]:
    """Start minus end of the path as the gradient (Nichol et al. 2018, section 3), so that descent moves the start towards the
    end. The query set only gives the score. Shared weights that do not adapt have no gradient."""
    points = list(path)
    score = learner.assess(meta, points[-1], task)
    return with_gradient(score.loss, points[0], tree_map(torch.sub, points[0], points[-1])), score


def _check_learns_nothing(learner: Learner, what: str) -> None:
    if learned := learner.rule.learned(learner.adapted(dict(learner.model.named_parameters()))):
        raise UserError(f"{what} does not reach what the rule would learn ({listed(learned)}); take a rule that learns nothing")


reptile.check = partial(_check_learns_nothing, what="Reptile's difference of weights")  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Implicit:
    """The gradient of the query loss at w*, the minimum of support loss + lam / 2 |w - w_0|^2, by the implicit function theorem
    (Rajeswaran et al. 2019, lemma 1): (I + H / lam)^-1 grad, H being the Hessian of the inner loss at the end of the path, by
    `cg_steps` of conjugate gradient. `damping` is added to lam in this system only (their code also adds to the identity).

    Shared weights that do not adapt get their exact share too: we differentiate the whole condition
    0 = grad inner(w) + lam (w - w_0), not only w_0 in it. Raises UserError for a path that is differentiated itself.
    """

    lam: float = 2.0
    cg_steps: int = 5
    damping: float = 0.0

    def __post_init__(self) -> None:
        if self.cg_steps < 1:
            raise UserError(f"{self.cg_steps} steps of conjugate gradient give no gradient; use cg_steps=1 or more")
        if not self.lam > 0 or self.damping < 0:
            raise UserError(f"lam is {self.lam} and damping {self.damping}; give lam > 0 and damping >= 0")

    def check(self, learner: Learner) -> None:
        if learner.order != 0:
            raise UserError(
                "an implicit gradient does not differentiate the path; use order=0 with it, which algorithms call 'first'"
            )
        _check_learns_nothing(learner, "an implicit gradient")

    def __call__(self, learner: Learner, meta: Meta, path: Iterable[Params], task: Task) -> tuple[Tensor, Score]:
        *_, end = path
        fast, lam = detach(end), self.lam + self.damping

        def condition(meta: Meta, fast: Params) -> Params:
            slope = grad(lambda w: learner.inner(learner, meta, w, task.support, learner.steps))(fast)
            start = learner.start(learner, meta, task.support)
            return {name: slope[name] + lam * (fast[name] - start[name]) for name in fast}

        score = learner.assess(meta, fast, task)
        constant = Meta(*map(detach, meta))
        right = grad(lambda w: learner.assess(constant, w, task).loss)(fast)
        # The condition's Jacobian H + lam I is symmetric, so pulling back through it multiplies by it; its graph is built once.
        _, product = vjp(lambda w: condition(constant, w), fast)  # type: ignore[misc]
        solution = detach(_solve(lambda v: product(v)[0], right, self.cg_steps))
        pull = dot(condition(meta, fast), solution)
        return score.loss - (pull - pull.detach()), score


def _solve(product: Callable[[Params], Params], right: Params, steps: int) -> Params:
    """Conjugate gradient (Hestenes & Stiefel 1952) from 0: x with product(x) = right, after `steps` steps or when solved."""
    x, residual = tree_map(torch.zeros_like, right), right
    direction, square = right, dot(right, right)
    for _ in range(steps):
        image = product(direction)
        rate = _ratio(square, dot(direction, image))
        x = tree_map(lambda a, b, rate=rate: a + rate * b, x, direction)
        residual = tree_map(lambda a, b, rate=rate: a - rate * b, residual, image)
        previous, square = square, dot(residual, residual)
        turn = _ratio(square, previous)
        direction = tree_map(lambda a, b, turn=turn: a + turn * b, residual, direction)
    return x


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0: the system is solved."""
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))
