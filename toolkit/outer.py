"""How the outer loop moves the meta-parameters: optimiser, the rate's schedule, clipping. A method may bring its own."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.errors import UserError, unknown

OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
LOWEST = 0.01  # of the peak rate, where a cosine ends: MAML++ goes from 1e-3 to 1e-5


@dataclass(frozen=True)
class Outer:
    """`optimizer` "adam" or "sgd" (plain); `schedule` of the meta rate over all iterations: "constant", "linear" to 0, or
    "cosine" to a hundredth; `clip` scales a meta-gradient that is longer down to this Euclidean length.
    """

    optimizer: str = "adam"
    schedule: str = "constant"
    clip: float | None = None

    def __post_init__(self) -> None:
        for kind, value, known in (("meta optimizer", self.optimizer, OPTIMIZERS), ("schedule", self.schedule, SCHEDULES)):
            if value not in known:
                raise unknown(kind, value, known)
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise UserError(f"the meta-gradient's longest length is {self.clip}; give a positive number")

    def build(self, leaves: list[Tensor], meta_lr: float, fused: bool = True) -> torch.optim.Optimizer:
        """The optimiser over these tensors. `fused` is faster, but rounds the last few numbers of a tensor in another way, so
        that parts of a tensor come out otherwise than the whole."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(leaves, lr=meta_lr)
        return torch.optim.Adam(leaves, lr=meta_lr, fused=fused and all(leaf.is_floating_point() for leaf in leaves))

    def rate(self, meta_lr: float, iteration: int, iterations: int) -> float:
        """The rate of iteration 0, 1, ..., `iterations` - 1."""
        done = iteration / iterations
        if self.schedule == "linear":
            return meta_lr * (1 - done)
        if self.schedule == "cosine":
            return meta_lr * (LOWEST + (1 - LOWEST) * (1 + math.cos(math.pi * done)) / 2)
        return meta_lr


PLAIN = Outer()
