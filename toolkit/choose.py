"""Which plan suits a learner, its tasks and the memory there is: by a short measurement of some candidates."""

import gc
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from toolkit.allocator import memory, return_freed_memory
from toolkit.engine import gradient_function
from toolkit.errors import UserError
from toolkit.learner import Learner, Meta
from toolkit.plan import Plan, compiled_plan, default_plan, out_of_memory
from toolkit.task import Task, count, take

log = logging.getLogger("toolkit")
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# A measurement that takes longer than it can save is left out.
WORTH_MEASURING = 30.0
Gradient = Callable[[Meta, Task], Any]


class Cost(NamedTuple):
    """Of one meta-gradient: its `seconds`, and the `bytes` of memory that it needs beyond what is there before and after."""

    seconds: float
    bytes: int


class Row(NamedTuple):
    """A candidate with its predicted cost, or the reason why it cannot be."""

    plan: Plan
    cost: Cost | None
    reason: str = ""


def choose(
    learner: Learner,
    tasks: Task,
    budget: str | int | None = None,
    meta: Meta | None = None,
    trace: bool = True,
    compile: bool = False,
    iterations: int | None = None,
) -> Plan:
    """The fastest plan for batches like `tasks` that needs no more memory than `budget` (as in "8GB"; three quarters of what is
    free by default), predicted from a few pieces of the batch. Says what it chose, and why.

    `trace` and `compile` say whether recorded and compiled plans are tried; a training of few `iterations` takes the default
    plan unmeasured. Raises UserError when one task alone needs more than the budget.
    """
    limit, meta = _limit(budget, tasks), meta or learner.init()
    (first, *others), ones = candidates(learner, tasks, trace, compile), dict[Plan, Cost]()
    log.info("measuring up to %d plans on the first tasks", 1 + len(others))
    rows = [predicted(learner, meta, tasks, first, limit, ones)]
    cost, short = rows[0].cost, iterations if budget is None else None
    if short is not None and cost is not None and rows[0].plan == first and cost.seconds * short < WORTH_MEASURING:
        return first
    rows += [predicted(learner, meta, tasks, plan, limit, ones) for plan in others]
    if all(row.cost is None for row in rows):
        rows.append(predicted(learner, meta, tasks, Plan("loop"), limit, ones))
    possible = [row for row in rows if row.cost is not None]
    if not possible:
        raise UserError(rows[-1].reason)
    best = min(possible, key=lambda row: row.cost.seconds)  # type: ignore[union-attr]
    for row in rows:
        if row.cost is None:
            log.warning("plan %s is not possible: %s", row.plan, row.reason)
    assert best.cost is not None
    log.info(
        "plan: %s; about %.3g s and %.0f MB an iteration, the fastest of %d tried", best.plan, *in_units(best.cost), len(rows)
    )
    return best.plan


def in_units(cost: Cost) -> tuple[float, float]:
    """Seconds and megabytes."""
    return cost.seconds, cost.bytes / 10**6


def candidates(learner: Learner, tasks: Task, trace: bool = True, compile: bool = False) -> list[Plan]:
    """Plans worth a try, the safest first."""
    first = default_plan(learner, tasks)
    found = [first]
    random = learner.rehearse(take(tasks, 0))
    if trace and not random:
        found += [Plan(first.map, first.chunk, trace=True)]
        if first.map == "threads":
            found += [Plan("threads", 1, trace=True)] * (first.chunk != 1) + [Plan("loop", trace=True)]
    return [*found, compiled_plan(first)] if compile and not random else found


def predicted(learner: Learner, meta: Meta, tasks: Task, plan: Plan, limit: int, ones: dict[Plan, Cost] | None = None) -> Row:
    """The plan, made smaller until it fits into `limit` bytes, with its cost for the whole batch as a few pieces tell it.

    `ones` holds what one task costs by the plans that were looked at before.
    """
    total, ones = count(tasks), {} if ones is None else ones
    while True:
        try:
            cost = _extrapolated(learner, meta, tasks, plan, limit, ones)
        except UserError:
            raise
        except Exception as error:
            if not out_of_memory(error):
                return Row(plan, None, _in_words(error))
            cost = None
        if cost is not None and cost.bytes <= limit:
            return Row(plan, cost)
        smaller = plan.smaller(total)
        # By its share of the memory; fourfold, since a recording holds less than the plain plan that told it.
        most = total if cost is None else 4 * limit / cost.bytes * _at_a_time(plan, total)
        while smaller is not None and smaller.memory == plan.memory and _at_a_time(smaller, total) > most:
            smaller = smaller.smaller(total)
        if smaller is None:
            needs = "more than there is" if cost is None else f"{cost.bytes / 10**6:,.0f} MB"
            return Row(plan, None, f"one task needs {needs} and the budget is {limit / 10**6:,.0f} MB; give a larger --budget")
        plan = smaller


def _at_a_time(plan: Plan, total: int) -> int:
    return min(total, plan.size(total) * (plan.workers or torch.get_num_threads() if plan.map == "threads" else 1))


def _extrapolated(learner: Learner, meta: Meta, tasks: Task, plan: Plan, limit: int, ones: dict[Plan, Cost]) -> Cost:
    total = count(tasks)
    if (wave := _at_a_time(plan, total)) < total:
        cost = measured(learner, meta, take(tasks, slice(0, wave)), plan)
        return Cost(cost.seconds * total / wave, cost.bytes)
    plain = replace(plan, trace=False, compile=False)
    one = ones[plain] = ones.get(plain) or measured(learner, meta, take(tasks, slice(0, 1)), plain)
    if one.bytes * total <= limit / 2:
        return measured(learner, meta, tasks, plan, gradient_function(learner, plan))
    return Cost(one.seconds * total, one.bytes * total)


def measured(
    learner: Learner,
    meta: Meta,
    tasks: Task,
    plan: Plan,
    function: Gradient | None = None,
    repeats: int = 3,
    patience: float = 1.0,
) -> Cost:
    """The cost of the meta-gradient of these tasks: the fastest of up to `repeats` runs, of fewer after `patience` seconds."""
    # Not kept unless it is given: its recording would be for these few tasks.
    function = function or gradient_function.__wrapped__(learner, plan)
    device, times = tasks.support.y.device, list[float]()

    def timed() -> None:
        began = time.perf_counter()
        function(meta, tasks)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)

    before = held(device)
    function(meta, tasks)  # what only the first call does is no part of the cost
    needed = held(device) - before + peak(timed, device)
    while len(times) < repeats and sum(times) < patience:
        timed()
    return Cost(min(times), needed)


def peak(work: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The bytes of memory that `work` holds at most beyond those held before: of tensors on a GPU, of the process on a CPU."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    return_freed_memory()
    _forget_peak()
    before = memory("VmRSS")
    work()
    return max(0, memory("VmHWM") - before)


def held(device: torch.device) -> int:
    """The bytes of a GPU that are taken between calls: of tensors, and of captured graphs for all that they do. None on a CPU,
    where a call keeps nothing that counts."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        log.debug("the peak of memory cannot be reset here; it is that of the whole process")


def _limit(budget: str | int | None, tasks: Task) -> int:
    return size(budget) if budget is not None else int(0.75 * free(tasks))


def free(tasks: Task) -> int:
    """The bytes that are free on the device of these tasks."""
    device = tasks.support.y.device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        assert found is not None
        return 1024 * int(found[1])
    except OSError:
        return 4 * 10**9


def size(text: str | int) -> int:
    """A number of bytes such as "8GB" or "500 MB". Raises UserError for another text."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in UNITS or match[1].count(".") > 1 or not float(f"0{match[1]}") > 0:
        raise UserError(f"a memory budget of {text!r}; give a positive number and a unit, as in 8GB or 500MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _in_words(error: Exception) -> str:
    """The first line of an error; of one of vmap, the operation that it cannot batch."""
    text = str(error).strip() or repr(error)
    if "vmap" in text or "atching rule" in text:
        found = re.search(r"\.item\(\)|aten::\w+|torch\.\w+", text)
        return f"vmap cannot batch {found[0]}" if found else text.splitlines()[0]
    return text.splitlines()[0]


def survey(learner: Learner, tasks: Task, budget: str | None, trace: bool, compile: bool) -> Iterator[tuple[Row, Cost | None]]:
    """Every candidate, those that recompute the steps too, as predicted from a few pieces and as measured on all `tasks`."""
    meta, limit, ones = learner.init(), _limit(budget, tasks), dict[Plan, Cost]()
    plans = candidates(learner, tasks, trace, compile)
    for plan in (*plans, *(replace(plan, memory="recompute") for plan in plans if learner.steps and not plan.compile)):
        row = predicted(learner, meta, tasks, plan, limit, ones)
        yield row, None if row.cost is None else measured(learner, meta, tasks, row.plan)
