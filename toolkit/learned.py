"""Parts of the inner loop that are themselves learned: preconditioners, ALFA's rates, MeTAL's loss.

They are small networks written as functions of tensors in `Meta.learned`; all start as plain gradient descent.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.learner import Learner, Meta
from toolkit.rules import Wrapped
from toolkit.starts import Head
from toolkit.task import Batch, Input, Padded
from toolkit.tree import Params, under


@dataclass(frozen=True)
class Preconditioned(Wrapped):
    """`rule` with each gradient multiplied, along every axis of its tensor, by a learned square matrix that starts as the
    identity.

    Tensors are folded to at most `axes` axes: with 3, (out, in, rest) of a convolution has three matrices, which is
    Meta-Curvature (Park & Oliva 2019); with 2, (out, rest) has two, the Kronecker-factored update of KFO (Arnold
    et al. 2021, section 4, with linear factors).
    """

    axes: int = 3

    def __post_init__(self) -> None:
        if self.axes not in (2, 3):
            raise UserError(f"tensors folded to {self.axes} axes; give 2 or 3")

    def learned(self, fast: Params) -> Params:
        return self.rule.learned(fast) | {
            f"curvature{axis}/{name}": torch.eye(size, dtype=tensor.dtype, device=tensor.device)
            for name, tensor in fast.items()
            for axis, size in enumerate(self._folded(tensor).shape)
        }

    def update(self, learned: Params, grads: Params, state: Params, fast: Params, k: int) -> tuple[Params, Params]:
        turned = {name: self._turn(name, grad, learned) for name, grad in grads.items()}
        return self.rule.update(learned, turned, state, fast, k)

    def _folded(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(self.axes - 1) if tensor.dim() > self.axes else tensor

    def _turn(self, name: str, grad: Tensor, learned: Params) -> Tensor:
        folded = self._folded(grad)
        for axis in range(folded.dim()):
            folded = torch.tensordot(folded, learned[f"curvature{axis}/{name}"], dims=([axis], [1])).movedim(-1, axis)
        return folded.reshape(grad.shape)


@dataclass(frozen=True)
class Alfa(Wrapped):
    """w <- beta w - alpha g with a rate and a decay per tensor that a small network makes anew in every step from the means of
    all gradients and weights (ALFA, Baik et al. 2020). `rule` gives the plain step that alpha scales.

    Two layers, hidden width of twice the tensors as in the paper; its last layer starts at 0, so that alpha and beta start
    at 1 (departure: the paper learns a factor per tensor and step instead).
    """

    def learned(self, fast: Params) -> Params:
        return self.rule.learned(fast) | _network(
            "alfa/", 2 * len(fast), 2 * len(fast), 2 * len(fast), next(iter(fast.values()))
        )

    def update(self, learned: Params, grads: Params, state: Params, fast: Params, k: int) -> tuple[Params, Params]:
        seen = torch.stack([tree[name].mean() for tree in (grads, fast) for name in fast])
        rates, decays = (1 + _respond(under("alfa/", learned), seen)).chunk(2)
        scaled = {name: rates[i] * grads[name] for i, name in enumerate(fast)}
        moved, state = self.rule.update(learned, scaled, state, fast, k)
        return {name: moved[name] + (decays[i] - 1) * fast[name] for i, name in enumerate(fast)}, state


@dataclass(frozen=True)
class TaskLoss:
    """The support loss plus a learned term: a small network's answer to the state of the task, averaged over examples
    (MeTAL, Baik et al. 2021).

    The state of an example is the support loss, the mean of each adapting tensor, and the example's outputs. A linear map of
    the mean state scales and shifts the network's own weights (theirs is a two-layer network). Examples without a label are
    averaged over too, the filling of padded tasks is not. Departures: the support set alone is used (the paper adds a term on
    unlabelled queries), no labels in the state and no standardising, all steps share one network, and the last layer and the
    map start at 0. Raises UserError for a learner of first order: the term would get no gradient (nor does it in the
    first-order part of an annealed training).
    """

    hidden: int = 16

    def check(self, learner: Learner) -> None:
        Head().check_layer(learner)
        if learner.order == 0 and learner.steps and not learner.phases:  # nor is a part of a training all of it
            raise UserError("a learned inner loss gets no gradient in first order; use order second or truncated:k")

    def learned(self, learner: Learner, params: Params) -> Params:
        like = next(iter(params.values()))
        outputs = learner.model.get_submodule(learner.head).out_features
        size = 1 + len(learner.adapted_names) + int(outputs)  # type: ignore[arg-type]
        network = _network("loss/", size, self.hidden, 1, like)
        return network | {"loss/turn": like.new_zeros(2 * len(network), size)}

    def __call__(self, learner: Learner, meta: Meta, fast: Params, support: Batch, k: int) -> Tensor:
        prediction = learner.predict(meta, fast, support.x, k=k)
        loss = learner.loss(prediction, support.y)
        shared = torch.stack([loss, *(tensor.mean() for tensor in fast.values())])
        rows = prediction.reshape(prediction.shape[0], -1)
        state = torch.cat([shared.expand(rows.shape[0], -1), rows], 1)
        own = under("loss/", meta.learned)
        turn = own.pop("turn") @ _mean(state, support.x)
        turned = {n: w * (1 + turn[2 * i]) + turn[2 * i + 1] for i, (n, w) in enumerate(own.items())}
        return loss + _mean(_respond(turned, state), support.x).squeeze(0)


def _mean(rows: Tensor, x: Input) -> Tensor:
    """The mean over the examples (examples, ...) of inputs `x`, without the filling of padded ones."""
    if not isinstance(x, Padded):
        return rows.mean(0)
    real = x.real.to(rows.dtype)
    return real @ rows / real.sum()


def _network(prefix: str, inputs: int, hidden: int, outputs: int, like: Tensor) -> Params:
    """Two linear layers with a ReLU between; the first is random (fixed seed), the last is 0."""
    noise = torch.randn(hidden, inputs, generator=torch.Generator().manual_seed(0)) / math.sqrt(inputs)
    return {
        f"{prefix}weight0": noise.to(like), f"{prefix}bias0": like.new_zeros(hidden),
        f"{prefix}weight1": like.new_zeros(outputs, hidden), f"{prefix}bias1": like.new_zeros(outputs),
    }  # fmt: skip


def _respond(network: Params, x: Tensor) -> Tensor:
    hidden = (x @ network["weight0"].T + network["bias0"]).relu()
    return hidden @ network["weight1"].T + network["bias1"]
