"""A learner is data: what adapts, from which start, by which rule, for how many steps, judged by which objective.

The inner loop exists once, here, as a path of fast weights after 0, 1, ..., K steps. Training differentiates through it,
evaluation walks it further, every method of the family reads it in its own way. All of this is written for one task; the
engine maps it over many.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils import _pytree as pytree

from toolkit.errors import UserError
from toolkit.metrics import accuracy
from toolkit.modules import copy_modules, in_evaluation, places, reached, select, unchanged, without_head
from toolkit.norms import Norms, batch_norms, check_policy, tell_changed
from toolkit.outer import PLAIN, Outer
from toolkit.randomness import kept, states
from toolkit.task import Batch, Input, Padded, Task, minibatch
from toolkit.tree import Params, Selection, detach, under

if TYPE_CHECKING:
    from toolkit.rules import Rule

Loss = Callable[[Tensor, Tensor], Tensor]


class Meta(NamedTuple):
    """What the outer loop learns: the shared model's `params`, and what the parts of a learner have `learned`, such as rates.
    `stats` are the statistics of the batch-norm policy "per_step", empty until `calibrate` has measured them."""

    params: Params
    learned: Params
    stats: Params = {}  # noqa: RUF012 (never written to)


class Carry(NamedTuple):
    """One point of the path: `fast` weights and the rule's `state`."""

    fast: Params
    state: Params


class Score(NamedTuple):
    """Query loss and metric of one task, scalars (shape (tasks,) once mapped)."""

    loss: Tensor
    metric: Tensor


class Observed(NamedTuple):
    """What a forward pass was seen to do: draw random numbers, normalise by batches, attend by torch's function."""

    random: bool
    batch_norm: bool
    attention: bool


Start = Callable[["Learner", Meta, Batch], Params]
Inner = Callable[["Learner", Meta, Params, Batch, int], Tensor]
Objective = Callable[["Learner", Meta, Iterable[Params], Task], tuple[Tensor, Score]]


def support_loss(learner: "Learner", meta: Meta, fast: Params, support: Batch, k: int) -> Tensor:
    """The learner's loss on the support set: what the inner loop descends, unless a method learns a loss of its own."""
    return learner.loss(learner.predict(meta, fast, support.x, k=k), support.y)


@dataclass(frozen=True, eq=False)
class Learner:
    """`loss(prediction, y)` and `metric(prediction, y)` give the mean over examples, a scalar.

    `adapts` selects, by parameter name, what the inner loop moves; everything else is shared by all tasks, never copied; the
    empty tuple selects nothing. Parameters with `requires_grad=False` are frozen: neither loop moves them. `batch_norm` is a
    policy of `toolkit.norms`. While `training`, modules such as dropout keep the mode in which the model came; otherwise all
    are in evaluation mode.

    `inner`     what the inner loop descends: a function (learner, meta, fast, support, k) -> scalar for step k = 0, 1, ...
    `order`     the last so many inner steps are differentiated twice, the others once; None: all of them (exact), 0: none.
    `batch`     support examples per inner step, in turn; None: all of them.
    `head`      the name of the model's last linear layer, for the methods that treat it apart.
    `outer`     how the outer loop moves the meta-parameters; plain Adam by default.
    `phases`    ((fraction, changed fields), ...): from that fraction of the training on, until the next, it is by the learner
                with these fields; evaluation is always by the learner itself.
    `pretrain`  the learner to train in this one's place, on all classes at once; this one inherits its weights by name.

    A start, rule, inner loss or objective may have `learned(...)`, what the outer loop learns of it, and `check(...)`, which
    raises UserError when it does not fit the learner.

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
    inner: Inner = support_loss
    order: int | None = None
    batch: int | None = None
    head: str = "head"
    outer: Outer = PLAIN
    phases: tuple[tuple[float, Mapping[str, Any]], ...] = ()
    pretrain: "Learner | None" = None
    adapted_names: tuple[str, ...] = field(init=False, repr=False)
    headless: nn.Module | None = field(init=False, repr=False)
    seen: dict[Any, Any] = field(init=False, repr=False, default_factory=dict)  # what was found out once

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 0:
            raise UserError(f"inner steps is {self.steps!r}; give a whole number, 0 or more")
        if self.order is not None and not 0 <= self.order <= self.steps:
            raise UserError(
                f"the last {self.order} of {self.steps} inner steps cannot be of second order; give 0 to {self.steps}"
            )
        if self.batch is not None and self.batch < 1:
            raise UserError(f"{self.batch} support examples per inner step; give at least 1")
        check_policy(self.model, self.batch_norm)
        names = select(self.model, self.adapts)
        if self.batch_norm.startswith("per_step"):  # whose scale and shift of each step are learned, but do not adapt
            names = tuple(name for name in names if name not in self._norm_params())
        object.__setattr__(self, "adapted_names", names)
        model = copy_modules(self.model)
        object.__setattr__(self, "model", model if self.training else in_evaluation(model))
        object.__setattr__(self, "headless", without_head(model, self.head))
        self.rule.check(self.adapted_names, self.steps)
        for part in (self.start, self.inner, self.objective):
            getattr(part, "check", lambda learner: None)(self)

    def init(self) -> Meta:
        """The meta-parameters to start from: copies of the model's current weights, and what the parts learn."""
        params = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        learned = self.rule.learned(self.adapted(params))
        for part in (self.start, self.inner, self.objective):
            if own := getattr(part, "learned", None):
                learned |= own(self, params)
        if self.batch_norm.startswith("per_step"):
            for k in range(self.steps + 1):
                learned |= {f"norm{k}/{name}": params[name].clone() for name in self._norm_params() if name in params}
        return Meta(params, learned)

    def at(self, progress: float) -> "Learner":
        """The learner that trains after this fraction of all iterations, by its `phases`."""
        begun = [(first, i) for i, (first, _) in enumerate(self.phases) if first <= progress]
        return _phase(self, max(begun)[1]) if begun else self

    def inherit(self, meta: Meta) -> Meta:
        """This learner's meta-parameters with all weights of `meta` that have a parameter of the same name and shape here."""
        own = self.init()
        same = {n: p for n, p in meta.params.items() if n in own.params and p.shape == own.params[n].shape}
        device = next(iter(meta.params.values())).device
        return pytree.tree_map(lambda t: t.to(device), own._replace(params=own.params | same))  # type: ignore[no-any-return]

    def adapted(self, params: Params) -> Params:
        """The part of `params` that the inner loop moves."""
        return {name: params[name] for name in self.adapted_names}

    def predict(self, meta: Meta, fast: Params, x: Input, support_x: Input | None = None, k: int | None = None) -> Tensor:
        """The model's output for `x` at point `k` of the path (its last by default), where the fast weights are `fast`.

        `support_x` is given for a query set only: batch norm sees it first if its policy asks for it.
        """
        return self._run(self.model, meta, fast, x, support_x, self.steps if k is None else k)[0]

    def embed(self, meta: Meta, fast: Params, x: Input) -> Tensor:
        """What the head gets for `x`, shape (examples, features). Raises UserError when the model has no such head."""
        return reached(lambda: self._run(self.body(), meta, fast, x, None, 0), self.head)

    def body(self) -> nn.Module:
        """The model without its head. Raises UserError when the model has no layer of the head's name."""
        if self.headless is None:
            layers = ", ".join(name for name, module in self.model.named_modules() if isinstance(module, nn.Linear))
            raise UserError(f"head={self.head!r} names no layer of the model; its linear layers are {layers or 'none'}")
        return self.headless

    def observed(self, meta: Meta, fast: Params, x: Input, k: int) -> Params:
        """The statistics that the batch norms see in `x` at point `k`, named as in `Meta.stats`."""
        _, norms, buffers = self._run(self.model, meta, fast, x, None, k)
        stats: Params = {}
        for given, mean, variance in norms.seen:
            name = next(n for n, buffer in buffers.items() if buffer is given).removesuffix("running_mean")
            if f"point{k}/{name}running_mean" in stats:
                raise UserError(f"batch norm {name[:-1]!r} runs twice in a pass, with statistics of its own each time; use two")
            stats[f"point{k}/{name}running_mean"] = mean.flatten()
            stats[f"point{k}/{name}running_var"] = variance.flatten()
        return stats

    def _run(
        self, model: nn.Module, meta: Meta, fast: Params, x: Input, support_x: Input | None, k: int
    ) -> tuple[Tensor, Norms, Params]:
        params, policy, first = {**meta.params, **fast}, self.batch_norm, None
        names = self.seen.get(model) or self.seen.setdefault(model, places(model, self.model))
        # Cloned, so that a module which updates a buffer cannot carry state from one task to the next.
        buffers = {names[place]: buffer.clone() for place, buffer in model.named_buffers()}
        if policy.startswith("per_step"):
            k = min(k, self.steps)
            params |= under(f"norm{k}/", meta.learned)
            if policy == "per_step" and support_x is not None and not self.training:
                policy = "running"
                buffers |= self._statistics(meta, k)
        elif policy == "support" and support_x is not None:
            first = pytree.tree_leaves(support_x)[0].shape[0]
            x = pytree.tree_map(lambda s, q: torch.cat([s, q]), support_x, x)
        x, real = x if isinstance(x, Padded) else (x, None)
        inputs = ((), x) if isinstance(x, dict) else ((x,), {})
        with Norms(policy, first, real, pytree.tree_leaves(x)[0].shape[0]) as norms, unchanged(model):
            given = buffers | params
            own = {place: given[name] for place, name in names.items() if name in given}
            return functional_call(model, own, *inputs, tie_weights=False)[first:], norms, buffers

    def _statistics(self, meta: Meta, k: int) -> Params:
        if not meta.stats and batch_norms(self.model):
            raise UserError("batch norm 'per_step' has no statistics yet; evaluate with calibrate(learner, meta, sampler)")
        return under(f"point{k}/", meta.stats)

    def _norm_params(self) -> list[str]:
        return [f"{name}.{kind}" for name in batch_norms(self.model) for kind in ("weight", "bias")]

    @torch.no_grad()
    def observe(self, x: Input) -> "Observed":
        """What one forward pass shows."""
        with kept():
            before, meta = states(self.model), self.init()
            _, norms, buffers = self._run(self.model, meta, {}, x, None, 0)
            tell_changed(self.model, buffers, meta.params)
            return Observed(states(self.model) != before, bool(norms.seen), norms.attention)

    @property
    def metric_name(self) -> str:
        """What the metric is called in results: its function's name in words."""
        return getattr(self.metric, "__name__", type(self.metric).__name__).replace("_", " ")

    def begin(self, meta: Meta, support: Batch) -> Carry:
        """The path's first point, before any step."""
        fast = self.start(self, meta, support)
        return Carry(fast, self.rule.init(fast))

    def rehearse(self, task: Task) -> bool:
        """Whether it draws random numbers: walks one step and scores it, once, which also shows the errors that only data can.
        Raises UserError for a model that fails on such a task."""
        if "random" in self.seen:
            return bool(self.seen["random"])
        try:
            with torch.no_grad(), kept():
                before, meta = states(self.model), self.init()
                *_, fast = self.path(meta, task.support, min(self.steps, 1))
                seen = None if self.batch_norm == "per_step" else task.support.x  # whose statistics may be still to come
                prediction = self.predict(meta, fast, task.query.x, seen)
                _ = self.loss(prediction, task.query.y), self.metric(prediction, task.query.y)
                tell_changed(self.model, {}, meta.params)
                return bool(self.seen.setdefault("random", states(self.model) != before))
        except UserError:
            raise
        except Exception as error:  # whatever the model of a user raises
            said = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(
                f"{self.name} cannot take a step on these tasks with this model ({type(error).__name__}: {said}); `toolkit "
                "doctor --model NAME` looks for the cause, and --debug shows where it is"
            ) from error

    def step(self, meta: Meta, carry: Carry, support: Batch, k: int) -> Carry:
        """The next point of the path: step `k` = 0, 1, ... of the rule on the inner loss."""
        here, shared = carry.fast, meta
        if self.order is not None and k < self.steps - self.order:
            here, shared = detach(here), Meta(*map(detach, meta))
        part = minibatch(support, self.batch, k)
        grads = grad(lambda fast: self.inner(self, shared, fast, part, k))(here)
        return Carry(*self.rule.update(meta.learned, grads, carry.state, carry.fast, k))

    def path(self, meta: Meta, support: Batch, steps: int | None = None) -> Iterator[Params]:
        """The fast weights after 0, 1, ..., `steps` inner steps (the learner's own number by default). It is given the
        support set only: query labels cannot reach the inner loop."""
        carry = self.begin(meta, support)
        yield carry.fast
        for k in range(self.steps if steps is None else steps):
            carry = self.step(meta, carry, support, k)
            yield carry.fast

    def assess(self, meta: Meta, fast: Params, task: Task, k: int | None = None) -> Score:
        """Query loss and metric of one task with these fast weights, which are point `k` of the path (its last by default)."""
        prediction = self.predict(meta, fast, task.query.x, task.support.x, k)
        return Score(self.loss(prediction, task.query.y), self.metric(prediction, task.query.y))


@lru_cache(maxsize=8)
def _phase(learner: Learner, index: int) -> Learner:
    # With one phase, by which the check of a part knows that this is not all of the training.
    return replace(learner, **{"phases": ((0.0, {}),)} | dict(learner.phases[index][1]))
