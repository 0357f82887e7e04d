"""What a meta-gradient and an adapted task cost, from shapes alone: operations, memory, bytes to store. Nothing is computed.

A learner is traced on torch's meta device, whose tensors have a shape and no numbers, so a model needs no memory and may be
larger than this machine. What runs is what the engine runs for one task, derivatives included, operation by operation.

Operations are those of matrix products and convolutions, two for a multiplication and its addition, by the formulas of torch's
flop counter; elementwise work is not counted, as is usual. Memory is that of tensors, exactly. A process on a CPU holds more,
since the C library's allocator cannot use every gap again: 1.2 to 1.9 times as much was seen, and 1.05 with the environment
variable MALLOC_MMAP_THRESHOLD_=65536, at a quarter to a half more time.
"""

import copy
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.engine import exact_attention, gradient_function
from toolkit.learner import Learner, Meta
from toolkit.plan import Plan
from toolkit.prefix import features, shortened, with_features
from toolkit.task import Batch, Task
from toolkit.tree import Params

log = logging.getLogger("toolkit")
MANY = 6  # inner steps, after which each takes as many operations as the one before
Memory = Literal["unroll", "recompute"]


@dataclass
class Kind:
    """An operation of torch with arguments of these shapes, how often it ran, and how many operations one takes."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    operations: int
    times: int = 0


@dataclass
class Seen:
    """What work was seen to do: its `operations`; the most bytes of tensors that it held at once beyond those that were there
    before, `peak`; and, where asked for, all its operations of torch by kind, without those that only look at a tensor."""

    operations: int = 0
    peak: int = 0
    kinds: dict[Any, Kind] = field(default_factory=dict)


class Watch(TorchDispatchMode):
    """While active, notes what torch runs in this thread, whatever differentiates or maps it. `held` are the tensors that are
    there already."""

    def __init__(self, held: Iterable[Tensor] = (), by_kind: bool = False) -> None:
        from torch.utils.flop_counter import flop_registry  # takes a while

        super().__init__()
        self.seen, self.by_kind, self.live = Seen(), by_kind, 0
        self.formulas: dict[Any, Callable[..., int]] = {**flop_registry, torch.ops.aten.convolution_backward: _convolution_back}
        self.sizes = dict.fromkeys((tensor.untyped_storage()._cdata for tensor in held), 0)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, in seconds, only to leave this class alone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out, before = func(*args, **kwargs), len(self.sizes)
        formula = self.formulas.get(func._overloadpacket)
        operations = formula(*args, **kwargs, out_val=out) if formula else 0
        self.seen.operations += operations
        for tensor in (out,) if isinstance(out, Tensor) else out if isinstance(out, list | tuple) else ():
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        if self.by_kind and (len(self.sizes) > before or func._schema.is_mutable):
            self._file(func, args, kwargs, operations)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += self.sizes[key]
            self.seen.peak = max(self.seen.peak, self.live)
            weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)

    def _file(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operations: int) -> None:
        leaves = pytree.tree_map(lambda a: (a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a, (args, kwargs))
        key = repr((func, leaves))
        if key not in self.seen.kinds:
            self.seen.kinds[key] = Kind(func, pytree.tree_map(_like, args), pytree.tree_map(_like, kwargs), operations)
        self.seen.kinds[key].times += 1


def _like(leaf: Any) -> Any:
    """A tensor's shape and strides alone, so that keeping it does not keep the tensor."""
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta") if isinstance(leaf, Tensor) else leaf


def _convolution_back(slope: Tensor, x: Tensor, weight: Tensor, *rest: Any, out_val: Any) -> int:
    """Each of the two gradients takes as many products as the convolution itself. (torch's own formula takes a grouped one's
    weight gradient for that of a dense one.)"""
    *_, transposed, _, _, wanted = rest
    batch, _, *places = x.shape if transposed else slope.shape
    return int(sum(wanted[:2]) * 2 * batch * torch.Size(places).numel() * weight.numel())


def of_meta_gradient(
    learner: Learner, task: Task, memory: Memory = "unroll", meta: Meta | None = None, by_kind: bool = False
) -> Seen:
    """What the meta-gradient of one `task` costs, whose inputs may be real: only their shapes count. A batch of tasks takes so
    many times the operations. Raises what torch raises where shapes do not tell what a model does, as of one that looks at
    values."""
    own, task, meta = _as_shapes(learner, task, meta)
    return _traced(own, task, meta, memory, by_kind)


def of_adapting(learner: Learner, task: Task, steps: int, meta: Meta | None = None, by_kind: bool = False) -> Seen:
    """What it costs to adapt to one test `task` by `steps` inner steps and to predict its query set; see `of_meta_gradient`."""
    own, task, meta = _as_shapes(replace(learner, training=False), task, meta)
    return _adapted(own, task, meta, steps, by_kind)


def operations(learner: Learner, task: Task, memory: Memory, tasks: int = 1) -> int | None:
    """The operations of the meta-gradient of so many tasks like this one, counted for one of them: from shapes, of a real one
    where shapes do not tell, None where that fails too."""

    def counted(steps: int) -> int | None:
        few = learner if steps == learner.steps else replace(learner, steps=steps)
        return _counted(few, task, None, lambda own, task, meta: _traced(own, task, meta, memory))

    one = _along(counted, learner, learner.steps)
    return None if one is None else tasks * one


def adapting_operations(learner: Learner, task: Task, steps: int, meta: Meta | None = None) -> int | None:
    """The same of adapting to one test task and predicting its query set."""
    judged = replace(learner, training=False)

    def counted(steps: int) -> int | None:
        return _counted(judged, task, meta, lambda own, task, meta: _adapted(own, task, meta, steps))

    return _along(counted, judged, steps)


def _along(counted: Callable[[int], int | None], learner: Learner, steps: int) -> int | None:
    """The operations of `steps` inner steps. Of many that are alike, as our own parts make them, a few tell those of all."""
    alike = learner.order in (None, 0) and learner.batch is None and not any(changes for _, changes in learner.phases)
    if alike and steps > MANY + 2 and all(map(_ours, (learner.rule, learner.inner, learner.start, learner.objective))):
        try:
            few = [counted(MANY + i) for i in range(3)]
        except Exception:  # of a part that fits one number of steps alone, such as weights for each
            few = [None]
        counts = [count for count in few if count is not None]
        if len(counts) == 3 and counts[1] - counts[0] == counts[2] - counts[1]:
            return counts[0] + (steps - MANY) * (counts[1] - counts[0])
    return counted(steps)


def _ours(part: Any) -> bool:
    """Whether a part of a learner is the toolkit's own, down to the parts that it is made of."""
    inner = [getattr(part, "rule", None), *(rule for _, rule in getattr(part, "rules", ()))]
    home = getattr(part, "__module__", "") or ""
    return home.startswith("toolkit.") and all(_ours(each) for each in inner if each is not None)


def _counted(learner: Learner, task: Task, meta: Meta | None, work: Callable[[Learner, Task, Meta], Seen]) -> int | None:
    for place in (_as_shapes, _as_it_is):
        try:
            return work(*place(learner, task, meta)).operations
        except Exception as error:  # a run that is done shall not fail for its bookkeeping
            log.debug("operations are not counted by %s: %s", place.__name__, error)
    return None


def _as_shapes(learner: Learner, task: Task, meta: Meta | None) -> tuple[Learner, Task, Meta]:
    """Learner, task and meta-parameters on the meta device. The learner's own model stays as it is, and is not copied."""
    tensors = (*learner.model.parameters(), *learner.model.buffers())
    shared: dict[int, Any] = {id(t): _shape(t) for t in tensors}
    own = replace(learner, model=copy.deepcopy(learner.model, shared))
    return own, pytree.tree_map(_shape, task), pytree.tree_map(_shape, meta or own.init())


def _as_it_is(learner: Learner, task: Task, meta: Meta | None) -> tuple[Learner, Task, Meta]:
    return learner, task, meta or learner.init()


def _shape(tensor: Tensor) -> Tensor:
    bare = tensor.detach().to("meta")
    return nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare


def _traced(learner: Learner, task: Task, meta: Meta, memory: Memory, by_kind: bool = False) -> Seen:
    batch: Task = pytree.tree_map(lambda t: t.unsqueeze(0), task)

    def work(own: Learner) -> Seen:
        gradient = gradient_function.__wrapped__(own, Plan("loop", memory=memory))
        if memory == "recompute":
            gradient(meta, batch)  # the first call also looks at the model
        with _watching(meta, batch, own, by_kind) as watch:
            gradient(meta, batch)
        return watch.seen

    return _by_engine(learner, task, learner.steps, work)


def _adapted(learner: Learner, task: Task, meta: Meta, steps: int, by_kind: bool = False) -> Seen:
    if learner.batch_norm == "per_step" and not meta.stats:
        meta = _with_statistics(learner, task, meta)

    def work(own: Learner) -> Seen:
        with torch.no_grad(), exact_attention(), _watching(meta, task, own, by_kind) as watch:
            shown = with_features(task, features(own, meta, task))
            *_, fast = own.path(meta, shown.support, steps)
            own.predict(meta, fast, shown.query.x, shown.support.x, steps)
        return watch.seen

    return _by_engine(learner, task, steps, work)


@torch.no_grad()
def _with_statistics(learner: Learner, task: Task, meta: Meta) -> Meta:
    """With statistics of every point of the path, which only `calibrate` measures on many tasks."""
    own = replace(learner, training=True)
    seen = [own.observed(meta, fast, task.query.x, k) for k, fast in enumerate(own.path(meta, task.support))]
    return meta._replace(stats={name: tensor for each in seen for name, tensor in each.items()})


def _nothing(learner: Learner, meta: Meta, one: Task) -> list[Tensor]:
    return []


def _by_engine(learner: Learner, task: Task, steps: int, work: Callable[[Learner], Seen]) -> Seen:
    """The work of the learner that the engine would take, whose front may run once per task. The engine compares numbers to
    know whether it may; here there are none."""
    one = pytree.tree_map(lambda tensor: tensor.unsqueeze(0), task)
    own = shortened(learner, Meta({}, {}), one, steps, _nothing)
    try:
        return work(own)
    except Exception:
        if own is learner:
            raise
        return work(learner)


@contextmanager
def _watching(meta: Meta, task: Task, learner: Learner, by_kind: bool) -> Iterator[Watch]:
    held = (*pytree.tree_leaves((meta, task)), *learner.model.parameters(), *learner.model.buffers())
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices), Watch(held, by_kind) as watch:
        yield watch


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors, each counted once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def model_bytes(learner: Learner) -> int:
    """The bytes of the shared model: its parameters, frozen ones too, and its buffers."""
    return stored_bytes((*learner.model.parameters(), *learner.model.buffers()))


def task_bytes(learner: Learner, support: Batch | None = None) -> int:
    """The bytes that a task has for itself, to be stored for each adapted task: what the inner loop moves, as large as it is
    for such a `support` set where one is given."""
    return stored_bytes(own_weights(learner, support).values())


def own_weights(learner: Learner, support: Batch | None = None) -> Params:
    """What a task has for itself, as its path begins: by the support set, which a start may keep (`starts.Memory`)."""
    if support is None:
        params = dict(learner.model.named_parameters())
        return {name: params[name] for name in learner.adapted_names}
    with torch.no_grad(), torch.random.fork_rng(), exact_attention():
        return learner.begin(learner.init(), support).fast
