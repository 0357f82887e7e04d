"""A learner is data: what adapts, from which start, by which rule, for how many steps, judged by which objective.

The inner loop exists once, here, as a path of fast weights after 0, 1, ..., K steps. Training differentiates through it,
evaluation walks it further, every method of the family reads it in its own way. All of this is written for one task; the
engine maps it over many.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils import _pytree as pytree

from toolkit.errors import UserError
from toolkit.metrics import accuracy
from toolkit.norms import Norms, check_policy
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


class Observed(NamedTuple):
    """What a forward pass of a model was seen to do."""

    random: bool
    batch_norm: bool


Start = Callable[["Learner", Meta, Batch], Params]
Objective = Callable[["Learner", Meta, Iterable[Params], Task], tuple[Tensor, Score]]


@dataclass(frozen=True, eq=False)
class Learner:
    """`loss(prediction, y)` and `metric(prediction, y)` give the mean over examples, a scalar.

    `adapts` selects, by parameter name, what the inner loop moves; everything else is shared by all tasks, never copied.
    Parameters with `requires_grad=False` are frozen: neither loop moves them. `batch_norm` is a policy of `toolkit.norms`.
    While `training`, modules such as dropout keep the mode in which the model came; otherwise all are in evaluation mode.

    The given model is never changed: the learner works on a copy of its modules that shares its weights. Raises UserError when
    `adapts`, or one of its patterns, matches no parameter.
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
    adapted_names: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"inner steps is {self.steps}; give 0 or more")
        check_policy(self.model, self.batch_norm)
        object.__setattr__(self, "adapted_names", select(self.model, self.adapts))
        model = copy_modules(self.model)
        if not self.training:
            model.eval()
        object.__setattr__(self, "model", model)

    def init(self) -> Meta:
        """The meta-parameters to start from: copies of the model's current weights, and the rule's initial ones."""
        params = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        return Meta(params, self.rule.learned(self.adapted(params)))

    def adapted(self, params: Params) -> Params:
        """The part of `params` that the inner loop moves."""
        return {name: params[name] for name in self.adapted_names}

    def predict(self, params: Params, x: Input, support_x: Input | None = None) -> Tensor:
        """The model's output for `x` under `params`; batch norm sees `support_x` first if its policy asks for it."""
        if support_x is None or self.batch_norm != "support":
            return self._call(params, x, Norms(self.batch_norm))
        count = pytree.tree_leaves(support_x)[0].shape[0]
        both = pytree.tree_map(lambda s, q: torch.cat([s, q]), support_x, x)
        return self._call(params, both, Norms(self.batch_norm, count))[count:]

    def _call(self, params: Params, x: Input, norms: Norms) -> Tensor:
        # Cloned, so that a module which updates a buffer cannot carry state from one task to the next.
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        inputs = ((), x) if isinstance(x, dict) else ((x,), {})
        with norms:
            return functional_call(self.model, {**buffers, **params}, *inputs)  # type: ignore[no-any-return]

    @torch.no_grad()
    def observe(self, x: Input) -> "Observed":
        """What one forward pass shows: whether it draws random numbers, and whether it uses batch norm."""
        norms = Norms(self.batch_norm)
        with torch.random.fork_rng():
            before = torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())
            self._call({}, x, norms)
            after = torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())
        return Observed(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), norms.used)

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


def select(model: nn.Module, adapts: Selection) -> tuple[str, ...]:
    """The names of the trained parameters that `adapts` selects; a tied parameter is selected by any of its names."""
    trained = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    chosen: set[int] = set()
    for pattern in adapts if isinstance(adapts, tuple) else (adapts,):
        found = {id(p) for name, p in trained if matches(name, pattern)}
        if not found:
            known = ", ".join(name for name, _ in trained)
            raise UserError(f"adapts={pattern!r} matches no trained parameter; the model has {known}")
        chosen |= found
    return tuple(name for name, p in model.named_parameters() if id(p) in chosen)


def copy_modules(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares the tensors of `model`. Swapping parameters in it leaves `model` alone."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
