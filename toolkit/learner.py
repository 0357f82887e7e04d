"""A learner is data: what adapts, from which start, by which rule, for how many steps, judged by which objective.

The inner loop exists once, here, as a path of fast weights after 0, 1, ..., K steps. Training differentiates through it,
evaluation walks it further, every method of the family reads it in its own way. All of this is written for one task; the
engine maps it over many.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils import _pytree as pytree

from toolkit.errors import UserError
from toolkit.metrics import accuracy
from toolkit.norms import Norms, check_policy, has_batch_norm
from toolkit.task import Batch, Input, Task
from toolkit.tree import Params, Selection, matches

if TYPE_CHECKING:
    from toolkit.rules import Rule

Loss = Callable[[Tensor, Tensor], Tensor]


class Meta(NamedTuple):
    """What the outer loop learns: the shared model's `params`, and what a rule has `learned`, such as rates."""

    params: Params
    learned: Params


class Carry(NamedTuple):
    """One point of the path: `fast` weights and the rule's `state`."""

    fast: Params
    state: Params


class Score(NamedTuple):
    """Query loss and metric of one task, scalars (shape (tasks,) once mapped)."""

    loss: Tensor
    metric: Tensor


Start = Callable[["Learner", Meta, Batch], Params]
Objective = Callable[["Learner", Meta, Iterable[Params], Task], tuple[Tensor, Score]]


@dataclass(frozen=True, eq=False)
class Learner:
    """`loss(prediction, y)` and `metric(prediction, y)` give the mean over examples, a scalar.

    `adapts` selects, by parameter name, what the inner loop moves; everything else is shared by all tasks, never copied.
    Parameters with `requires_grad=False` are frozen: neither loop moves them. `batch_norm` is a policy of
    `toolkit.norms`. `training` is the mode that the model's other modules see (dropout).

    The given model is never changed: the learner works on a copy of its modules that shares its weights.
    """

    model: nn.Module
    loss: Loss
    adapts: Selection
    start: Start
    rule: "Rule"
    steps: int
    objective: Objective
    metric: Loss = accuracy
    batch_norm: str = "batch"
    training: bool = True
    name: str = "learner"

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"inner steps is {self.steps}; give 0 or more")
        if not self.adapted_names:
            known = ", ".join(name for name, p in self.model.named_parameters() if p.requires_grad)
            raise UserError(f"adapts={self.adapts!r} matches no trained parameter; the model has {known}")
        check_policy(self.model, self.batch_norm)
        model = copy_modules(self.model)
        model.train(self.training)
        object.__setattr__(self, "model", model)

    def init(self) -> Meta:
        """The meta-parameters to start from: copies of the model's current weights, and the rule's initial ones."""
        params = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        return Meta(params, self.rule.learned(self.adapted(params)))

    def adapted(self, params: Params) -> Params:
        """The part of `params` that the inner loop moves."""
        return {name: params[name] for name in self.adapted_names}

    @cached_property
    def adapted_names(self) -> tuple[str, ...]:
        """The names of the parameters that the inner loop moves."""
        trained = (name for name, p in self.model.named_parameters() if p.requires_grad)
        return tuple(name for name in trained if matches(name, self.adapts))

    def predict(self, params: Params, x: Input, support_x: Input | None = None) -> Tensor:
        """The model's output for `x` under `params`; batch norm sees `support_x` first if its policy asks for it."""
        if support_x is None or not self._needs_support:
            return self._call(params, x, None)
        count = pytree.tree_leaves(support_x)[0].shape[0]
        return self._call(params, pytree.tree_map(lambda s, q: torch.cat([s, q]), support_x, x), count)[count:]

    def _call(self, params: Params, x: Input, support_count: int | None) -> Tensor:
        # Cloned, so that a module which updates a buffer cannot carry state from one task to the next.
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        inputs = ((), x) if isinstance(x, dict) else ((x,), {})
        with Norms(self.batch_norm, support_count):
            return functional_call(self.model, {**buffers, **params}, *inputs)  # type: ignore[no-any-return]

    @cached_property
    def _needs_support(self) -> bool:
        return self.batch_norm == "support" and has_batch_norm(self.model)

    @property
    def metric_name(self) -> str:
        """What the metric is called in results: its function's name in words."""
        return getattr(self.metric, "__name__", type(self.metric).__name__).replace("_", " ")

    def begin(self, meta: Meta, support: Batch) -> Carry:
        """The path's first point, before any step."""
        fast = self.start(self, meta, support)
        return Carry(fast, self.rule.init(fast))

    def step(self, meta: Meta, carry: Carry, support: Batch) -> Carry:
        """The next point of the path: one step of the rule on the support loss."""

        def support_loss(fast: Params) -> Tensor:
            return self.loss(self.predict({**meta.params, **fast}, support.x), support.y)

        grads = grad(support_loss)(carry.fast)
        return Carry(*self.rule.update(meta.learned, grads, carry.state, carry.fast))

    def path(self, meta: Meta, support: Batch, steps: int | None = None) -> Iterator[Params]:
        """The fast weights after 0, 1, ..., `steps` inner steps (the learner's own number by default). It is given the
        support set only: query labels cannot reach the inner loop."""
        carry = self.begin(meta, support)
        yield carry.fast
        for _ in range(self.steps if steps is None else steps):
            carry = self.step(meta, carry, support)
            yield carry.fast

    def assess(self, meta: Meta, fast: Params, task: Task) -> Score:
        """Query loss and metric of one task with these fast weights."""
        prediction = self.predict({**meta.params, **fast}, task.query.x, task.support.x)
        return Score(self.loss(prediction, task.query.y), self.metric(prediction, task.query.y))


def copy_modules(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares the tensors of `model`. Swapping parameters in it leaves `model` alone."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
