"""Operations on `Params`: flat dicts from parameter name to tensor, the only container of weights in this toolkit."""

from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import Tensor

Params = dict[str, Tensor]
Selection = str | tuple[str, ...] | Callable[[str], bool]


def tree_map(function: Callable[..., Tensor], *trees: Params) -> Params:
    """`function` of the tensors of the same name."""
    return {name: function(*(tree[name] for tree in trees)) for name in trees[0]}


def under(prefix: str, tree: Params) -> Params:
    """What of a tree is named `prefix`..., by the rest of the name."""
    return {name.removeprefix(prefix): tensor for name, tensor in tree.items() if name.startswith(prefix)}


def detach(tree: Params) -> Params:
    """The same values, cut off from the graph."""
    return {name: tensor.detach() for name, tensor in tree.items()}


def matches(name: str, selection: Selection) -> bool:
    """Whether a glob pattern, one of several patterns, or a predicate selects this parameter name."""
    if callable(selection):
        return bool(selection(name))
    patterns = (selection,) if isinstance(selection, str) else selection
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def dot(a: Params, b: Params) -> Tensor:
    """The inner product of two trees of the same names and shapes."""
    return torch.stack([(tensor * b[name]).sum() for name, tensor in a.items()]).sum()


def numel(tree: Params) -> int:
    """The number of scalars in a tree."""
    return sum(tensor.numel() for tensor in tree.values())


def norm(tree: Params) -> Tensor:
    """The Euclidean norm of all scalars of a tree together."""
    return torch.stack([tensor.double().square().sum() for tensor in tree.values()]).sum().sqrt()


def laid_out_like(leaf: Tensor, other: Tensor) -> Tensor:
    """A slope or a moment with the strides of its weight: torch's fused Adam pairs them by their place in memory, without a
    look."""
    return other if other.stride() == leaf.stride() else torch.empty_like(leaf).copy_(other)
