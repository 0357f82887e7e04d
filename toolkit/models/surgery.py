"""Models made from yours: copies with adapters, prompts, warp layers, context parameters, an attention head, or another width
of head.

Each returns a new module tree and leaves the given model alone; new parameters have telling names, by which a learner adapts
them or not.
"""

import copy
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.models.adapters import Layer, Lora, LoraAttention, Prompted
from toolkit.modules import listed
from toolkit.tree import Selection, matches

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm | nn.InstanceNorm2d


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
        width = layer.weight.shape[0] if layer.weight is not None else _channels(layer)
        self.generate = nn.Linear(size, width * (2 if self.film else 1), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y, change = self.layer(x), self.generate(self.context)
        if not self.film:
            return y + change  # type: ignore[no-any-return]
        scale, shift = change.view(2, -1, *[1] * (y.dim() - 2))
        return y * (1 + scale) + shift  # type: ignore[no-any-return]


def _channels(norm: Any) -> int:
    return int(norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features)


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
    """A copy with low-rank adapters on all layers whose name `layers` selects, of those that `able` knows; their parameters
    have `lora_` in their names. By the peft library if `peft`, by default when it is installed; else by `Lora`, which gives the
    same function. The weights of the model stay trainable if they were: freeze them to meta-learn the adapters alone.

    Attention of torch.nn, convolutions with groups and those that pad with other than zeros always get our own: in the first
    peft puts constants in place of the weights while it runs, so that they would get no gradient, and adds the update of the
    output projection twice (0.21); for the others it is another function."""
    if rank < 1:
        raise UserError(f"adapters of rank {rank}; give rank 1 or more")
    targets = _chosen(model, layers, able(model))
    own = [name for name in targets if not _as_in_peft(model, name)]
    if peft and own:
        raise UserError(f"peft=True cannot be had for {listed(own)}, where peft does another thing; use peft=False")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            if peft:
                raise UserError("the adapters of peft need it; run pip install peft, or use peft=False") from None
            peft = False
        if peft is False or own:
            # What lies in an attention gets its adapters before that has another name.
            targets.sort(key=lambda name: isinstance(model.get_submodule(name), nn.MultiheadAttention))
            return _exchanged(
                model, targets, lambda name, m: (LoraAttention if isinstance(m, nn.MultiheadAttention) else Lora)(m, rank, 1.0)
            )

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


def able(model: nn.Module) -> list[str]:
    """The names of the layers that can get low-rank adapters: linear and convolutional ones, and attention of torch.nn whose
    queries, keys and values are of one width (other than its output projection, a layer by itself)."""
    return [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d) or (isinstance(m, nn.MultiheadAttention) and m._qkv_same_embed_dim)
    ]


def _as_in_peft(model: nn.Module, name: str) -> bool:
    layer, around = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    if isinstance(layer, nn.MultiheadAttention) or isinstance(around, nn.MultiheadAttention):
        return False
    return not isinstance(layer, nn.Conv2d) or (layer.groups == 1 and layer.padding_mode == "zeros")


def prompted(model: nn.Module, tokens: int = 10, seed: int = 0) -> nn.Module:
    """A copy of a vision transformer (torchvision's or timm's `VisionTransformer`, alone or within `model`) with `tokens`
    learned tokens beside those of the image, `*.prompt`; see `adapters.Prompted`. At first they are small noise, and the
    function is another one than the given model's. Raises UserError for other models."""
    if tokens < 1:
        raise UserError(f"{tokens} prompts; give at least 1")
    result = copy.deepcopy(model)
    for name, module in result.named_modules():
        if not any(kind.__name__ == "VisionTransformer" for kind in type(module).__mro__):
            continue
        inner = "encoder.layers" if hasattr(module, "encoder") else "blocks"
        blocks = module.get_submodule(inner)
        norm = next((m for m in blocks.modules() if isinstance(m, nn.LayerNorm)), None)
        if isinstance(blocks, nn.Sequential) and norm is not None:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                new = Prompted(blocks, tokens, norm.normalized_shape[-1])
            new.prompt.data = new.prompt.data.to(norm.weight)
            new.train(blocks.training)
            result.set_submodule(f"{name}.{inner}".lstrip("."), new)
            return result
    raise UserError(
        f"prompts are put into the vision transformers of torchvision and timm, and {type(model).__name__} is none; use --lora "
        "or a model such as tv:vit_b_16"
    )


def warped(model: nn.Module, head: str = "head") -> nn.Module:
    """A copy with a warp layer after every linear layer and convolution of images but the head; its parameters are
    `*.warp.weight`."""
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
    hear = _called(model, nn.Linear | nn.Conv2d | Norm)
    convolutions = [name for name, m in hear.items() if isinstance(m, nn.Conv2d)]
    chosen = layer or (convolutions[min(2, len(convolutions) - 1)] if convolutions else next(iter(hear), ""))
    following = dict(pairwise(hear)).get(chosen)
    if layer is None and following and isinstance(hear[following], Norm):
        chosen = following
    if chosen not in hear:
        raise UserError(f"layer={layer!r} cannot listen to context parameters; these layers can: {listed(hear)}")
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


def _called(model: nn.Module, kinds: Any) -> dict[str, Any]:
    """The layers of these kinds by name, but those of which attention of torch.nn only reads the weights."""
    read = {
        f"{name}.out_proj".lstrip(".") for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
    }
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and name not in read}


def _chosen(model: nn.Module, layers: Selection, known: Iterable[str] | None = None) -> list[str]:
    known = list(_called(model, nn.Linear | nn.Conv2d) if known is None else known)
    chosen = [name for name in known if matches(name, layers)]
    if not chosen:
        raise UserError(f"{layers!r} names no linear or convolutional layer of the model; it has {listed(known)}")
    return chosen


def _replaced(model: nn.Module, layers: Selection, made: Callable[[str, Layer], nn.Module]) -> nn.Module:
    return _exchanged(model, _chosen(model, layers), made)


def _exchanged(model: nn.Module, names: list[str], made: Callable[[str, Any], nn.Module]) -> nn.Module:
    result = copy.deepcopy(model)
    for name in names:
        layer = result.get_submodule(name)
        like = next(iter((*layer.parameters(), *result.parameters())))
        new, inside = made(name, layer).to(like), set(layer.modules())
        for module in new.modules():
            module.training = module.training if module in inside else layer.training
        if not name:
            return new
        for place, module in list(result.named_modules(remove_duplicate=False)):
            if module is layer:  # one layer may stand at several places
                result.set_submodule(place, new)
    return result
