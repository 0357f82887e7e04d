"""Many processes on one training: plain modules, tasks shared by their number, gradients added by one collective.

`torchrun --nproc-per-node N experiments/....py ...` starts them; nothing else changes. No wrapper goes around the model: DDP
and FSDP hook into modules, and a functional call goes past their hooks (silently wrong gradients, measured).

Fast: every process adds the gradients of its tasks, and one all-reduce adds those sums. Ordered: the sum goes along the chain
of processes, each adding its pieces one by one, so that the order of all additions is that of one process, to the last bit.
"""

import hashlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.utils import _pytree as pytree

from toolkit.errors import UserError

T = TypeVar("T")
log = logging.getLogger("toolkit")
BEAT, PATIENCE = 5.0, 45.0  # seconds between two signs of life, and without any until a process counts as lost
ROLL_CALL = timedelta(minutes=2)  # until all must have started
STUCK = timedelta(hours=2)  # until a collective gives up; whoever is dead is noticed long before
WAITING: list[float] = []  # since when this process waits for the others, while it does


class Lost(UserError):
    """Another process of this training is gone."""


class Joined(NamedTuple):
    """Where processes leave each other notes, who watches over them, and how that one is told to stop."""

    notes: Store
    watch: threading.Thread
    over: threading.Event


JOINED: list[Joined] = []  # at most one; torch too has one group only


class Share(NamedTuple):
    """A part of a batch of tasks: its tasks are numbers `start`, `start` + 1, ... of `total`. `fold` adds up pieces, over all
    processes; `sample` are tasks, the same in every process, on which what must be equal everywhere is decided."""

    start: int
    total: int
    fold: Callable[[Iterable[Any]], Any]
    sample: Any


def added(parts: Iterable[T]) -> T:
    """The sum of trees of tensors, from left to right."""
    return reduce(lambda a, b: pytree.tree_map(torch.add, a, b), parts)


@dataclass(frozen=True)
class Group:
    """The processes that share one training: the `rank` of this one, 0 first, and their number `size`; whether they add in
    order, and whether each keeps a part of the optimiser only (`toolkit.sharded`). All of them must call the same methods in
    the same order. Raises `Lost` when one of them is gone."""

    rank: int = 0
    size: int = 1
    ordered: bool = False
    sharded: bool = False

    def part(self, total: int, piece: int) -> range:
        """The tasks of a batch of `total` that are this process's: neighbours, in whole pieces of `piece` tasks. Raises
        UserError when there are fewer pieces than processes."""
        pieces = -(-total // piece)
        if pieces < self.size:
            what = f"{total} tasks" + (f" in pieces of {piece}" if piece > 1 else "")
            raise UserError(
                f"{self.size} processes cannot share {what}; start at most {pieces}, or give more --tasks"
                + (" or a smaller --chunk" if piece > 1 else "")
            )
        first, end = (piece * (pieces * rank // self.size) for rank in (self.rank, self.rank + 1))
        return range(first, min(end, total))

    def fold(self, parts: Iterable[T]) -> T:
        """The sum of all parts of all processes: trees of tensors of the same structure. The same in every process."""
        if self.size == 1:
            return added(parts)
        if not self.ordered:
            return self._everywhere(added(parts), lambda flat: dist.all_reduce(flat))
        mine = list(parts)
        if self.rank:
            before = self._everywhere(mine[0], lambda flat: dist.recv(flat, self.rank - 1))
            mine = [before, *mine]
        total = added(mine)
        if self.rank + 1 < self.size:
            self._everywhere(total, lambda flat: dist.send(flat, self.rank + 1))
        return self._everywhere(total, lambda flat: dist.broadcast(flat, self.size - 1))

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns, or the UserError that it raises, in process 0, the only one that runs it."""
        if self.size == 1:
            return work()
        done: list[Any] = [None, None]
        if not self.rank:
            try:
                done[0] = work()
            except UserError as error:
                done[1] = error
        with self._talk():
            dist.broadcast_object_list(done, 0)
        if done[1] is not None:
            raise done[1]
        return done[0]  # type: ignore[no-any-return]

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._talk():
            dist.all_gather_object(values, value)
        return values

    def any(self, mine: bool) -> bool:
        """Whether it is so in any process."""
        if self.size == 1:
            return mine
        flag = torch.tensor([float(mine)])
        with self._talk():
            dist.all_reduce(flag)
        return bool(flag)

    def agree(self, facts: dict[str, Any], advice: str) -> None:
        """Raises UserError where the facts of a process are not those of process 0, naming the first that differs."""
        own, *others = self.gathered(facts)
        for rank, theirs in enumerate(others, 1):
            for key in sorted(own.keys() | theirs.keys()):
                a, b = own.get(key), theirs.get(key)
                if a != b:
                    raise UserError(f"process {rank} has {key} {b}, and process 0 has {a}; {advice}")

    def same(self, tensors: Any, iteration: int) -> None:
        """Raises UserError when the tensors of a tree are not the same bits in all processes."""
        if self.size > 1:
            self.agree(
                {f"after iteration {iteration} weights of hash": fingerprint(tensors)},
                "they have drifted apart, so nothing after the newest checkpoint can be trusted; use machines and libraries "
                "of one kind, and no operations that are not deterministic",
            )

    def _everywhere(self, tree: T, collective: Callable[[Tensor], object]) -> T:
        """The tree after a collective on all its numbers in one row, for each type of number."""
        leaves, spec = pytree.tree_flatten(tree)
        for dtype in sorted({leaf.dtype for leaf in leaves}, key=str):
            own = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
            flat = torch.cat([leaves[i].reshape(-1) for i in own])
            flat = flat.cpu() if flat.is_cuda and "nccl" not in str(dist.get_backend_config()) else flat
            with self._talk():
                collective(flat)
            for i, part in zip(own, flat.split([leaves[i].numel() for i in own]), strict=True):
                # In the memory layout of the leaf, which the optimiser relies on.
                leaves[i] = torch.empty_like(leaves[i]).copy_(part.view(leaves[i].shape))
        return pytree.tree_unflatten(leaves, spec)  # type: ignore[no-any-return]

    @contextmanager
    def _talk(self) -> Iterator[None]:
        WAITING[:] = [time.monotonic()]
        try:
            yield
        except (RuntimeError, OSError) as error:  # how gloo and NCCL say that nobody answers
            reason = re.sub(r"^\[[^]]*\] ", "", " ".join(str(error).split())).split(". ")[0]
            raise Lost(f"another of the {self.size} processes is gone ({reason[:200]})") from None
        finally:
            WAITING.clear()


ALONE = Group()


def fingerprint(tensors: Any) -> str:
    """A hash of all bits of a tree of tensors."""
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(tensors):
        digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def started() -> bool:
    """Whether this process is one of several that torchrun (or Slurm) started together."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def here(ordered: bool = False, sharded: bool = False) -> Group:
    """The group that this process has joined; of one process where it has joined none, which has nothing to shard."""
    return Group(dist.get_rank(), dist.get_world_size(), ordered, sharded) if dist.is_initialized() else Group(0, 1, ordered)


def join(beat: float = BEAT, patience: float = PATIENCE) -> None:
    """Joins the processes that were started together, if there are any, and watches over them: a process that gives no sign
    of life for `patience` seconds, or whose machine is gone, ends the others with a sentence."""
    if not started() or dist.is_initialized():
        return
    try:
        store, rank, size = next(rendezvous("env://", timeout=ROLL_CALL))
        notes = PrefixStore("toolkit", store)
        notes.set(f"here/{rank}", _own_gpu())
        notes.wait([f"here/{other}" for other in range(size)], ROLL_CALL)
        gpus = [notes.get(f"here/{other}").decode() for other in range(size)]
    except RuntimeError:
        total, seconds = os.environ["WORLD_SIZE"], f"{ROLL_CALL.total_seconds():.0f}"
        raise Lost(f"of {total} processes not all started within {seconds} s; look at what the others say") from None
    # NCCL wants a GPU for each; gloo adds what lies on one by way of the host.
    kinds = "cpu:gloo,cuda:nccl" if all(gpus) and len(set(gpus)) == size else "gloo"
    if not rank and kinds == "gloo" and any(gpus):
        log.info("%d processes have %d GPUs: with --device cuda they add by way of the host", size, len({*gpus} - {""}))
    dist.init_process_group(kinds, timeout=STUCK, store=store, rank=rank, world_size=size)
    over, beats = threading.Event(), [0]
    watch = threading.Thread(target=_watch, args=(notes, over, beats, beat, patience), daemon=True, name="watch")
    watch.start()
    threading.Thread(target=_guard, args=(over, beats, beat, patience), daemon=True, name="guard").start()
    JOINED.append(Joined(notes, watch, over))


def _own_gpu() -> str:
    """Takes the GPU that is this process's, by its number on its machine; its name in the world, "" where there is none."""
    if not torch.cuda.is_available():
        return ""
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return str(torch.cuda.get_device_properties().uuid)


def leave() -> None:
    """Says good-bye: from now on nobody waits for this process."""
    if not JOINED:
        return
    notes, watch, over = JOINED.pop()
    over.set()
    watch.join(BEAT)  # Python's end, in the middle of a call to the store, would abort the process
    if watch.is_alive():  # in a call that is not answered, and another would not be either
        _end("process 0, or torchrun if it keeps the notes of all, does not answer")
    with suppress(RuntimeError, OSError):  # nobody is there to read it
        notes.set(f"left/{dist.get_rank()}", "1")
    dist.destroy_process_group()


def said_already(sentence: str) -> bool:
    """Whether another process has said this sentence: so that all who stumble over the same thing say it once."""
    if not JOINED:
        return False
    key = "said/" + hashlib.sha256(sentence.encode()).hexdigest()[:16]
    try:
        return bool(JOINED[0].notes.add(key, 1) > 1)
    except (RuntimeError, OSError):
        return False


def _watch(notes: Store, over: threading.Event, beats: list[int], beat: float, patience: float) -> None:
    """Counts for the others to see, and looks whether they still count, until it is over. `beats` counts the looks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    seen, silent = [-1] * size, [0.0] * size
    while not over.wait(beat):
        try:
            notes.add(f"alive/{rank}", 1)
            for other in range(size):
                if notes.check([f"left/{other}"]):
                    silent[other] = 0.0
                    continue
                count = notes.add(f"alive/{other}", 0)
                silent[other] = silent[other] + beat if count == seen[other] else 0.0
                seen[other] = count
            worst = max(range(size), key=silent.__getitem__)
            reason = f"process {worst} has given no sign of life for {silent[worst]:.0f} s" if silent[worst] >= patience else ""
        except (RuntimeError, OSError):
            if over.wait(beat):  # ending as the others do
                return
            reason = "process 0 is gone"
        beats[0] += 1
        if reason:
            _end(reason)
        if any(time.monotonic() - since > patience for since in WAITING):  # for one that is alive, and may still come
            say = f"some of the {size} processes wait for another for more than {patience:.0f} s: it takes long, or it hangs"
            if not said_already(say):
                log.warning("%s; after %.0f hours the run would end", say, STUCK.total_seconds() / 3600)


def _guard(over: threading.Event, beats: list[int], beat: float, patience: float) -> None:
    """Notices when the watch waits for an answer that does not come: whoever keeps the notes, process 0 unless torchrun does,
    is there and silent, and the store has no time limit of its own for that."""
    seen, silent = -1, 0.0
    while not over.wait(beat):
        silent, seen = silent + beat if beats[0] == seen else 0.0, beats[0]
        if silent >= patience:
            _end(f"process 0, or torchrun if it keeps the notes of all, has given no sign of life for {silent:.0f} s")


def _end(reason: str) -> None:
    print(f"error: {reason}; the same command with --resume goes on from the newest checkpoint", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)
