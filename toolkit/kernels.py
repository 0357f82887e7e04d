"""Convolution and batch norm that are exact to every order and fast to second order.

torch differentiates a convolution's gradient by convolutions whose kernel is as large as the image, and batch norm's by a score
of elementary operations. Here the three bilinear maps of a convolution, and batch norm and its gradient, are differentiated
into one another, so every derivative of any order runs on the same few kernels. Those take channels last, which they keep: on a
CPU that is the layout in which convolution, pooling and sums over pixels are fastest.

Every function also takes a batch of tasks, one axis more on all tensors: what `vmap` makes of it. Where weights differ from
task to task their convolutions are one batched matrix product; where they are shared, one convolution of all examples.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from toolkit.products import Geometry, Pair, Size, of_tasks

aten = torch.ops.aten


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Size = 1,
    padding: int | Size = 0,
    dilation: int | Size = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.conv2d` of a batch of images, in the precision of autocast where it is on."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # torch knows no autocast of shapes
        low = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(low), weight.to(low), None if bias is None else bias.to(low)
    geometry = Geometry(_pair(stride), _pair(padding), _pair(dilation), groups)
    return _Convolution.apply(x, weight, bias, "output", None, geometry)  # type: ignore[no-any-return]


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm of images `x` by their own statistics; also their mean and 1 / sqrt(variance + eps), each (channels,)."""
    return _BatchNorm.apply(x, weight, bias, eps)  # type: ignore[no-any-return]


def _pair(value: int | Size) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


# Images are (examples, channels, height, width); those of a batch of tasks (tasks, examples, channels, height, width).


def _last(x: Tensor) -> Tensor:
    """`x` with its channels last in memory. With one channel all layouts look alike, so the strides must say which it is."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.shape[1] > 1 else x.as_strided(x.shape, _strides(x.shape))


def _strides(shape: Size) -> tuple[int, ...]:
    _, channels, height, width = shape
    return channels * height * width, 1, width * channels, channels


def _unfilled(shape: Size, like: Tensor) -> Tensor:
    """Memory that is never read: torch's gradient of a convolution asks for its input or weight only to know the shape."""
    return torch.empty_strided(shape, _strides(shape), dtype=like.dtype, device=like.device)


class _Convolution(Function):
    """Any of the three maps of a convolution: "output" (x, weight) -> y, and its gradients, "input" (y, weight) -> x and
    "weight" (y, x) -> weight, whose results have this `shape`."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, bias: Tensor | None, kind: str, shape: Size | None, g: Geometry) -> Tensor:
        if a.dim() == 5:
            return of_tasks(a, b, bias, kind, shape, g)
        if kind == "output":
            return aten.convolution(_last(a), _last(b), bias, *g.arguments)  # type: ignore[no-any-return]
        assert shape is not None
        x, weight = (_unfilled(shape, a), _last(b)) if kind == "input" else (_last(b), _unfilled(shape, a))
        wanted = [kind == "input", kind == "weight", False]
        return aten.convolution_backward(_last(a), x, weight, None, *g.arguments, wanted)[wanted.index(True)]  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        a, b, _, ctx.kind, _, ctx.geometry = inputs
        ctx.save_for_backward(a, b)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        (a, b), (first, second, third, *_) = ctx.saved_tensors, ctx.needs_input_grad

        def to(kind: str, left: Tensor, right: Tensor, like: Tensor | None = None) -> Tensor:
            shape = None if like is None else tuple(like.shape)
            return _Convolution.apply(left, right, None, kind, shape, ctx.geometry)  # type: ignore[no-any-return]

        if ctx.kind == "output":
            to_a = to("input", h, b, a) if first else None
            to_b = to("weight", h, a, b) if second else None
        elif ctx.kind == "input":
            to_a = to("output", h, b) if first else None
            to_b = to("weight", a, h, b) if second else None
        else:
            to_a = to("output", b, h) if first else None
            to_b = to("input", a, h, b) if second else None
        return to_a, to_b, h.sum((-4, -2, -1)) if third else None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, b: Tensor, bias: Tensor | None, kind: str, shape: Any, g: Geometry) -> Any:
        tasks, shared = info.batch_size, kind != "weight" and in_dims[1] is None and in_dims[2] is None
        if shared:
            of_all = None if shape is None else (tasks * shape[0], *shape[1:])
            merged = _Convolution.apply(a.movedim(in_dims[0], 0).flatten(0, 1), b, bias, kind, of_all, g)
            return merged.unflatten(0, (tasks, -1)), 0
        a, b, bias = (_of_tasks(t, dim, tasks) for t, dim in zip((a, b, bias), in_dims[:3], strict=True))
        if g.groups > 1 or a.dim() == 6:  # no product of matrices, or a vmap in a vmap: one task after the other
            parts = zip(a.unbind(), b.unbind(), [None] * tasks if bias is None else bias.unbind(), strict=True)
            return torch.stack([_Convolution.apply(*part, kind, shape, g) for part in parts]), 0
        return _Convolution.apply(a, b, bias, kind, None if shape is None else (tasks, *shape), g), 0


def _of_tasks(tensor: Any, dim: int | None, tasks: int) -> Any:
    if tensor is None:
        return None
    return tensor.expand(tasks, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


class _BatchNorm(Function):
    """y = (x - mean) * scale * weight + bias, with `mean` and `scale` = 1 / sqrt(variance + eps) of x itself.

    Both are results too, so that the gradient's own dependence on them is differentiated like any other use of them.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        if x.dim() == 4:
            return aten.native_batch_norm(_last(x), weight, bias, None, None, True, 0.0, eps)  # type: ignore[no-any-return]
        mean = _mean(x)
        centred = x - _wide(mean)
        scale = (_mean(centred.square()) + eps).rsqrt()
        return torch.addcmul(_wide(bias), centred, _wide(scale * weight)).to(x.dtype), mean, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2], *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, slope: Tensor | None, to_mean: Tensor | None, to_scale: Tensor | None) -> Any:
        x, weight, mean, scale = ctx.saved_tensors
        to_x = to_weight = to_bias = None
        if slope is not None:
            to_x, to_weight, to_bias = _BatchNormBack.apply(slope, x, weight, mean, scale)
        if to_mean is not None or to_scale is not None:
            # mean is sum(x) / n, and scale moves by -scale^3 (x - mean) / n with each x.
            pixels = x.numel() // mean.numel()
            shift = 0 if to_mean is None else to_mean / pixels
            factor = mean * 0 if to_scale is None else -to_scale * scale**3 / pixels
            more = torch.addcmul(_wide(shift - factor * mean), x, _wide(factor)).to(x.dtype)
            to_x = more if to_x is None else to_x + more
        return to_x, to_weight, to_bias, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        given = [_of_tasks(t, dim, info.batch_size) for t, dim in zip((x, weight, bias), in_dims[:3], strict=True)]
        if given[0].dim() == 6:
            return _stacked([_BatchNorm.apply(*part, eps) for part in zip(*(t.unbind() for t in given), strict=True)])
        return _BatchNorm.apply(*given, eps), (0, 0, 0)


class _BatchNormBack(Function):
    """The gradient of `_BatchNorm` with respect to x, weight and bias, from the `slope` of its y; a function of all five."""

    @staticmethod
    def forward(slope: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.dim() == 4:
            given = _last(slope), _last(x), weight, None, None, mean, scale, True, 0.0
            return aten.native_batch_norm_backward(*given, [True, True, True])  # type: ignore[no-any-return]
        standard = (x - _wide(mean)) * _wide(scale)
        along, even = _mean(slope * standard), _mean(slope)
        factor, pixels = scale * weight, x.numel() // mean.numel()
        to_x = torch.addcmul(slope - _wide(even), standard, _wide(-along)) * _wide(factor)
        return to_x.to(x.dtype), along * pixels, even * pixels

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, h: Tensor | None, v: Tensor | None, u: Tensor | None) -> Any:
        slope, x, weight, mean, scale, to_weight, to_bias = ctx.saved_tensors
        pixels = x.numel() // mean.numel()
        along, even = to_weight / pixels, to_bias / pixels  # means of slope * standard and of slope
        standard = torch.addcmul(_wide(-mean * scale), x, _wide(scale))
        to_slope = to_x = to_w = to_mean = to_scale = None
        # The result depends on `standard` by factor * (h * a + slope * b), whose mean is `level` and whose part along
        # `standard` is `tilt`.
        if h is not None:
            to_slope, h_along, h_even = _BatchNormBack.apply(h, x, weight, mean, scale)
            h_along, h_even = h_along / pixels, h_even / pixels
            spread = pixels * (_mean(h * slope) - h_even * even - h_along * along)
            factor, a, b = scale * weight, -along, -h_along
            level, tilt = factor * (a * h_even + b * even), 2 * factor * a * h_along
            of_slope = factor * b if v is None else factor * b + v
            to_w, to_scale = scale * spread, weight * spread
            if v is not None:
                level, tilt = level + v * even, tilt + v * along
            to_x = torch.addcmul(slope * _wide(scale * of_slope), h, _wide(scale * factor * a))
        elif v is not None:
            level, tilt = v * even, v * along
            to_x = slope * _wide(scale * v)
        if h is not None or v is not None:
            to_mean, more = -scale * pixels * level, pixels * tilt / scale
            to_scale = more if to_scale is None else to_scale + more
        if v is not None:
            to_slope = standard * _wide(v) if to_slope is None else torch.addcmul(to_slope, standard, _wide(v))
        if u is not None:
            to_slope = _wide(u).expand_as(x) if to_slope is None else to_slope + _wide(u)
        return *(None if t is None else t.to(x.dtype) for t in (to_slope, to_x)), to_w, to_mean, to_scale

    @staticmethod
    def vmap(info: Any, in_dims: Any, *given: Tensor) -> Any:
        given = tuple(_of_tasks(t, dim, info.batch_size) for t, dim in zip(given, in_dims, strict=True))
        if given[1].dim() == 6:
            return _stacked([_BatchNormBack.apply(*part) for part in zip(*(t.unbind() for t in given), strict=True)])
        return _BatchNormBack.apply(*given), (0, 0, 0)


def _stacked(parts: list[tuple[Tensor, ...]]) -> Any:
    return tuple(torch.stack(column) for column in zip(*parts, strict=True)), (0,) * len(parts[0])


def _mean(x: Tensor) -> Tensor:
    """Of each channel, in float32 at least: sums of half-precision numbers overflow."""
    return (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).mean((-4, -2, -1))


def _wide(channels: Any) -> Any:
    """(..., channels) as it meets images."""
    return channels.unsqueeze(-1).unsqueeze(-1).unsqueeze(-4)
