"""What the outer loop minimises: functions (learner, meta, path, task) -> (scalar to differentiate, query score at the end).

`path` gives the fast weights after 0, 1, ..., K steps, in this order.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from toolkit.errors import UserError
from toolkit.learner import Learner, Meta, Score
from toolkit.task import Task
from toolkit.tree import Params


def last_step(learner: Learner, meta: Meta, path: Iterable[Params], task: Task) -> tuple[Tensor, Score]:
    """The query loss after the last step (Finn et al. 2017, equation 1)."""
    *_, fast = path
    score = learner.assess(meta, fast, task)
    return score.loss, score


@dataclass(frozen=True)
class EveryStep:
    """The query losses after steps 1..K, weighted (Antoniou et al. 2019, equation 4). `weights` has K entries."""

    weights: tuple[float, ...]

    def __call__(self, learner: Learner, meta: Meta, path: Iterable[Params], task: Task) -> tuple[Tensor, Score]:
        if learner.steps != len(self.weights) or not self.weights:
            raise UserError(f"{len(self.weights)} step weights for {learner.steps} inner steps; give one weight per step")
        scores = [learner.assess(meta, fast, task) for k, fast in enumerate(path) if k]
        value = sum((w * score.loss for w, score in zip(self.weights, scores, strict=True)), scores[0].loss * 0)
        return value, scores[-1]
