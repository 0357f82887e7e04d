"""Losses and metrics of (prediction, y): scalars, the mean over the examples of one task that have a label.

Classes are numbered from 0; an example of a negative class (`task.IGNORED`) counts nowhere. A metric of your own is called by
its function's name, whose last word, accuracy, error or loss, tells comparisons what is better (`direction`).
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from toolkit.errors import UserError


def accuracy(prediction: Tensor, y: Tensor) -> Tensor:
    """The fraction of right classes; `prediction` has shape (examples, classes, ...), `y` (examples, ...)."""
    if y.is_floating_point():
        raise UserError(
            "accuracy needs integer classes, but y holds floats; for regression pass loss=squared_error, metric=squared_error"
        )
    _check_classes(prediction, y)
    # Counted in float32 at least: bfloat16 knows no number between 256 and 258.
    right = (prediction.argmax(1) == y).to(torch.promote_types(prediction.dtype, torch.float32))
    return right.sum() / (y >= 0).sum().clamp(min=1)


def cross_entropy(prediction: Tensor, y: Tensor) -> Tensor:
    """The mean cross entropy of logits (examples, classes, ...) against classes (examples, ...); 0 where no example has a
    label, as may be in a minibatch of a semi-supervised support set. Floats as targets are probabilities of classes,
    (examples, classes)."""
    if y.is_floating_point():
        if prediction.shape != y.shape or y.shape[-1] < 2:
            raise UserError(
                f"cross entropy needs integer classes or their probabilities, but y has floats of shape {tuple(y.shape)}; for "
                "regression pass loss=squared_error, metric=squared_error"
            )
        return torch.nn.functional.cross_entropy(prediction, y)
    _check_classes(prediction, y)
    return torch.nn.functional.cross_entropy(prediction, y, reduction="sum") / (y >= 0).sum().clamp(min=1)


def _check_classes(prediction: Tensor, y: Tensor) -> None:
    # Else argmax finds class 0 alone, or what it finds is compared with each label of all.
    if prediction.dim() < 2 or prediction.shape[:1] + prediction.shape[2:] != y.shape:
        raise UserError(
            f"predictions of shape {tuple(prediction.shape)} do not fit classes of shape {tuple(y.shape)}; make them "
            "(examples, classes) and (examples,), or give a loss and a metric of your own"
        )
    if prediction.shape[1] < 2:
        raise UserError("one output tells no classes apart; give the model one for each, or give a loss and metric of your own")


def squared_error(prediction: Tensor, y: Tensor) -> Tensor:
    """The mean squared error. Written out: `F.mse_loss` has no forward-mode derivative of its gradient."""
    if prediction.shape != y.shape:
        raise UserError(f"prediction of shape {tuple(prediction.shape)} against y of shape {tuple(y.shape)}; make them equal")
    return (prediction - y).square().mean()


def brier(prediction: Tensor, y: Tensor) -> Tensor:
    """The Brier score, in [0, 2]: the mean squared distance between probabilities and the right class, summed over classes
    (Brier 1950)."""
    labelled = (y >= 0).to(prediction.dtype)
    off = prediction.softmax(-1) - _one_hot(y, prediction.shape[-1], prediction.dtype)
    return (off.square().sum(-1) * labelled).sum() / labelled.sum().clamp(min=1)


def by_class(prediction: Tensor, y: Tensor) -> Tensor:
    """The accuracy of each class position, shape (classes,); NaN for a class without examples."""
    kind = torch.promote_types(prediction.dtype, torch.float32)
    classes, right = _one_hot(y, prediction.shape[-1], kind), (prediction.argmax(-1) == y).to(kind)
    return right @ classes / classes.sum(0)


def reliability(prediction: Tensor, y: Tensor) -> Tensor:
    """Shape (3, BINS): for each of equally wide bins of confidence the share of examples in it, and the sums over them of
    confidence and of right answers, by the number of examples. Their means over tasks make the diagram and its error, `ece`."""
    confidence, chosen = prediction.softmax(-1).max(-1)
    place = (confidence * BINS).ceil().clamp(1, BINS) - 1
    bins = (place.unsqueeze(-1) == torch.arange(BINS, device=y.device)) & (y >= 0).unsqueeze(-1)
    rows = torch.stack([torch.ones_like(confidence), confidence, (chosen == y).to(confidence.dtype)])
    diagram = rows @ bins.to(confidence.dtype) / (y >= 0).sum().clamp(min=1)
    # As one: a mean over tasks must leave a diverged task out of all three rows.
    return torch.where(prediction.isfinite().all(), diagram, torch.nan)


def ece(diagram: Tensor) -> Tensor:
    """The expected calibration error of (..., 3, BINS), means of `reliability`: the gap between confidence and accuracy, over
    all bins (Guo et al. 2017, equation 3), of all tasks' queries together, each task with the same weight."""
    return (diagram[..., 1, :] - diagram[..., 2, :]).abs().sum(-1)


def _one_hot(y: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    return (y.unsqueeze(-1) == torch.arange(classes, device=y.device)).to(dtype)


# What evaluation also measures of classification, beside a learner's loss and metric.
BINS = 15
MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nll": cross_entropy,
    "brier": brier,
    "by_class": by_class,
    "reliability": reliability,
}


def direction(metric_name: str) -> int:
    """1 for a metric that is better when larger, -1 when smaller, 0 where its name does not tell: called an accuracy, or an
    error or a loss."""
    last = metric_name.split()[-1:] or [""]
    return {"accuracy": 1, "error": -1, "loss": -1}.get(last[0], 0)


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
