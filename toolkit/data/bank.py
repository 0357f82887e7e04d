"""A class bank: images (or any arrays) grouped by class, from which episodes are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.errors import UserError


class Tokens(NamedTuple):
    """What the numbers of texts stand for: the `vocabulary`, by a fingerprint or in words, what made them in a few words, and
    the number of `padding`, by which short texts are filled."""

    vocabulary: str
    made_by: str
    padding: int = 0


@dataclass(frozen=True)
class ClassBank:
    """Items grouped by class.

    `items` has shape (items, ...) and may be mapped from a file; banks made from one another share it, nothing is copied.
    A bank has entries: class c owns entries `first[c]` .. `first[c + 1] - 1`, so `first` has shape (classes + 1,) and dtype
    int64. Entry e is item e, or, with `rows`, item `rows[e]`; a row beyond the items counts on, row + k * len(items) being
    that item turned by k times 90 degrees. uint8 items are pixels: samplers turn them into floats in [0, 1].
    `names` holds one name per class, `source` says in a few words what this is ("omniglot vinyals test"). `tokens` says what
    the numbers of texts are, so that a language model is not given those of another vocabulary.
    """

    items: Tensor
    first: Tensor
    names: tuple[str, ...]
    source: str = "bank"
    rows: Tensor | None = None
    tokens: Tokens | None = None
    sizes: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        entries = len(self.items if self.rows is None else self.rows)
        if len(self.first) != len(self.names) + 1 or self.entries != entries:
            raise UserError(
                f"class bank {self.source!r}: {len(self.names)} names, {len(self.first)} class starts and "
                f"{entries} items do not fit; `first` needs one entry more than `names` and must end at the items"
            )
        object.__setattr__(self, "sizes", self.first.diff())

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.names)

    @property
    def entries(self) -> int:
        """The number of entries, over all classes."""
        return int(self.first[-1])

    def read(self, entries: Tensor) -> Tensor:
        """The items of `entries` (any shape), of shape (*entries.shape, ...): copies, on the device of the items."""
        rows = (entries if self.rows is None else self.rows[entries]).reshape(-1)
        index = (rows % len(self.items)).to(self.items.device)
        found = self.items.index_select(0, index)  # ten times as fast as indexing
        if self.rows is not None:
            turns = rows // len(self.items)
            for k in range(1, int(turns.max()) + 1 if len(turns) else 0):
                turned = (turns == k).nonzero().flatten().to(found.device)
                found[turned] = found[turned].rot90(k, dims=(-2, -1))
        return found.view(*entries.shape, *self.items.shape[1:])

    def select(self, classes: Sequence[int], source: str | None = None) -> "ClassBank":
        """A bank of only these classes, in this order."""
        index = torch.as_tensor(classes, dtype=torch.int64)
        entries = torch.cat([torch.arange(int(self.first[c]), int(self.first[c + 1])) for c in index])
        first = torch.cat([torch.zeros(1, dtype=torch.int64), self.sizes[index].cumsum(0)])
        rows = entries if self.rows is None else self.rows[entries]
        names = tuple(self.names[c] for c in index)
        return replace(self, first=first, names=names, source=source or self.source, rows=rows)

    def to(self, device: torch.device | str) -> "ClassBank":
        """The same bank with its items on `device`, where tasks are then drawn and augmented."""
        return replace(self, items=self.items.to(device))


def with_rotations(bank: ClassBank) -> ClassBank:
    """The bank with every class also turned by 90, 180 and 270 degrees, each turn a class of its own; turned when read.

    `bank.items` has shape (items, channels, height, width). Source: Santoro et al. 2016, section 4.1, as used for
    Omniglot by Vinyals et al. 2016 and Finn et al. 2017. Raises UserError for items that are no square images.
    """
    shape = tuple(bank.items.shape[1:])
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise UserError(f"{bank.source} has items of shape {shape}; only square images can be turned into new classes")
    rows = torch.arange(len(bank.items)) if bank.rows is None else bank.rows
    total = len(bank.items)
    first = torch.cat([bank.first[:-1] + k * bank.entries for k in range(4)] + [bank.first[-1:] * 4])
    names = tuple(f"{name} {90 * k} deg" if k else name for k in range(4) for name in bank.names)
    turned = torch.cat([(rows + k * total) % (4 * total) for k in range(4)])
    return ClassBank(bank.items, first, names, f"{bank.source} +rotations", turned)
