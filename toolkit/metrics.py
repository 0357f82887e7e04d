"""Losses and metrics of (prediction, y): scalars, the mean over the examples of one task that have a label.

Classes are numbered from 0; an example of a negative class (`task.IGNORED`) counts nowhere.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from toolkit.errors import UserError


def accuracy(prediction: Tensor, y: Tensor) -> Tensor:
    """The fraction of right classes; `prediction` has shape (examples, classes), `y` (examples,)."""
    if y.is_floating_point():
        raise UserError("accuracy needs integer classes, but y holds floats; for regression pass metric=squared_error")
    right = (prediction.argmax(-1) == y).to(prediction.dtype)
    return right.sum() / (y >= 0).sum().clamp(min=1)


def cross_entropy(prediction: Tensor, y: Tensor) -> Tensor:
    """The mean cross entropy of logits (examples, classes) against classes (examples,); 0 where no example has a label, as may
    be in a minibatch of a semi-supervised support set."""
    if y.is_floating_point():
        return torch.nn.functional.cross_entropy(prediction, y)
    return torch.nn.functional.cross_entropy(prediction, y, reduction="sum") / (y >= 0).sum().clamp(min=1)


def squared_error(prediction: Tensor, y: Tensor) -> Tensor:
    """The mean squared error. Written out: `F.mse_loss` has no forward-mode derivative of its gradient."""
    if prediction.shape != y.shape:
        raise UserError(f"prediction of shape {tuple(prediction.shape)} against y of shape {tuple(y.shape)}; make them equal")
    return (prediction - y).square().mean()


def of_ways(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The same loss or metric over classes 0 .. max(y) only: for tasks with fewer classes than the model has outputs.

    It equals a model whose head ends at the task's last class, which `y` must therefore hold.
    """

    @wraps(function)
    def restricted(prediction: Tensor, y: Tensor) -> Tensor:
        return function(within(prediction, y), y)

    restricted.of_ways = True  # type: ignore[attr-defined]
    return restricted


def is_of_ways(function: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether a loss or metric was made by `of_ways`."""
    return getattr(function, "of_ways", False)


def within(prediction: Tensor, y: Tensor) -> Tensor:
    """Logits (examples, classes) that leave no chance to classes beyond the last one in `y`."""
    beyond = torch.arange(prediction.shape[-1], device=y.device) > y.max()
    return prediction.masked_fill(beyond, torch.finfo(prediction.dtype).min / 2)
