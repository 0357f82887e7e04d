"""The methods, each a few lines of data: a row of the table in ARCHITECTURE.md.

All take the model first and share these keyword arguments (`maml` has them all; the others pass on what they do not set):
`loss` and `metric` of (prediction, y); `inner_lr`; `inner_steps`; `adapts`, the names that the inner loop moves (glob patterns
or a predicate); `batch_norm`, a policy of `toolkit.norms`; `rule`, which replaces plain gradient descent with `inner_lr`;
`order`, see `maml`; `inner_batch`, support examples per inner step; `outer`, how the meta-parameters move; `head`, the name of
the last linear layer. Methods without inner steps take `inner_lr` and `inner_steps` for evaluation only, or not at all.
"""

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import Any

from torch import nn

from toolkit.errors import UserError
from toolkit.learned import Alfa, Preconditioned, TaskLoss
from toolkit.learner import Learner, Loss
from toolkit.metrics import accuracy, cross_entropy
from toolkit.models.surgery import attention_head, lora, warped, widened, with_context
from toolkit.objectives import EveryStep, Implicit, annealed_weights, last_step
from toolkit.objectives import reptile as reptile_objective
from toolkit.order import with_order
from toolkit.outer import Outer
from toolkit.plugins import resolve, takes
from toolkit.rule_line import parsed
from toolkit.rules import SGD, Frozen, PerStep, Proximal, Rule
from toolkit.starts import BlankHead, Memory, Prototypes, Ridge, SharedHead, inherited, zeros
from toolkit.tree import Selection

STAGES = 10
AnyRule = Rule | str | None


def maml(
    model: nn.Module,
    *,
    loss: Loss = cross_entropy,
    inner_lr: float = 0.4,
    inner_steps: int = 1,
    adapts: Selection = "*",
    metric: Loss = accuracy,
    batch_norm: str = "batch",
    rule: AnyRule = None,
    order: str = "second",
    inner_batch: int | None = None,
    outer: Outer | None = None,
    head: str = "head",
    name: str = "maml",
) -> Learner:
    """Model-agnostic meta-learning with exact second order (Finn et al. 2017, algorithm 2).

    `order` is a word of `toolkit.order`, such as "first" or "truncated:2"; `rule` may be a line of `toolkit.rule_line`.
    """
    learner = Learner(
        model, loss, adapts, inherited, parsed(rule) or SGD(inner_lr), inner_steps, last_step, metric, batch_norm,
        batch=inner_batch, outer=outer or Outer(), head=head, name=name,
    )  # fmt: skip
    return with_order(learner, order)


def fomaml(model: nn.Module, *, name: str = "fomaml", **shared: Any) -> Learner:
    """First-order MAML: second derivatives dropped, their graph never built (Finn et al. 2017, section 5.2)."""
    return maml(model, name=name, **{"order": "first", **shared})


def reptile(model: nn.Module, *, name: str = "reptile", **shared: Any) -> Learner:
    """Towards the end of the path (Nichol et al. 2018, algorithm 2), by plain descent whose rate falls linearly to 0, so
    `meta_lr` is the paper's epsilon and starts near 1. The paper's inner loop is Adam without momentum on minibatches
    (`rule=Adam(lr, (0, 0.999))`, `inner_batch`) of support sets with more shots than at test."""
    shared = {"outer": Outer("sgd", "linear"), **_without(name, shared, "order"), "order": "first"}
    return replace(maml(model, name=name, **shared), objective=reptile_objective)


def anil(
    model: nn.Module, *, adapts: Selection | None = None, head: str = "head", name: str = "anil", **shared: Any
) -> Learner:
    """Almost no inner loop: only the head adapts (Raghu et al. 2020, section 4). `adapts` names the head's parameters."""
    return maml(model, adapts=adapts or f"{head}.*", head=head, name=name, **shared)


def boil(model: nn.Module, *, head: str = "head", name: str = "boil", **shared: Any) -> Learner:
    """Body only update in the inner loop: all but the head adapts (Oh et al. 2021, section 3)."""
    return _needs_head(maml(model, adapts=lambda n: not n.startswith(f"{head}."), head=head, name=name, **shared))


def meta_sgd(model: nn.Module, *, inner_lr: float = 0.4, name: str = "meta_sgd", **shared: Any) -> Learner:
    """A learned rate per weight (Li et al. 2017, algorithm 1). All start at `inner_lr` (the paper draws them at random)."""
    return maml(model, rule=SGD(inner_lr, learn="weight"), name=name, **_without(name, shared, "rule"))


def maml_plus_plus(
    model: nn.Module,
    *,
    inner_lr: float = 0.4,
    inner_steps: int = 5,
    anneal: float = 0.1,
    first_order: float = 0.3,
    batch_norm: str = "per_step",
    name: str = "maml_plus_plus",
    **shared: Any,
) -> Learner:
    """MAML++ (Antoniou et al. 2019, section 4): query loss after every step with weights that go over to the last one during
    the fraction `anneal` of the training (in ten stages), first order during the fraction `first_order`, a learned rate per
    tensor and step, cosine meta rate, batch norm with statistics, scale and shift of each step's own. That scale and shift do
    not adapt, as in the configurations of their code, which always normalises by the batch at hand (transductive): that is
    `batch_norm="per_step_batch"`. Departures: after `anneal` the early steps keep 3 % of the weight, where their code drops
    them; and K + 1 points of the path have their own batch norm, where it lets the query set after step k share the support
    set's of step k.
    """
    shared.setdefault("outer", Outer(schedule="cosine"))
    rule = PerStep(SGD(inner_lr, learn="tensor"), max(1, inner_steps))
    shared = _without(name, shared, "order", "rule")
    learner = maml(model, rule=rule, inner_steps=inner_steps, batch_norm=batch_norm, name=name, **shared)
    if not (0 <= anneal <= 1 and 0 <= first_order <= 1):
        raise UserError(f"anneal is {anneal} and first_order {first_order}; give fractions of the training from 0 to 1")
    starts = sorted({0.0, first_order} | {anneal * i / STAGES for i in range(STAGES + 1)})
    phases = tuple(
        (i, {"objective": EveryStep(annealed_weights(inner_steps, min(1, i / anneal) if anneal else 1)),
             "order": 0 if i < first_order else None})
        for i in starts
    ) if inner_steps else ()  # fmt: skip
    return replace(learner, phases=phases)


def imaml(
    model: nn.Module,
    *,
    inner_lr: float = 0.1,
    inner_steps: int = 16,
    lam: float = 2.0,
    cg_steps: int = 5,
    damping: float = 0.0,
    rule: AnyRule = None,
    name: str = "imaml",
    **shared: Any,
) -> Learner:
    """Implicit MAML: a long proximal path, not differentiated, and the implicit gradient at its end (Rajeswaran et al. 2019,
    algorithms 1 and 2). The gradient is exact in the limit of a converged path and solved system."""
    rule, shared = Proximal(parsed(rule) or SGD(inner_lr), lam), _without(name, shared, "order")
    learner = maml(model, rule=rule, inner_steps=inner_steps, name=name, **shared | {"order": "first"})
    return replace(learner, objective=Implicit(lam, cg_steps, damping))


def cavia(
    model: nn.Module, *, context: int | None = None, layer: str | None = None, name: str = "cavia", **shared: Any
) -> Learner:
    """Only `context` input-like parameters adapt, from zero; the shared network learns to listen to them (Zintgraf et al. 2019,
    algorithm 1). `layer` names the layer that does; see `models.surgery.with_context`."""
    learner = maml(with_context(model, context, layer), adapts="*context", name=name, **shared)
    return replace(learner, start=zeros)


def proto_maml(model: nn.Module, *, name: str = "proto_maml", **shared: Any) -> Learner:
    """MAML whose head starts from the prototypes of the support set (Triantafillou et al. 2020, "Proto-MAML")."""
    return replace(maml(model, name=name, **shared), start=Prototypes())


def protonet(model: nn.Module, *, head: str = "head", name: str = "protonet", **shared: Any) -> Learner:
    """Prototypical networks: ProtoMAML without steps, also in evaluation (Snell et al. 2017, equations 1 and 2)."""
    return replace(_stepless(_checked_head(model, head), head, name, shared), start=Prototypes())


def matching_net(model: nn.Module, *, head: str = "head", name: str = "matching_net", **shared: Any) -> Learner:
    """Attention over the support set by cosine similarity (Vinyals et al. 2016, section 2.1), without the full context
    embeddings of its section 2.1.2. No steps."""
    learner = _stepless(
        attention_head(_checked_head(model, head), head), head, name, shared, (f"{head}.keys", f"{head}.values")
    )
    return replace(learner, start=Memory())


def r2d2(model: nn.Module, *, head: str = "head", name: str = "r2d2", **shared: Any) -> Learner:
    """A closed-form ridge-regression head on a meta-learned body (R2-D2, Bertinetto et al. 2019, section 3.2). No steps."""
    return replace(_stepless(_checked_head(model, head), head, name, shared), start=Ridge())


def meta_curvature(model: nn.Module, *, inner_lr: float = 0.4, rule: AnyRule = None, axes: int = 3,
                   name: str = "meta_curvature", **shared: Any) -> Learner:  # fmt: skip
    """Gradients multiplied along every axis by a learned matrix (Park & Oliva 2019)."""
    return maml(model, rule=Preconditioned(parsed(rule) or SGD(inner_lr), axes), name=name, **shared)


def kfo(model: nn.Module, *, name: str = "kfo", **shared: Any) -> Learner:
    """Kronecker-factored learned updates: two matrices per weight matrix (Arnold et al. 2021; linear factors)."""
    return meta_curvature(model, axes=2, name=name, **shared)


def warp_grad(model: nn.Module, *, head: str = "head", name: str = "warp_grad", **shared: Any) -> Learner:
    """Warp layers between the layers, learned by the outer loop alone, shape the inner loop's gradients (Flennerhag et al.
    2020, section 2, its "Warp-MAML"). Linear 1x1 warps, and MAML's objective in place of the trajectory one."""
    return maml(warped(_checked_head(model, head), head), adapts=lambda n: ".warp." not in n, head=head, name=name, **shared)


def alfa(model: nn.Module, *, inner_lr: float = 0.4, rule: AnyRule = None, name: str = "alfa", **shared: Any) -> Learner:
    """Rates and decays made by a small network from gradients and weights in every step (Baik et al. 2020, algorithm 1)."""
    return maml(model, rule=Alfa(parsed(rule) or SGD(inner_lr)), name=name, **shared)


def metal(model: nn.Module, *, name: str = "metal", **shared: Any) -> Learner:
    """A learned inner loss that adapts to the task (Baik et al. 2021, algorithm 1); see `learned.TaskLoss`."""
    return replace(maml(model, name=name, **shared), inner=TaskLoss())


def unicorn_maml(model: nn.Module, *, name: str = "unicorn_maml", **shared: Any) -> Learner:
    """MAML with a single shared head vector, whatever the labels' order (Ye & Chao 2022)."""
    return replace(maml(model, name=name, **shared), start=SharedHead())


def lora_maml(model: nn.Module, *, rank: int = 4, layers: Selection = "*", peft: bool | None = None,
              name: str = "lora_maml", **shared: Any) -> Learner:  # fmt: skip
    """MAML whose inner loop moves low-rank adapters only (adapters: Hu et al. 2022); see `models.surgery.lora`."""
    return maml(lora(model, rank, layers, peft), adapts="*lora_*", name=name, **shared)


def joint(model: nn.Module, *, inner_steps: int = 0, name: str = "joint", **shared: Any) -> Learner:
    """The shared model trained on the query sets of all tasks without adaptation; evaluation adapts it as MAML would."""
    return maml(model, inner_steps=0, name=name, **_without(name, shared, "order"))


def fine_tune(model: nn.Module, *, classes: int, name: str = "fine_tune", adapts: Selection = "*", inner_steps: int = 0,
              head: str = "head", **shared: Any) -> Learner:  # fmt: skip
    """Pretrained on all `classes` at once; then a new head and all weights are fine-tuned on each task. The learner to train is
    its `pretrain`, on tasks of `samplers.AllClasses`. (The "Baseline" of Chen et al. 2019 freezes the body: `linear_probe`.)"""
    _checked_head(model, head)
    whole = joint(widened(model, classes, head), head=head, name=f"{name} pretraining", **shared)
    return replace(maml(model, adapts=adapts, inner_steps=0, head=head, name=name, **shared), start=BlankHead(), pretrain=whole)


def linear_probe(model: nn.Module, *, classes: int, head: str = "head", name: str = "linear_probe", **shared: Any) -> Learner:
    """As `fine_tune`, with the body frozen: only the new head learns ("Baseline" of Chen et al. 2019, section 3.1)."""
    return fine_tune(model, classes=classes, adapts=f"{head}.*", head=head, name=name, **shared)


def nearest_centroid(
    model: nn.Module, *, classes: int, head: str = "head", name: str = "nearest_centroid", **shared: Any
) -> Learner:
    """As `fine_tune`, judged by the distance to the class means of the support embeddings (Wang et al. 2019, "SimpleShot",
    without its centring and normalising). No steps."""
    shared = _without(name, shared, "rule", "inner_batch") | {"rule": Frozen(), "adapts": f"{head}.*"}
    return replace(fine_tune(model, classes=classes, head=head, name=name, **shared), start=Prototypes())


def _stepless(model: nn.Module, head: str, name: str, shared: dict[str, Any], adapts: Selection | None = None) -> Learner:
    fixed = {"rule": Frozen(), "inner_steps": 0, "adapts": adapts or f"{head}.*"}
    return maml(model, head=head, name=name, **_without(name, shared, "rule", "order", "inner_batch") | fixed)


def _without(name: str, shared: dict[str, Any], *knobs: str) -> dict[str, Any]:
    for knob in knobs:
        if shared.get(knob):
            words = knob.replace("_", " ")
            raise UserError(f"{name} leaves no choice of {words}; leave the {words} out, or use a method such as maml")
    return shared


def _needs_head(learner: Learner) -> Learner:
    learner.body()
    return learner


def _checked_head(model: nn.Module, head: str) -> nn.Module:
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if head not in layers:
        raise UserError(
            f"head={head!r} names no linear layer of the model; it has {', '.join(layers) or 'none'}, give the last one as head"
        )
    return model


METHODS: dict[str, Callable[..., Learner]] = {
    method.__name__: method
    for method in (
        maml, fomaml, reptile, anil, boil, meta_sgd, maml_plus_plus, imaml, cavia, proto_maml, protonet, matching_net, r2d2,
        meta_curvature, kfo, warp_grad, alfa, metal, unicorn_maml, lora_maml, joint, fine_tune, linear_probe, nearest_centroid,
    )
}  # fmt: skip


PRETRAINED = tuple(name for name, method in METHODS.items() if "classes" in signature(method).parameters)


def build(name: str, model: nn.Module, classes: int | None = None, **arguments: Any) -> Learner:
    """The method called `name` (see `toolkit.plugins`); `classes` goes to those that pretrain on all training classes. Raises
    UserError for an unknown name, when there are no such classes, and when it makes something else than a learner."""
    method = resolve(name, "algorithms")
    if "classes" in takes(method):
        if classes is None:
            raise UserError(f"{name} pretrains on all training classes, but these tasks have none; use a method such as joint")
        arguments["classes"] = classes
    try:
        learner = method(model, **arguments)
    except TypeError as error:
        raise UserError(f"{name} cannot be called ({error}); a method is def {name}(model, *, own=1.0, **shared)") from error
    if not isinstance(learner, Learner):
        raise UserError(f"{name} made a {type(learner).__name__}; an algorithm is a function from a model to a Learner")
    return learner
