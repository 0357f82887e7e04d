"""`diagnose`: what in a model stands in the way of an exact second-order meta-gradient. Copies of the model run on a toy task,
watched: as a whole and, where that fails, by module and by operation, each on what it got."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from toolkit.algorithms import maml
from toolkit.engine import exact_attention
from toolkit.metrics import accuracy, cross_entropy, squared_error
from toolkit.norms import Norms
from toolkit.probe import TOLERANCE, failure, finite, meta_objective, meta_slopes, mismatch, tensors, total, undisturbed, words
from toolkit.recorded import difference
from toolkit.task import Batch, Task

LEVELS, MODEL, EXAMPLES = ("error", "warning", "note"), "the model", 6
CUTS = {"detach", "detach_", ".data", "item", "tolist", "numpy", "__int__", "__float__"}
LOOKS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "nonzero", "unique", "equal", "masked_select"}
ATTENTION, RECURRENT = {"scaled_dot_product_attention", "multi_head_attention_forward"}, nn.RNNBase | nn.RNNCellBase
SMALL, NORMS = "add a small number under a root, in a logarithm or to a divisor", _NormBase | nn.LayerNorm
Rows = Iterator[tuple[str, Iterable[str], str, str]]  # of a level, names, what is the matter with them, and advice


@dataclass(frozen=True)
class Finding:
    """`what` is the matter with the parameters, modules or operations `where`, and what to do. An "error" makes results wrong
    or stops a training, a "warning" may do so or costs time, a "note" is to be known."""

    level: str
    what: str
    where: str
    advice: str


def report(findings: list[Finding]) -> str:
    """One line and sentence for each finding, errors first."""
    ordered = sorted(findings, key=lambda finding: LEVELS.index(finding.level))
    return "\n".join(f"{f.level:8} {f.where}: {f.what}; {f.advice}" for f in ordered) or "nothing found"


def diagnose(model: nn.Module, inputs: tuple[int, ...], outputs: int, integer_inputs: int | None = None) -> list[Finding]:
    """What is the matter with a model for examples of shape `inputs`, which are numbers, or feature numbers below
    `integer_inputs`. It has `outputs` classes to tell apart; one output means regression.

    Neither the model nor any global random state changes. Whatever the model raises is a finding.
    """
    found: list[Finding] = []
    try:
        with undisturbed(), exact_attention(), torch.enable_grad():
            for level, names, what, advice in _examined(model, inputs, outputs, integer_inputs):
                if names := [name or MODEL for name in names]:
                    more = f" and {len(names) - 8} more" * (len(names) > 8)
                    found.append(Finding(level, what, ", ".join(names[:8]) + more, advice))
    except Exception as error:
        found.append(Finding("error", f"cannot be examined further, {words(error)}", MODEL, "mend that and look again"))
    return found


class Part:
    """A module or an operation as it was called: `where` it stands, `what` it is, and all that it can be differentiated by.
    A number that all its results share in has `first` derivatives; one that these share in has the `second`."""

    def __init__(self, where: str, what: str, call: Callable[..., Any], params: dict[str, Tensor], given: Any) -> None:
        self.where, self.what, self.call = where, what, call
        given, self.spec = pytree.tree_flatten(given)
        self.given = [t.detach().clone(memory_format=torch.contiguous_format) if isinstance(t, Tensor) else t for t in given]
        floats = {i: t for i, t in enumerate(self.given) if isinstance(t, Tensor) and t.is_floating_point()}
        self.leaves = {name: p.detach() for name, p in params.items() if p.is_floating_point()}, floats
        self.first, self.second = grad(self.value), grad(self.slope)

    def value(self, leaves: Any) -> Tensor:
        given = [leaves[1][i].clone() if i in leaves[1] else t for i, t in enumerate(self.given)]
        torch.manual_seed(0)
        with Norms("batch"):
            return total(self.call(leaves[0], *pytree.tree_unflatten(given, self.spec)))

    def slope(self, leaves: Any) -> Tensor:
        return total(self.first(leaves))


class Watch(TorchFunctionMode):
    """Runs a model once and notes by module its `parts` and, if asked, `ops` as they are called, where it is `random`, `looks`
    at values, `cuts` gradients or turns to `lower` precision; and which tensors were `touched`."""

    def __init__(self, model: nn.Module, x: Tensor, ops: bool = False) -> None:
        super().__init__()
        self.recording, self.draws = ops, partial(torch.cuda.get_rng_state, x.device) if x.is_cuda else torch.get_rng_state
        self.inside = [("", self.draws())]
        self.called, self.touched, self.parts, self.ops = set[str](), set[int](), dict[str, Part](), list[Part]()
        self.random, self.looks, self.cuts, self.lower = (dict[str, str]() for _ in range(4))
        self.out: Any = None
        self.error: Exception | None = None
        modules = list(model.named_modules())
        hooks = [m.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True) for name, m in modules]
        hooks += [m.register_forward_hook(partial(self._leave, name)) for name, m in modules]
        torch.manual_seed(0)
        try:
            with Norms("batch"), self:
                self.out = model(x)
        except Exception as error:
            self.error = error
        for hook in hooks:
            hook.remove()

    def _enter(self, name: str, module: nn.Module, *given: Any) -> None:
        def call(params: Any, args: Any, kwargs: Any) -> Any:
            buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
            return functional_call(module, {**buffers, **params}, args, kwargs)

        with torch._C.DisableTorchFunction():  # what is done here is not the model's doing
            self.inside.append((name, self.draws()))
            if name not in self.parts:
                self.parts[name] = Part(name, type(module).__name__, call, dict(module.named_parameters()), given)

    def _leave(self, name: str, *_: Any) -> None:
        with torch._C.DisableTorchFunction():
            if not torch.equal(self.inside.pop()[1], self.draws()) and not _holds(name, self.random):
                self.random[name] = "random"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, where, kwargs, given = getattr(func, "__name__", ""), self.inside[-1][0], kwargs or {}, tensors((args, kwargs))
        name = f".{getattr(func.__self__, '__name__', '')}" if name in ("__get__", "__set__") else name
        if not name.startswith(".") or name == ".data":
            self.called.add(name)
            self.touched |= {id(t) for t in given}
            if name in LOOKS or (name == "__getitem__" and any(t.dtype == torch.bool for t in given)):
                self.looks.setdefault(where, name.strip("_"))
            if any(t.requires_grad for t in given) and (name in CUTS or not torch.is_grad_enabled()):
                self.cuts.setdefault(where, name.strip("._") if name in CUTS else "no_grad")
            if self.recording:
                self.ops.append(Part(where, name, lambda _, args, kwargs: func(*args, **kwargs), {}, (args, kwargs)))
        result = func(*args, **kwargs)
        if any(t.dtype == torch.float64 for t in given) and any(t.dtype == torch.float32 for t in tensors(result)):
            self.lower.setdefault(where, name)
        return result


def untwice(part: Part) -> str:
    """What is wrong with a part, in words, as of those that follow; nothing where all is well."""
    return failure(part.second, part.leaves)


def unbatched(part: Part) -> str:
    several = vmap(part.second, randomness="different")
    both = pytree.tree_map(lambda t: torch.stack([t, 0.9 * t]), part.leaves)
    return untwice(part) or (failure(several, both) if tensors(both) else "")


def unfinite(part: Part) -> str:
    for what, function in (("result", part.value), ("derivative", part.first), ("second derivative", part.second)):
        if finite(part.leaves) and not failure(function, part.leaves) and not finite(function(part.leaves)):
            return f"no finite {what}"
    return ""


def wrong(part: Part) -> str:
    for order, of, by in (("first", part.value, part.first), ("second", part.slope, part.second)):
        if mismatch(of, by(part.leaves), part.leaves) > 10 * TOLERANCE:
            return f"wrong {order} derivative"
    return ""


def _blame(model: nn.Module, x: Tensor, test: Callable[[Part], str], otherwise: str = "") -> dict[str, str]:
    """The innermost modules that fail a test, with the operation that does in each if it is known, and what is wrong."""
    if not otherwise and not test(Watch(copy.deepcopy(model), x).parts[""]):
        return {}
    seen, found = Watch(copy.deepcopy(model), x, ops=True), dict[str, str]()
    for part in sorted(seen.parts.values(), key=lambda part: -part.where.count(".") - bool(part.where)):
        if not _holds(part.where, found) and (said := test(part)):
            ops = (f"{op.what}: {said}" for op in seen.ops if op.where == part.where and (said := test(op)))
            found[part.where] = next(ops, f"{part.what}: {said}")
    return found or {"": otherwise}


def _layers(model: nn.Module) -> Rows:
    """What modules tell without being run."""
    kinds = [(name, m, isinstance(m, _BatchNorm) and m.track_running_stats) for name, m in model.named_modules()]
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    yield "note", frozen, "frozen (requires_grad=False), so neither loop moves it", "unfreeze it if it shall learn"
    still = "batch norm in evaluation mode, but policy 'batch' (the default) takes the batch's own statistics"
    yield "warning", [n for n, m, own in kinds if own and not m.training], still, "give batch_norm='running'"
    kept = "batch norm whose running statistics stay as they are, since an update would leak from task to task (policy 'batch')"
    yield "note", [n for n, m, own in kinds if own and m.training], kept, "choose another policy by batch_norm if need be"
    yield "note", [n for n, m, _ in kinds if isinstance(m, NORMS)], "replaced by exact formulas", "nothing to do"
    yield "note", [n for n, m, _ in kinds if isinstance(m, nn.Conv2d)], "runs by the toolkit's kernels", "nothing to do"
    cuda = "on CUDA set torch.backends.cudnn.enabled = False, as cuDNN has no second derivative of it"
    yield "note", [n for n, m, _ in kinds if isinstance(m, RECURRENT)], "recurrent, so the plan is 'loop' and not vmap", cuda


def _examined(model: nn.Module, inputs: tuple[int, ...], outputs: int, vocabulary: int | None) -> Rows:
    yield from _layers(model)
    like = next((p.detach() for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    noise = torch.randn(4, EXAMPLES, *inputs, generator=torch.Generator().manual_seed(0)).to(like)
    x = noise if vocabulary is None else (noise.abs() * 1e4).long() % vocabulary
    y = torch.arange(EXAMPLES, device=like.device) % outputs if outputs > 1 else noise.flatten(2)[0, :, :1]
    tasks = Task(*(Batch(part, y.expand(2, *y.shape)) for part in x.split(2)))
    twin, given = copy.deepcopy(model), x[0].clone()
    before, seen = _state(twin), Watch(twin, given)
    got, wanted = tuple(seen.out.shape) if isinstance(seen.out, Tensor) else type(seen.out).__name__, (EXAMPLES, outputs)
    if seen.error is not None or got != wanted:
        fault = f"gives {got} for {EXAMPLES} examples" if seen.error is None else f"forward fails with {words(seen.error)}"
        yield "error", [seen.inside[-1][0]], fault, f"make it take inputs {tuple(x[0].shape)} and return a tensor {wanted}"
        return
    changed = [name for name, state in _state(twin).items() if state != before.get(name)]
    params = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    steady = torch.equal(*(out.nan_to_num() for out in (seen.out, Watch(twin, x[0].clone()).out)))
    copied = "compute with a changed copy"
    yield "error", ["inputs"] * (not given.equal(x[0])), "forward changes them in place, so later steps see others", copied
    yield "error", [n for n in changed if n in params], "forward changes this parameter in place", copied
    leaks = "forward changes this state, which leaks from task to task or, of a buffer, is dropped"
    yield "warning", [n for n in changed if n not in params], leaks, "keep no state in forward"
    yield "warning", [""] * (not steady and not changed), "passes under one seed differ", "draw from torch's own generator"
    looks = [f"{name or MODEL} ({op})" for name, op in seen.looks.items()]
    yield "warning", looks, "looks at values, which vmap and recorded plans cannot", "use torch.where, or the map 'loop'"
    excluded = "draws random numbers (dropout?), which excludes threads, recompute, recorded and compiled plans"
    yield "note", seen.random, excluded, "use the map 'vmap' or 'loop' with memory 'unroll'"
    yield "note", [""] * bool(seen.called & ATTENTION), "attention runs by its plain formula (math kernel)", "nothing to do"
    flat = [n for n, part in seen.parts.items() if part.what.startswith("BatchNorm") and part.given[0][0, 0].numel() == 1]
    yield "note", flat, "batch norm makes a constant of a batch of one example", "let inner steps see two examples or more"
    kinds = {"10 times larger": x[0] * 10, "all 0": x[0] * 0, "all 1": x[0] * 0 + 1}
    for kind in list(kinds)[vocabulary is not None :]:
        for where, said in _blame(model, kinds[kind], unfinite).items():
            yield "warning", [where], f"{said} where inputs are {kind}", SMALL
    loss = (cross_entropy if outputs > 1 else squared_error)(seen.out, y)
    slopes = torch.autograd.grad(loss, [*params.values()], allow_unused=True) if loss.requires_grad else [None] * len(params)
    lost = [name for name, slope in zip(params, slopes, strict=True) if slope is None]
    cut, by = [n for n in lost if id(params[n]) in seen.touched], [f"{op} in {n or MODEL}" for n, op in seen.cuts.items()]
    why = f"no gradient of inner or meta-loss, as it is cut off{' by ' * bool(by)}{', '.join(by)}"
    yield "error", cut, why, "let gradients pass, or set requires_grad=False"
    yield "warning", [n for n in lost if n not in cut], "no gradient of inner or meta-loss, as it is unused", "remove it"
    yield from _gradients(model, tasks, [n for n in params if n not in lost], seen, steady)


def _gradients(model: nn.Module, tasks: Task, learning: list[str], seen: Watch, steady: bool) -> Rows:
    """What a second-order step shows, in float64 if the model can."""
    double, wide = copy.deepcopy(model).double(), pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, tasks)
    if seen.random:
        double.eval()  # a mask of dropout depends on more than the seed
    low = Watch(copy.deepcopy(double), wide.support.x[0])
    exact, steady = low.error is None and not low.lower, steady and not low.random
    yield "note", low.lower or [""] * (not exact), "not in float64, so no gradient is checked by differences", "cast to x.dtype"
    model, tasks = (double, wide) if exact else (copy.deepcopy(model), tasks)
    scores = (squared_error,) * 2 if tasks.support.y.is_floating_point() else (cross_entropy, accuracy)
    learner = maml(model, loss=scores[0], metric=scores[1], inner_lr=0.01, inner_steps=2)
    x, noise = tensors(tasks)[0][0], torch.Generator().manual_seed(1)
    # Stirred, so that what starts at 0 counts; away from 0, so that what is positive stays so.
    stir = {name: torch.rand(p.shape, generator=noise).to(p) / 10 for name, p in learner.init().params.items()}
    params = {name: p + stir[name] * torch.where(p != 0, p, 1) for name, p in learner.init().params.items()}
    gradient = partial(meta_slopes, learner, params, tasks)
    if failed := failure(gradient, "loop"):
        for where, said in _blame(model, x, untwice, failed).items():
            yield "error", [where], f"the meta-gradient fails: {said}", "use what torch.func can differentiate twice"
        return
    slopes = gradient("loop")
    if not finite(slopes):
        for where, said in _blame(model, x, unfinite, "no finite meta-gradient").items():
            yield "error", [where], said, SMALL
        return
    yield "warning", [n for n in learning if not slopes[n].any()], "its meta-gradient is exactly 0", "look for dead units"
    if exact and steady and (off := mismatch(partial(meta_objective, learner, tasks), slopes, params)) > TOLERANCE:
        found = _blame(model, x, wrong)
        for where, said in (found or {"": "or the loss has jumps"}).items():
            off_by = f"the meta-gradient is off differences by {off:.0e}: {said}"
            yield "error" if found else "warning", [where], off_by, "mend the backward of it, or what hides a dependence"
    if any(isinstance(module, RECURRENT) for module in model.modules()):
        return
    failed = failure(gradient, "vmap")
    for where, said in _blame(model, x, unbatched, failed).items() if failed else ():
        if where not in seen.looks:
            yield "warning", [where], f"vmap cannot batch it: {said}", "use another operation, or the map 'loop' or 'threads'"
    if steady and not failed and (said := difference(gradient("vmap"), slopes, lambda: None)):
        yield "error", [""], f"its meta-gradient by vmap is not that by a loop: {said}", "use the map 'loop'"


def _holds(name: str, found: Iterable[str]) -> bool:
    return any(other.startswith(f"{name}." if name else "") for other in found)


def _state(model: nn.Module) -> dict[str, Any]:
    """All that a forward pass may leave behind, but what batch norm keeps, which is no part of the engine's."""
    kept: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key[0] != "_"} | module._parameters | module._buffers
        kept |= {f"{name}.{key}".strip("."): value for key, value in own.items() if not isinstance(module, _BatchNorm)}
    return {name: _print(value) for name, value in kept.items()}


def _print(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return value if isinstance(value, int | float | str) else (id(value), len(value) if hasattr(value, "__len__") else 0)
