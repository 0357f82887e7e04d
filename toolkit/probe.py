"""Tools that look at functions of tensors from outside: what they raise, whether derivatives agree with differences."""

import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from toolkit.engine import gradient_function
from toolkit.learner import Learner, Meta
from toolkit.plan import Plan
from toolkit.randomness import kept
from toolkit.task import Task, count, take
from toolkit.tree import Params

TOLERANCE = 1e-5


def words(error: BaseException) -> str:
    """An error in one line: its kind and its first sentence."""
    first = re.split(r"(?<=[.?!]) ", " ".join(str(error).split()))[0]
    return f"{type(error).__name__}: {first[:200].rstrip('.')}".removesuffix(": ")


def failure(function: Callable[..., Any], *given: Any) -> str:
    """What a call raises, in one line; or else the operations that a vmap in it does one task after the other, if any."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            function(*given)
        except Exception as error:
            return words(error)
    return ", ".join(sorted({name for each in caught for name in re.findall(r"batching rule for ([\w:]+)", str(each.message))}))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Global random states, and warnings, as if nothing had happened."""
    with kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tensors(tree: Any) -> list[Tensor]:
    """The leaves that are tensors."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def finite(tree: Any) -> bool:
    """Whether all numbers in it are."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors(tree))


def total(tree: Any) -> Tensor:
    """A number that all floats in it have a share in, each another one."""
    floats = [t for t in tensors(tree) if t.is_floating_point()]
    waves = (torch.arange(1, t.numel() + 1, device=t.device).to(t.dtype).cos().view(t.shape) for t in floats)
    return sum(((t * (wave + t / 2)).sum() for t, wave in zip(floats, waves, strict=True)), torch.zeros(()))


def meta_slopes(learner: Learner, params: Params, tasks: Task, map: Literal["vmap", "loop"]) -> Params:
    """The engine's meta-gradient at these parameters, by vmap or by a loop."""
    torch.manual_seed(0)
    return gradient_function.__wrapped__(learner, Plan(map))(Meta(params, {}), tasks)[0].params  # type: ignore[no-any-return]


def meta_objective(learner: Learner, tasks: Task, params: Params) -> Tensor:
    """What that is the gradient of, by nothing of the engine's."""
    torch.manual_seed(0)
    meta, parts = Meta(params, {}), [take(tasks, i) for i in range(count(tasks))]
    return torch.stack([learner.objective(learner, meta, learner.path(meta, t.support), t)[0] for t in parts]).mean()


def mismatch(function: Callable[[Any], Tensor], slopes: Any, at: Any, tolerance: float = TOLERANCE) -> float:
    """How far the `slopes` of a function of a tree are from central differences, relative to their length, in the worst of
    three directions, along and across them.

    Of some distances the best counts: a meta-objective is a function of gradients, so it jumps where the model has kinks.
    """
    flat, spec = pytree.tree_flatten(at)
    given, generator, worst = pytree.tree_leaves(slopes), torch.Generator().manual_seed(2), 0.0
    size = _length(given)

    def moved(way: list[Tensor], h: float) -> float:
        return float(function(pytree.tree_unflatten([t + h * w for t, w in zip(flat, way, strict=True)], spec)))

    for sign in (1, -1, 0):
        noise = [torch.randn(t.shape, generator=generator).to(t) for t in flat]
        way = [n / _length(noise) + sign * g / (size or 1) for n, g in zip(noise, given, strict=True)]
        wanted, errors = sum(float((g * w).sum()) for g, w in zip(given, way, strict=True)), list[float]()
        for h in (1e-6, 1e-7, 1e-8, 1e-9):
            up, down = moved(way, h), moved(way, -h)
            found = (up - down) / (2 * h)
            errors.append(abs(found - wanted) / max(size, abs(found), 1e-3 * abs(up), 1e-12))
            if errors[-1] < tolerance:
                break
        worst = max(worst, min(errors))
    return worst


def _length(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))
