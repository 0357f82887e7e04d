"""Models made from yours: copies with adapters, warp layers, context parameters, an attention head, or another width of head.

Each returns a new module tree and leaves the given model alone; new parameters have telling names, by which a learner adapts
them or not.
"""

import copy
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.tree import Selection, matches

Layer = nn.Linear | nn.Conv2d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm | nn.InstanceNorm2d


class Lora(nn.Module):
    """`layer` plus a low-rank update, layer(x) + scale B A x; B starts at 0, so at first it is `layer` (Hu et al. 2022,
    equation 3). For a convolution A has its kernel and B is 1x1."""

    def __init__(self, layer: Layer, rank: int, scale: float) -> None:
        super().__init__()
        self.base_layer, self.scale = layer, scale
        if isinstance(layer, nn.Conv2d):
            shape = {key: getattr(layer, key) for key in ("kernel_size", "stride", "padding", "dilation")}
            self.lora_A: nn.Module = nn.Conv2d(layer.in_channels, rank, bias=False, **shape)  # type: ignore[arg-type]
            self.lora_B: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.lora_A = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_B = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.scale * self.lora_B(self.lora_A(x))  # type: ignore[no-any-return]


class Warp(nn.Module):
    """`layer` followed by a linear warp layer, a 1x1 convolution for a convolution; it starts as the identity."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        width = layer.weight.shape[0]
        self.layer = layer
        if isinstance(layer, nn.Conv2d):
            self.warp: nn.Module = nn.Conv2d(width, width, 1, bias=False)
            nn.init.dirac_(self.warp.weight)
        else:
            self.warp = nn.Linear(width, width, bias=False)
            nn.init.eye_(self.warp.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.warp(self.layer(x))  # type: ignore[no-any-return]


class Context(nn.Module):
    """`layer` with its output shifted, for feature maps also scaled, channel by channel by a linear map of the `context` vector
    (FiLM; Zintgraf et al. 2019, equations 7 and 8: a shift of a linear layer is a concatenated input)."""

    def __init__(self, layer: Layer | Norm, size: int) -> None:
        super().__init__()
        self.layer, self.film = layer, not isinstance(layer, nn.Linear)
        self.context = nn.Parameter(torch.zeros(size))
        self.generate = nn.Linear(size, layer.weight.shape[0] * (2 if self.film else 1), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y, change = self.layer(x), self.generate(self.context)
        if not self.film:
            return y + change  # type: ignore[no-any-return]
        scale, shift = change.view(2, -1, *[1] * (y.dim() - 2))
        return y * (1 + scale) + shift  # type: ignore[no-any-return]


class Attention(nn.Module):
    """A head that attends to remembered examples: log of the softmax over cosine similarities times `values` (Vinyals et al.
    2016, section 2.1). `keys` (examples, features) and `values` (examples, classes) are filled by the start `Memory`. The
    similarities are multiplied by a learned factor, 10 at first (departure: the paper has 1)."""

    def __init__(self, ways: int, features: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.zeros(ways, features))
        self.values = nn.Parameter(torch.eye(ways))
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, x: Tensor) -> Tensor:
        similar = F.normalize(x, dim=-1) @ F.normalize(self.keys, dim=-1).T
        share = (similar * self.log_scale.exp()).softmax(-1) @ self.values
        return share.clamp(min=torch.finfo(share.dtype).tiny).log()


def lora(model: nn.Module, rank: int = 4, layers: Selection = "*", peft: bool | None = None, seed: int = 0) -> nn.Module:
    """A copy with low-rank adapters on all linear and convolutional layers whose name `layers` selects; their parameters have
    `lora_` in their names. By the peft library if `peft`, by default when it is installed; else by `Lora`, which gives the same
    function. The weights of the model stay trainable if they were: freeze them to meta-learn the adapters alone."""
    if rank < 1:
        raise UserError(f"adapters of rank {rank}; give rank 1 or more")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            if peft:
                raise UserError("the adapters of peft need it; run pip install peft, or use peft=False") from None
            peft = False
        if peft is False:
            return _replaced(model, layers, lambda name, layer: Lora(layer, rank, 1.0))

        targets = _chosen(model, layers)
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        memo: dict[int, object] = {}
        copied = copy.deepcopy(model, memo)
        kept = {id(memo[i]) for i in trained}
        exactly = "|".join(map(re.escape, targets))  # a list of names would also match the ends of other names
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=exactly)
        made: nn.Module = inject_adapter_in_model(config, copied)
        for name, p in made.named_parameters():
            p.requires_grad_("lora_" in name or id(p) in kept)
        return made.to(next(model.parameters()).dtype)


def warped(model: nn.Module, head: str = "head") -> nn.Module:
    """A copy with a warp layer after every linear and convolutional layer but the head; its parameters are `*.warp.weight`."""
    layers = tuple(name for name in _chosen(model, "*") if name != head)
    if not layers:
        raise UserError(f"the model has no layer but its head {head!r}, so there is none to warp; use a deeper one")
    with torch.random.fork_rng():
        return _replaced(model, layers, lambda name, layer: Warp(layer))


def with_context(model: nn.Module, size: int | None = None, layer: str | None = None, seed: int = 0) -> nn.Module:
    """A copy whose layer `layer` listens to `size` context parameters, `<layer>.context`: by default 100 on feature maps and 5
    elsewhere. The layer is by default the third convolution, or the first layer of a network without (both as in Zintgraf et
    al. 2019, section 5); where normalisation follows, it is that one, since it would undo what comes before it."""
    if size is not None and size < 1:
        raise UserError(f"{size} context parameters; give at least 1")
    able = {
        name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | Norm) and m.weight is not None
    }
    convolutions = [name for name, m in able.items() if isinstance(m, nn.Conv2d)]
    chosen = layer or (convolutions[min(2, len(convolutions) - 1)] if convolutions else next(iter(able), ""))
    following = dict(pairwise(able)).get(chosen)
    if layer is None and following and isinstance(able[following], Norm):
        chosen = following
    if chosen not in able:
        raise UserError(f"layer={layer!r} cannot listen to context parameters; these layers can: {', '.join(able) or 'none'}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _exchanged(
            model, [chosen], lambda name, module: Context(module, size or (5 if isinstance(module, nn.Linear) else 100))
        )


def attention_head(model: nn.Module, head: str = "head") -> nn.Module:
    """A copy whose linear head is replaced by `Attention`."""
    return _replaced(model, head, lambda name, layer: Attention(layer.weight.shape[0], layer.weight.shape[1]))


def widened(model: nn.Module, classes: int, head: str = "head", seed: int = 0) -> nn.Module:
    """A copy whose linear head has `classes` outputs, newly drawn."""
    if classes < 1:
        raise UserError(f"a head of {classes} classes; give at least 1")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _replaced(model, head, lambda name, layer: nn.Linear(layer.weight.shape[1], classes))


def _chosen(model: nn.Module, layers: Selection) -> list[str]:
    able = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    chosen = [name for name in able if matches(name, layers)]
    if not chosen:
        raise UserError(f"{layers!r} names no linear or convolutional layer of the model; it has {', '.join(able) or 'none'}")
    return chosen


def _replaced(model: nn.Module, layers: Selection, made: Callable[[str, Layer], nn.Module]) -> nn.Module:
    return _exchanged(model, _chosen(model, layers), made)


def _exchanged(model: nn.Module, names: list[str], made: Callable[[str, Any], nn.Module]) -> nn.Module:
    result = copy.deepcopy(model)
    for name in names:
        layer = result.get_submodule(name)
        new = made(name, layer).to(layer.weight)  # type: ignore[arg-type, call-overload]
        if not name:
            return new
        result.set_submodule(name, new)
    return result
