"""Which item of a bank each example is: tasks drawn from a bank whose items are numbers instead."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.data.bank import ClassBank
from toolkit.samplers.audit import BATCH, Facts, FailedError, Stream, describe, inputs, labelled, overlaps, real
from toolkit.samplers.faults import Finding, banked
from toolkit.task import IGNORED, Batch, Input

ENOUGH = 20  # times that classes came again, before labels that never changed are no chance
LEVELS = ("ok", "note", "fault")
DISJOINT, MEANING = "disjoint by identity", "label meaning"


class Identity(NamedTuple):
    """The findings, and whether the items of all tasks are known and apart."""

    findings: tuple[Finding, ...]
    apart: bool


def identity(stream: Stream, tasks: int) -> Identity | None:
    """Whether items meet in a task, and whether labels say more than the task does; None for a sampler that shows no bank.

    A sampler that wraps another by its field `sampler` is judged by the inner one, a mixture of `samplers` by each of them."""
    owner = banked(stream.sampler)
    if owner is None:
        mixed = getattr(stream.sampler, "samplers", ())
        found = [identity(replace(stream, sampler=each), -(-tasks // len(mixed))) for each in mixed]
        each_known = [one for one in found if one is not None]
        return _together(each_known) if each_known and len(each_known) == len(found) else None
    facts, pairs = list[Facts](), list[tuple[Tensor, Tensor]]()
    try:
        whole = numbered(owner.bank)
        plain, *ends = (
            replace(stream, sampler=replace(owner, bank=replace(whole, items=items)))
            for items in (whole.items, *(whole.items.new_full((1,), value).expand_as(whole.items) for value in (0, 1)))
        )
        zeros, ones = (end.many(0, 1)[0].support.x for end in ends)
        for start in range(0, tasks, BATCH):
            for batch in plain.many(start, min(BATCH, tasks - start)):
                parts = [_numbers(part, (zeros, ones), owner.bank) for part in batch]
                if parts[0] is None or parts[1] is None:
                    return _unknown("the inputs do not show which items they are")
                facts.append(overlaps(batch, [parts[0], parts[1]]))
                if labelled(batch):
                    pairs.append((parts[0], batch.support.y.cpu().long()))
    except FailedError as error:
        return _unknown(f"the sampler fails on a bank of numbers ({error.sentence})")
    except Exception as error:  # whatever somebody's class does when it is made anew with another bank
        return _unknown(f"the sampler cannot be made anew with another bank ({describe(error)})")
    overlap, repeated = (torch.cat([fact[name] for fact in facts]) for name in ("overlap", "repeated"))
    inner = "" if owner is stream.sampler else f" of the {type(owner).__name__} inside"
    if overlap.any() or repeated.any():
        disjoint = Finding(DISJOINT, "fault", meeting(overlap, repeated, f"item{inner}", stream))
    else:
        disjoint = Finding(DISJOINT, "ok", f"no item{inner} is twice in any of {len(overlap)} tasks")
    findings = (disjoint, *_meaning(pairs, owner.bank))
    return Identity(findings, disjoint.level == "ok")


def meeting(overlap: Tensor, repeated: Tensor, what: str, stream: Stream) -> str:
    """The sentence for tasks in which items of support and query meet, or for those in which one comes twice in a set."""
    if overlap.any():
        first = stream.replay(int(overlap.nonzero()[0]))
        return f"a support {what} is again in the query set, in {int(overlap.sum())} of {len(overlap)} tasks, first in {first}"
    first = stream.replay(int(repeated.nonzero()[0]))
    return f"an {what} is twice in one set, in {int(repeated.sum())} of {len(repeated)} tasks, first in {first}"


def numbered(bank: ClassBank) -> ClassBank:
    """The same bank with every item replaced by its row, a constant of the item's shape; a turned item has a row of its own."""
    rows = torch.arange(bank.entries) if bank.rows is None else bank.rows
    dtype = bank.items.dtype
    if dtype == torch.uint8 or dtype.itemsize < 4:
        dtype = torch.float32
    if dtype == torch.float32 and len(rows) and int(rows.max()) > 2**23:
        dtype = torch.float64
    shape = bank.items.shape[1:]
    items = rows.to(bank.items.device, dtype).view(-1, *[1] * len(shape)).expand(-1, *shape)
    return replace(bank, items=items, rows=None)


def _together(found: list[Identity]) -> Identity:
    """The findings on the samplers of a mixture, the worst of each name."""
    worst: dict[str, Finding] = {}
    for finding in (finding for one in found for finding in one.findings):
        if finding.check not in worst or LEVELS.index(finding.level) > LEVELS.index(worst[finding.check].level):
            worst[finding.check] = finding
    return Identity(tuple(worst.values()), all(one.apart for one in found))


def _unknown(reason: str) -> Identity:
    return Identity((Finding(DISJOINT, "note", f"cannot be told: {reason}"),), False)


def _numbers(batch: Batch, ends: tuple[Input, Input], bank: ClassBank) -> Tensor | None:
    """The row of each item (tasks, items), read from the input that tells most of them apart.

    A sampler may scale and shift the values (x / 255, or by the mean and deviation of each channel): `ends` are its inputs for
    a bank of zeros and for one of ones. What it does otherwise cannot be read, and gives None."""
    top = bank.entries - 1 if bank.rows is None else int(bank.rows.max())
    best, mask = None, real(batch)
    for tensor, zeros, ones in zip(inputs(batch.x), *map(inputs, ends), strict=True):
        if tensor.dtype == torch.bool or tensor.is_complex() or not tensor.numel():
            continue
        values, base, end = (t.detach().cpu().double().reshape(*t.shape[:2], -1) for t in (tensor, zeros, ones))
        base, slope = base[:1, :1], end[:1, :1] - base[:1, :1]
        if (slope == 0).any():
            continue
        values = torch.where(mask[..., None], (values - base) / slope, 0)
        numbers = values[..., 0].round().long()
        if (values - numbers[..., None]).abs().max() > 0.25 or int(numbers.min()) < 0 or int(numbers.max()) > top:
            continue
        if best is None or len(numbers.unique()) > len(best.unique()):
            best = numbers
    return best


def _meaning(found: list[tuple[Tensor, Tensor]], bank: ClassBank) -> tuple[Finding, ...]:
    """Whether a class has another label in another task, by the rows and labels of support items.

    Where it has not, one network can learn all tasks by heart (Yin et al. 2020, "Meta-Learning without Memorization", section
    3: tasks that are not mutually exclusive)."""
    if not found:
        return ()
    rows = torch.arange(bank.entries) if bank.rows is None else bank.rows
    class_of = torch.zeros(int(rows.max()) + 1, dtype=torch.int64)
    class_of[rows] = torch.arange(bank.classes).repeat_interleave(bank.sizes)
    pairs, seen = [], 0
    for numbers, y in found:
        task = torch.arange(seen, seen + len(y))[:, None].expand_as(y)
        pairs.append(torch.stack([task, class_of[numbers], y], -1)[y != IGNORED])
        seen += len(y)
    _, classes, labels = torch.cat(pairs).unique(dim=0).unbind(1)
    times = classes.bincount(minlength=bank.classes)
    again = int((times - 1).clamp(min=0).sum())
    kinds = torch.stack([classes, labels], 1).unique(dim=0)[:, 0].bincount(minlength=bank.classes)
    if len(labels.unique()) < 2:
        return ()
    if again < ENOUGH:
        return (Finding(MEANING, "note", f"cannot be told: classes came again only {again} times; look at more tasks"),)
    if int(kinds.max()) == 1:
        text = (
            "each class has the same label in every task, so a network can learn them by heart; shuffle the labels in each task"
        )
        return (Finding(MEANING, "fault", text),)
    order = torch.corrcoef(torch.stack([classes, labels]).double())[0, 1].item()
    if abs(order) > 5 / len(labels) ** 0.5:
        text = (
            f"labels follow the order of the classes in the bank (correlation {order:.2f}), which a network can learn by heart"
        )
        return (Finding(MEANING, "note", text),)
    return (Finding(MEANING, "ok", "the label of a class changes from task to task"),)
