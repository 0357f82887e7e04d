"""Operations on modules: which parameters a selection means, copies that share weights, a model without its head."""

import copy

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
