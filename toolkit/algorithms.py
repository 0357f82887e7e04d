"""The methods, each a few lines of data: a row of the table in ARCHITECTURE.md.

All take the model first and share these keyword arguments: `loss` and `metric` of (prediction, y); `inner_lr`; `inner_steps`;
`adapts`, the names that the inner loop moves (glob patterns or a predicate); `batch_norm`, a policy of `toolkit.norms`;
`rule`, which replaces plain gradient descent with `inner_lr`.
"""

from collections.abc import Callable

from torch import nn

from toolkit.errors import unknown
from toolkit.learner import Learner, Loss
from toolkit.metrics import accuracy, cross_entropy
from toolkit.objectives import last_step
from toolkit.rules import SGD, FirstOrder, Rule
from toolkit.starts import inherited
from toolkit.tree import Selection


def maml(
    model: nn.Module,
    *,
    loss: Loss = cross_entropy,
    inner_lr: float = 0.4,
    inner_steps: int = 1,
    adapts: Selection = "*",
    metric: Loss = accuracy,
    batch_norm: str = "batch",
    rule: Rule | None = None,
    name: str = "maml",
) -> Learner:
    """Model-agnostic meta-learning with exact second order (Finn et al. 2017, algorithm 2)."""
    rule = rule or SGD(inner_lr)
    return Learner(model, loss, adapts, inherited, rule, inner_steps, last_step, metric, batch_norm, name=name)


def fomaml(
    model: nn.Module, *, inner_lr: float = 0.4, rule: Rule | None = None, name: str = "fomaml", **shared: object
) -> Learner:
    """First-order MAML: second derivatives dropped (Finn et al. 2017, section 5.2)."""
    return maml(model, rule=FirstOrder(rule or SGD(inner_lr)), name=name, **shared)  # type: ignore[arg-type]


def anil(model: nn.Module, *, adapts: Selection = "head.*", name: str = "anil", **shared: object) -> Learner:
    """Almost no inner loop: only the head adapts (Raghu et al. 2020, section 4). `adapts` names the head's parameters."""
    return maml(model, adapts=adapts, name=name, **shared)  # type: ignore[arg-type]


METHODS: dict[str, Callable[..., Learner]] = {"maml": maml, "fomaml": fomaml, "anil": anil}


def build(name: str, model: nn.Module, **arguments: object) -> Learner:
    """The method called `name`. Raises UserError for an unknown name."""
    if name not in METHODS:
        raise unknown("algorithm", name, METHODS)
    return METHODS[name](model, **arguments)
