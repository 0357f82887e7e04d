"""The residual network of the few-shot literature."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

WIDTHS = (64, 160, 320, 640)


class Residual(nn.Module):
    """Three 3x3 convolutions with batch norm and leaky ReLU beside a 1x1 convolution, then 2x2 max-pooling."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        layers = OrderedDict[str, nn.Module]()
        for i in range(3):
            layers[f"conv{i}"] = nn.Conv2d(channels if i == 0 else width, width, 3, padding=1, bias=False)
            layers[f"norm{i}"] = nn.BatchNorm2d(width)
            if i < 2:
                layers[f"relu{i}"] = nn.LeakyReLU(0.1)
        self.layers = nn.Sequential(layers)
        shortcut = OrderedDict(conv=nn.Conv2d(channels, width, 1, bias=False), norm=nn.BatchNorm2d(width))
        self.shortcut = nn.Sequential(shortcut)
        # Pooling first: a leaky ReLU keeps the order of numbers, so the result is the same by a quarter of its work.
        self.end = nn.Sequential(OrderedDict(pool=nn.MaxPool2d(2), relu=nn.LeakyReLU(0.1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.layers(x) + self.shortcut(x))  # type: ignore[no-any-return]


def resnet12(ways: int, channels: int = 3, size: int = 84, seed: int = 0) -> nn.Sequential:
    """ResNet-12 of 64, 160, 320 and 640 channels, global average, linear head; 12.4 million weights, `body.blockN.*`, `head.*`.

    As in Lee et al. 2019 (MetaOptNet, section 4.1), without its DropBlock. Input (images, `channels`, `size`, `size`), of 16
    pixels at least, output (images, `ways`). Convolutions start as in He et al. 2015, the head Glorot-uniform.
    """
    blocks = OrderedDict[str, nn.Module]()
    for i, width in enumerate(WIDTHS):
        blocks[f"block{i}"] = Residual(channels if i == 0 else WIDTHS[i - 1], width)
    blocks["flat"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Linear(WIDTHS[-1], ways)
    model = nn.Sequential(OrderedDict(body=nn.Sequential(blocks), head=head))
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=0.1, mode="fan_out", nonlinearity="leaky_relu", generator=generator)
    nn.init.xavier_uniform_(head.weight, generator=generator)
    nn.init.zeros_(head.bias)
    return model
