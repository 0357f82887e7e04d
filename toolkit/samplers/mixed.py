"""Several samplers mixed: every task comes from one of them (several datasets in one training, as in Meta-Dataset)."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from toolkit import plugins
from toolkit.data.bank import ClassBank
from toolkit.errors import UserError, unknown
from toolkit.samplers.episodes import Episodes
from toolkit.task import Task, TaskSampler, draw, stack

LOOKED_AT = 8  # tasks of each sampler, to see what they are like


@dataclass(frozen=True)
class Mixed:
    """Each task comes from one of `samplers`, drawn with probabilities proportional to `weights` (equal ones by default).

    `outputs` is the largest number of classes: what the samplers say it is, or the most that was seen in some tasks of each
    that does not say; None for float targets. All samplers must make tasks of the same shapes and dtypes, so that tasks can
    be batched: the same ways, shots and queries, and images of one size and number of channels.

    Source: Triantafillou et al. 2020 (Meta-Dataset), section 3.2, where each episode first takes a dataset uniformly.
    Raises UserError, when it is made, for weights that do not fit and for samplers whose tasks differ.
    """

    samplers: Sequence[TaskSampler]
    weights: Sequence[float] | None = None
    outputs: int | None = field(init=False)

    def __post_init__(self) -> None:
        samplers = tuple(self.samplers)
        if not samplers:
            raise UserError("no samplers were given to mix; give at least one")
        for i, sampler in enumerate(samplers):
            if isinstance(sampler, type) or not callable(sampler):
                what = sampler.__name__ if isinstance(sampler, type) else type(sampler).__name__
                raise UserError(f"sampler {i} of the mixture is {what}, which draws no tasks; give an instance, {what}(...)")
        weights = tuple(1.0 for _ in samplers) if self.weights is None else tuple(self.weights)
        if len(weights) != len(samplers):
            raise UserError(f"{len(weights)} weights were given for {len(samplers)} samplers; give one for each")
        if bad := [w for w in weights if isinstance(w, str) or not (0 < w < math.inf)]:
            raise UserError(f"the weight {bad[0]!r} of the mixture is not a positive number; leave out a sampler of no weight")
        looks = [draw(sampler, LOOKED_AT, seed=0, split="look") for sampler in samplers]
        for i in range(1, len(samplers)):
            _check_alike(samplers, looks, i)
        known = [getattr(sampler, "outputs", None) or _classes(look) for sampler, look in zip(samplers, looks, strict=True)]
        object.__setattr__(self, "samplers", samplers)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "outputs", max((k for k in known if k is not None), default=None))

    def __call__(self, generator: torch.Generator) -> Task:
        return self.samplers[self._pick(generator)](generator)

    def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
        """One task per generator, stacked; equal to calling the sampler on each."""
        given = [(generator, self._pick(generator), generator.clone_state()) for generator in generators]
        drawn = [(i, clone) for _, i, clone in given]
        groups = {i: [place for place, (j, _) in enumerate(drawn) if j == i] for i in {i for i, _ in drawn}}
        parts = [together(self.samplers[i], [drawn[place][1] for place in places]) for i, places in groups.items()]
        for generator, _, clone in given:
            generator.set_state(clone.get_state())
        rows = [torch.tensor(places) for places in groups.values()]

        def join(*tensors: Tensor) -> Tensor:
            joined = tensors[0].new_empty(len(drawn), *tensors[0].shape[1:])
            for index, tensor in zip(rows, tensors, strict=True):
                joined.index_copy_(0, index.to(joined.device), tensor)
            return joined

        try:
            tasks: Task = pytree.tree_map(join, *parts) if len(parts) > 1 else parts[0]
            return tasks
        except (RuntimeError, ValueError) as error:
            names = ", ".join(_name(self.samplers, i) for i in sorted(groups))
            raise UserError(
                f"tasks of the mixed samplers ({names}) differ in shape and cannot be batched ({error}); "
                "give all the same ways, shots and queries"
            ) from None

    def _pick(self, generator: torch.Generator) -> int:
        """The number of the sampler that the next task comes from."""
        ends = list(accumulate(self.weights or ()))
        noise = torch.rand((), generator=generator, dtype=torch.float64).item()
        return min(bisect_right(ends, noise * ends[-1]), len(ends) - 1)


def together(sampler: TaskSampler, generators: Iterable[torch.Generator]) -> Task:
    """One task of `sampler` per generator, stacked, in one go where the sampler can.

    The generators must be objects of their own; each is left where its task ends, so a sampler that clones those it is given
    must set them to where its clones end. Raises UserError for tasks of unequal shapes.
    """
    many = getattr(sampler, "draw_many", None)
    if many is not None:
        batch: Task = many(iter(generators))
        return batch
    tasks = [sampler(generator) for generator in generators]
    try:
        return stack(tasks)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the tasks of {type(sampler).__name__} differ in shape and cannot be stacked ({error}); "
            "give every task the same ways, shots and queries"
        ) from None


def mixed(
    split: str,
    data_root: str | Path = "data",
    download: bool = False,
    ways: int | None = None,
    shots: int | None = None,
    queries: int | None = None,
    of: str = "omniglot-vinyals,glyphs",
    weights: str = "",
) -> Mixed:
    """Tasks from several datasets or samplers, `of` (names with commas), by `weights` (numbers with commas, equal by default).

    A dataset gives episodes. Raises UserError for unknown names, weights that are no numbers, and whatever `Mixed` refuses.
    """
    sizes = {key: n for key, n in (("ways", ways), ("shots", shots), ("queries", queries)) if n is not None}
    given = {"split": split, "data_root": data_root, "download": download} | sizes
    samplers = [_made(name.strip(), given, sizes) for name in of.split(",")]
    try:
        numbers = [float(weight) for weight in weights.split(",")] if weights.strip() else None
    except ValueError:
        raise UserError(f"weights {weights!r} of the mixture are not numbers with commas between them, such as 2,1") from None
    return Mixed(samplers, numbers)


def _made(name: str, given: dict[str, Any], sizes: dict[str, int]) -> TaskSampler:
    kinds = [kind for kind in ("datasets", "samplers") if name in plugins.names(kind)]
    if not kinds and ":" not in name:
        raise unknown("dataset or sampler", name, [*plugins.names("datasets"), *plugins.names("samplers")])
    target = plugins.resolve(name, kinds[0] if kinds else None)
    if not isinstance(target, type) and "generator" in plugins.takes(target):
        taken = {key: given[key] for key in plugins.takes(target) if key in given}
        return partial(target, **taken) if taken else target
    made = plugins.call(target, given, {}, f"{name} of the mixture")
    return Episodes(made, **sizes) if isinstance(made, ClassBank) else made


def _classes(look: Task) -> int | None:
    y = look.support.y
    return None if y.is_floating_point() else int(y.max()) + 1


def _check_alike(samplers: Sequence[TaskSampler], looks: list[Task], i: int) -> None:
    first, other = _layout(looks[0]), _layout(looks[i])
    for part in first | other:
        if first.get(part) != other.get(part):
            raise UserError(
                f"the samplers of a mixture must make tasks of the same shapes, but {part} of {_name(samplers, 0)} is "
                f"{first.get(part, 'missing')} and of {_name(samplers, i)} {other.get(part, 'missing')}; give both the same "
                "ways, shots, queries and size of images, or train on one of them"
            )


def _layout(tasks: Task) -> dict[str, str]:
    """What each tensor of one task is like, by where it stands in the task."""
    leaves: list[tuple[Any, Tensor]] = pytree.tree_flatten_with_path(tasks)[0]
    return {pytree.keystr(path)[1:]: f"{tuple(t.shape[1:])} {str(t.dtype).removeprefix('torch.')}" for path, t in leaves}


def _name(samplers: Sequence[TaskSampler], i: int) -> str:
    """The number, kind and, where it draws from a bank, source of a sampler."""
    sampler = samplers[i]
    kind = getattr(getattr(sampler, "func", sampler), "__name__", type(sampler).__name__)
    bank = getattr(sampler, "bank", None)
    return f"sampler {i} ({kind}{f' of {bank.source}' if isinstance(bank, ClassBank) else ''})"
