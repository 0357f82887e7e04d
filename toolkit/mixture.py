"""A mixture of adapted models: P(y|x) = sum over sub-tasks c of pi_c P(y|x, theta_c), for queries whose sub-task is unknown.

Shared knowledge over sub-tasks is often printed as P(y|x) = sum_c P(y_c|x, theta_c). We depart from that in two points. It has
no weights, so with C sub-tasks it sums to C over y instead of 1; and each term has a y_c of its own where there is one y. We
take the law of total probability, whose weights pi_c = P(c) are at least 0 and sum to 1; `uniform` weights are the printed
formula divided by C. Weights come from nothing (`uniform`), from a few labelled examples of the one sub-task at hand
(`by_likelihood`), or from labelled examples of several (`fit_weights`). Classification only; nothing here is differentiated.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from toolkit.engine import exact_layers
from toolkit.errors import UserError
from toolkit.learner import Learner, Meta
from toolkit.task import Batch, Input
from toolkit.tree import Params


class Components(NamedTuple):
    """C adapted models: `fast` weights after `steps` inner steps and the inputs of the support sets behind them, which the
    batch-norm policy may ask for; every tensor has a leading axis C."""

    fast: Params
    support_x: Input
    steps: int


@torch.no_grad()
def adapt(learner: Learner, meta: Meta, supports: Batch, steps: int | None = None) -> Components:
    """The learner adapted to each of C support sets (leading axis C), in `steps` inner steps, its own number by default."""
    learner = replace(learner, training=False)
    sizes = {leaf.shape[:1] for leaf in pytree.tree_leaves(supports)}
    if len(sizes) != 1 or not next(iter(sizes), ()):
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in pytree.tree_leaves(supports))
        raise UserError(f"support sets of shapes {shapes} have no equal leading axis of sub-tasks; stack the sets to one Batch")
    _check_classes(supports)
    steps = learner.steps if steps is None else steps
    if steps < 0:
        raise UserError(f"{steps} inner steps; give 0 or more")

    def walk(support: Batch) -> Params:
        *_, fast = learner.path(meta, support, steps)
        return fast

    with exact_layers(learner):
        fast = vmap(walk, randomness="different")(supports)
    return Components(fast, supports.x, steps)


@torch.no_grad()
def log_probabilities(learner: Learner, meta: Meta, components: Components, x: Input) -> Tensor:
    """log P(y|x, theta_c) of each component, shape (C, examples, classes)."""
    learner = replace(learner, training=False)

    def predict(fast: Params, support_x: Input) -> Tensor:
        return learner.predict(meta, fast, x, support_x, components.steps)

    with exact_layers(learner):
        scores = vmap(predict, randomness="different")(components.fast, components.support_x)
    if scores.dim() != 3 or scores.shape[-1] < 2:
        raise UserError(
            f"a mixture needs a score for each of 2 or more classes, but the model gives {tuple(scores.shape[1:])} for the "
            "examples; use a classifier"
        )
    return scores.log_softmax(-1)


@torch.no_grad()
def mix(learner: Learner, meta: Meta, components: Components, x: Input, weights: Tensor) -> Tensor:
    """log P(y|x), shape (examples, classes). `weights` have shape (C,), or (examples, C) where they differ from query to query.
    Raises UserError for weights of another shape, below 0, or that do not sum to 1."""
    logs = log_probabilities(learner, meta, components, x)
    _check_weights(weights, logs.shape[0], logs.shape[1])
    return torch.logsumexp(logs + weights.to(logs).log().movedim(-1, 0).reshape(logs.shape[0], -1, 1), 0)


def uniform(components: int) -> Tensor:
    """Equal weights, shape (C,), float64."""
    if components < 1:
        raise UserError(f"{components} components have no weights; give at least 1")
    return torch.full((components,), 1 / components, dtype=torch.float64)


@torch.no_grad()
def by_likelihood(learner: Learner, meta: Meta, components: Components, support: Batch, prior: Tensor | None = None) -> Tensor:
    """P(c | support) for labelled examples that all come from one sub-task: prior_c times the product of P(y|x, theta_c),
    normalised. Shape (C,), float64; the prior is uniform by default."""
    scores = _of_targets(learner, meta, components, support).sum(1)
    if prior is not None:
        _check_weights(prior, len(scores), None)
        scores = scores + prior.to(scores).log()
    return scores.softmax(0)


@torch.no_grad()
def fit_weights(learner: Learner, meta: Meta, components: Components, batch: Batch, iterations: int = 100) -> Tensor:
    """The weights of greatest likelihood on labelled examples that may each come from another sub-task, shape (C,), float64.

    By EM from uniform weights (Dempster et al. 1977, section 4.3): the new weight of c is the mean over examples of
    P(c|x, y), and no iteration lowers the likelihood, which is concave in the weights, so this goes to a global maximum.
    """
    if iterations < 0 or not len(batch.y):
        raise UserError(f"{iterations} iterations on {len(batch.y)} examples; give 0 iterations or more, and 1 example or more")
    scores = _of_targets(learner, meta, components, batch)
    logs = uniform(len(scores)).to(scores).log()
    for _ in range(iterations):
        logs = (scores + logs.unsqueeze(1)).log_softmax(0).logsumexp(1) - torch.tensor(len(batch.y)).log()
    return logs.softmax(0)


def _of_targets(learner: Learner, meta: Meta, components: Components, batch: Batch) -> Tensor:
    """log P(y|x, theta_c) of the labels given, shape (C, examples), float64."""
    _check_classes(batch)
    logs = log_probabilities(learner, meta, components, batch.x).double()
    return logs.gather(2, batch.y.long().expand(len(logs), -1).unsqueeze(2)).squeeze(2)


def _check_classes(batch: Batch) -> None:
    if batch.y.is_floating_point():
        raise UserError("a mixture is of class probabilities, but y holds floats; give integer classes")


def _check_weights(weights: Tensor, components: int, examples: int | None) -> None:
    allowed = [(components,)] if examples is None else [(components,), (examples, components)]
    if tuple(weights.shape) not in allowed:
        names = " or ".join(map(str, allowed))
        raise UserError(f"weights of shape {tuple(weights.shape)} do not fit; with {components} components give shape {names}")
    total = weights.double().sum(-1)
    if not bool((weights >= 0).all()) or not bool(((total - 1).abs() < 1e-4).all()):
        worst = total.flatten()[(total - 1).abs().argmax()].item()
        raise UserError(
            f"weights between {weights.min().item():g} and {weights.max().item():g} with a sum of {worst:g} are no "
            "probabilities; give numbers of 0 or more that sum to 1"
        )
