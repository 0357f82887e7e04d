"""Convolution and batch norm closed under differentiation: torch's own values, exact derivatives, vmap equal to a loop."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap

from tests.conftest import relative
from toolkit import kernels, products
from toolkit.norms import Norms

GEOMETRIES: dict[str, dict[str, Any]] = {
    "same": {"padding": 1},
    "stride": {"stride": 2, "padding": 1},
    "stride without padding": {"stride": 2},
    "dilation": {"padding": 2, "dilation": 2},
    "groups": {"padding": 1, "groups": 2},
    "axes apart": {"stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
}


def given(groups: int = 1, channels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (2, channels, 5, 6), (6, channels // groups, 3, 2), (6,)
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in shapes)  # type: ignore[return-value]


def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return kernels.batch_norm(x, weight, bias, 1e-2)[0]


def images() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 3, 2), (2,), (2,)))  # type: ignore[return-value]


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_convolution_equals_torchs_and_its_derivatives_are_exact(geometry: str, channels: int) -> None:
    options = GEOMETRIES[geometry]
    if channels % options.get("groups", 1):
        pytest.skip("one channel has no groups")
    x, weight, bias = given(options.get("groups", 1), channels)
    assert relative(kernels.conv2d(x, weight, bias, **options), F.conv2d(x, weight, bias, **options)) < 1e-14
    assert gradcheck(lambda *a: kernels.conv2d(*a, **options), (x, weight, bias))
    assert gradgradcheck(lambda *a: kernels.conv2d(*a, **options), (x, weight, bias))


def test_batch_norm_equals_torchs_and_its_derivatives_are_exact_to_third_order() -> None:
    x, weight, bias = images()
    assert relative(normed(x, weight, bias), F.batch_norm(x, None, None, weight, bias, True, eps=1e-2)) < 1e-14
    assert gradcheck(normed, (x, weight, bias)) and gradgradcheck(normed, (x, weight, bias))

    def slope(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return torch.autograd.grad((normed(x, weight, bias) ** 3).sum(), (x, weight, bias), create_graph=True)

    for i in range(3):
        assert gradgradcheck(lambda *a, i=i: slope(*a)[i], (x, weight, bias))


def test_what_depends_on_the_statistics_is_differentiated() -> None:
    def of_statistics(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, mean, scale = kernels.batch_norm(x, weight, bias, 1e-2)
        return torch.cat([(mean * scale).sin(), y.mean((0, 2, 3)) ** 2])

    assert gradgradcheck(of_statistics, images())


def curved(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """A gradient of a gradient with respect to all arguments of `function`."""

    def loss(*arguments: Tensor) -> Tensor:
        return (function(*arguments) ** 3).sum()

    def slope(*arguments: Tensor) -> Tensor:
        return torch.stack([(t**2).sum() for t in grad(loss, (0, 1, 2))(*arguments)]).sum()

    return grad(slope, (0, 1, 2))


SHARED: dict[str, tuple[bool, bool, bool]] = {
    "weights of each task": (False, False, True),
    "shared weights": (False, True, True),
    "shared images": (True, False, False),
    "shared images and bias": (True, False, True),
    "bias of each task": (False, True, False),
}


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("what", [*GEOMETRIES, "batch norm"])
@pytest.mark.parametrize("gpu", [False, True], ids=["", "as on a GPU"])
def test_vmap_equals_a_loop_to_second_order(what: str, shared: str, gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_on_gpu", lambda tensor: gpu)
    options = GEOMETRIES.get(what, {})
    function = curved(normed if what == "batch norm" else lambda *a: kernels.conv2d(*a, **options))
    base = [t.detach() for t in (images() if what == "batch norm" else given(options.get("groups", 1)))]
    dims = tuple(None if one else 0 for one in SHARED[shared])
    tensors = [t if dim is None else torch.stack([t, t.flip(0) + 0.5]) for t, dim in zip(base, dims, strict=True)]
    found = vmap(function, in_dims=dims)(*tensors)
    for i in range(2):
        expected = function(*(t if dim is None else t[i] for t, dim in zip(tensors, dims, strict=True)))
        assert relative([f[i] for f in found], expected) < 1e-12


@pytest.mark.parametrize("what", ["stride", "batch norm"])
def test_vmap_in_vmap_equals_loops(what: str) -> None:
    function = curved(normed if what == "batch norm" else lambda *a: kernels.conv2d(*a, **GEOMETRIES[what]))
    base = [t.detach() for t in (images() if what == "batch norm" else given())]
    x, weight = (torch.stack([torch.stack([t, 2 * t]), torch.stack([t + 1, -t])]) for t in base[:2])
    found = vmap(vmap(function, (0, 0, None)), (0, 0, None))(x, weight, base[2])
    for i in range(2):
        for j in range(2):
            assert relative([f[i, j] for f in found], function(x[i, j], weight[i, j], base[2])) < 1e-12


def test_channels_stay_last_from_the_first_layer_on() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3))
    x = torch.randn(5, 1, 12, 12)
    with Norms("batch"):
        for layer in model:
            x = layer(x)
            assert x.stride(1) == 1, layer


def test_what_only_torch_can_do_is_left_to_it() -> None:
    layer, x = nn.Conv2d(2, 3, 3, padding="same"), torch.randn(4, 2, 5, 5)
    single = nn.Conv2d(2, 3, 3, padding=1)
    with Norms("batch"):
        assert relative(layer(x), F.conv2d(x, layer.weight, layer.bias, padding="same")) == 0
        assert relative(single(x[0]), F.conv2d(x[0], single.weight, single.bias, padding=1)) == 0


@pytest.mark.parametrize("tasks", [0, 2])
def test_half_precision_keeps_its_type_and_its_gradient_is_near(tasks: int) -> None:
    def value(x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
        return kernels.batch_norm(kernels.conv2d(x, weight, bias, padding=1), gain, bias, 1e-5)[0].float().square().mean()

    def second(*arguments: Tensor) -> Any:
        return grad(lambda *a: sum(t.square().sum() for t in grad(value, (1, 3))(*a)), (1, 3))(*arguments)

    g = torch.Generator().manual_seed(0)
    x, weight, bias, gain = (torch.randn(s, generator=g) for s in ((8, 3, 6, 6), (4, 3, 3, 3), (4,), (4,)))
    if tasks:
        x, second = torch.stack([x] * tasks), vmap(second, in_dims=(0, None, None, None))
    expected = second(x, weight, bias, gain)
    with torch.autocast("cpu", torch.bfloat16):
        found = second(x, weight, bias, gain)
    assert all(f.dtype == torch.float32 for f in found)
    assert 1e-4 < relative(found[1], expected[1]) < 0.1


@pytest.mark.parametrize("size", [1, (1, 1), 2])
def test_adaptive_average_pooling_is_torchs_and_to_one_number_needs_no_loop(size: Any) -> None:
    """torch has no batching rule for it and says so in a warning, which is an error here."""
    x, layer = torch.randn(2, 3, 4, 6, 4, dtype=torch.float64), nn.AdaptiveAvgPool2d(size)
    with Norms("batch"):
        assert torch.allclose(layer(x[0]), F.adaptive_avg_pool2d(x[0], size), atol=1e-14)
        if size != 2:
            seconds = vmap(grad(lambda x: layer(x).square().sum()))(x)
            assert torch.allclose(seconds[0], grad(lambda x: F.adaptive_avg_pool2d(x, 1).square().sum())(x[0]), atol=1e-14)
