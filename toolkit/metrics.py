"""Losses and metrics of (prediction, y): scalars, the mean over the examples of one task."""

import torch
from torch import Tensor

from toolkit.errors import UserError


def accuracy(prediction: Tensor, y: Tensor) -> Tensor:
    """The fraction of right classes; `prediction` has shape (examples, classes), `y` (examples,)."""
    if y.is_floating_point():
        raise UserError("accuracy needs integer classes, but y holds floats; for regression pass metric=squared_error")
    return (prediction.argmax(-1) == y).to(prediction.dtype).mean()


def cross_entropy(prediction: Tensor, y: Tensor) -> Tensor:
    """The mean cross entropy of logits (examples, classes) against classes (examples,)."""
    return torch.nn.functional.cross_entropy(prediction, y)


def squared_error(prediction: Tensor, y: Tensor) -> Tensor:
    """The mean squared error. Written out: `F.mse_loss` has no forward-mode derivative of its gradient."""
    if prediction.shape != y.shape:
        raise UserError(f"prediction of shape {tuple(prediction.shape)} against y of shape {tuple(y.shape)}; make them equal")
    return (prediction - y).square().mean()
