"""A class bank: images (or any arrays) grouped by class, from which episodes are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toolkit.errors import UserError


@dataclass(frozen=True)
class ClassBank:
    """Items grouped by class.

    `items` has shape (items, ...); class c owns rows `first[c]` .. `first[c + 1] - 1`, so `first` has shape
    (classes + 1,) and dtype int64. uint8 items are pixels: samplers turn them into floats in [0, 1].
    `names` holds one name per class, `source` says in a few words what this is ("omniglot vinyals test").
    """

    items: Tensor
    first: Tensor
    names: tuple[str, ...]
    source: str = "bank"
    sizes: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.first) != len(self.names) + 1 or int(self.first[-1]) != len(self.items):
            raise UserError(
                f"class bank {self.source!r}: {len(self.names)} names, {len(self.first)} class starts and "
                f"{len(self.items)} items do not fit; `first` needs one entry more than `names` and must end at the items"
            )
        object.__setattr__(self, "sizes", self.first.diff())

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.names)

    def select(self, classes: Sequence[int], source: str | None = None) -> "ClassBank":
        """A bank of only these classes, in this order."""
        index = torch.as_tensor(classes, dtype=torch.int64)
        rows = torch.cat([torch.arange(int(self.first[c]), int(self.first[c + 1])) for c in index])
        first = torch.cat([torch.zeros(1, dtype=torch.int64), self.sizes[index].cumsum(0)])
        return ClassBank(self.items[rows], first, tuple(self.names[c] for c in index), source or self.source)


def with_rotations(bank: ClassBank) -> ClassBank:
    """The bank with every class also turned by 90, 180 and 270 degrees, each turn a class of its own.

    `bank.items` has shape (items, channels, height, width). Source: Santoro et al. 2016, section 4.1, as used for
    Omniglot by Vinyals et al. 2016 and Finn et al. 2017.
    """
    turned = [bank.items.rot90(k, dims=(-2, -1)) for k in range(4)]
    first = torch.cat([bank.first[:-1] + k * len(bank.items) for k in range(4)] + [bank.first[-1:] * 4])
    names = tuple(f"{name} {90 * k} deg" if k else name for k in range(4) for name in bank.names)
    return ClassBank(torch.cat(turned), first, names, f"{bank.source} +rotations")
