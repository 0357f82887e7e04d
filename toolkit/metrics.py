"""Losses and metrics of (prediction, y): scalars, the mean over the examples of one task."""

import torch
from torch import Tensor


def accuracy(prediction: Tensor, y: Tensor) -> Tensor:
    """The fraction of right classes; `prediction` has shape (examples, classes), `y` (examples,)."""
    return (prediction.argmax(-1) == y).to(prediction.dtype).mean()


def cross_entropy(prediction: Tensor, y: Tensor) -> Tensor:
    """The mean cross entropy of logits (examples, classes) against classes (examples,)."""
    return torch.nn.functional.cross_entropy(prediction, y)


def squared_error(prediction: Tensor, y: Tensor) -> Tensor:
    """The mean squared error. Written out: `F.mse_loss` has no forward-mode derivative of its gradient."""
    return (prediction - y).square().mean()


HIGHER_IS_BETTER = ("accuracy",)
