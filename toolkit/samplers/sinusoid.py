"""Sinusoid regression (Finn et al. 2017, section 5.1)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from toolkit.errors import UserError
from toolkit.task import Batch, Task, take


@dataclass(frozen=True)
class Sinusoid:
    """Tasks y = a sin(x - p) with a ~ U[0.1, 5], p ~ U[0, pi], x ~ U[-5, 5]; x and y of shape (`shots` or `queries`, 1)."""

    shots: int = 10
    queries: int = 10

    def __post_init__(self) -> None:
        if min(self.shots, self.queries) < 1:
            raise UserError(f"{self.shots} shots and {self.queries} queries: each must be at least 1")

    def __call__(self, generator: torch.Generator) -> Task:
        return take(self.draw_many(iter([generator])), 0)

    def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
        """One task per generator, stacked; equal to calling the sampler on each."""
        noise = torch.stack([torch.rand(2 + self.shots + self.queries, generator=g) for g in generators])
        amplitude, phase = 0.1 + 4.9 * noise[:, :1], math.pi * noise[:, 1:2]
        x = 10 * noise[:, 2:] - 5
        y = amplitude * torch.sin(x - phase)
        support, query = (slice(0, self.shots), slice(self.shots, None))
        return Task(Batch(x[:, support, None], y[:, support, None]), Batch(x[:, query, None], y[:, query, None]))
