"""What another package brings: a sampler, a dataset, a model, an algorithm and a logger that know nothing of our tests."""

import json
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolkit import Batch, Learner, Task
from toolkit.algorithms import maml
from toolkit.data.bank import ClassBank
from toolkit.rules import SGD, Groups


@dataclass(frozen=True)
class Thresholds:
    """Which of five numbers is the largest by more than a gap?"""

    shots: int
    queries: int
    gap: float = 1.0

    def __call__(self, generator: torch.Generator) -> Task:
        order = torch.randperm(5, generator=generator)
        x = torch.randn(5, self.shots + self.queries, 5, generator=generator)
        x[torch.arange(5), :, order] += self.gap
        y = torch.arange(5)[:, None].repeat(1, self.shots + self.queries)
        parts = (slice(0, self.shots), slice(self.shots, None))
        return Task(*(Batch(x[:, part].flatten(0, 1), y[:, part].flatten()) for part in parts))


def stripes(split: str, classes: int = 8, size: int = 12) -> ClassBank:
    """Noisy stripes, of another width in each class."""
    generator = torch.Generator().manual_seed({"train": 1, "val": 2, "test": 3}[split])
    waves = (torch.arange(size) * (torch.arange(classes)[:, None] + 1)).cos()
    items = (waves[:, None, None, None, :] + torch.randn(classes, 20, 1, size, size, generator=generator)).flatten(0, 1)
    return ClassBank(items, torch.arange(classes + 1) * 20, tuple(f"{split} {c}" for c in range(classes)), f"stripes {split}")


def network(inputs: tuple[int, ...], outputs: int, seed: int = 0, width: int = 16) -> nn.Module:
    """One hidden layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(inputs), width), nn.Tanh())
        return nn.Sequential(OrderedDict(body=body, head=nn.Linear(width, outputs)))


def boosted(model: nn.Module, *, inner_lr: float = 0.4, boost: float = 1.0, **shared: Any) -> Learner:
    """MAML whose head learns faster than the rest."""
    rule = Groups(("head.*", SGD(boost * inner_lr)), ("*", SGD(inner_lr)))
    return maml(model, **{"name": "boosted", **shared, "rule": rule})


class Lines:
    """Rows as lines of JSON, with the seed of the run."""

    def __init__(self, folder: Path, config: dict[str, Any], start: int) -> None:
        self.file, self.seed = folder / "theirs.jsonl", config["seed"]
        with open(self.file, "a") as file:
            file.write(json.dumps({"start": start}) + "\n")

    def __call__(self, row: dict[str, float]) -> None:
        with open(self.file, "a") as file:
            file.write(json.dumps({"seed": self.seed, **row}) + "\n")
