"""Layers with something added to them that a task can adapt alone: low-rank updates of linear, convolutional and attention
layers, and prompts.

Each is the layer it is put around, at first bit for bit (not so prompts), and answers for that layer's attributes, which other
modules may look at. `fold` undoes it: plain layers with the updates added into their weights.
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from toolkit.modules import copy_modules

Layer = nn.Linear | nn.Conv2d


class _Around(nn.Module):
    """Something around `base_layer`, with low-rank factors `lora_A` and `lora_B`, of which the second starts at 0."""

    def __init__(self, layer: Any, down: Any, up: Any, scale: float) -> None:
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B, self.scale = layer, down, up, scale
        nn.init.zeros_(up.weight)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):
                raise
            return getattr(self.base_layer, name)

    def _updated(self, weight: Tensor) -> Tensor:
        down: Tensor = self.lora_A.weight
        up: Tensor = self.lora_B.weight
        return weight + self.scale * (up.flatten(1) @ down.flatten(1)).view(-1, *down.shape[1:])


class Lora(_Around):
    """`layer` plus a low-rank update, layer(x) + scale B A x; B starts at 0, so at first it is `layer` (Hu et al. 2022,
    equation 3). For a convolution A has its kernel and B is 1x1; both are without groups."""

    def __init__(self, layer: Layer, rank: int, scale: float) -> None:
        if isinstance(layer, nn.Conv2d):
            shape = {key: getattr(layer, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
            down: Layer = nn.Conv2d(layer.in_channels, rank, bias=False, **shape)  # type: ignore[arg-type]
            up: Layer = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            down = nn.Linear(layer.in_features, rank, bias=False)
            up = nn.Linear(rank, layer.out_features, bias=False)
        super().__init__(layer, down, up, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.scale * self.lora_B(self.lora_A(x))  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """The weight of a plain layer without groups that does the same: attention of torch.nn reads it, and calls no layer."""
        weight, groups = self.base_layer.weight, getattr(self.base_layer, "groups", 1)
        if groups > 1:
            width, total = weight.shape[1], self.base_layer.in_channels
            parts = enumerate(weight.chunk(groups))
            weight = torch.cat([F.pad(part, (0, 0, 0, 0, i * width, total - (i + 1) * width)) for i, part in parts])
        return self._updated(weight)


class LoraAttention(_Around):
    """`nn.MultiheadAttention` whose projection to queries, keys and values, one matrix there, has a low-rank update, with one A
    for all three, as in peft. Its output projection is a layer inside of it, with an update of its own or none."""

    def __init__(self, layer: nn.MultiheadAttention, rank: int, scale: float) -> None:
        width = layer.embed_dim
        super().__init__(layer, nn.Linear(width, rank, bias=False), nn.Linear(rank, 3 * width, bias=False), scale)

    @property
    def in_proj_weight(self) -> Tensor:
        """The weight of plain attention that does the same."""
        return self._updated(self.base_layer.in_proj_weight)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = True,
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As that of `nn.MultiheadAttention`. Self-attention without masks and weights, which is what vision transformers ask
        for, never makes the updated weight, of which every task would have one."""
        base = self.base_layer
        plain = query is key is value and key_padding_mask is None and attn_mask is None and not need_weights
        if not plain or query.dim() != 3 or base.bias_k is not None or base.add_zero_attn:
            weight = {"in_proj_weight": self.in_proj_weight}
            arguments = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return functional_call(base, weight, arguments)  # type: ignore[no-any-return]
        x = query.transpose(0, 1) if base.batch_first else query  # (tokens, examples, width), as there
        together = F.linear(x, base.in_proj_weight, base.in_proj_bias) + self.scale * self.lora_B(self.lora_A(x))
        parts = together.unflatten(-1, (3, base.num_heads, base.head_dim)).permute(2, 1, 3, 0, 4)
        dropped = base.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], dropout_p=dropped, is_causal=is_causal)
        y = base.out_proj(y.permute(2, 0, 1, 3).flatten(-2))
        return y.transpose(0, 1) if base.batch_first else y, None


class Prompted(nn.Sequential):
    """A vision transformer's blocks on more tokens: `prompt` (tokens, width) is put behind those of the image in front of the
    first block and dropped after the last (Jia et al. 2022, equations 4 to 6, "VPT-shallow"; there they stand in the middle,
    which is the same to blocks that know no order). The blocks keep their names."""

    def __init__(self, blocks: nn.Sequential, tokens: int, width: int) -> None:
        super().__init__(OrderedDict(blocks.named_children()))
        self.prompt = nn.Parameter(0.02 * torch.randn(tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        """(examples, tokens, width) to the same shape."""
        prompt = self.prompt.expand(x.shape[0], -1, -1)
        return super().forward(torch.cat([x, prompt], 1))[:, : x.shape[1]]  # type: ignore[no-any-return]


def fold(model: nn.Module) -> nn.Module:
    """A copy that computes the same with plain layers: low-rank updates, ours and those of peft, are added into the weights of
    the layers around which they stand. All other tensors are shared with `model`. Grouped convolutions lose their groups; a
    layer with a forward of its own, which may do anything with its weight, keeps its update beside it."""
    result = copy_modules(model)
    layer: Any
    for name, module in reversed(list(result.named_modules())):  # what lies within another one comes first
        if isinstance(module, LoraAttention):
            layer, weight, which = module.base_layer, module.in_proj_weight, "in_proj_weight"
        elif isinstance(module, Lora):
            layer, weight, which = module.base_layer, module.weight, "weight"
        elif hasattr(module, "get_delta_weight"):
            layer, which = module.get_base_layer(), "weight"  # type: ignore[operator]
            weight = sum((module.get_delta_weight(a) for a in module.active_adapters), layer.weight)  # type: ignore
        else:
            continue
        if not _is_plain(layer):
            continue
        layer = copy_modules(layer)  # which may stand at other places too, without an update
        if parametrize.is_parametrized(layer):
            _settle(layer)
        old: nn.Parameter = getattr(layer, which)
        setattr(layer, which, nn.Parameter(weight.detach(), requires_grad=old.requires_grad))
        if isinstance(module, Lora) and isinstance(layer, nn.Conv2d):
            layer.groups = 1
        if not name:
            return layer  # type: ignore[no-any-return]
        for place, other in list(result.named_modules(remove_duplicate=False)):
            if other is module:
                result.set_submodule(place, layer)
    return result


def _is_plain(layer: nn.Module) -> bool:
    kind: Any = parametrize.type_before_parametrizations(layer)
    ours = [base for base in (nn.Linear, nn.Conv2d, nn.MultiheadAttention) if issubclass(kind, base)]
    own = ("forward", "_conv_forward")
    return bool(ours) and all(getattr(kind, name, None) is getattr(ours[0], name, None) for name in own)


def _settle(layer: Any) -> None:
    """Gives a layer the weights that it makes of others each time, as by weight norm, for its own. (torch's way to do so takes
    them from all copies of the layer, which have their class in common.)"""
    made = {name: getattr(layer, name).detach() for name in layer.parametrizations}
    trained = any(p.requires_grad for p in layer.parametrizations.parameters())
    layer.__class__ = parametrize.type_before_parametrizations(layer)
    del layer.parametrizations
    for name, tensor in made.items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=trained))
