"""The meta-gradient by another implementation: learn2learn's own classes, as a check on our engine and a yardstick for it.

`train(learner, ..., gradient=backend("learn2learn"))` trains with it. What is computed is read off the learner's fields, not
its name: `l2l.algorithms.MAML` for a fixed rate, `MetaSGD` for a learned rate per weight, both of first order when `order` is
0; of the whole model, or of its head on the features of its body (ANIL).
"""

import contextlib
import copy
import io
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit.distributed import Share, added
from toolkit.engine import GradientFunction, Metrics, exact_layers, gradient_function, placed
from toolkit.errors import UserError, unknown
from toolkit.learner import Learner, Meta, Score, support_loss
from toolkit.modules import reached, without_head
from toolkit.objectives import last_step
from toolkit.plan import Plan
from toolkit.randomness import kept
from toolkit.rules import SGD
from toolkit.starts import inherited
from toolkit.task import Input, Padded, Task, count, take
from toolkit.train import Gradient
from toolkit.tree import Params


@lru_cache(maxsize=8)
def learn2learn_gradient(learner: Learner, plan: Plan) -> GradientFunction:
    """The meta-gradient function of `engine.gradient_function`, by learn2learn. `plan` has no effect: learn2learn takes the
    tasks one by one and keeps the graph of all their inner steps.

    ANIL is done as in learn2learn's LightningANIL, but for batch norm: there it sees the support and the query set together,
    here each by itself, as the policy "batch" says. Every call works on a copy of the model, so the running statistics that
    learn2learn updates are forgotten. Raises UserError for what learn2learn's classes cannot do, and when it is missing.
    """
    rule = _checked_rule(learner)
    l2l = _learn2learn()
    looked: list[bool] = []

    def gradient(meta: Meta, tasks: Task, share: Share | None = None) -> tuple[Meta, Metrics]:
        share = share or Share(0, count(tasks), added, tasks)
        if isinstance(tasks.support.x, Padded):
            raise UserError(
                "learn2learn would count the filling of padded tasks; use the backend 'toolkit', or tasks of one size"
            )
        model = _loaded(learner, meta)
        if not looked:
            _look(learner, rule, model, take(tasks, 0))
            looked.append(True)
        rates = {key: nn.Parameter(rate.detach()) for key, rate in meta.learned.items()}
        body, adapting = None, model
        if not _adapts_all(learner):
            body, adapting = without_head(model, learner.head), model.get_submodule(learner.head)
        first_order = learner.order == 0
        if rule.learn:
            lrs = nn.ParameterList([rates[f"lr/{name}"] for name in learner.adapted_names])
            peer = l2l.algorithms.MetaSGD(adapting, rule.lr, first_order, lrs)
        else:
            peer = l2l.algorithms.MAML(adapting, rule.lr, first_order, allow_unused=True)
        scores = []
        with exact_layers(learner):
            for i in range(count(tasks)):
                score = _adapted_score(learner, body, peer.clone(), take(tasks, i))
                score.loss.backward()  # type: ignore[no-untyped-call]
                scores.append(Score(score.loss.detach(), score.metric.detach()))
        score = Score(*(torch.stack(values) for values in zip(*scores, strict=True)))
        trees = zip(meta, (dict(model.named_parameters()), rates, {}), strict=True)
        own = Meta(*(_means(tree, leaves, share.total) for tree, leaves in trees))
        grads, (task_loss, task_metric) = share.fold([(own, placed(score, share.start, share.total))])
        return grads, Metrics(task_loss.mean(), task_metric.mean(), task_loss, task_metric)

    return gradient


BACKENDS: dict[str, Gradient] = {"toolkit": gradient_function, "learn2learn": learn2learn_gradient}


def backend(name: str) -> Gradient:
    """What computes the meta-gradient, by name. Raises UserError for an unknown name."""
    if name not in BACKENDS:
        raise unknown("backend", name, BACKENDS)
    return BACKENDS[name]


def _adapted_score(learner: Learner, body: nn.Module | None, clone: Any, task: Task) -> Score:
    """The query score of one task after the inner steps of `clone`, on the features of `body` if there is one."""
    support, query = (x if body is None else _features(learner, body, x) for x in (task.support.x, task.query.x))
    for _ in range(learner.steps):
        clone.adapt(learner.loss(_call(clone, support), task.support.y))
    prediction = _call(clone, query)
    return Score(learner.loss(prediction, task.query.y), learner.metric(prediction, task.query.y))


def _features(learner: Learner, body: nn.Module, x: Input) -> Tensor:
    return reached(lambda: _call(body, x), learner.head)


def _call(module: nn.Module, x: Input) -> Tensor:
    return module(**x) if isinstance(x, dict) else module(x)  # type: ignore[no-any-return]


def _means(tree: Params, leaves: Mapping[str, Tensor], tasks: int) -> Params:
    """The mean of the gradients summed in `leaves`, shaped like `tree`; zero where none arrived."""
    grads = {name: leaves[name].grad if name in leaves else None for name in tree}
    return {name: torch.zeros_like(tree[name]) if grad is None else grad / tasks for name, grad in grads.items()}


def _loaded(learner: Learner, meta: Meta) -> nn.Module:
    """A copy of the model with the parameters of `meta`, whose batch norms take the statistics of each batch. Frozen parameters
    become buffers, since MetaSGD wants a gradient for every parameter."""
    model = copy.deepcopy(learner.model)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train()
        for name, p in list(module.named_parameters(recurse=False)):
            if not p.requires_grad:
                delattr(module, name)
                module.register_buffer(name, p.detach())
    for name, p in model.named_parameters():
        p.data = meta.params[name].detach()
    return model


def _adapts_all(learner: Learner) -> bool:
    return learner.adapted_names == tuple(name for name, p in learner.model.named_parameters() if p.requires_grad)


def _checked_rule(learner: Learner) -> SGD:
    """The learner's rule. Raises UserError for the first field that is beyond learn2learn's classes."""
    rule, head = learner.rule, f"{learner.head}."
    trained = [(name, p) for name, p in learner.model.named_parameters(remove_duplicate=False) if p.requires_grad]
    of_head = tuple(name for name, _ in trained if name.startswith(head))
    plain = isinstance(rule, SGD) and not rule.momentum and rule.learn in (None, "weight")
    learned = isinstance(rule, SGD) and rule.learn
    tied = len({id(p) for _, p in trained}) < len(trained)
    for what, given, fits, allowed in (
        ("start", learner.start, learner.start is inherited, "inherited"),
        ("objective", learner.objective, learner.objective is last_step, "last_step"),
        ("inner loss", learner.inner, learner.inner is support_loss, "support_loss"),
        ("rule", rule, plain, "SGD without momentum, at a fixed rate or a learned one per weight,"),
        ("order", learner.order, learner.order in (None, 0), "None or 0"),
        ("inner batch", learner.batch, learner.batch is None, "None"),
        ("batch norm", repr(learner.batch_norm), learner.batch_norm == "batch", "'batch'"),
        ("number of phases", len(learner.phases), not any(changes for _, changes in learner.phases), "0"),
        ("adapting part", ", ".join(learner.adapted_names), _adapts_all(learner) or learner.adapted_names == of_head,
         f"all parameters or those under {head!r}"),
        ("set of parameters with learned rates", "tied", not (learned and tied), "an untied one"),
    ):  # fmt: skip
        if not fits:
            raise UserError(
                f"learn2learn cannot compute {learner.name}: its {what} is {getattr(given, '__name__', given)}, and only "
                f"{allowed} is possible; use the backend 'toolkit', or a plain maml, fomaml, anil or meta_sgd"
            )
    assert isinstance(rule, SGD)
    return rule


def _look(learner: Learner, rule: SGD, model: nn.Module, task: Task) -> None:
    """Raises UserError where only a forward pass shows that learn2learn would be wrong: a head that is not the model's end, or
    learned rates of parameters that the model does not use."""
    outputs: list[Any] = []
    with kept():
        if not _adapts_all(learner):
            head = model.get_submodule(learner.head)
            with head.register_forward_hook(lambda module, inputs, output: outputs.append(output)):
                prediction = _call(model, task.support.x)
            if outputs[-1] is not prediction:
                raise UserError(
                    f"the model goes on after its head {learner.head!r}, and learn2learn would leave that out; end the model "
                    "with its head, or use the backend 'toolkit'"
                )
        if rule.learn:
            loss = learner.loss(_call(model, task.support.x), task.support.y)
            leaves = dict(model.named_parameters())
            adapting = [leaves[name] for name in learner.adapted_names]
            grads = torch.autograd.grad(loss, adapting, allow_unused=True)
            if unused := [name for name, grad in zip(learner.adapted_names, grads, strict=True) if grad is None]:
                raise UserError(
                    f"the model does not use {', '.join(unused)}, which learn2learn's MetaSGD cannot bear; freeze them "
                    "(requires_grad=False), or use the backend 'toolkit'"
                )


def _learn2learn() -> Any:
    """The package, without the warnings and notices of its dependencies."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            import learn2learn
    except ImportError as error:
        raise UserError(
            f"the backend 'learn2learn' cannot be imported ({error}); run pip install -r requirements-learn2learn.txt, or use "
            "the backend 'toolkit'"
        ) from None
    return learn2learn
