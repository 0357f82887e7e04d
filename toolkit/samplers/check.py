"""`check_sampler`: what is wrong with a task sampler, found before a network is trained on its tasks."""

import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from toolkit.errors import UserError
from toolkit.randomness import kept
from toolkit.samplers.audit import BATCH, FailedError, Stream, describe
from toolkit.samplers.contents import Seen, content, dtype, labels, look_at, sizes
from toolkit.samplers.faults import (
    Finding,
    deterministic,
    different,
    global_random,
    leakage,
    sharing,
    stable,
)  # fmt: skip
from toolkit.samplers.identity import identity
from toolkit.task import TaskSampler

# Faults that a sampler may declare to be meant, by an attribute `by_design` with their names; they are then notes.
EXCUSABLE = ("labels", "label meaning", "disjoint by content", "disjoint by identity", "leakage")
WIDTH = 120


@dataclass(frozen=True)
class Report:
    """What `check_sampler` found: a finding for each check that could be made, in order; `name` says of what."""

    name: str
    findings: tuple[Finding, ...]
    tasks_per_second: float

    @property
    def ok(self) -> bool:
        """Whether there is no fault; notes are allowed."""
        return not self.faults

    @property
    def faults(self) -> tuple[str, ...]:
        """The names of the checks that found a fault."""
        return tuple(finding.check for finding in self.findings if finding.level == "fault")

    def __str__(self) -> str:
        faults, notes = len(self.faults), sum(finding.level == "note" for finding in self.findings)
        total = f"{faults or 'no'} fault{'s' * (faults != 1)}, {notes or 'no'} note{'s' * (notes != 1)}"
        rows = []
        for check, level, text in self.findings:
            start = f"{check:21}{level:7}"
            rows.append(textwrap.fill(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start)))
        return "\n".join([f"{self.name}: {total}", *rows])


def check_sampler(
    sampler: TaskSampler,
    tasks: int = 200,
    seed: int = 0,
    splits: Mapping[str, TaskSampler] | None = None,
    split: str = "train",
    progress: Callable[[int], object] | None = None,
) -> Report:
    """Draws tasks 0 .. `tasks` - 1 of the stream (`seed`, `split`) of `sampler` and reports what is wrong with them and with
    the way that they are drawn.

    `splits` are the samplers of other splits by name, for classes that splits share. `progress` is told the number of tasks
    each time that some were drawn. The checks, by name: runs, type, sizes, stable, dtype, labels, disjoint by content, disjoint
    by identity (exact, for a dataclass with a `bank`), label meaning, deterministic, different, global random, sharing,
    gradient-free, leakage and speed. A sampler whose attribute `by_design` holds the name of a check gets a note where that
    check finds a fault, as far as it concerns what tasks hold (`EXCUSABLE`).

    A bad sampler never raises; global random numbers stay as they were. Raises UserError for arguments that are no sampler, and
    for fewer than 1 task.
    """
    streams = {split: sampler} | dict(splits or {})
    for name, each in streams.items():
        if isinstance(each, type) or not callable(each):
            what = f"the class {each.__name__}" if isinstance(each, type) else f"a {type(each).__name__}"
            raise UserError(
                f"the sampler of {name!r} is {what}; give something to call with a generator, such as Episodes(bank)"
            )
    if tasks < 1:
        raise UserError(f"cannot check {tasks} tasks; look at 1 or more")
    if splits and split in splits:
        raise UserError(f"the split {split!r} is given twice; leave the one that is checked out of `splits`")
    stream = Stream(sampler, seed, split)
    others = [Stream(each, seed, name) for name, each in (splits or {}).items()]
    with kept(devices=False):
        seen = look_at(stream, tasks, progress or (lambda drawn: None))
        found = tuple(_meant(sampler, finding) for finding in _once(_findings(stream, others, seen)))
    name = getattr(sampler, "__name__", type(sampler).__name__)
    rate = seen.rate if isinstance(seen, Seen) else 0.0
    return Report(f"{name}, split {split!r}", found, rate)


def _findings(stream: Stream, others: list[Stream], seen: Seen | FailedError) -> Iterator[Finding]:
    if isinstance(seen, FailedError):
        yield Finding(seen.check, "fault", f"{seen.sentence}; nothing else could be looked at")
        return
    if seen.failure:
        yield Finding(seen.failure.check, "fault", f"{seen.failure.sentence}; tasks after it were not looked at")
    total = len(seen.all("hash"))
    yield Finding("runs", "ok", f"{total} tasks were drawn (seed {stream.seed}, split {stream.split!r})")
    yield Finding("type", "ok", "tasks are made of tensors")
    yield sizes(seen)
    yield stable(seen.forms)
    yield dtype(stream, seen)
    if seen.odd is None:
        yield labels(seen)
        known = identity(stream, total)
        yield content(stream, seen, known)
        yield from known.findings if known else ()
    [at_random] = _guarded("global random", lambda: global_random(stream))
    globally = at_random.level == "fault"
    [steady] = _guarded("deterministic", lambda: deterministic(stream, globally))
    yield from (steady, *_guarded("different", lambda: different(stream, seen.all("hash"), globally)), at_random)
    yield from _guarded("sharing", lambda: sharing(stream, steady.level == "ok" and not globally))
    if seen.gradient:
        yield Finding(
            "gradient-free", "fault", f"{seen.gradient} requires a gradient; draw under torch.no_grad(), or detach it"
        )
    else:
        yield Finding("gradient-free", "ok", "no tensor requires a gradient")
    yield from _leakage([stream, *others])
    yield Finding("speed", "ok", f"{seen.rate:,.0f} tasks/s, drawn {BATCH} at a time")


def _guarded(check: str, look: Callable[[], Finding | None]) -> list[Finding]:
    """The finding of a check, and that of another where the sampler fails on the way."""
    try:
        finding = look()
        return [finding] if finding else []
    except FailedError as error:
        return [Finding(error.check, "fault", error.sentence)]
    except Exception as error:  # a sampler can return what nobody thought of, and the other checks still help
        return [Finding(check, "note", f"could not be looked at ({describe(error)})")]


def _once(findings: Iterator[Finding]) -> Iterator[Finding]:
    """One finding for each check: the faults that are found before others, or else the first."""
    found: dict[str, Finding] = {}
    for finding in findings:
        if finding.check not in found or (finding.level == "fault" != found[finding.check].level):
            found[finding.check] = finding
    yield from found.values()


def _meant(sampler: TaskSampler, finding: Finding) -> Finding:
    if finding.level == "fault" and finding.check in EXCUSABLE and finding.check in getattr(sampler, "by_design", ()):
        return finding._replace(level="note", text=f"by design: {finding.text}")
    return finding


def _leakage(streams: list[Stream]) -> Iterator[Finding]:
    if len(streams) < 2:
        return
    found = [f for a, b in combinations(streams, 2) for f in _guarded("leakage", lambda a=a, b=b: leakage(a, b))]  # type: ignore[misc]
    yield from (finding for finding in found if finding.check != "leakage")
    for level in ("fault", "note"):
        if texts := [text for check, kind, text in found if check == "leakage" and kind == level]:
            yield Finding("leakage", level, "; ".join(texts))  # type: ignore[arg-type]
            return
    yield Finding("leakage", "ok", f"{', '.join(stream.split for stream in streams)} share nothing that could be found")
