"""Where a path starts: functions (learner, meta, support) -> fast weights.

A start that learns has `learned(learner, params)`, one that is choosy has `check(learner)`; see `Learner`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.learner import Learner, Meta
from toolkit.task import Batch
from toolkit.tree import Params, tree_map


def inherited(learner: Learner, meta: Meta, support: Batch) -> Params:
    """The shared weights themselves: what is meta-learned is the start (Finn et al. 2017)."""
    return learner.adapted(meta.params)


def zeros(learner: Learner, meta: Meta, support: Batch) -> Params:
    """Zero, whatever the shared weights: for context parameters (Zintgraf et al. 2019, section 3)."""
    return tree_map(torch.zeros_like, learner.adapted(meta.params))


@dataclass(frozen=True)
class Head:
    """The base of starts that fill the linear head, `learner.head`, and inherit the rest."""

    def check_layer(self, learner: Learner) -> None:
        """Raises UserError unless the learner's head is a linear layer of its model."""
        learner.body()
        layer = learner.model.get_submodule(learner.head)
        if not isinstance(layer, nn.Linear):
            raise UserError(
                f"the head {learner.head!r} is a {type(layer).__name__}; this method needs a linear layer, name one with head="
            )

    def check(self, learner: Learner) -> None:
        self.check_layer(learner)
        _check_untied(learner)
        if not self._names(learner) <= set(learner.adapted_names):
            missing = ", ".join(sorted(self._names(learner) - set(learner.adapted_names)))
            raise UserError(f"this method sets the head for each task, but {missing} does not adapt; add it to adapts")

    def _names(self, learner: Learner) -> set[str]:
        return {f"{learner.head}.{name}" for name, _ in learner.model.get_submodule(learner.head).named_parameters()}

    def _filled(self, learner: Learner, meta: Meta, weight: Tensor, bias: Tensor) -> Params:
        values = {f"{learner.head}.weight": weight, f"{learner.head}.bias": bias}
        return learner.adapted(meta.params) | {name: values[name] for name in sorted(self._names(learner))}


@dataclass(frozen=True)
class Prototypes(Head):
    """The head whose logits are, up to a constant, the negative squared distances to the class means c of the support
    embeddings: weight 2 c, bias -|c|^2 (Snell et al. 2017, section 2.4; Triantafillou et al. 2020, "Proto-MAML"). Raises
    UserError for targets that are no classes, and for a head without a bias.
    """

    def check(self, learner: Learner) -> None:
        super().check(learner)
        if f"{learner.head}.bias" not in self._names(learner):
            raise UserError(f"prototypes need a head with a bias, but {learner.head!r} has none; build it with bias=True")

    def __call__(self, learner: Learner, meta: Meta, support: Batch) -> Params:
        features, classes = _embedded(learner, meta, support)
        means = classes.T @ features / classes.sum(0).clamp(min=1).unsqueeze(1)
        return self._filled(learner, meta, 2 * means, -means.square().sum(1))


@dataclass(frozen=True)
class Ridge(Head):
    """The head that solves ridge regression from support embeddings X to one-hot classes Y, in its dual form
    W = X' (X X' + lambda I)^-1 Y, scaled and shifted: logits alpha x W + beta; lambda, alpha and beta are learned, the first
    two as logarithms (R2-D2, Bertinetto et al. 2019, section 3.2)."""

    lam: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (self.lam > 0 and self.scale > 0):
            raise UserError(f"lambda starts at {self.lam} and alpha at {self.scale}; give positive numbers")

    def learned(self, learner: Learner, params: Params) -> Params:
        values = next(iter(params.values())).new_tensor([self.lam, self.scale]).log()
        return {"start/log_lambda": values[0], "start/log_alpha": values[1], "start/beta": torch.zeros_like(values[0])}

    def __call__(self, learner: Learner, meta: Meta, support: Batch) -> Params:
        features, classes = _embedded(learner, meta, support)
        lam, scale = meta.learned["start/log_lambda"].exp(), meta.learned["start/log_alpha"].exp()
        gram = features @ features.T + lam * torch.eye(features.shape[0], dtype=features.dtype, device=features.device)
        weight = scale * classes.T @ torch.linalg.solve(gram, features)
        return self._filled(learner, meta, weight, meta.learned["start/beta"].expand(classes.shape[1]))


@dataclass(frozen=True)
class SharedHead(Head):
    """Every row of the head starts from one shared vector, the mean of the meta-learned rows, so the labels' order cannot
    matter (UNICORN-MAML, Ye & Chao 2022). The rows of the parameter only matter through their mean."""

    def __call__(self, learner: Learner, meta: Meta, support: Batch) -> Params:
        return learner.adapted(meta.params) | {
            name: meta.params[name].mean(0, keepdim=True).expand(meta.params[name].shape)
            for name in sorted(self._names(learner))
        }


@dataclass(frozen=True)
class BlankHead(Head):
    """A head of zeros on the shared body: a new classifier, as the fine-tuning baselines start it."""

    def __call__(self, learner: Learner, meta: Meta, support: Batch) -> Params:
        names = self._names(learner)
        return {name: torch.zeros_like(p) if name in names else p for name, p in learner.adapted(meta.params).items()}


@dataclass(frozen=True)
class Memory:
    """The support embeddings and their one-hot classes, for a head that attends to them (`models.attention_head`)."""

    def check(self, learner: Learner) -> None:
        learner.body()
        _check_untied(learner)

    def __call__(self, learner: Learner, meta: Meta, support: Batch) -> Params:
        features, classes = _embedded(learner, meta, support)
        return {f"{learner.head}.keys": features, f"{learner.head}.values": classes}


def _check_untied(learner: Learner) -> None:
    """Raises UserError for a head that shares a weight with other layers, which would change with it for each task."""
    own = {id(p) for p in learner.model.get_submodule(learner.head).parameters()}
    tied = [name for name, p in learner.body().named_parameters(remove_duplicate=False) if id(p) in own]
    if tied:
        raise UserError(
            f"the head {learner.head!r} shares a weight with {tied[0]}, but this method sets it for each task; untie it"
        )


def _embedded(learner: Learner, meta: Meta, support: Batch) -> tuple[Tensor, Tensor]:
    """Support embeddings (examples, features) and one-hot classes (examples, ways) in their dtype; both are 0 for an example
    without a label, which then has no part in means and in kernels."""
    if support.y.is_floating_point() or support.y.dim() != 1:
        raise UserError(
            f"{learner.name} needs one integer class per example, but y is {support.y.dtype} of shape "
            f"{tuple(support.y.shape)}; for regression use a method such as maml"
        )
    features = learner.embed(meta, learner.adapted(meta.params), support.x)
    head = next(p for name, p in meta.params.items() if name.startswith(f"{learner.head}."))
    classes = torch.arange(head.shape[0], device=support.y.device)
    features = torch.where(support.y.unsqueeze(1) < 0, 0, features)
    return features, (support.y.unsqueeze(1) == classes).to(features.dtype)
