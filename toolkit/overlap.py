"""Warnings where test classes are not new: those of training, or those that a model was pretrained on."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from toolkit.samplers.faults import banks_of

log = logging.getLogger("toolkit")


def warn_of_splits(samplers: Mapping[str, Any]) -> None:
    """One warning where test classes are among those of training or validation, by their names: as of two datasets in a mixture
    whose splits cross. Classes that have but a number for a name may be others under the same number."""
    classes = {split: {name for bank in banks_of(sampler) for name in bank.names} for split, sampler in samplers.items()}
    test = {name for name in classes.pop("test", set()) if not re.fullmatch(r"(class )?\d+", name)}
    shared = {split: both for split, names in classes.items() if (both := sorted(test & names))}
    if shared:
        both = sorted({name for names in shared.values() for name in names})
        log.warning(
            "%d of the %d test classes are classes of %s as well (%s): they are not new to what is learned or chosen there",
            len(both), len(test), " and ".join(shared), ", ".join(both[:3]) + ", ..." * (len(both) > 3),
        )  # fmt: skip


def warn_of_overlap(name: str, model: nn.Module, classes: Sequence[str]) -> None:
    """One warning where test classes are among those that the model was pretrained on, by their names; class names that are
    numbers of WordNet, as in mini-ImageNet, are taken for ImageNet's."""
    on, seen = getattr(model, "pretrained_on", ""), {_plain(c) for c in getattr(model, "pretrained_classes", ())}
    both = [c for c in classes if _plain(c) in seen or ("ImageNet" in on and re.fullmatch(r"n\d{8}", c))]
    if both:
        log.warning(
            "%s was pretrained on %s, where %d of the %d test classes occur (%s): they are not new to it",
            name, on, len(both), len(classes), ", ".join(both[:3]) + ", ..." * (len(both) > 3),
        )  # fmt: skip


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").strip()
