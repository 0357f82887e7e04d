"""The checks of `check_sampler` that look at what tasks hold: each gives one finding."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toolkit.samplers.audit import BATCH, Facts, FailedError, Form, Stream, describe, examine, form, named
from toolkit.samplers.faults import Finding, banked
from toolkit.samplers.identity import Identity, meeting
from toolkit.task import Task

LABELS = {
    "negative": "negative labels; use 0 .. n - 1, and -100 (task.IGNORED) for an item without label",
    "filling": "filling with a label; give it -100 (task.IGNORED)",
    "gap": "support labels with gaps; number the classes of a task 0 .. n - 1 and let each occur",
    "uncovered": "query labels that no support item has; give each class of the query set a support item",
    "unjudged": "a query set without labels, on which nothing can be judged",
}


@dataclass
class Seen:
    """What was seen of the tasks while they were drawn."""

    look: Task
    forms: dict[Form, int]
    facts: list[Facts] = field(default_factory=list)
    odd: Task | None = None
    gradient: str | None = None
    failure: FailedError | None = None
    seconds: float = 0.0

    def all(self, name: str) -> Tensor:
        """One fact of all tasks, of shape (tasks,)."""
        return torch.cat([facts[name] for facts in self.facts])

    @property
    def rate(self) -> float:
        """Tasks drawn in a second."""
        return sum(len(facts["hash"]) for facts in self.facts) / max(self.seconds, 1e-9)


def look_at(stream: Stream, tasks: int, progress: Callable[[int], object]) -> Seen | FailedError:
    """The tasks, without what they hold; what was seen up to a failure, or the failure when it comes among the first."""
    seen = None
    try:
        look = stream.one(0)
        seen = Seen(look, {form(look): 0})
        seen.gradient = next((name for name, leaf in named(look) if leaf.requires_grad), None)
        for start in range(0, tasks, BATCH):
            begin = time.perf_counter()
            batches = stream.many(start, min(BATCH, tasks - start))
            seen.seconds += time.perf_counter() - begin
            for i, batch in enumerate(batches):
                seen.forms.setdefault(form(batch, 1), start + i)
                seen.gradient = seen.gradient or next((name for name, leaf in named(batch) if leaf.requires_grad), None)
                seen.facts.append(examine(batch))
                if seen.odd is None and seen.facts[-1]["ragged"].any():
                    seen.odd = batch
            progress(min(BATCH, tasks - start))
    except Exception as error:
        failure = error if isinstance(error, FailedError) else FailedError("type", f"tasks cannot be read ({describe(error)})")
        if seen is None or not seen.facts:
            return failure
        seen.failure = failure
    return seen


def sizes(seen: Seen) -> Finding:
    if seen.odd is not None:
        shapes = ", ".join(f"{name} {tuple(leaf.shape[1:])}" for name, leaf in named(seen.odd))
        text = f"x and y of a set must have a row for each of the same items, at least one, but the shapes are {shapes}"
        return Finding("sizes", "fault", text)
    support, query = ({k: v.shape[1:] for k, v in named(Task(batch, batch)) if ".x" in k} for batch in seen.look)
    if len(support) == len(query) and support != query:
        (name, a), b = next((pair, query[pair[0]]) for pair in support.items() if query.get(pair[0]) != pair[1])
        return Finding("sizes", "fault", f"items differ in shape: {tuple(a)} in {name}, {tuple(b)} in the query set")
    rows = [len(batch.y) for batch in seen.look]
    return Finding("sizes", "ok", f"{rows[0]} support and {rows[1]} query items, with as many targets")


def dtype(stream: Stream, seen: Seen) -> Finding:
    kinds = {name: str(leaf.dtype).removeprefix("torch.") for name, leaf in named(seen.look)}
    bad = seen.all("not finite")
    if bad.any():
        text = (
            f"{int(bad.sum())} of {len(bad)} tasks hold NaN or infinite numbers, first {stream.replay(int(bad.nonzero()[0]))}"
        )
        return Finding("dtype", "fault", text)
    ys = kinds["support.y"], kinds["query.y"]
    if ys[0] != ys[1] or ys[0] not in ("int64", "float32", "float64", "float16", "bfloat16"):
        text = (
            f"y is {ys[0]} in the support set and {ys[1]} in the query set; use int64 for labels, float32 for numbers, in both"
        )
        return Finding("dtype", "fault", text)
    for kind, why in (("float64", "twice the memory and time of float32"), ("uint8", "networks take floats")):
        if names := [name for name, found in kinds.items() if found == kind]:
            return Finding("dtype", "note", f"{', '.join(names)} is {kind}: {why}")
    return Finding("dtype", "ok", ", ".join(f"{name} {kind}" for name, kind in kinds.items()))


def labels(seen: Seen) -> Finding:
    """Whether labels are 0 .. n - 1 in the support set and the query set has no others, and how many items each label has."""
    if any("ways" not in facts for facts in seen.facts):
        return Finding("labels", "ok", "targets are not one integer an item, so there are no labels")
    for name, what in LABELS.items():
        bad = seen.all(name)
        if bad.any():
            text = f"{int(bad.sum())} of {len(bad)} tasks have {what}; the first is task {int(bad.nonzero()[0])}"
            return Finding("labels", "fault", text)
    counts = [f"{_span(seen, f'{part} least', f'{part} most')} {part}" for part in ("support", "query")]
    text = f"{_span(seen, 'ways', 'ways')} labels a task, each with {' and '.join(counts)} items"
    even = all(bool((seen.all(f"{part} least") == seen.all(f"{part} most")).all()) for part in ("support", "query"))
    return Finding("labels", "ok" if even else "note", text if even else f"{text}: imbalanced")


def _span(seen: Seen, least: str, most: str) -> str:
    low, high = int(seen.all(least).min()), int(seen.all(most).max())
    return str(low) if low == high else f"{low} to {high}"


def content(stream: Stream, seen: Seen, known: Identity | None) -> Finding:
    """Whether equal items meet in a task. Where items are known to be others (`known`), the data hold equal ones: a note.
    Inputs of a regression, and items changed at random, may also meet by chance, in at most one task of a thousand."""
    name = "disjoint by content"
    overlap, repeated = seen.all("overlap"), seen.all("repeated")
    hits, total = int((overlap | repeated).sum()), len(overlap)
    if not hits:
        return Finding(name, "ok", f"no two items of any of {total} tasks are equal")
    text = meeting(overlap, repeated, "item of equal content", stream)
    apart = known is not None and known.apart
    if apart and _unchanged(stream.sampler):
        return Finding(name, "note", f"the data hold equal items: {text}")
    if apart and not overlap.any():
        return Finding(name, "note", f"a changed copy can equal another item: {text}")
    if (apart or "ways" not in seen.facts[0]) and hits <= max(1, total // 1000):
        return Finding(name, "note", f"rare enough to be chance: {text}")
    return Finding(name, "fault", text)


def _unchanged(sampler: Any) -> bool:
    """Whether a sampler hands out the items of its bank as they are, as far as can be seen: it wraps no other one, or mixes
    such samplers."""
    mixed = getattr(sampler, "samplers", ())
    return all(map(_unchanged, mixed)) if mixed else banked(sampler) is sampler
