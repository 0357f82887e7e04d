"""The part of a model before the first adapting layer gives the same features at every inner step: it runs once per task.

`shortened` makes of a learner one whose path walks on `features` of a task's inputs. The meta-gradient
then goes back through the front once too, with the sum of what all steps send.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from math import inf, isnan, nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from toolkit.learner import Carry, Learner, Meta
from toolkit.modules import cut, without_head
from toolkit.objectives import last_step
from toolkit.randomness import kept
from toolkit.rules import Frozen
from toolkit.starts import inherited
from toolkit.task import Batch, Input, Padded, Task, take
from toolkit.tree import Params, tree_map

Features = tuple[Tensor, Tensor]
# How far apart two results that are the same may be, by their length: in float64; in less; in less where there is no float64.
SAME, NEAR, ROUNDED = 1e-8, 1e-5, 1e-2


@dataclass(frozen=True, eq=False)
class Shortened(Learner):
    """A learner for tasks whose inputs are features: `front` makes them from the inputs, `back` is the rest of the model. All
    else, names of parameters too, is that of the learner of the whole model."""

    front: nn.Module = field(init=False, repr=False)
    back: nn.Module = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = _parts(self)
        assert parts is not None, "shortened makes no such learner of a model without a front"
        for name, part in zip(("front", "back"), parts, strict=True):
            object.__setattr__(self, name, part)
        object.__setattr__(self, "headless", without_head(self.back, self.head))

    def features(self, meta: Meta, task: Task) -> Features:
        """What the front makes of the support and of the query inputs of one task; differentiable in `meta`."""
        (support, _), (query, _) = task
        return tuple(self._run(self.front, meta, {}, *x, 0)[0] for x in ((support, None), (query, support)))  # type: ignore

    def predict(self, meta: Meta, fast: Params, x: Input, support_x: Input | None = None, k: int | None = None) -> Tensor:
        return self._run(self.back, meta, fast, x, support_x, self.steps if k is None else k)[0]

    def rehearse(self, task: Task) -> bool:
        with torch.no_grad():
            shown = self.features(self.init(), task)
        return super().rehearse(with_features(task, shown))

    def step(self, meta: Meta, carry: Carry, support: Batch, k: int) -> Carry:
        # A step of first order takes the shared weights for constants, so also what they made of the inputs.
        if self.order is not None and k < self.steps - self.order:
            support = pytree.tree_map(torch.Tensor.detach, support)
        return super().step(meta, carry, support, k)


def features(learner: Learner, meta: Meta, task: Task) -> Features | tuple[()]:
    """What the front of a `Shortened` learner makes of one task's inputs; nothing for another learner."""
    return learner.features(meta, task) if isinstance(learner, Shortened) else ()


def with_features(task: Task, features: Features | tuple[()]) -> Task:
    """A task, or a batch of tasks, with its `features` in place of its inputs, if there are any; filling stays filling."""
    if not features:
        return task
    return Task(*(batch._replace(x=_filled(batch.x, x)) for batch, x in zip(task, features, strict=True)))


def _filled(x: Input, features: Tensor) -> Input:
    return Padded(features, x.real) if isinstance(x, Padded) else features


def in_double(function: Callable[..., Any], own: Learner, meta: Meta, piece: Task) -> Any:
    """`function(own, meta, piece)` in float64; None when the model cannot run so (a cast in it, a device without float64)."""

    def double(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    learner = replace(own, model=copy.deepcopy(own.model).double())
    try:
        return function(learner, pytree.tree_map(double, meta), pytree.tree_map(double, piece))
    except (RuntimeError, TypeError):
        return None


def shortened(learner: Learner, meta: Meta, one: Task, steps: int, work: Callable[[Learner, Meta, Task], Any]) -> Learner:
    """The learner that runs the front of the model once per task, where that is possible and the same; else `learner`.

    Not the same are a front that treats steps or minibatches apart (`_parts` cuts before such layers) or draws random numbers,
    and a start, rule, inner loss or objective that does more with inputs than to hand them to the learner. That cannot be
    read off a function, so both learners do the `work` to come, say the gradient of `one`, a batch of one task, and must agree;
    `work` returns trees, each compared as a whole. The weights for that are `meta` with noise, so that what starts at 0 counts.
    What rounding may explain is done again in float64.
    """
    task = take(one, 0)
    if not steps or type(learner) is not Learner or isinstance(task.support.x, dict) or _parts(learner) is None:
        return learner
    own = Shortened(**{f.name: getattr(learner, f.name) for f in fields(learner) if f.init})
    front = Learner(
        own.front, own.loss, (), inherited, Frozen(), 0, last_step, batch_norm=own.batch_norm, training=own.training
    )
    seen = front.observe(task.support.x)
    if seen.random or (seen.batch_norm and not _steady(learner)):
        return learner
    meta = _stirred(meta)

    def off(double: bool) -> float:
        """How far apart the results of the two are, by their length; NaN where there is no result in float64."""
        found = []
        for each in (learner, own):
            with kept():
                found.append(in_double(work, each, meta, one) if double else work(each, meta, one))
        return nan if None in found else max(map(_distance, *found), default=0.0)

    try:
        rounded = off(False)
        wide = all(tensor.dtype == torch.float64 for tensor in meta.params.values())
        exact = 0.0 if rounded <= (SAME if wide else NEAR) else off(True)
    except Exception:  # a part that stumbles over features, or a run whose own error is to come
        return learner
    return own if exact <= SAME or (isnan(exact) and rounded <= ROUNDED) else learner


def _parts(learner: Learner) -> tuple[nn.Module, nn.Module] | None:
    """The learner's model, cut before what adapts and what may differ from step to step."""

    def blocked(layer: nn.Module) -> bool:
        return any(
            (isinstance(m, _DropoutNd) and m.training and m.p > 0) or (isinstance(m, _BatchNorm) and not _steady(learner))
            for m in layer.modules()
        )

    return cut(learner.model, learner.adapted_names, blocked)


def _steady(learner: Learner) -> bool:
    """Whether batch norm does the same at every step."""
    return learner.batch_norm == "running" or (learner.batch is None and not learner.batch_norm.startswith("per_step"))


def _stirred(meta: Meta) -> Meta:
    generator = torch.Generator().manual_seed(0)

    def stir(tensor: Tensor) -> Tensor:
        size = tensor.square().mean().sqrt()
        return tensor + 0.1 * torch.where(size > 0, size, 1) * torch.randn(tensor.shape, generator=generator).to(tensor)

    return Meta(tree_map(stir, meta.params), tree_map(stir, meta.learned), meta.stats)


def _distance(a: Any, b: Any) -> float:
    ours, theirs = (torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)] or [torch.zeros(1)]) for tree in (a, b))
    if not torch.equal(ours.isnan(), theirs.isnan()):  # a loss that is NaN is so by either way
        return inf
    gap, length = float((ours.nan_to_num() - theirs.nan_to_num()).norm()), float(theirs.nan_to_num().norm())
    return gap / length if gap else 0.0
