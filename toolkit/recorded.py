"""Functions of tensors as recorded operations: traced once, replayed without Python's and autograd's work, or compiled. On a
CUDA device the replay is one graph of kernels, launched at once: those of small networks end before the next is launched.

What is recorded is what torch runs, derivatives included, so a replay gives the same numbers. A recording holds for one set of
shapes, strides and names, and for a function that does the same for all values of its tensors: one that looks at them cannot
be recorded, and one that draws random numbers should not be.
"""

import logging
import os
import re
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from toolkit.data.cache import cache_folder
from toolkit.errors import UserError
from toolkit.tape import NoPeeking, Tape, reads_host

log = logging.getLogger("toolkit")
PATIENCE, GLANCE = 120.0, 10.0  # seconds that the compiler gets, and between two words on it
CHECKED = [3 * 10**n for n in range(1, 9)]  # calls of a recording at which the function runs too


class Recorder:
    """`function(learner, *trees)` by its recording for each `layout` of trees that `prepare` was called with; else as it is.

    On a CUDA device the recordings of one recorder share the memory that their graphs keep between calls, and take turns.

    `prepare` also compares what is `judged` of the first result with that of the function itself and, where they differ, both
    with `exact`, the same in float64 (None where there is none). What cannot be recorded or compiled, or comes out wrong, runs
    as it is, with a warning. A function that has changed since, as by a number in a closure, is found out at some later calls,
    fewer and fewer: a replay of the same operations has the same bits, so that raises UserError; compiled code and a GPU round
    otherwise, so there it is a warning.
    """

    def __init__(
        self, function: Callable[..., Any], compiled: bool, exact: Callable[..., Any], judged: Callable[[Any], Any]
    ) -> None:
        self.function, self.compiled, self.exact, self.judged = function, compiled, exact, judged
        self.made: dict[Any, Recording | None] = {}
        self.calls: dict[Any, Iterator[int]] = defaultdict(partial(count, 1))
        self.pool: Any = None
        self.turn = threading.Lock()

    def prepare(self, learner: Any, *trees: Any) -> None:
        """Records for this layout, unless it is done. Not for threads: recording is the work of one."""
        if (key := layout(trees)[0]) in self.made:
            return
        self.made[key] = None
        step = "recording"
        try:
            recording, plain = written(lambda *trees: self.function(learner, *trees), *trees)
            found = recording(*trees)
            on_gpu = all(leaf.is_cuda for leaf in recording.example) and not reads_host(recording.graph)  # type: ignore[arg-type]
            if self.compiled:
                step = "torch.compile"
                recording = compiled(recording)
                found = recording(*trees)
            if on_gpu:
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                recording = captured(recording, self.pool, self.turn)
                found = recording(*trees)
            recording.example = []  # which would be kept for nothing
        except Exception as error:  # whatever they stumble on, the run can go on without it
            reason = (str(error).strip().splitlines() or [repr(error)])[0]
            avoid = "--no-compile" if self.compiled else "--no-trace"
            log.warning("%s failed (%s); going on without it, %s avoids the attempt", step, reason, avoid)
            return

        if wrong := self._wrong(found, plain, learner, *trees):
            log.warning("%s is refused: %s; going on without it", step, wrong)
            return
        self.made[key] = recording

    def _wrong(self, found: Any, plain: Any, learner: Any, *trees: Any) -> str:
        def exact() -> Any:
            result = self.exact(learner, *trees)
            return None if result is None else self.judged(result)

        return difference(self.judged(found), self.judged(plain), exact)

    def __call__(self, learner: Any, *trees: Any) -> Any:
        if not self.made:
            return self.function(learner, *trees)
        key, leaves = layout(trees)
        recording = self.made.get(key)
        if recording is None:
            return self.function(learner, *trees)
        found = recording.of_leaves(leaves)
        if next(self.calls[key]) in CHECKED and (wrong := self._wrong(found, self.function(learner, *trees), learner, *trees)):
            said = (
                f"the recorded operations are no longer those of the model, loss and rule: {wrong}; one of them depends on "
                "what changes beside its tensors, such as a number in a closure; use --no-trace, or a plan that records nothing"
            )
            if not (self.compiled or leaves[0].is_cuda):
                raise UserError(said)
            log.warning("%s (or these tasks magnify rounding, which is another in compiled code)", said)
        return found


class Recording:
    """The operations of a function, as a graph over the leaves of its arguments."""

    def __init__(self, graph: Callable[..., Any], result: Any, example: list[Tensor]) -> None:
        self.graph, self.result, self.example = graph, result, example

    def __call__(self, *trees: Any) -> Any:
        return self.of_leaves(pytree.tree_leaves(trees))

    def of_leaves(self, leaves: list[Tensor]) -> Any:
        """The function's result for arguments with these leaves."""
        with torch.no_grad():
            return pytree.tree_unflatten(self.graph(*leaves), self.result)


def record(function: Callable[..., Any], *trees: Any) -> Recording:
    """The operations that `function` runs on `trees`. Raises RuntimeError for one that looks at the values of its tensors, or
    changes tensors that it was not given."""
    return written(function, *trees)[0]


def written(function: Callable[..., Any], *trees: Any) -> tuple[Recording, Any]:
    """The same, and what the function returned."""
    leaves, given = pytree.tree_flatten(trees)
    own = [leaf.detach() for leaf in leaves]  # of a tensor that is given twice, two that can be told apart
    with warnings.catch_warnings(), NoPeeking(), Tape(own) as tape:
        warnings.simplefilter("ignore")  # of torch about its own batching rules
        returned = function(*pytree.tree_unflatten(own, given))
    results, spec = pytree.tree_flatten(returned)
    return Recording(tape.ended(results), spec, leaves), returned


def compiled(recording: Recording, mended: tuple[Path, ...] = ()) -> Recording:
    """The recording compiled, which its first call does in tens of seconds; on disk for later processes. Files there that are
    damaged are made anew, but those that were `mended` before. Raises RuntimeError when that takes longer than two minutes, or
    what torch raises where there is no compiler."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    place = "TORCHINDUCTOR_CACHE_DIR"  # set by torch as soon as it traces, to a place that is lost at a restart
    if os.environ.get(place, default_cache_dir()) == default_cache_dir():
        os.environ[place] = str(cache_folder() / "compiled")
    began, done, threads = time.perf_counter(), threading.Event(), torch.get_num_threads()
    fast = torch.compile(recording.graph, fullgraph=True, dynamic=False)
    failed: list[BaseException] = []

    def work() -> None:
        torch.set_num_threads(threads)  # which is each thread's own, and built into the code
        try:
            with torch.no_grad():
                fast(*recording.example)
        except BaseException as error:
            failed.append(error)
        done.set()

    # In a thread of its own, since a compiler cannot be interrupted: past our patience it ends unheard.
    threading.Thread(target=work, daemon=True, name="compiler").start()
    while not done.wait(GLANCE):
        passed = time.perf_counter() - began
        if passed > PATIENCE:
            raise RuntimeError(f"not done after {passed:.0f} s")
        log.info("compiling, %.0f s so far", passed)
    if failed:
        file = damaged(failed[0])
        if file is None or file in mended:
            raise failed[0]
        log.warning("the compiled file %s is damaged; compiling it anew", file)
        file.unlink()
        return compiled(recording, (*mended, file))
    log.info("compiled in %.1f s", time.perf_counter() - began)
    return Recording(fast, recording.result, recording.example)


def captured(recording: Recording, pool: Any, turn: threading.Lock) -> Recording:
    """The recording as one CUDA graph, whose memory comes from `pool`, and which runs when it has the `turn`; as it is where a
    graph cannot hold it, as where an operation waits for the device."""
    try:
        return Recording(Captured(recording.graph, recording.example, pool, turn), recording.result, recording.example)
    except RuntimeError as error:
        log.info("no CUDA graph of it (%s); its operations are launched one by one", str(error).strip().splitlines()[0])
        return recording


class Captured:
    """The operations `graph` as a CUDA graph: it reads and writes memory of its own, so arguments are copied in and results
    out. Graphs of one pool take turns, since their memory overlaps; all callers must be on the device's default stream."""

    def __init__(self, graph: Callable[..., list[Tensor]], example: list[Tensor], pool: Any, turn: threading.Lock) -> None:
        self.turn, self.replayed = turn, torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.device(example[0].device):
            self.given = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t) for t in example]
            aside = torch.cuda.Stream()  # what libraries prepare in their first call cannot be captured
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                graph(*self.given)
            torch.cuda.current_stream().wait_stream(aside)
            # Of this thread alone: others may go on with what a capture of all would forbid them. After a capture that failed
            # torch does not come back from its stream.
            back = torch.cuda.stream(torch.cuda.current_stream())
            with back, torch.cuda.graph(self.replayed, pool, capture_error_mode="thread_local"):
                self.results = graph(*self.given)

    def __call__(self, *leaves: Tensor) -> list[Tensor]:
        with self.turn, torch.cuda.device(leaves[0].device):
            torch._foreach_copy_(self.given, leaves)
            self.replayed.replay()
            return [result.clone() for result in self.results]


def damaged(error: BaseException) -> Path | None:
    """The file of the compiler's cache that could not be loaded: a process that ends while it compiles leaves half a file."""
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).resolve()
    found = re.search(re.escape(str(folder)) + r"/\S+\.so(?=: )", str(error))
    return Path(found[0]) if found and Path(found[0]).is_file() else None


def layout(tree: Any) -> tuple[Any, list[Tensor]]:
    """What a recording depends on beside values, and the leaves. The structure holds the order of names: equal shapes of others
    would be taken for one another. Strides are built into views and results, and the precision that the caller asked for into
    all of it."""
    leaves, structure = pytree.tree_flatten(tree)
    precision = [torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")]
    return (structure, *precision, tuple((leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for leaf in leaves)), leaves


def difference(found: Any, plain: Any, exact: Callable[[], Any]) -> str:
    """What is wrong with a recorded result, in words; nothing unless it is much further from float64 than the plain one is: ten
    times, plus 1e-4 of its length (1e-10 in float64). A fixed bound would refuse ill-conditioned batches, where both are
    equally rounded; only where there is no float64 result, 1e-2 of the plain one must do. `exact()`, the result in float64, is
    asked for unless the two are so close that it could say nothing else."""

    def row(tree: Any) -> Tensor:
        return torch.cat([leaf.double().flatten() for leaf in pytree.tree_leaves(tree)])

    double = pytree.tree_leaves(plain)[0].dtype == torch.float64
    a, b, slack = row(found), row(plain), 1e-10 if double else 1e-4
    if float((a - b).norm()) <= slack * float(b.norm()):
        return ""
    if (truth := exact()) is None:
        c, slack = b, slack if double else 1e-2
    else:
        c = row(truth)
    off, allowed = float((a - c).norm()), float(10 * (b - c).norm() + slack * c.norm())
    if off <= allowed or not bool(c.isfinite().all()):
        return ""
    length = float(c.norm())
    return f"its result is off by {off / length:.1e} of its length, where rounding explains {allowed / length:.1e}"
