"""Small networks of the few-shot literature, by name. Any other `nn.Module` works as well."""

from collections.abc import Callable
from functools import partial

from torch import nn

from toolkit.errors import unknown
from toolkit.models.big import BigModel
from toolkit.models.conv4 import conv4
from toolkit.models.mlp import mlp

__all__ = ["CLASSIFIERS", "REGRESSORS", "BigModel", "classifier", "conv4", "mlp", "regressor"]

CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "conv4": conv4,
    "conv4-pool": partial(conv4, pool=True),
    "conv4-32": partial(conv4, width=32),
}
REGRESSORS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp}


def classifier(name: str, ways: int, seed: int) -> nn.Module:
    """The image classifier called `name` with `ways` outputs. Raises UserError for an unknown name."""
    if name not in CLASSIFIERS:
        raise unknown("model", name, CLASSIFIERS)
    return CLASSIFIERS[name](ways, seed=seed)


def regressor(name: str, seed: int) -> nn.Module:
    """The network called `name` from one number to one number. Raises UserError for an unknown name."""
    if name not in REGRESSORS:
        raise unknown("model", name, REGRESSORS)
    return REGRESSORS[name](seed=seed)
