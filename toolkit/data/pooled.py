"""All images of a published data set, whatever parts it comes in, and its classes divided between train, val and test."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from toolkit.data.bank import ClassBank
from toolkit.data.convert import from_dataset, grouped, numbered, plain, quick_labels, read
from toolkit.data.stored import Write, stored
from toolkit.errors import UserError, unknown

SPLITS = ("train", "val", "test")
SHARE = 0.2
LOOKED_AT = 32


def pooled(
    name: str,
    parts: Sequence[Any],
    names: Sequence[str] | None = None,
    size: int | None = None,
    channels: int | None = None,
    relabel: bool = False,
) -> ClassBank:
    """The images of several map-style datasets with the same classes as one bank, decoded once into the cache.

    The cache is keyed by the settings, the number of items of each part, the pixels and labels of 32 items spread evenly over
    each, and all labels of those that list them. Only uint8 items are cached. Raises UserError as `from_dataset`.
    """
    from torch.utils.data import ConcatDataset

    whole: Any = ConcatDataset(list(parts))
    pairs = [list(read(part, size, channels, name, _spread(len(part)))) for part in parts]
    looks = [look for of_part in pairs for look in of_part]
    if not looks or looks[0][0].dtype != torch.uint8:
        return from_dataset(whole, size, names, name, relabel, channels)
    digest = hashlib.sha256(f"{size} {channels} {[len(part) for part in parts]}".encode())
    for item, label in looks:
        digest.update(f"{tuple(item.shape)} {label!r}".encode() + item.contiguous().numpy().tobytes())
    for part, of_part in zip(parts, pairs, strict=True):
        listed = quick_labels(part, len(part), of_part[0][1]) if of_part else None
        digest.update(repr(None if listed is None else [plain(label) for label in listed]).encode())

    def fill(write: Write) -> dict[str, Any]:
        return {"labels": written(write, read(whole, size, channels, name), name, relabel)}

    items, notes = stored(f"{slug(name)}-{digest.hexdigest()[:16]}-v2", len(whole), tuple(looks[0][0].shape), fill)
    return grouped(items, notes["labels"], names, name, relabel)


def written(write: Write, pairs: Iterable[tuple[Tensor, Any]], name: str, relabel: bool = False) -> list[Any]:
    """Writes the items of (item, label) pairs and returns their labels, which are checked while nothing is kept yet."""
    labels = []
    for item, label in pairs:
        write(item.numpy())
        labels.append(label)
    numbered(labels, name, relabel)
    return labels


def divided(bank: ClassBank, split: str, published: str | None = None) -> ClassBank:
    """The classes of one split.

    `published` names a list in `toolkit/data/splits`. Without it the classes are ordered by the SHA-256 of their names, a fixed
    shuffle that no random generator can change; the last 20 % (rounded, at least 2) are test, the 20 % before them val, the
    rest train. Raises UserError for an unknown split, for fewer than 6 classes, and for a bank that lacks classes of the list.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    number = {name: i for i, name in enumerate(bank.names)}
    if len(number) < bank.classes:
        raise UserError(f"classes of {bank.source} share a name; give every class a name of its own")
    if published:
        listed = json.loads((resources.files("toolkit.data") / "splits" / f"{published}.json").read_text())
        if absent := [name for part in SPLITS for name in listed[part] if name not in number]:
            raise UserError(
                f"{bank.source} lacks {len(absent)} classes of its published split, as {', '.join(absent[:3])}; get all of it"
            )
        chosen = [number[name] for name in listed[split]]
    else:
        if bank.classes < 6:
            raise UserError(f"{bank.source} has {bank.classes} classes; to divide them, train, val and test need 2 each")
        order = sorted(number, key=lambda name: hashlib.sha256(name.encode()).digest())
        held = max(2, round(SHARE * bank.classes))
        ends = {"train": (0, -2 * held), "val": (-2 * held, -held), "test": (-held, None)}[split]
        chosen = sorted(number[name] for name in order[slice(*ends)])
    return bank.select(chosen, f"{bank.source} {split}")


def slug(name: str) -> str:
    """A name as part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def _spread(total: int) -> list[int]:
    """At most 32 numbers below `total`, from the first to the last."""
    return sorted({i * (total - 1) // (LOOKED_AT - 1) for i in range(LOOKED_AT)}) if total else []
