"""The four-block convolutional network of the few-shot literature."""

from collections import OrderedDict

import torch
from torch import nn


def conv4(ways: int, channels: int = 1, size: int = 28, width: int = 64, pool: bool = False, seed: int = 0) -> nn.Sequential:
    """Four blocks of 3x3 convolution, batch norm and ReLU, then a linear head; parameters `body.blockN.*` and `head.*`.

    Input (images, `channels`, `size`, `size`), output (images, `ways`). Halving is by stride 2, as Finn et al. 2017 did for
    Omniglot (section 5.2), or by 2x2 max-pooling with `pool` (Vinyals et al. 2016; MAML's mini-ImageNet network, width 32).
    With strides the last feature map is averaged, as in the MAML code; with pooling it is flattened. Weights start
    Glorot-uniform, biases at 0.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(4):
        convolution = nn.Conv2d(channels if i == 0 else width, width, 3, stride=1 if pool else 2, padding=1)
        parts: OrderedDict[str, nn.Module] = OrderedDict(conv=convolution, norm=nn.BatchNorm2d(width))
        if pool:
            parts["pool"] = nn.MaxPool2d(2)  # before the ReLU: the same numbers and slopes by a quarter of its work
        blocks[f"block{i}"] = nn.Sequential(OrderedDict(parts, relu=nn.ReLU()))
        size = size // 2 if pool else (size + 1) // 2
    blocks["flat"] = nn.Flatten() if pool else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Linear(width * size * size if pool else width, ways)
    model = nn.Sequential(OrderedDict(body=nn.Sequential(blocks), head=head))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return model
