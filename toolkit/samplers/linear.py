"""Linear regression tasks: the family whose adapted weights are known in closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.task import Batch, Task


@dataclass(frozen=True)
class Linear:
    """Tasks y = x w + b + noise with w, b, x ~ N(0, 1); x (examples, `inputs`), y (examples, 1), float64."""

    inputs: int = 3
    shots: int = 10
    queries: int = 10
    noise: float = 0.1

    def __post_init__(self) -> None:
        if min(self.inputs, self.shots, self.queries) < 1:
            raise UserError(f"{self.inputs} inputs, {self.shots} shots, {self.queries} queries: each must be at least 1")

    def __call__(self, generator: torch.Generator) -> Task:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        weight, bias = normal(self.inputs, 1), normal(1)
        x = normal(self.shots + self.queries, self.inputs)
        y = x @ weight + bias + self.noise * normal(len(x), 1)
        return Task(Batch(x[: self.shots], y[: self.shots]), Batch(x[self.shots :], y[self.shots :]))


def adapted(theta: Tensor, support: Batch, lr: float, steps: int) -> Tensor:
    """`steps` of gradient descent on the mean squared error of a linear model, in closed form.

    `theta` (inputs + 1, 1) is the weight above the bias. With A = [x 1] and H = 2 A'A / n the error to the least-squares
    solution t* shrinks as theta_k - t* = (1 - lr H)^k (theta - t*). Written without t*, which need not be unique:
    theta_k = M^k theta + lr (1 + M + ... + M^(k-1)) 2 A'y / n, with M = 1 - lr H.
    """
    assert isinstance(support.x, Tensor)
    design = torch.cat([support.x, torch.ones_like(support.x[:, :1])], 1)
    step = torch.eye(len(theta), dtype=theta.dtype) - lr * 2 * design.T @ design / len(design)
    pull = lr * 2 * design.T @ support.y / len(design)
    powers = [torch.linalg.matrix_power(step, k) for k in range(steps)]
    end: Tensor = torch.linalg.matrix_power(step, steps) @ theta + sum(powers, torch.zeros_like(step)) @ pull
    return end
