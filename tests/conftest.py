"""Shared pieces of the tests: small smooth models, batches of tasks, finite differences."""

import gc
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from toolkit import Batch, Learner, Meta, Task
from toolkit.engine import gradient_function


@pytest.fixture(autouse=True)
def quiet_state() -> None:
    """Every test starts from the same global random state, which the toolkit must not depend on."""
    torch.manual_seed(0)
    gradient_function.cache_clear()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw nothing at their end, which takes longer than they do; figures have tests of their own."""
    monkeypatch.setattr("toolkit.plots.save.draw_run", lambda folder: [])


def dense() -> nn.Module:
    """A smooth network from three numbers to two classes, float64."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.7
    return model


def named(**layers: nn.Module) -> nn.Module:
    """A smooth network of named layers with random weights, float64: from three numbers to two classes, unless it is told."""
    layers = layers or {"body": nn.Linear(3, 4), "act": nn.Tanh(), "head": nn.Linear(4, 2)}
    generator, model = torch.Generator().manual_seed(1), nn.Sequential(OrderedDict(layers)).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.7
    return model


def stirred(learner: Learner) -> Meta:
    """The learner's first meta-parameters with random noise on all of them, so that nothing stays zero or the identity; rates
    stay positive."""
    generator, meta = torch.Generator().manual_seed(5), learner.init()

    def stir(name: str, tensor: Tensor) -> Tensor:
        noise = 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        return tensor * noise.exp() if "lr/" in name else tensor + noise

    return Meta(*({name: stir(name, tensor) for name, tensor in tree.items()} for tree in meta))


def convolutional(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """A smooth convolutional network with a normalisation layer, two classes, float64."""
    torch.manual_seed(2)
    body = [nn.Conv2d(1, 3, 3, stride=2, padding=1), norm(3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(12, 2)).double()


def task_batch(tasks: int = 3, shape: tuple[int, ...] = (3,), support: int = 4, query: int = 6, ways: int = 2) -> Task:
    """A batch of random classification tasks, float64."""
    g = torch.Generator().manual_seed(3)

    def batch(n: int) -> Batch:
        x = torch.randn(tasks, n, *shape, generator=g, dtype=torch.float64)
        return Batch(x, torch.randint(ways, (tasks, n), generator=g))

    return Task(batch(support), batch(query))


def finite_differences(value: Callable[[Meta], Tensor], meta: Meta, h: float = 1e-5) -> Meta:
    """Central differences of `value` in every scalar of `meta`."""
    leaves, spec = pytree.tree_flatten(meta)
    grads = [torch.zeros_like(leaf) for leaf in leaves]
    for leaf, grad in zip(leaves, grads, strict=True):
        flat = leaf.view(-1)
        for i in range(flat.numel()):
            kept = flat[i].item()
            flat[i] = kept + h
            above = value(meta)
            flat[i] = kept - h
            grad.view(-1)[i] = (above - value(meta)) / (2 * h)
            flat[i] = kept
    return pytree.tree_unflatten(grads, spec)


class Slopes:
    """Central differences of `value` along a few random directions of length one, which takes less time than in every scalar
    and sees as much: an error of a gradient shows in its projections as large as it is."""

    def __init__(self, value: Callable[[Meta], Tensor], meta: Meta, count: int = 8, h: float = 1e-5) -> None:
        leaves, spec = pytree.tree_flatten(meta)
        generator = torch.Generator().manual_seed(7)
        whole, sizes = flat(meta), [leaf.numel() for leaf in leaves]
        self.directions = torch.randn(count, len(whole), generator=generator, dtype=torch.float64)
        self.directions /= self.directions.norm(dim=1, keepdim=True)

        def at(scalars: Tensor) -> Tensor:
            parts = [part.view_as(leaf) for part, leaf in zip(scalars.split(sizes), leaves, strict=True)]
            return value(pytree.tree_unflatten(parts, spec))

        self.slopes = torch.stack([(at(whole + h * d) - at(whole - h * d)) / (2 * h) for d in self.directions])

    def off(self, grads: object) -> float:
        """The relative error of these gradients in those directions."""
        return relative(self.directions @ flat(grads), self.slopes)


def mean_objective(learner: Learner, tasks: Task) -> Callable[[Meta], Tensor]:
    """The mean objective over a batch of tasks, by a plain loop and without any derivative of the toolkit's own."""

    def value(meta: Meta) -> Tensor:
        values = []
        for i in range(tasks.support.y.shape[0]):
            task = pytree.tree_map(lambda t, i=i: t[i], tasks)
            values.append(learner.objective(learner, meta, learner.path(meta, task.support), task)[0])
        return torch.stack(values).mean()

    return value


def flat(tree: object) -> Tensor:
    """All scalars of a tree of tensors in one vector."""
    return torch.cat([leaf.detach().reshape(-1).double() for leaf in pytree.tree_leaves(tree)])


def relative(a: object, b: object) -> float:
    """|a - b| / |b| over all scalars of two trees."""
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not look at a million objects again and again."""
    gc.collect()
    gc.freeze()
