"""Which classes a sampler draws from, and a warning where a model was pretrained on some of them."""

import logging
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from toolkit.data.bank import ClassBank

log = logging.getLogger("toolkit")


def banks_of(sampler: Any) -> list[ClassBank]:
    """The banks that a sampler draws from, itself or by the samplers that it is around."""
    inner = [getattr(sampler, "sampler", None), *getattr(sampler, "samplers", ())]
    bank = getattr(sampler, "bank", None)
    own = [bank] if isinstance(bank, ClassBank) else []
    return own + [found for each in inner if each is not None for found in banks_of(each)]


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
