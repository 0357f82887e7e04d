"""Maps a learner over a batch of tasks and returns the meta-gradient: the derivative of the mean objective.

How tasks are mapped is a `Plan`; every plan gives the same gradient up to rounding. One differentiation per piece of the
batch, after the sum over its tasks, so gradients of shared parameters are never stacked per task; pieces are added in task
order, so a run repeats bit for bit.
"""

import copy
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from toolkit.errors import UserError, unknown
from toolkit.learner import Learner, Meta, Observed, Score
from toolkit.task import Task, count, take

log = logging.getLogger("toolkit")
R = TypeVar("R")
MAPS, MEMORIES = ("vmap", "loop", "threads"), ("unroll", "recompute")
# Measured for conv4 on 28x28 images: tasks of 10 images are fastest eight in a piece, of 30 four, of 80 alone.
PIXELS_PER_PIECE = 100_000


@dataclass(frozen=True)
class Plan:
    """How a learner is mapped over a batch of tasks.

    `map`      "vmap" (all tasks of a piece in one vectorised pass), "loop" (one by one), or "threads" (pieces in parallel, one
               intra-op thread each; best for convolutions on a CPU).
    `chunk`    tasks per piece: all with "vmap" by default, 1 otherwise. Smaller pieces need less memory.
    `memory`   "unroll" keeps the graph of all inner steps; "recompute" keeps only the path of fast weights and rebuilds each
               step's graph on the way back: memory nearly flat in the number of inner steps, the gradient exact.
    `compile`  compiles the meta-gradient of a piece with `torch.compile`: tens of seconds once, then about ten times faster
               for small networks.
    `workers`  threads of "threads"; by default as many as torch uses.
    """

    map: Literal["vmap", "loop", "threads"] = "vmap"
    chunk: int | None = None
    memory: Literal["unroll", "recompute"] = "unroll"
    compile: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        for kind, value, known in (("map", self.map, MAPS), ("memory", self.memory, MEMORIES)):
            if value not in known:
                raise unknown(f"{kind} of a plan", value, known)
        if self.workers is not None and self.workers < 1:
            raise UserError(f"workers is {self.workers}; give 1 thread or more, or None")
        if self.chunk is not None and self.chunk < 1:
            raise UserError(f"chunk is {self.chunk}; give 1 task or more per piece, or None")
        if self.map == "loop" and self.chunk not in (None, 1):
            raise UserError(f"map 'loop' takes tasks one by one, but chunk is {self.chunk}; use map 'vmap' with this chunk")
        if self.compile and self.map == "threads":
            raise UserError("a compiled plan cannot run in threads; use map 'vmap' or compile=False")

    def pieces(self, tasks: Task) -> Iterator[Task]:
        """The batch of tasks cut into batches of at most `chunk` tasks."""
        total = count(tasks)
        size = self.chunk or (total if self.map == "vmap" else 1)
        return (take(tasks, slice(i, i + size)) for i in range(0, total, size))


def default_plan(learner: Learner, tasks: Task) -> Plan:
    """The plan for a learner and a batch like `tasks` when none is given.

    Vmap in general; for convolutions on a CPU threads with pieces of a few tasks, since a wide vmap there costs memory and
    time; a loop for recurrent layers, which vmap cannot map.
    """
    modules = list(learner.model.modules())
    if any(isinstance(module, nn.RNNBase | nn.RNNCellBase) for module in modules):
        return Plan("loop")
    convolutional = any(isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) for module in modules)
    dropout = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0 for m in modules)
    if tasks.support.y.device.type != "cpu" or not convolutional or dropout:
        return Plan("vmap")
    pixels = sum(leaf.numel() for leaf in pytree.tree_leaves((tasks.support.x, tasks.query.x))) // count(tasks)
    return Plan("threads", chunk=max(1, min(8, PIXELS_PER_PIECE // pixels)))


class Metrics(NamedTuple):
    """`loss` and `metric`: query means over the tasks, scalars; `task_loss`, `task_metric`: shape (tasks,)."""

    loss: Tensor
    metric: Tensor
    task_loss: Tensor
    task_metric: Tensor


def meta_gradient(learner: Learner, meta: Meta, tasks: Task, plan: Plan | None = None) -> tuple[Meta, Metrics]:
    """The gradient of the mean objective over a batch of tasks, shaped like `meta`, and the query scores behind it.

    Exact for every rule: second derivatives are dropped only where the learner's `order` says so. Without a plan
    `default_plan` chooses.
    """
    return gradient_function(learner, plan or default_plan(learner, tasks))(meta, tasks)


@lru_cache(maxsize=8)
def gradient_function(learner: Learner, plan: Plan) -> Callable[[Meta, Task], tuple[Meta, Metrics]]:
    """`meta_gradient` for a fixed learner and plan, with its threads or compiled code kept for the next call."""
    piece_gradient = _recomputed if plan.memory == "recompute" else _unrolled

    def of_piece(own: Learner, meta: Meta, piece: Task) -> tuple[Meta, Score]:
        return piece_gradient(own, lift_for(plan, piece), meta, piece)

    if plan.compile:
        of_piece = _checked(torch.compile(of_piece, fullgraph=True), of_piece)
    run = runner(learner, plan)

    observed: list[Observed] = []

    def gradient(meta: Meta, tasks: Task) -> tuple[Meta, Metrics]:
        _check_batch(tasks)
        if not observed:
            observed.append(learner.observe(take(tasks, 0).support.x))
            if observed[0].random and (plan.map == "threads" or plan.memory == "recompute" or plan.compile):
                raise UserError(
                    "the model draws random numbers (dropout?), which threads, recompute and compiled code cannot repeat; "
                    "use map 'vmap' or 'loop' with memory 'unroll' and no compile"
                )
        total, grads, scores = count(tasks), None, []
        with exact_attention():
            for piece_grads, score in run(lambda own, piece: of_piece(own, meta, piece), plan.pieces(tasks)):
                grads = piece_grads if grads is None else _add(grads, piece_grads)
                scores.append(score)
        task_loss, task_metric = (torch.cat(values).detach() for values in zip(*scores, strict=True))
        mean = pytree.tree_map(lambda tensor: tensor / total, grads)
        return mean, Metrics(task_loss.mean(), task_metric.mean(), task_loss, task_metric)

    return gradient


def _check_batch(tasks: Task) -> None:
    sizes = {leaf.shape[:1] for leaf in pytree.tree_leaves(tasks)}
    if len(sizes) != 1:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in pytree.tree_leaves(tasks))
        raise UserError(
            f"a batch of tasks needs one task axis first, equal in all tensors, but the shapes are {shapes}; use draw"
        )


def runner(learner: Learner, plan: Plan) -> Callable[[Callable[[Learner, Task], R], Iterator[Task]], Iterator[R]]:
    """A function (work, pieces) -> results in order; `work(learner, piece)` runs in threads where the plan says so."""
    if plan.map != "threads":
        return lambda work, pieces: (work(learner, piece) for piece in pieces)
    local = threading.local()

    def start_thread() -> None:
        # A functional call swaps parameters inside the modules, so every thread needs modules of its own.
        local.learner = replace(learner)
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(plan.workers or torch.get_num_threads(), "tasks", start_thread)
    return lambda work, pieces: pool.map(lambda piece: work(local.learner, piece), pieces)


def exact_attention() -> Any:
    """Attention by its plain formula: the fused kernels have no second derivative (on the CPU either)."""
    return sdpa_kernel(SDPBackend.MATH)


Lift = Callable[..., Callable[..., Any]]


def lift_for(plan: Plan, piece: Task) -> Lift:
    return lift_one if plan.map != "vmap" and count(piece) == 1 else lift_vmap


def lift_vmap(function: Callable[..., Any], in_dims: tuple[int | None, ...]) -> Callable[..., Any]:
    """`function` of one task as a function of a batch of tasks, vectorised; random layers differ from task to task."""
    return vmap(function, in_dims=in_dims, randomness="different")


def lift_one(function: Callable[..., Any], in_dims: tuple[int | None, ...]) -> Callable[..., Any]:
    """The same for a batch that holds a single task, without the cost of vectorising."""

    def lifted(*arguments: Any) -> Any:
        single = [a if dim is None else take(a, 0) for a, dim in zip(arguments, in_dims, strict=True)]
        return pytree.tree_map(lambda tensor: tensor.unsqueeze(0), function(*single))

    return lifted


def _unrolled(learner: Learner, lift: Lift, meta: Meta, tasks: Task) -> tuple[Meta, Score]:
    def objective(meta: Meta, task: Task) -> tuple[Tensor, Score]:
        return learner.objective(learner, meta, learner.path(meta, task.support), task)

    def total(meta: Meta) -> tuple[Tensor, Score]:
        values, scores = lift(objective, (None, 0))(meta, tasks)
        return values.sum(), scores

    return grad(total, has_aux=True)(meta)  # type: ignore[no-any-return]


def _recomputed(learner: Learner, lift: Lift, meta: Meta, tasks: Task) -> tuple[Meta, Score]:
    """The adjoint sweep: forward without a graph, keeping the path; then back, one step's graph at a time."""
    begin = lift(learner.begin, (None, 0))
    steps = [lift(partial(learner.step, k=k), (None, 0, 0)) for k in range(learner.steps)]
    judge = lift(lambda meta, path, task: learner.objective(learner, meta, path, task), (None, 0, 0))

    def total(meta: Meta, path: list[Any]) -> tuple[Tensor, Score]:
        values, scores = judge(meta, path, tasks)
        return values.sum(), scores

    with torch.no_grad():
        carries = [begin(meta, tasks.support)]
        for k in range(learner.steps):
            carries.append(steps[k](meta, carries[-1], tasks.support))
    value, pull, scores = vjp(total, meta, [carry.fast for carry in carries], has_aux=True)  # type: ignore[misc]
    grads, path_grads = pull(torch.ones_like(value))
    adjoint = carries[-1]._replace(fast=path_grads[-1], state=pytree.tree_map(torch.zeros_like, carries[-1].state))
    for k in reversed(range(learner.steps)):
        _, pull = vjp(lambda meta, carry, k=k: steps[k](meta, carry, tasks.support), meta, carries[k])  # type: ignore[misc]
        own, adjoint = pull(adjoint)
        grads = _add(grads, own)
        adjoint = adjoint._replace(fast=_add(adjoint.fast, path_grads[k]))
        carries.pop()
    _, pull = vjp(lambda meta: begin(meta, tasks.support), meta)  # type: ignore[misc]
    return _add(grads, pull(adjoint)[0]), scores


def _add(a: Any, b: Any) -> Any:
    return pytree.tree_map(torch.add, a, b)


def _checked(compiled: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, compared with `eager` on its first call; where it cannot be compiled, `eager` with a warning."""
    chosen: list[Callable[..., Any]] = []

    def function(own: Learner, meta: Meta, piece: Task) -> Any:
        if chosen:
            return chosen[0](own, meta, piece)
        try:
            found = compiled(own, meta, piece)
        except Exception as error:  # whatever the compiler stumbles on, the run can go on without it
            reason = (str(error).strip().splitlines() or [repr(error)])[0]
            log.warning("torch.compile failed (%s); going on without it, --no-compile avoids the attempt", reason)
            chosen.append(eager)
            return eager(own, meta, piece)
        _compare(found, eager(own, meta, piece), _in_double(eager, own, meta, piece))
        chosen.append(compiled)
        return found

    return function


def _in_double(eager: Callable[..., Any], own: Learner, meta: Meta, piece: Task) -> Any:
    """`eager` in float64; None when the model cannot run so (a cast in it, a device without float64)."""

    def double(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    learner = replace(own, model=copy.deepcopy(own.model).double())
    try:
        return eager(learner, pytree.tree_map(double, meta), pytree.tree_map(double, piece))
    except (RuntimeError, TypeError):
        return None


def _compare(compiled: Any, eager: Any, exact: Any) -> None:
    """Raises UserError when the compiled gradient or loss is much further from float64 than the eager one is: ten times, plus
    1e-4 of its size (1e-10 in float64). A fixed bound would refuse ill-conditioned batches, where both are equally rounded;
    only where there is no float64 result, 1e-2 against the eager one must do. The metric may jump, so it is left out."""
    sides = [pytree.tree_leaves((grads, score.loss)) for grads, score in (compiled, eager, exact or eager)]
    for a, b, c in zip(*sides, strict=True):
        slack = 1e-10 if b.dtype == torch.float64 else 1e-4 if exact else 1e-2
        off = float((a.double() - c).abs().max())
        allowed = 10 * float((b.double() - c).abs().max()) + slack * (1 + float(c.abs().max()))
        if not off <= allowed and bool(c.isfinite().all()):
            raise UserError(
                f"the compiled meta-gradient is off by {off:.1e} where rounding explains {allowed:.1e}; "
                "use --no-compile and report this model"
            )
