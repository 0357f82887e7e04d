"""Many processes on one training: plain modules, tasks shared by their number, gradients added by one collective.

`torchrun --nproc-per-node N experiments/....py ...` starts them; nothing else changes. No wrapper goes around the model: DDP
and FSDP hook into modules, and a functional call goes past their hooks (silently wrong gradients, measured).

Fast: every process adds the gradients of its tasks, and one all-reduce adds those sums. Ordered: the sum goes along the chain
of processes, each adding its pieces one by one, so that the order of all additions is that of one process, to the last bit.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from toolkit.errors import UserError
from toolkit.processes import WAITING, Lost

T = TypeVar("T")


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
            flat = flat.cpu() if flat.is_cuda and _by_host() else flat
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


def here(ordered: bool = False, sharded: bool = False, device: str = "cpu") -> Group:
    """The group that this process has joined; of one process where it has joined none, which has nothing to shard. Raises
    UserError for parts on a `device` that processes share."""
    if not dist.is_initialized():
        return Group(0, 1, ordered)
    if sharded and device.startswith("cuda") and _by_host():
        raise UserError("--shard keeps parts on GPUs of their own, but processes share one; start as many as there are GPUs")
    return Group(dist.get_rank(), dist.get_world_size(), ordered, sharded)


def _by_host() -> bool:
    """Whether what lies on GPUs is added on the CPU: where they are shared."""
    return "nccl" not in str(dist.get_backend_config())
