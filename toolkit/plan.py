"""How a learner is mapped over a batch of tasks: a `Plan`, a value. Every plan gives the same gradient up to rounding."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from toolkit.errors import UserError, unknown
from toolkit.learner import Learner
from toolkit.task import Task, count, take

MAPS, MEMORIES, PRECISIONS = ("vmap", "loop", "threads"), ("unroll", "recompute"), ("bfloat16", "float16")
# Measured for conv4 on 28x28 images: eager tasks of 10 images are fastest eight in a piece, of 30 four, of 80 alone.
PIXELS_PER_PIECE = 100_000
UNMAPPED = re.compile("vmap|[Bb]atching rule|functorch|doesn't match the broadcast shape")  # torch's words for it


@dataclass(frozen=True)
class Plan:
    """How a learner is mapped over a batch of tasks.

    `map`      "vmap" (all tasks of a piece in one vectorised pass), "loop" (one by one), or "threads" (pieces in parallel, one
               intra-op thread each; best for convolutions on a CPU).
    `chunk`    tasks per piece: all with "vmap" by default, 1 otherwise. Smaller pieces need less memory.
    `memory`   "unroll" keeps the graph of all inner steps; "recompute" keeps only the path of fast weights and rebuilds each
               step's graph on the way back: memory nearly flat in the number of inner steps, the gradient exact.
    `trace`    records the operations of a piece on the first batch, in some seconds, and replays them from then on without the
               work of autograd and Python in between.
    `compile`  also hands the recorded operations to `torch.compile`: tens of seconds once, then several times faster for small
               networks.
    `autocast` "bfloat16": convolutions and matrix products in this precision, by torch's autocast. The gradient is then not
               exact: off by a tenth to a quarter of its length on conv4 at its first weights (results/speed/speed.md).
    `workers`  threads of "threads"; by default as many as torch uses.
    """

    map: Literal["vmap", "loop", "threads"] = "vmap"
    chunk: int | None = None
    memory: Literal["unroll", "recompute"] = "unroll"
    compile: bool = False
    workers: int | None = None
    trace: bool = False
    autocast: str | None = None

    def __post_init__(self) -> None:
        for kind, value, known in (("map", self.map, MAPS), ("memory", self.memory, MEMORIES)):
            if value not in known:
                raise unknown(f"{kind} of a plan", value, known)
        if self.autocast not in (None, *PRECISIONS):
            raise unknown("precision of autocast", str(self.autocast), PRECISIONS)
        if self.workers is not None and not (isinstance(self.workers, int) and self.workers > 0):
            raise UserError(f"workers is {self.workers!r}; give 1 thread or more, or None")
        if self.chunk is not None and not (isinstance(self.chunk, int) and self.chunk > 0):
            raise UserError(f"chunk is {self.chunk!r}; give 1 task or more per piece, or None")
        if self.map == "loop" and self.chunk not in (None, 1):
            raise UserError(f"map 'loop' takes tasks one by one, but chunk is {self.chunk}; use map 'vmap' with this chunk")
        if self.compile and self.map == "threads":
            raise UserError("a compiled plan cannot run in threads; use map 'vmap' or compile=False")

    def __str__(self) -> str:
        words = [
            self.map,
            *([f"{self.chunk} task{'s' * (self.chunk > 1)} a piece"] if self.chunk and self.map != "loop" else []),
            *(["steps recomputed"] if self.memory == "recompute" else []),
            *(["compiled"] if self.compile else ["recorded"] if self.trace else []),
            *([self.autocast] if self.autocast else []),
        ]
        return ", ".join(words)

    @classmethod
    def stored(cls, data: dict[str, Any]) -> "Plan":
        """The plan that a file says; what another version also wrote is left out."""
        return cls(**{field.name: data[field.name] for field in fields(cls) if field.name in data})

    @property
    def records(self) -> bool:
        """Whether pieces run as recorded operations."""
        return self.trace or self.compile

    def size(self, total: int) -> int:
        """Tasks per piece of a batch of `total` tasks."""
        return min(total, self.chunk or (total if self.map == "vmap" else 1))

    def pieces(self, tasks: Task) -> Iterator[Task]:
        """The batch of tasks cut into batches of at most `chunk` tasks."""
        total = count(tasks)
        size = self.size(total)
        if size == total:
            return iter((tasks,))
        return (take(tasks, slice(i, i + size)) for i in range(0, total, size))

    def smaller(self, total: int) -> "Plan | None":
        """The plan that needs less memory for a batch of `total` tasks: pieces of half the size, then one worker, then steps
        recomputed; None when there is none."""
        if self.size(total) > 1:
            return replace(self, chunk=self.size(total) // 2)
        if self.map == "threads" and self.workers != 1:
            return replace(self, workers=1)
        # Unrecorded: the recording of recomputed steps needs the memory that is short.
        return replace(self, memory="recompute", trace=False, compile=False) if self.memory == "unroll" else None


def default_plan(learner: Learner, tasks: Task) -> Plan:
    """The plan for a learner and a batch like `tasks` when none is given and nothing shall be measured.

    Vmap in general; for convolutions on a CPU threads with pieces of a few tasks, since a wide vmap there costs memory and
    time; a loop for recurrent layers, which vmap cannot map.
    """
    modules = list(learner.model.modules())
    if any(isinstance(module, nn.RNNBase | nn.RNNCellBase) for module in modules):
        return Plan("loop")
    convolutional = any(isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) for module in modules)
    on_cpu = tasks.support.y.device.type == "cpu"
    if not on_cpu or not convolutional or learner.rehearse(take(tasks, 0)):  # which threads cannot repeat
        return Plan("vmap")
    pixels = sum(leaf.numel() for leaf in pytree.tree_leaves((tasks.support.x, tasks.query.x))) // count(tasks)
    return Plan("threads", chunk=max(1, min(8, PIXELS_PER_PIECE // pixels)))


def ordered(plan: Plan, chunk: int = 1) -> Plan:
    """The plan for sums in the order of tasks: in pieces of `chunk` tasks. For one task vmap is waste."""
    return replace(plan, chunk=chunk, map="loop" if plan.map == "vmap" and chunk == 1 else plan.map)


def compiled_plan(plan: Plan) -> Plan:
    """The plan compiled. Threads cannot be; compiled code fuses elementwise work, so its pieces may be wider than theirs."""
    wide = replace(plan, map="vmap", chunk=4 * (plan.chunk or 1)) if plan.map == "threads" else plan
    return replace(wide, compile=True)


def refuse_random(learner: Learner, plan: Plan, tasks: Task) -> None:
    """Raises UserError for a learner that draws random numbers where the plan cannot repeat them."""
    cannot = plan.map == "threads" or plan.memory == "recompute" or plan.records
    if cannot and learner.rehearse(take(tasks, 0)):
        raise UserError(
            "the model or a part of the learner draws random numbers (dropout?), which threads, recompute and recorded or "
            "compiled code cannot repeat; use map 'vmap' or 'loop' with memory 'unroll', no trace and no compile"
        )


def unmapped(error: BaseException, plan: Plan) -> UserError | None:
    """What to say of an error by which torch refuses to map a model by vmap, if it is one."""
    if plan.map == "loop" or not isinstance(error, RuntimeError) or not UNMAPPED.search(said := str(error).strip()):
        return None
    return UserError(f"the tasks cannot be mapped by vmap with this model ({said.splitlines()[0]}); use --map loop")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU, where torch raises a plain RuntimeError for it."""
    told = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    return told or isinstance(error, MemoryError | torch.OutOfMemoryError)
