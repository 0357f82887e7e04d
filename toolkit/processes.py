"""Processes that torchrun (or Slurm) started together: how one joins the others, says good-bye, and notices who is lost."""

import hashlib
import logging
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from toolkit.errors import UserError

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


def started() -> bool:
    """Whether this process is one of several that torchrun (or Slurm) started together."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(beat: float = BEAT, patience: float = PATIENCE) -> None:
    """Joins the processes that were started together, if there are any, and watches over them: a process that gives no sign
    of life for `patience` seconds, or whose machine is gone, ends the others with a sentence."""
    if not started() or dist.is_initialized():
        return
    gpu = own_gpu()
    try:
        store, rank, size = next(rendezvous("env://", timeout=ROLL_CALL))
        notes = PrefixStore("toolkit", store)
        notes.set(f"here/{rank}", gpu)
        notes.wait([f"here/{other}" for other in range(size)], ROLL_CALL)
        gpus = [notes.get(f"here/{other}").decode() for other in range(size)]
    except dist.DistStoreError:  # which is how a store says that nothing came
        total, seconds = os.environ["WORLD_SIZE"], f"{ROLL_CALL.total_seconds():.0f}"
        raise Lost(f"of {total} processes not all started within {seconds} s; look at what the others say") from None
    except RuntimeError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise Lost(f"the processes could not meet at {place} ({str(error).strip().splitlines()[0]})") from None
    # NCCL wants a GPU for each; gloo adds what lies on one by way of the host.
    kinds = "cpu:gloo,cuda:nccl" if all(gpus) and len(set(gpus)) == size else "gloo"
    if not rank and kinds == "gloo" and any(gpus):
        have = len({*gpus} - {""})
        log.info("%d processes and %d GPU%s: with --device cuda they add by way of the host", size, have, "s" * (have > 1))
    over, beats = threading.Event(), [0]
    given = notes, over, beats, beat, patience, rank, size
    watch = threading.Thread(target=_watch, args=given, daemon=True, name="watch")
    watch.start()
    threading.Thread(target=_guard, args=(over, beats, beat, patience), daemon=True, name="guard").start()
    JOINED.append(Joined(notes, watch, over))
    dist.init_process_group(kinds, timeout=STUCK, store=store, rank=rank, world_size=size)  # watched: it waits for the others


def own_gpu() -> str:
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
        notes.set(f"left/{os.environ['RANK']}", "1")
    if dist.is_initialized():
        dist.destroy_process_group()


def speak() -> None:
    """The messages of this process on stderr: all of the first process of several, and the errors of the others."""
    rank = os.environ.get("RANK", "0") if started() else "0"
    logging.basicConfig(level=logging.WARNING, format="%(message)s" if rank == "0" else f"process {rank}: %(message)s")
    log.setLevel(logging.INFO if rank == "0" else logging.ERROR)


def said_already(sentence: str) -> bool:
    """Whether another process has said this sentence: so that all who stumble over the same thing say it once."""
    if not JOINED:
        return False
    key = "said/" + hashlib.sha256(sentence.encode()).hexdigest()[:16]
    try:
        return bool(JOINED[0].notes.add(key, 1) > 1)
    except (RuntimeError, OSError):
        return False


def _watch(notes: Store, over: threading.Event, beats: list[int], beat: float, patience: float, rank: int, size: int) -> None:
    """Counts for the others to see, and looks whether they still count, until it is over. `beats` counts the looks."""
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
            if not said_already(say):  # by one process, which need not be the first, the only one to say warnings
                log.error("%s; after %.0f hours the run would end", say, STUCK.total_seconds() / 3600)


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
