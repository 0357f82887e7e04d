"""Small networks of the few-shot literature. Any other `nn.Module` works as well.

A model is made by a function or class that takes what it needs by name: `inputs`, the shape of one example; `outputs`, how many
numbers to predict (also called `ways`); for square images `channels` and `size`; `seed`. Their short names are in setup.cfg.
"""

import math
from collections import OrderedDict
from functools import partial

from torch import nn

from toolkit.models.bag import bag
from toolkit.models.big import BigModel
from toolkit.models.conv4 import conv4
from toolkit.models.mlp import mlp
from toolkit.models.resnet12 import resnet12

__all__ = ["BigModel", "bag", "conv4", "conv4_32", "conv4_32_pool", "conv4_pool", "dense", "mlp", "resnet12"]

conv4_pool = partial(conv4, pool=True)
conv4_32 = partial(conv4, width=32)
conv4_32_pool = partial(conv4, width=32, pool=True)


def dense(inputs: tuple[int, ...], outputs: int, seed: int = 0, width: int = 40, depth: int = 2) -> nn.Sequential:
    """`mlp` from examples of shape `inputs` to `outputs` numbers, through `depth` layers of `width`."""
    network = mlp((math.prod(inputs), *[width] * depth, outputs), seed)
    flat = [] if len(inputs) == 1 else [("flat", nn.Flatten())]
    return nn.Sequential(OrderedDict([*flat, *network.named_children()]))
