"""Normalisation layers that are exact to second order, and batch norm by a named policy instead of hidden state.

Batch-norm policies:
    "batch"    every forward pass normalises by the statistics of its own batch, the query batch too. This is what Finn et
               al. 2017 did; it is transductive: the prediction for one query depends on the other queries.
    "support"  query predictions use the statistics of the task's support set under the same weights; not transductive.
    "running"  the module's stored running statistics, never updated; not transductive. Instance norm uses its own, if it
               keeps some, under this policy only: else it normalises each example by itself, in training and after.
    "per_step" every point k of the path has its own scale and shift, which the outer loop learns and the inner loop leaves
               alone, and its own statistics (Antoniou et al. 2019, section 4: "BNRS + BNWB"). A support set is normalised by
               itself, and so is a query set in training; in evaluation a query set is normalised by the statistics of point
               k, which `calibrate` measures on training tasks (exact means, where the paper keeps running averages); not
               transductive.
    "per_step_batch" the same scale and shift for every point, but always the batch's own statistics, as the code of that paper
               does; transductive.
No policy updates running statistics: an update inside the inner loop would leak from task to task. The policy of a run is
recorded in its `summary.json`.

Why not torch's own kernels: under `vmap`, torch 2.15 differentiates batch, layer and instance norm with affine weights twice
as if their statistics were constants, so second-order meta-gradients are silently wrong, by a per cent or more
(tests/test_gradients.py shows it). The same formulas in elementary operations are right. Group norm is here for torch 2.11,
which has none under `vmap`.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from toolkit import kernels
from toolkit.errors import UserError, unknown
from toolkit.modules import listed, refuse_moved

log = logging.getLogger("toolkit")
_warned = WeakIdKeyDictionary()  # statistics that a warning was given of: copies of a learner share them
POLICIES = ("batch", "support", "running", "per_step", "per_step_batch")
TRANSDUCTIVE = ("batch", "per_step_batch")


class Norms(TorchFunctionMode):
    """While active, replaces torch's batch, layer, group and instance norm. Batch norm follows `policy`; with `support_count`
    only the first so many of all `examples` give its statistics, and with `real` (examples,) only those where it holds.
    `seen` lists afterwards whether there was a batch norm, and `attention` says whether there was torch's attention."""

    def __init__(
        self, policy: str, support_count: int | None = None, real: Tensor | None = None, examples: int | None = None
    ) -> None:
        super().__init__()
        self.examples = examples
        self.policy, self.support_count, self.real = policy, support_count, real
        self.seen: list[tuple[Tensor | None, Tensor, Tensor]] = []
        self.attention = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _REFUSED and not _counts(func, args):
            raise UserError(f"the model uses {getattr(func, '__qualname__', func)}, {_REFUSED[func]}")
        if func in (F.scaled_dot_product_attention, F.multi_head_attention_forward):
            self.attention = True
        if func is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        if func is torch.batch_norm:
            return self._batch_norm(*_in_order(*args, **(kwargs or {})))
        if func is F.instance_norm:
            return self._instance_norm(*args, **(kwargs or {}))
        if func is torch.instance_norm:
            return self._instance_norm(*_in_order(*args, **(kwargs or {})))
        if func is torch.conv2d and _is_plain(*args, **(kwargs or {})):
            return kernels.conv2d(*args, **(kwargs or {}))
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        shape = [1, -1] + [1] * (input.dim() - 2)
        own = self.policy != "running" or running_mean is None or running_var is None
        if own and self.support_count is None and self.real is None and input.dim() == 4 and None not in (weight, bias):
            y, mean, scale = kernels.batch_norm(input, weight, bias, eps)  # type: ignore[arg-type]
            self.seen.append((running_mean, mean, scale**-2 - eps))
            return y
        if not own:
            assert running_mean is not None and running_var is not None
            mean, variance = running_mean.view(shape), running_var.view(shape)
        else:
            if self.support_count is not None and len(input) != self.examples:
                raise UserError(
                    f"batch norm got {len(input)} examples where the task has {self.examples}, so which are of the support set "
                    "is unknown; a model that splits or folds its inputs takes the policy 'batch' or 'running'"
                )
            axes, part = [0, *range(2, input.dim())], input[: self.support_count]
            variance, mean = _statistics(part, axes) if self.real is None else _weighted(part, axes, self.real)
        self.seen.append((running_mean, mean, variance))
        return _affine(input, mean, variance, eps, weight, bias, shape)

    def _instance_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        shape = [1, -1] + [1] * (input.dim() - 2)
        if self.policy == "running" and running_mean is not None and running_var is not None:
            mean, variance = running_mean.view(shape), running_var.view(shape)
        else:
            variance, mean = _statistics(input, list(range(2, input.dim())))
        return _affine(input, mean, variance, eps, weight, bias, shape)


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    axes = list(range(-len(normalized_shape), 0))
    variance, mean = _statistics(input, axes)
    return _affine(input, mean, variance, eps, weight, bias, list(normalized_shape))


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    groups = input.unflatten(1, (num_groups, -1))
    variance, mean = _statistics(groups, list(range(2, groups.dim())))
    shape = [1, num_groups, -1] + [1] * (input.dim() - 2)
    return _affine(groups, mean, variance, eps, weight, bias, shape).flatten(1, 2)


def _in_order(
    input: Tensor,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    *rest: Any,
) -> tuple[Any, ...]:
    """The arguments of `torch.batch_norm` and `torch.instance_norm` in the order of `F.batch_norm` and `F.instance_norm`."""
    return input, running_mean, running_var, weight, bias, training, momentum, eps


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Under vmap, torch 2.14 keeps the row of the filling from the gradient in the first task alone."""
    if max_norm is not None or scale_grad_by_freq:
        raise UserError(
            "an embedding with max_norm changes its weights while it reads them, and one with scale_grad_by_freq has another "
            "gradient than its derivative; make it without"
        )
    found = F.embedding(input, weight)
    if padding_idx is None:
        return found
    return torch.where((input == padding_idx % weight.shape[0]).unsqueeze(-1), found.detach(), found)


def _is_plain(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, *rest: Any) -> bool:
    """Whether a convolution is of a batch of images, with its padding in numbers: the rest is left to torch."""
    return input.dim() == 4 and not isinstance(padding, str)


def _adaptive_average(input: Tensor, output_size: Any) -> Tensor:
    # To one number it is a mean, which torch 2.14 knows under vmap; else it warns and loops over the tasks.
    if output_size in (1, (1, 1), [1, 1]):
        return input.mean((-2, -1), keepdim=True)
    return F.adaptive_avg_pool2d(input, output_size)


_REPLACED: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: lambda input, shape, weight=None, bias=None, eps=1e-5, *rest: _layer_norm(
        input, shape, weight, bias, eps
    ),
    F.group_norm: _group_norm,
    torch.group_norm: lambda input, groups, weight=None, bias=None, eps=1e-5, *rest: _group_norm(
        input, groups, weight, bias, eps
    ),
    F.embedding: _embedding,
    F.adaptive_avg_pool2d: _adaptive_average,
    F.hardsigmoid: lambda x, inplace=False: (x / 6 + 0.5).clamp(0, 1),  # torch's own has no second derivative
}


_UNSEEN = (
    "whose second derivative torch gets wrong under vmap; use the layer of torch.nn or its function in torch.nn.functional"
)
_UNSAID = "by which a weight changes unseen; make it of another one, as torch.nn.utils.parametrize does"
_HOOK = "but a hook on a tensor sees other gradients by each plan; scale or clip in the forward instead"
_REFUSED: dict[Any, str] = dict.fromkeys((torch.native_layer_norm, torch.native_batch_norm, torch.native_group_norm), _UNSEEN)
_REFUSED |= {Tensor.register_hook: _HOOK, Tensor.data.__set__: _UNSAID}  # type: ignore[attr-defined]


def _counts(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether it is a hook of torch's own, whose counters of operations hook on tensors."""
    return func is Tensor.register_hook and len(args) > 1 and str(getattr(args[1], "__module__", "")).startswith("torch.")


def _affine(
    x: Tensor, mean: Tensor, variance: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, shape: list[int]
) -> Tensor:
    scale = (variance + eps).rsqrt()
    y = (x - mean) * (scale if weight is None else scale * weight.view(shape))
    return (y if bias is None else y + bias.view(shape)).to(x.dtype)


def _statistics(x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    """(variance, mean) over `axes`, in float32 at least: squares of half-precision numbers overflow."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mean = x.mean(axes, keepdim=True)  # var_mean of torch 2.14 is twenty times slower over channels last
    return (x - mean).square().mean(axes, keepdim=True), mean


def _weighted(x: Tensor, axes: list[int], real: Tensor) -> tuple[Tensor, Tensor]:
    """`_statistics` over the examples that are `real`, by multiplication: in a vmap their number differs from task to task."""
    if real.shape[0] < x.shape[0]:
        raise UserError(
            f"batch norm got {x.shape[0]} examples where the padded task has {real.shape[0]}; a model that splits its inputs "
            "cannot take padded tasks"
        )
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    weight = real[: x.shape[0]].to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    total = weight.sum() * (x[0].numel() // x.shape[1])
    mean = (x * weight).sum(axes, keepdim=True) / total
    return ((x - mean).square() * weight).sum(axes, keepdim=True) / total, mean


def check_policy(model: nn.Module, policy: str) -> None:
    """Raises UserError for an unknown policy, and when it needs running statistics that a module does not keep."""
    if not isinstance(model, nn.Module):
        raise UserError(f"the model is a {type(model).__name__}; give an nn.Module")
    if policy not in POLICIES:
        raise unknown("batch-norm policy", policy, POLICIES)
    if policy not in ("running", "per_step"):
        return
    for name in batch_norms(model):
        if model.get_submodule(name).running_mean is None:
            raise UserError(f"batch norm {name!r} keeps no running statistics; use the policy 'batch' or 'support'")
    if policy == "per_step":
        return
    tracked = (*((name, model.get_submodule(name)) for name in batch_norms(model)), *tracked_instance_norms(model).items())
    new: dict[str, Any] = {name: module.running_mean for name, module in tracked if module.num_batches_tracked == 0}
    if not all(mean in _warned for mean in new.values()):
        _warned.update(dict.fromkeys(new.values(), True))
        log.warning(
            "normalisation has never been trained in %s: a running mean is 0 and a variance 1, and will stay so", listed(new)
        )


def tell_changed(model: nn.Module, buffers: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    """Warns once of what a model changed in fresh copies of its buffers, which nobody will see: such as the vectors of a
    spectral norm. The counts of batch norm are not used. Raises UserError for fresh copies of weights that it changed, as by
    clipping them."""
    refuse_moved(name for name, it in params.items() if it._version)
    changed = [name for name, it in buffers.items() if it._version and not name.endswith("num_batches_tracked")]
    own = {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in changed}
    if not all(buffer in _warned for buffer in own.values()):
        _warned.update(dict.fromkeys(own.values(), True))
        log.warning(
            "the model changes %s when it is called; such changes are dropped, so that a task leaves no trace in the next, and "
            "what depends on them stays as it was made",
            listed(changed),
        )


def tracked_instance_norms(model: nn.Module) -> dict[str, nn.Module]:
    """A model's instance norms that keep running statistics, by name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, _InstanceNorm)}
    return {name: module for name, module in found.items() if module.running_mean is not None}


def batch_norms(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's batch-norm layers."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, _BatchNorm))
