"""The gradient doctor: broken models are diagnosed by name, healthy ones left in peace, and nothing is changed."""

import copy
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from toolkit.diagnosis import Finding, diagnose, report
from toolkit.models import bag, conv4, mlp


class Apply(nn.Module):
    """A layer of a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Once(Function):
    """A square whose gradient torch.func takes for a constant, without a word."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope * 2 * ctx.saved_tensors[0]


class Silent(Once):
    """A square with a right gradient that hides its own dependence on x."""

    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope * 2 * ctx.saved_tensors[0].detach()


class Old(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope * 2


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.seen = nn.Linear(4, 3), 0
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        return self.head(x)


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.data.clamp_(max=0.5)
        return x * self.scale


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(20, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


def between(middle: nn.Module | Callable[[Tensor], Tensor], bias: bool = True) -> nn.Sequential:
    """Something between two layers; its name is "2"."""
    middle = middle if isinstance(middle, nn.Module) else Apply(middle)
    return nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), middle, nn.Linear(6, 3))


def first(function: Callable[[Tensor], Tensor]) -> nn.Sequential:
    """A function before a layer."""
    return nn.Sequential(Apply(function), nn.Linear(4, 3))


def by_value(x: Tensor) -> Tensor:
    return x if x.mean().item() > 0 else 2 * x


def in_place(x: Tensor) -> Tensor:
    return x.mul_(2)


def frozen() -> nn.Module:
    model = between(nn.ReLU())
    model[0].weight.requires_grad_(False)
    return model


# A model, and what is found: level, name, and words of the finding.
ZOO: dict[str, tuple[Callable[[], nn.Module], str, str, str]] = {
    "unused": (Unused, "warning", "spare.weight, spare.bias", "unused"),
    "detached": (lambda: between(torch.detach), "error", "0.weight, 0.bias", "cut off by detach in 2"),
    "no_grad": (lambda: between(torch.no_grad()(torch.sin)), "error", "0.weight, 0.bias", "cut off by no_grad in 2"),
    "half detached": (lambda: between(lambda x: x * x.detach()), "error", "2", "detach: wrong first derivative"),
    "once_differentiable": (lambda: between(Once.apply), "error", "2", "wrong second derivative"),
    "silently wrong": (lambda: between(Silent.apply), "error", "2", "wrong second derivative"),
    "without vmap": (lambda: between(Once.apply), "warning", "2", "vmap cannot batch it"),
    "old function": (lambda: between(Old.apply), "error", "2", "setup_context"),
    "batch norm in eval": (lambda: between(nn.BatchNorm1d(6).eval()), "warning", "2", "evaluation mode"),
    "batch norm": (lambda: between(nn.BatchNorm1d(6)), "note", "2", "running statistics stay as they are"),
    "batch norm of one": (lambda: between(nn.BatchNorm1d(6)), "note", "2", "constant of a batch of one"),
    "counted calls": (Counting, "warning", "seen, calls", "changes this state"),
    "clamped parameter": (lambda: between(Clamped()), "error", "2.scale", "changes this parameter in place"),
    "inputs in place": (lambda: first(in_place), "error", "inputs", "changes them in place"),
    "root at 0": (lambda: between(lambda x: x.square().sqrt(), bias=False), "warning", "2", "sqrt: no finite derivative"),
    "norm at 0": (
        lambda: between(lambda x: x / (1 + x.norm(dim=1, keepdim=True)), bias=False),
        "warning", "2", "norm: no finite second derivative where inputs are all 0",
    ),
    "deviation 0": (lambda: first(lambda x: x / x.std(1, keepdim=True)), "warning", "0", "where inputs are all 1"),
    "large inputs": (lambda: first(lambda x: (30 * x).exp()), "warning", "0", "10 times larger"),
    "log of ReLU": (lambda: between(lambda x: x.relu().log()), "error", "2", "log: no finite result"),
    "item": (lambda: between(by_value), "warning", "2 (item)", "looks at values"),
    "item as a factor": (lambda: between(lambda x: x * x.mean().item()), "error", "2", "wrong first derivative"),
    "dropout": (lambda: between(nn.Dropout()), "note", "2", "random"),
    "own randomness": (lambda: between(lambda x: x * np.random.rand()), "warning", "the model", "under one seed"),
    "frozen": (frozen, "note", "0.weight", "frozen"),
    "dead": (lambda: between(lambda x: x * 0), "warning", "0.weight, 0.bias, 3.weight", "exactly 0"),
    "float32 inside": (lambda: between(lambda x: x.float()), "note", "2", "not in float64"),
    "wrong outputs": (lambda: nn.Linear(4, 5), "error", "the model", "gives (6, 5) for 6 examples"),
    "no tensor": (lambda: nn.LSTM(4, 3), "error", "the model", "gives tuple"),
    "broken forward": (lambda: between(nn.Linear(7, 6)), "error", "2", "forward fails with RuntimeError: mat1 and mat2"),
    "no parameters": (lambda: Apply(lambda x: x[:, :3]), "error", "the model", "no trained parameter"),
}  # fmt: skip


def found(findings: list[Finding], level: str, where: str, words: str) -> bool:
    return any((f.level, f.where) == (level, where) and words in f.what for f in findings)


@pytest.mark.parametrize("name", ZOO)
def test_broken_models_are_diagnosed_by_name(name: str) -> None:
    make, level, where, words = ZOO[name]
    findings = diagnose(make(), (4,), 3)
    assert found(findings, level, where, words), report(findings)


def test_an_operation_without_a_second_derivative_is_named() -> None:
    findings = diagnose(Bags(), (5,), 3, integer_inputs=20)
    assert found(findings, "error", "table", "embedding_bag: NotImplementedError"), report(findings)


def test_an_operation_that_vmap_takes_one_by_one_is_named() -> None:
    findings = diagnose(between(lambda x: torch.ones(1) * torch.renorm(x, 2, 0, 1.0)), (4,), 3)
    assert found(findings, "warning", "2", "vmap cannot batch it: renorm: aten::renorm"), report(findings)


HEALTHY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int | None]] = {
    "conv4": (lambda: conv4(5), (1, 28, 28), 5, None),
    "conv4 with pooling": (lambda: conv4(5, pool=True), (1, 28, 28), 5, None),
    "mlp": (lambda: mlp((4, 40, 40, 3)), (4,), 3, None),
    "sinusoid": (mlp, (1,), 1, None),
    "double": (lambda: mlp((4, 8, 3)).double(), (4,), 3, None),
    "bag": (lambda: bag((9,), 3, features=50, width=16), (9,), 3, 50),
    "lstm": (Recurrent, (6, 4), 3, None),
    "transformer": (lambda: Transformer(0.0), (5, 8), 3, None),
    "transformer with dropout": (lambda: Transformer(0.1), (5, 8), 3, None),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_models_are_left_in_peace(name: str) -> None:
    make, inputs, outputs, vocabulary = HEALTHY[name]
    findings = diagnose(make(), inputs, outputs, vocabulary)
    assert all(finding.level == "note" for finding in findings), report(findings)


def test_what_the_engine_does_by_itself_is_noted() -> None:
    of_conv4 = diagnose(conv4(5, width=4), (1, 28, 28), 5)
    assert found(of_conv4, "note", ", ".join(f"body.block{i}.norm" for i in range(4)), "replaced by exact formulas")
    assert found(of_conv4, "note", ", ".join(f"body.block{i}.conv" for i in range(4)), "the toolkit's kernels")
    assert found(diagnose(Recurrent(), (6, 4), 3), "note", "lstm", "the plan is 'loop'")
    assert found(diagnose(Transformer(0.0), (5, 8), 3), "note", "the model", "attention runs by its plain formula")


@pytest.mark.parametrize("make", [lambda: conv4(3, width=4), Unused, lambda: between(nn.Dropout()), Counting, Clamped])
def test_neither_the_model_nor_random_states_change(make: Callable[[], nn.Module]) -> None:
    model = make()
    kept = copy.deepcopy(model)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    diagnose(model, (1, 28, 28) if isinstance(model, nn.Sequential) and hasattr(model, "body") else (4,), 3)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))
    assert all(torch.equal(a, kept.state_dict()[name]) for name, a in model.state_dict().items())
    for module in model.modules():
        assert module.training and not module._forward_hooks and not module._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())
    assert getattr(model, "seen", 0) == 0


def test_a_diagnosis_repeats() -> None:
    model = between(Silent.apply)
    assert diagnose(model, (4,), 3) == diagnose(model, (4,), 3)


def test_a_report_has_errors_first_and_a_line_for_each() -> None:
    findings = [Finding("note", "a", "x", "c"), Finding("error", "b", "y", "d"), Finding("warning", "e", "z", "f")]
    assert report(findings) == "error    y: b; d\nwarning  z: e; f\nnote     x: a; c"
    assert report([]) == "nothing found"
    assert all("\n" not in line for line in report(diagnose(between(Old.apply), (4,), 3)).splitlines())


def test_a_model_that_cannot_be_copied_is_a_finding() -> None:
    model = nn.Linear(4, 3)
    model.scaled = model.weight * 2
    assert found(diagnose(model, (4,), 3), "error", "the model", "cannot be examined further, RuntimeError")


def test_it_is_quick() -> None:
    began = time.process_time()
    diagnose(conv4(5), (1, 28, 28), 5)
    assert time.process_time() - began < 15
