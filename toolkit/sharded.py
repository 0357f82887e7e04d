"""Weights and the outer optimiser in parts, one in each process, for shared models whose optimiser does not fit into one.

Each process keeps a slice (`DTensor`, along the longest axis) of every master weight and of what the optimiser knows about it,
moves its own, and gathers the whole once per step, since an inner loop reads all weights. So a process holds 2 copies of the
weights (the gathered ones and their gradient) and 3 / N (its masters and two moments of Adam), where it would hold 4.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from toolkit.distributed import Group
from toolkit.tree import laid_out_like


def split(group: Group, tensor: Tensor) -> Tensor:
    """This process's part of a tensor that all processes have; of one number, all of it."""
    from torch.distributed.device_mesh import init_device_mesh  # half a second, which only runs in parts shall wait for
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh(tensor.device.type, (group.size,))
    longest = max(range(tensor.dim()), key=lambda dim: tensor.shape[dim], default=None)
    place = Replicate() if longest is None else Shard(longest)
    return distribute_tensor(tensor.contiguous(), mesh, [place], src_data_rank=None)


def whole(tree: Any) -> Any:
    """A tree with its parts gathered. All processes must call this together."""
    return pytree.tree_map(lambda leaf: leaf.full_tensor() if _is_part(leaf) else leaf, tree)


def masters(group: Group, leaves: list[Tensor]) -> list[Tensor]:
    """What the outer optimiser moves: the weights themselves, or this process's parts of them."""
    return [split(group, leaf) for leaf in leaves] if group.sharded else leaves


def restored(group: Group, state: dict[str, Any], leaves: list[Tensor]) -> dict[str, Any]:
    """An optimiser's state for these weights, in parts where the group has them so, and laid out like them."""

    def parts(leaf: Tensor, key: str, value: Any) -> Any:
        # Told by name: the count of steps is one number, as a learned rate is.
        moment = key != "step" and isinstance(value, Tensor) and value.shape == leaf.shape
        if not moment:
            return value
        return split(group, value) if group.sharded else laid_out_like(leaf, value)

    own = {i: {key: parts(leaves[i], key, value) for key, value in each.items()} for i, each in state["state"].items()}
    return state | {"state": own}


@torch.no_grad()
def publish(moved: list[Tensor], leaves: list[Tensor]) -> None:
    """The weights as their masters are now, in every process."""
    for master, leaf in zip(moved, leaves, strict=True):
        if _is_part(master):
            leaf.copy_(whole(master))


def _is_part(leaf: Any) -> bool:
    """Whether it is a `DTensor`, told without the import of its class."""
    return hasattr(leaf, "full_tensor")
