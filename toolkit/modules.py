"""Operations on modules: which parameters a selection means, a model's blocks, copies that share weights, a model without its
head or in two parts."""

import copy
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from toolkit.errors import UserError
from toolkit.tree import Selection, matches

SHOWN = 12  # names in a sentence; of more, only the first few


def select(model: nn.Module, adapts: Selection, said: str | None = None) -> tuple[str, ...]:
    """The names of the trained parameters that `adapts` selects; a tied parameter is selected by any of its names. `said` is
    how an error calls it."""
    trained = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    chosen: set[int] = set()
    for pattern in adapts if isinstance(adapts, tuple) else (adapts,):
        found = {id(p) for name, p in trained if matches(name, pattern)}
        if not found:
            raise _nothing([name for name, _ in trained], pattern, said)
        chosen |= found
    return tuple(name for name, p in model.named_parameters() if id(p) in chosen)


def _nothing(trained: list[str], pattern: str | Callable[[str], bool], said: str | None) -> UserError:
    what, near = said or "adapts, a function of names,", list[str]()
    if isinstance(pattern, str):
        what = said or f"adapts={pattern!r}"
        if len(trained) > SHOWN:
            known = {part: f"*{part}*" for name in trained for part in name.split(".")}
            known |= {name.partition(".")[0]: f"{name.partition('.')[0]}.*" for name in trained if "." in name}
            odd = [word for word in re.split(r"[.*?]+", pattern) if not any(word in name for name in trained)]
            near = [repr(known[found]) for word in odd for found in get_close_matches(word, known, n=2)]
    hint = f"; near it are {', '.join(near)}" if near else ""
    return UserError(f"{what} matches no trained parameter{hint}; the model has {listed(trained)}")


def listed(names: Iterable[str]) -> str:
    """Names in a sentence: all, or of many the first few and how many more."""
    names = list(names)
    if len(names) <= SHOWN:
        return ", ".join(names) or "none"
    return f"{', '.join(names[: SHOWN // 2])} and {len(names) - SHOWN // 2} more"


def unlearned(model: nn.Module) -> dict[str, Tensor]:
    """What of a model is in no checkpoint, since no loop moves it: frozen weights and buffers, by name."""
    state = model.state_dict(keep_vars=True).items()  # which may hold other things than tensors
    return {name: tensor for name, tensor in state if isinstance(tensor, Tensor) and not tensor.requires_grad}


def blocks(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's blocks, first to last: layers of a transformer, residual blocks, blocks of conv4.

    They are the modules of that type of which one list of the model (`nn.Sequential`, `nn.ModuleList`, `nn.ModuleDict`) holds
    most, two at least, wherever they stand in such lists. Where there are only lists within lists, they are the entries of the
    longest; without any, the layers with weights of their own.
    """
    lists = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    entries = [
        (name, f"{name}.{key}".lstrip("."), type(child))
        for name, module in model.named_modules()
        if isinstance(module, lists)
        for key, child in module.named_children()
        if any(True for _ in child.parameters()) and any(True for _ in child.children())
    ]
    most = Counter((place, kind) for place, _, kind in entries)
    ranked = sorted(most, key=lambda one: (not issubclass(one[1], lists), most[one]), reverse=True)
    place, kind = next((one for one in ranked if most[one] > 1), ("", None))
    if kind is None:
        return tuple(name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False)))
    found = [name for where, name, own in entries if own is kind and (where == place or not issubclass(kind, lists))]
    return tuple(name for name in found if not any(name.startswith(f"{other}.") for other in found))


class Reached(Exception):
    """The head of a model is reached, with this input."""


class _End(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise Reached(x)


def without_head(model: nn.Module, head: str) -> nn.Module | None:
    """A copy of the model that ends where its layer `head` would begin, for `reached`; None when there is no layer of this
    name."""
    if head not in dict(model.named_modules()) or not head:
        return None
    body = copy_modules(model)
    body.set_submodule(head, _End())
    return body


def reached(call: Callable[[], object], head: str) -> Tensor:
    """What the head gets in a `call` of a model `without_head`, whatever the model would do behind it. Raises UserError where
    its forward does not come by there."""
    try:
        call()
    except Reached as found:
        return found.args[0]  # type: ignore[no-any-return]
    raise UserError(f"the model does not use its layer {head!r}, so that is no head; name the last linear layer with head=")


def in_evaluation(model: nn.Module) -> nn.Module:
    """The model, its modules marked as in evaluation mode. Not by `eval()`, in which a module may change its weights, as some
    adapters do, which are shared."""
    for module in model.modules():
        module.training = False
    return model


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Attributes that modules set meanwhile are put back."""
    plain = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]  # which lie elsewhere
    before = [(module.__dict__, dict(module.__dict__)) for module in plain]
    try:
        yield
    finally:
        for now, own in before:
            now.clear()
            now.update(own)


def copy_modules(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares the tensors of `model`. Swapping parameters in it leaves `model` alone. Raises
    UserError for a layer that cannot be copied, or not such that the copy works with its own weights."""
    if lazy := [name for name, p in (*model.named_parameters(), *model.named_buffers()) if is_lazy(p)]:
        raise UserError(f"weights of the model have no size yet ({listed(lazy)}); call it once with an example before")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    _refuse_closures(model, {*shared, *map(id, model.modules())})
    try:
        copied = copy.deepcopy(model, shared)
        for module in copied.modules():
            if isinstance(module, nn.TransformerEncoder):
                # Else torch goes over to nested tensors in evaluation, which have other results and cannot be mapped.
                module.enable_nested_tensor = module.use_nested_tensor = False
        return copied
    except RuntimeError as error:  # of tensors that a layer computed and keeps
        raise UserError(
            f"a layer of the model cannot be copied ({str(error).splitlines()[0]}); for torch.nn.utils.weight_norm use "
            "torch.nn.utils.parametrizations.weight_norm"
        ) from error


def _refuse_closures(model: nn.Module, own: Container[int]) -> None:
    """Raises UserError for a function in a module, or a hook of it, that holds on to modules or tensors of the model: it would
    go on with those in every copy."""
    for name, module in model.named_modules():
        if type(module).__setstate__ is not nn.Module.__setstate__:
            continue  # which sees to its copies itself
        for what in (*vars(module).values(), *module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if isinstance(what, FunctionType) and any(id(getattr(one, "__self__", one)) in own for one in _held(what)):
                place = f"module {name!r}" if name else "the model"
                raise UserError(
                    f"{place} keeps a function ({what.__qualname__}) that holds on to the model's own layers or weights, and "
                    "would use those in place of adapted ones; make it a method"
                )


def _held(function: FunctionType) -> Iterator[object]:
    yield from function.__defaults__ or ()
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty one
            yield cell.cell_contents


def refuse_scripted_norms(model: nn.Module) -> None:
    """Raises UserError for norms in scripted modules, into which nothing can look: torch.func gets their second derivative
    wrong, and nobody can put the right formula in its place."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and "_norm(" in str(getattr(module, "inlined_graph", "")):
            raise UserError(
                f"the scripted module {name!r} has a norm, whose second derivative torch gets wrong where nothing can look "
                "into it; give the module that was scripted, or take order 'first'"
            )


def refuse_moved(weights: Iterable[str]) -> None:
    """Raises UserError for weights, by name, that a forward pass has changed: they would move behind the back of both loops."""
    if names := list(weights):
        raise UserError(
            f"the model changes its own weights in place when it is called ({listed(names)}); make them of others instead, as "
            "torch.nn.utils.parametrize does"
        )


def places(part: nn.Module, model: nn.Module) -> dict[str, str]:
    """For each place of a tensor in `part`, which is `model` or a copy of a part of it: the name of the tensor in `model`.

    A tensor at several places has one name. A module at several places counts once: to swap its tensors twice would put the
    swapped ones back."""
    names = {id(tensor): name for name, tensor in (*model.named_buffers(), *model.named_parameters())}
    own = (
        (f"{path}.{key}".lstrip("."), t)
        for path, m in part.named_modules()
        for key, t in (*m._parameters.items(), *m._buffers.items())
    )
    return {place: names.get(id(tensor), place) for place, tensor in own if tensor is not None}


# Layers that only look at their input in another shape: a part of a model that has no others is free.
FREE = (nn.Identity, nn.Flatten, nn.Unflatten)


def cut(
    model: nn.Module, adapted: Container[str], blocked: Callable[[nn.Module], bool] = lambda layer: False
) -> tuple[nn.Module, nn.Module] | None:
    """Two copies of `model`, front and back: back of what front makes of an input is what the model makes of it. Names and
    weights are those of the model, layers of the other part are `nn.Identity`.

    The cut is as late as it can be: in front of the first layer with a parameter whose name is `adapted`, the first that is
    `blocked`, and the first that shares a tensor with the layers after them. None when that leaves nothing in front. The order
    of the layers is known within `nn.Sequential`, at any depth, and in a module that declares it by an attribute `sequence`,
    the names of submodules that its forward applies one after the other and does nothing else. Raises UserError for a declared
    name that is not there.
    """
    layers = list(_chain(model, "", Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))))
    # The name too, since a declared layer may be applied at two places.
    parts = [{name, *map(id, (*layer.parameters(), *layer.buffers()))} for name, layer in layers]
    moving = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in adapted}
    if not moving or not moving <= set().union(*parts):
        return None
    place = next(i for i, (_, layer) in enumerate(layers) if moving & parts[i] or blocked(layer))
    while place and set().union(*parts[:place]) & set().union(*parts[place:]):
        place -= 1
    if all(isinstance(layer, FREE) for _, layer in layers[:place]):
        return None
    front, back = copy_modules(model), copy_modules(model)
    for i, (name, _) in enumerate(layers):
        (back if i < place else front).set_submodule(name, nn.Identity())
    return front, back


def _chain(module: nn.Module, name: str, uses: Counter[int]) -> Iterator[tuple[str, nn.Module]]:
    """The named layers that `module` applies one after the other; itself where its order is not known. A module with hooks, or
    used at several places, stays whole: in two parts the hooks would run twice, and a place could not be replaced alone."""
    declared = getattr(module, "sequence", None)
    if uses[id(module)] > 1 or module._forward_hooks or module._forward_pre_hooks:
        names = None
    elif isinstance(declared, tuple | list) and all(isinstance(entry, str) for entry in declared):
        names = declared
    else:
        names = list(module._modules) if getattr(type(module), "forward", None) is nn.Sequential.forward else None
    if names is None:
        yield name, module
        return
    known = dict(module.named_modules(remove_duplicate=False))
    for entry in names:
        if entry not in known or not entry:
            children = ", ".join(child for child, _ in module.named_children()) or "none"
            raise UserError(
                f"{type(module).__name__} declares the sequence {tuple(names)}, but {entry!r} is no submodule of it; "
                f"name some of {children}"
            )
        yield from _chain(known[entry], f"{name}.{entry}".lstrip("."), uses)
