"""Maps a learner over a batch of tasks and returns the meta-gradient: the derivative of the mean objective.

How tasks are mapped is a `Plan`; every plan gives the same gradient up to rounding. One differentiation per piece of the
batch, after the sum over its tasks, so gradients of shared parameters are never stacked per task; pieces are added in task
order, so a run repeats bit for bit.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from toolkit.allocator import keep_freed_memory, map_each_tensor
from toolkit.distributed import Share, added
from toolkit.errors import UserError
from toolkit.learner import Learner, Meta, Score
from toolkit.modules import refuse_moved, refuse_scripted_norms
from toolkit.plan import Plan, default_plan, refuse_random, unmapped
from toolkit.prefix import features, in_double, shortened, with_features
from toolkit.recorded import Recorder, layout
from toolkit.task import Task, count, take
from toolkit.tree import laid_out_like


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
    plan = plan or default_plan(learner, tasks)
    try:
        return gradient_function(learner, plan)(meta, tasks)
    except RuntimeError as error:
        if said := unmapped(error, plan):
            raise said from error
        raise


GradientFunction = Callable[..., tuple[Meta, Metrics]]


@lru_cache(maxsize=8)
def gradient_function(learner: Learner, plan: Plan) -> GradientFunction:
    """`meta_gradient` for a fixed learner and plan, as a function of (meta, tasks), with its threads or recorded code kept for
    the next call.

    The first batch decides whether the front of the model can run once per task (`prefix.shortened`). A third argument, a
    `Share`, says that the tasks are a part of a larger batch: then the result is that of the whole batch.
    """
    piece_gradient = _recomputed if plan.memory == "recompute" else _unrolled

    def of_piece(total: int, own: Learner, meta: Meta, piece: Task) -> tuple[Meta, Score]:
        with precision(plan, piece):
            grads, score = piece_gradient(own, lift_for(plan, piece), meta, piece, total)
        return pytree.tree_map(laid_out_like, meta, grads), score

    @cache
    def recorder(total: int) -> Recorder:
        work = partial(of_piece, total)
        return Recorder(work, plan.compile, partial(in_double, work), lambda out: (out[0], out[1].loss))

    ready: list[tuple[Learner, Runner]] = []
    prepared: set[Any] = set()

    def prepare(meta: Meta, tasks: Task, share: Share) -> None:
        """What only the first batch of these shapes needs."""
        _check_batch(tasks)
        if not ready:
            refuse_random(learner, plan, tasks)
            if learner.order != 0 and learner.steps:
                refuse_scripted_norms(learner.model)
            if tasks.support.y.device.type == "cpu":
                keep_freed_memory() if plan.memory == "unroll" else map_each_tensor()
            one = take(share.sample, slice(0, 1))
            own = shortened(learner, meta, one, learner.steps, partial(of_piece, 1))
            ready.append((own, runner(own, plan)))
        if plan.records:
            pieces = [*plan.pieces(share.sample), *plan.pieces(tasks)]
            for piece in (pieces[0], pieces[-1]):
                recorder(share.total).prepare(ready[0][0], meta, piece)

    def pieces_of(meta: Meta, tasks: Task, share: Share) -> Iterator[tuple[Meta, Score]]:
        work, place = recorder(share.total), share.start
        for grads, score in ready[0][1](lambda own, piece: work(own, meta, piece), plan.pieces(tasks)):
            yield grads, placed(score, place, share.total)
            place += len(score.loss)

    def gradient(meta: Meta, tasks: Task, share: Share | None = None) -> tuple[Meta, Metrics]:
        share = share or Share(0, count(tasks), added, tasks)
        with exact_layers(learner):
            if new := (key := layout((meta, tasks))[0]) not in prepared:
                prepare(meta, tasks, share)
                prepared.add(key)
            before = {name: p._version for name, p in meta.params.items()} if new else {}
            grads, (task_loss, task_metric) = share.fold(pieces_of(meta, tasks, share))
        refuse_moved(name for name, version in before.items() if meta.params[name]._version != version)
        return grads, Metrics(task_loss.mean(), task_metric.mean(), task_loss, task_metric)

    return gradient


def placed(score: Score, start: int, total: int) -> Score:
    """The scores of tasks `start`, ... among those of all `total` tasks, 0 for the others: to be added."""

    def wide(values: Tensor) -> Tensor:
        row = values.new_zeros(total)
        row[start : start + len(values)] = values.detach()
        return row

    return Score(*map(wide, score))


def _check_batch(tasks: Task) -> None:
    sizes = {leaf.shape[:1] for leaf in pytree.tree_leaves(tasks)}
    if len(sizes) != 1:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in pytree.tree_leaves(tasks))
        raise UserError(
            f"a batch of tasks needs one task axis first, equal in all tensors, but the shapes are {shapes}; use draw"
        )


Runner = Callable[[Callable[[Learner, Task], Any], Iterable[Task]], Iterator[Any]]


def runner(learner: Learner, plan: Plan) -> Runner:
    """A function (work, pieces) -> results in order; `work(learner, piece)` runs in threads where the plan says so."""
    if plan.map != "threads":
        return lambda work, pieces: (work(learner, piece) for piece in pieces)
    local = threading.local()

    def start_thread() -> None:
        # A functional call swaps parameters inside the modules, so every thread needs modules of its own.
        local.learner = replace(learner)
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(plan.workers or torch.get_num_threads(), "tasks", start_thread)

    def run(work: Callable[[Learner, Task], Any], pieces: Iterable[Task]) -> Iterator[Any]:
        # The precision around this call, which every thread has for itself.
        kinds = {kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}

        def of_piece(piece: Task) -> Any:
            with ExitStack() as stack:
                for kind, dtype in kinds.items():
                    stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
                return work(local.learner, piece)

        return pool.map(of_piece, pieces)

    return run


def precision(plan: Plan, tasks: Task) -> Any:
    """The precision of convolutions and matrix products that the plan asks for."""
    if plan.autocast is None:
        return nullcontext()
    return torch.autocast(tasks.support.y.device.type, getattr(torch, plan.autocast), cache_enabled=False)


def exact_attention() -> Any:
    """Attention by its plain formula: the fused kernels have no second derivative (on the CPU either)."""
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def unrounded() -> Iterator[None]:
    """Convolutions of float32 in float32: by torch's default cuDNN rounds their factors to 10 bits (TF32). What else was asked
    of torch stays."""
    cudnn: Any = torch.backends.cudnn
    asked = {cudnn.fp32_precision, getattr(torch.backends, "fp32_precision", "none")} != {"none"}
    if asked or {cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision} != {"tf32"}:
        yield
        return
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = True


def exact_layers(learner: Learner) -> ExitStack:
    """Attention and recurrent layers in a form that can be differentiated twice, which cuDNN's recurrent kernels cannot be, and
    convolutions unrounded."""
    stack = ExitStack()
    stack.enter_context(exact_attention())
    if _recurs_by_cudnn(learner):
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
    stack.enter_context(unrounded())
    return stack


def switched(learner: Learner, task: Task) -> str:
    """What `exact_layers` switches for a learner, in words; "" for nothing."""
    attends = learner.observe(task.support.x).attention
    found = ["attention by its plain formula"] if attends else []
    found += ["recurrent layers without cuDNN"] if _recurs_by_cudnn(learner) else []
    return f"{' and '.join(found)}, since the fused kernels cannot be differentiated twice" if found else ""


def _recurs_by_cudnn(learner: Learner) -> bool:
    return torch.backends.cudnn.is_available() and any(isinstance(m, nn.RNNBase) for m in learner.model.modules())


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


def _unrolled(learner: Learner, lift: Lift, meta: Meta, tasks: Task, share: int = 1) -> tuple[Meta, Score]:
    """The gradient of the sum of the objectives over `share`, and the scores."""

    def objective(meta: Meta, task: Task) -> tuple[Tensor, Score]:
        task = with_features(task, features(learner, meta, task))
        return learner.objective(learner, meta, learner.path(meta, task.support), task)

    def total(meta: Meta) -> tuple[Tensor, Score]:
        values, scores = lift(objective, (None, 0))(meta, tasks)
        return values.sum() / share, scores

    return grad(total, has_aux=True)(meta)  # type: ignore[no-any-return]


def _recomputed(learner: Learner, lift: Lift, meta: Meta, tasks: Task, share: int = 1) -> tuple[Meta, Score]:
    """The same by the adjoint sweep: forward without a graph, keeping the path; then back, one step's graph at a time."""
    front = lift(partial(features, learner), (None, 0))
    begin = lift(learner.begin, (None, 0))
    steps = [lift(partial(learner.step, k=k), (None, 0, 0)) for k in range(learner.steps)]
    judge = lift(lambda meta, path, task: learner.objective(learner, meta, path, task), (None, 0, 0))

    def total(meta: Meta, shown: Any, path: list[Any]) -> tuple[Tensor, Score]:
        values, scores = judge(meta, path, with_features(tasks, shown))
        return values.sum() / share, scores

    def start(meta: Meta, shown: Any) -> Any:
        return begin(meta, with_features(tasks, shown).support)

    def step(k: int, meta: Meta, shown: Any, carry: Any) -> Any:
        return steps[k](meta, carry, with_features(tasks, shown).support)

    with torch.no_grad():
        shown = front(meta, tasks)
        carries = [start(meta, shown)]
        for k in range(learner.steps):
            carries.append(step(k, meta, shown, carries[-1]))
    value, pull, scores = vjp(total, meta, shown, [carry.fast for carry in carries], has_aux=True)  # type: ignore[misc]
    *sums, path_grads = pull(torch.ones_like(value))
    del pull, value  # and with them the graph of the query set, which is the largest
    adjoint = carries[-1]._replace(fast=path_grads[-1], state=pytree.tree_map(torch.zeros_like, carries[-1].state))
    for k in reversed(range(learner.steps)):
        carries.pop()
        _, pull = vjp(partial(step, k), meta, shown, carries[-1])  # type: ignore[misc]
        *own, adjoint = pull(adjoint)
        sums = _add(sums, own)
        adjoint = adjoint._replace(fast=_add(adjoint.fast, path_grads[k]))
    _, pull = vjp(start, meta, shown)  # type: ignore[misc]
    grads, to_shown = _add(sums, list(pull(adjoint)))
    if not pytree.tree_leaves(shown):
        return grads, scores
    _, pull = vjp(lambda meta: front(meta, tasks), meta)  # type: ignore[misc]
    return _add(grads, pull(to_shown)[0]), scores


def _add(a: Any, b: Any) -> Any:
    return pytree.tree_map(torch.add, a, b)
