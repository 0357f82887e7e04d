"""Operations on modules: which parameters a selection means, copies that share weights, a model without its head or in two
parts."""

import copy
from collections import Counter
from collections.abc import Callable, Container, Iterator

from torch import nn

from toolkit.errors import UserError
from toolkit.tree import Selection, matches


def select(model: nn.Module, adapts: Selection) -> tuple[str, ...]:
    """The names of the trained parameters that `adapts` selects; a tied parameter is selected by any of its names."""
    trained = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    chosen: set[int] = set()
    for pattern in adapts if isinstance(adapts, tuple) else (adapts,):
        found = {id(p) for name, p in trained if matches(name, pattern)}
        if not found:
            known = ", ".join(name for name, _ in trained)
            raise UserError(f"adapts={pattern!r} matches no trained parameter; the model has {known}")
        chosen |= found
    return tuple(name for name, p in model.named_parameters() if id(p) in chosen)


def without_head(model: nn.Module, head: str) -> nn.Module | None:
    """A copy of the model whose layer `head` passes its input on; None when there is no layer of this name."""
    if head not in dict(model.named_modules()) or not head:
        return None
    body = copy_modules(model)
    body.set_submodule(head, nn.Identity())
    return body


def copy_modules(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares the tensors of `model`. Swapping parameters in it leaves `model` alone."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


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
        names = list(module._modules) if type(module).forward is nn.Sequential.forward else None
    if names is None:
        yield name, module
        return
    known = dict(module.named_modules())
    for entry in names:
        if entry not in known or not entry:
            children = ", ".join(child for child, _ in module.named_children()) or "none"
            raise UserError(
                f"{type(module).__name__} declares the sequence {tuple(names)}, but {entry!r} is no submodule of it; "
                f"name some of {children}"
            )
        yield from _chain(known[entry], f"{name}.{entry}".lstrip("."), uses)
