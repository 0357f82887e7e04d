"""The checks of `check_sampler` that look at how a sampler behaves, rather than at single tasks: each gives one finding."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from toolkit.data.bank import ClassBank
from toolkit.randomness import seed_all, states
from toolkit.samplers.audit import Form, Stream, fits, hashes, item_hashes, labelled, leaves, named, task_hashes
from toolkit.task import TaskSampler, stack

FEW = 16  # tasks that are drawn several times
BANK_BYTES = 2**30  # of a bank that are compared with another


class Finding(NamedTuple):
    """What one check found: its name, how bad it is, and one sentence."""

    check: str
    level: Literal["fault", "note", "ok"]
    text: str


def stable(forms: dict[Form, int]) -> Finding:
    """Whether all tasks have one structure, dtype and shape; `forms` holds the first task of each."""
    if len(forms) == 1:
        return Finding("stable", "ok", "every task has the same shapes and dtypes")
    (one, first), (other, second) = list(forms.items())[:2]
    pairs = zip(one[1], other[1], strict=False)
    a, b = next(((a, b) for a, b in pairs if a != b), (one[0], other[0]))
    return Finding("stable", "fault", f"tasks {first} and {second} differ: {_shape(a)} against {_shape(b)}")


def _shape(leaf: Any) -> str:
    return leaf if isinstance(leaf, str) else f"{str(leaf[0]).removeprefix('torch.')} of shape {leaf[1]}"


def hashes_of(stream: Stream, start: int = 0, tasks: int = FEW) -> list[int]:
    """The hashes of some tasks, drawn as batches."""
    return [h for batch in stream.many(start, tasks) for h in task_hashes(batch).tolist()]


def _alone(stream: Stream, index: int) -> int:
    return int(task_hashes(stack([stream.one(index)]))[0])


def deterministic(stream: Stream, globally: bool) -> Finding:
    """Whether a task depends on (seed, index) alone. With `globally` the sampler is known to use global random numbers, which
    are then seeded for every task, so that only other causes are reported."""

    def alone(index: int) -> int:
        if globally:
            seed_all(index, devices=False)
        return _alone(stream, index)

    singles = {index: alone(index) for index in reversed(range(FEW))}
    for index in range(FEW):
        if alone(index) != singles[index]:
            return Finding("deterministic", "fault", f"task {index} drawn again, from an equal generator, is another task")
    if not globally:
        middle = FEW // 3
        for start, found in ((0, hashes_of(stream)), (middle, hashes_of(stream, middle, FEW - middle))):
            for index, value in enumerate(found, start):
                if value != singles[index]:
                    text = f"task {index} drawn alone is another than in the batch of tasks {start} to {FEW - 1}"
                    return Finding("deterministic", "fault", text)
    return Finding("deterministic", "ok", "the same (seed, index) gives the same task, in any order, alone and in batches")


def different(stream: Stream, found: Tensor, globally: bool) -> Finding:
    """Whether tasks depend on index and seed; `found` tells the tasks drawn apart. With `globally`, as in `deterministic`, the
    same tasks for another seed have that cause."""
    few = hashes_of(stream)
    if len(found.unique()) == len(set(few)) == 1:
        return Finding("different", "fault", "every task is the same; draw all randomness from the generator that is given")
    if not globally and hashes_of(replace(stream, seed=stream.seed + 1)) == few:
        return Finding("different", "fault", f"seed {stream.seed + 1} gives the tasks of seed {stream.seed}; use the generator")
    drawn, unique = len(found), len(found.unique())
    if unique <= drawn / 2 and drawn > 1:
        return Finding("different", "note", f"only {unique} of {drawn} tasks are different")
    return Finding("different", "ok", f"{unique} of {drawn} tasks are different, and another seed gives others")


def global_random(stream: Stream) -> Finding:
    """Whether the global generators of torch, Python and numpy are read (tasks change with them) or moved."""
    found, moved = [], dict[str, None]()
    for seed in (1, 2, 1):
        seed_all(seed, devices=False)
        before = states()
        found.append(hashes_of(stream))
        moved |= {name: None for name, state in states().items() if state != before[name]}
    advice = "draw from the generator that the sampler is given"
    if moved:
        return Finding("global random", "fault", f"drawing moves the global random numbers of {' and '.join(moved)}; {advice}")
    if found[0] == found[2] != found[1]:
        return Finding("global random", "fault", f"tasks change with the global random numbers; {advice}")
    return Finding("global random", "ok", "global random numbers are neither read nor moved")


def sharing(stream: Stream, steady: bool) -> Finding:
    """Whether changing a returned task in place changes anything else; `steady` when a task drawn again should be equal.

    Memory that outlives the task is found by its address and never written to: it may be a user's data, mapped read-only."""
    again, after = stream.one(0), stream.one(1)
    batches = stream.many(0, 4) if stream.batched else []
    task = stream.one(0)  # the last one drawn, so that what goes on from it shows
    kept = [_range(bank.items) for bank in banks_of(stream.sampler)]
    for name, leaf in named(task):
        if any(_meet(_range(leaf), place) for place in kept):
            return Finding("sharing", "fault", f"{name} is a view of the bank, which changing it changes; return a copy")
        if any(_meet(_range(leaf), _range(other)) for other in leaves((again, after))):
            text = f"{name} of one task lies in the memory of another, so changing one changes the other; return a copy"
            return Finding("sharing", "fault", text)
    for batch in batches:
        for name, leaf in named(batch):
            if leaf.stride(0) == 0 and leaf.numel():
                return Finding("sharing", "fault", f"the tasks of a batch share the memory of {name}; expand it by a copy")
    before, kept_values = int(task_hashes(stack([task]))[0]), [leaf.detach().clone() for leaf in leaves(task)]
    parts = dict(named(task))
    for name, leaf in parts.items():
        others = {other: _content(tensor) for other, tensor in parts.items() if other != name}
        _change(leaf)
        for other, content in others.items():
            if _content(parts[other]) != content:
                return Finding("sharing", "fault", f"changing {name} in place changes {other}; return a copy")
    changed = _alone(stream, 0) != before if steady else False
    for leaf, value in zip(parts.values(), kept_values, strict=True):
        _change(leaf, value)
    if changed:
        return Finding(
            "sharing", "fault", "changing a task in place changes the next one drawn; keep a copy of what you return"
        )
    return Finding("sharing", "ok", "changing a task in place changes nothing else")


def _content(leaf: Tensor) -> bytes:
    return leaf.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def _change(leaf: Tensor, value: Tensor | None = None) -> None:
    """Writes into a tensor, another value everywhere by default; one that torch lets nobody write into stays."""
    leaf = leaf.detach()
    try:
        leaf.copy_(torch.where(leaf == 0, 1, 0) if value is None else value)
    except RuntimeError:
        return


def _range(leaf: Tensor) -> tuple[int, int]:
    if not leaf.numel():
        return 0, 0
    span = sum((size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True)) + 1
    return leaf.data_ptr(), leaf.data_ptr() + span * leaf.element_size()


def _meet(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return max(a[0], b[0]) < min(a[1], b[1])


def banked(sampler: TaskSampler) -> Any:
    """The dataclass with a field `bank`, a ClassBank, that a sampler is or, in its field `sampler`, wraps."""
    if isinstance(sampler, type) or not is_dataclass(sampler):
        return None
    names = {field.name for field in fields(sampler)}
    if "bank" in names and isinstance(getattr(sampler, "bank", None), ClassBank):
        return sampler
    return banked(sampler.sampler) if "sampler" in names else None  # type: ignore[attr-defined]


def banks_of(sampler: Any) -> list[ClassBank]:
    """The banks that a sampler shows, itself or by the samplers that it is around."""
    inner = [getattr(sampler, "sampler", None), *getattr(sampler, "samplers", ())]
    bank = getattr(sampler, "bank", None)
    own = [bank] if isinstance(bank, ClassBank) else []
    return own + [found for each in inner if each is not None for found in banks_of(each)]


def leakage(one: Stream, other: Stream) -> Finding | None:
    """What two splits share: class names and items of their banks, or else the items that some tasks hold."""
    pair = f"{one.split} and {other.split}"
    if (ours := banks_of(one.sampler)) and (theirs := banks_of(other.sampler)):
        found = [_shared_classes(pair, a, b) for a in ours for b in theirs]
        return min(filter(None, found), key=lambda each: each.level != "fault", default=None)
    drawn = [[batch for start in range(0, 4 * FEW, FEW) for batch in s.many(start, FEW)] for s in (one, other)]
    if not all(labelled(batch) and fits(batch.support) and fits(batch.query) for batches in drawn for batch in batches):
        return None
    items = [torch.cat([item_hashes(b.x).flatten() for batch in d for b in batch]).unique() for d in drawn]
    shared, least = int(torch.isin(items[0], items[1]).sum()), min(map(len, items))
    if shared:
        level: Literal["fault", "note"] = "fault" if shared > least / 100 else "note"
        return Finding("leakage", level, f"{shared} of {least} different items drawn from {pair} are in both")
    return None


def _shared_classes(pair: str, one: ClassBank, other: ClassBank) -> Finding | None:
    names = [name for name in one.names if name in set(other.names)]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return Finding("leakage", "fault", f"{pair} share {len(names)} classes: {', '.join(map(repr, names[:3]))}{more}")
    (ours, classes), (theirs, _) = _items(one), _items(other)
    equal = torch.isin(ours, theirs)
    share = classes[equal].bincount(minlength=one.classes) / classes.bincount(minlength=one.classes).clamp(min=1)
    if (share >= 0.5).any():
        name = one.names[int(share.argmax())]
        text = f"{pair} share {int((share >= 0.5).sum())} classes under other names, such as {name!r}, by equal items"
        return Finding("leakage", "fault", text)
    if equal.any():
        return Finding("leakage", "note", f"{pair} share no class, but {int(equal.sum())} item(s) have equal contents in both")
    return None


def _items(bank: ClassBank) -> tuple[Tensor, Tensor]:
    """Hashes of the items of a bank, and their classes: of all, or of the first of each class of a bank that is large."""
    size = bank.items[0].numel() * bank.items.element_size() if len(bank.items) else 1
    each = max(1, BANK_BYTES // (size * max(1, bank.classes)))
    classes = torch.arange(bank.classes).repeat_interleave(bank.sizes)
    kept = (torch.arange(bank.entries) - bank.first[classes] < each).nonzero().flatten()
    pieces = kept.split(max(1, 2**24 // size))
    return torch.cat([hashes(bank.read(piece)) for piece in pieces]), classes[kept]
