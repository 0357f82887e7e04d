"""Few-shot regression of curves: harmonics, sines or lines, and step functions."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.task import Batch, Task, take


@dataclass(frozen=True)
class Harmonics:
    """Tasks y = a sin(w x + p) + b sin(2 w x + q) + noise, seen near a place m of their own; x, y (`shots` or `queries`, 1).

    a, b ~ N(0, 1); w ~ U[5, 7]; p, q ~ U[0, 2 pi]; x ~ N(m, 1) with m ~ U[-4, 4]; Gaussian `noise`, a standard deviation, on
    all targets. Source: Lacoste et al. 2018, "Uncertainty in Multitask Transfer Learning", with the ranges and without noise
    as in torchmeta's `Harmonic`. Tasks are drawn without end, where theirs are fixed in number.
    """

    shots: int = 10
    queries: int = 10
    noise: float = 0.0

    def __post_init__(self) -> None:
        _check(self.shots, self.queries, self.noise)

    def __call__(self, generator: torch.Generator) -> Task:
        return take(self.draw_many(iter([generator])), 0)

    def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
        """One task per generator, stacked; equal to calling the sampler on each."""
        n = self.shots + self.queries
        uniform, normal = _random(generators, 4, 2 + 2 * n)
        frequency, first, second = 5 + 2 * uniform[:, :1], 2 * math.pi * uniform[:, 1:2], 2 * math.pi * uniform[:, 2:3]
        x = 8 * uniform[:, 3:] - 4 + normal[:, 2 : 2 + n]
        y = normal[:, :1] * torch.sin(frequency * x + first) + normal[:, 1:2] * torch.sin(2 * frequency * x + second)
        return _task(x, y + self.noise * normal[:, 2 + n :], self.shots)


@dataclass(frozen=True)
class SineOrLine:
    """Tasks that are, each with probability 1/2, a sine y = a sin(x - p) or a line y = s x + c, with Gaussian `noise` (a
    standard deviation) on all targets; x, y (`shots` or `queries`, 1).

    a ~ U[0.1, 5], p ~ U[0, pi]; s, c ~ U[-3, 3]; x ~ U[-5, 5]. Source: Finn, Xu and Levine 2018, "Probabilistic Model-Agnostic
    Meta-Learning", the illustrative 5-shot regression of section 5.
    """

    shots: int = 5
    queries: int = 10
    noise: float = 0.3

    def __post_init__(self) -> None:
        _check(self.shots, self.queries, self.noise)

    def __call__(self, generator: torch.Generator) -> Task:
        return take(self.draw_many(iter([generator])), 0)

    def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
        """One task per generator, stacked; equal to calling the sampler on each."""
        n = self.shots + self.queries
        uniform, normal = _random(generators, 3 + n, n)
        kind, one, two = uniform[:, :1], uniform[:, 1:2], uniform[:, 2:3]
        x = 10 * uniform[:, 3:] - 5
        sine = (0.1 + 4.9 * one) * torch.sin(x - math.pi * two)
        line = (6 * one - 3) * x + 6 * two - 3
        return _task(x, torch.where(kind < 0.5, sine, line) + self.noise * normal, self.shots)


@dataclass(frozen=True)
class Steps:
    """Tasks that are -1 at first and change to 1 and back at each of `jumps` places ~ U[-2.5, 2.5], with Gaussian `noise` (a
    standard deviation) on all targets; x ~ U[-5, 5]; x, y (`shots` or `queries`, 1).

    Source: the "multistep" family of Harrison, Sharma and Pavone 2018 (ALPaCA), with three jumps and the places from their
    code. There the targets have noise of variance 0.05, which is `noise=0.224`; here none by default.
    """

    shots: int = 10
    queries: int = 10
    jumps: int = 3
    noise: float = 0.0

    def __post_init__(self) -> None:
        _check(self.shots, self.queries, self.noise)
        if self.jumps < 1:
            raise UserError(f"{self.jumps} jumps; a step function needs at least 1")

    def __call__(self, generator: torch.Generator) -> Task:
        return take(self.draw_many(iter([generator])), 0)

    def draw_many(self, generators: Iterator[torch.Generator]) -> Task:
        """One task per generator, stacked; equal to calling the sampler on each."""
        n = self.shots + self.queries
        uniform, normal = _random(generators, self.jumps + n, n)
        places, x = 5 * uniform[:, : self.jumps] - 2.5, 10 * uniform[:, self.jumps :] - 5
        passed = (x[:, :, None] > places[:, None]).sum(2)
        return _task(x, 2.0 * (passed % 2) - 1 + self.noise * normal, self.shots)


def _check(shots: int, queries: int, noise: float) -> None:
    if min(shots, queries) < 1:
        raise UserError(f"{shots} shots and {queries} queries: each must be at least 1")
    if not 0 <= noise < math.inf:
        raise UserError(f"noise {noise} is no standard deviation; give 0 or more")


def _random(generators: Iterator[torch.Generator], uniform: int, normal: int) -> tuple[Tensor, Tensor]:
    """From each generator, numbers from U[0, 1] and then from N(0, 1); shapes (tasks, `uniform`) and (tasks, `normal`)."""
    drawn = [(torch.rand(uniform, generator=g), torch.randn(normal, generator=g)) for g in generators]
    return torch.stack([u for u, _ in drawn]), torch.stack([n for _, n in drawn])


def _task(x: Tensor, y: Tensor, shots: int) -> Task:
    x, y = x[..., None], y[..., None]
    return Task(Batch(x[:, :shots], y[:, :shots]), Batch(x[:, shots:], y[:, shots:]))
