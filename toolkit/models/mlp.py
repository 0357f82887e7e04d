"""Multi-layer perceptrons."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


def mlp(sizes: Sequence[int] = (1, 40, 40, 1), seed: int = 0) -> nn.Sequential:
    """Linear layers with ReLU between them; parameters `body.layerN.*` and `head.*`.

    The default is the sinusoid network of Finn et al. 2017 (section 5.1), with their initialisation: weights normal with
    standard deviation 0.01, cut at two deviations, biases 0.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02, generator=generator)
        nn.init.zeros_(layer.bias)
    body: OrderedDict[str, nn.Module] = OrderedDict()
    for i, layer in enumerate(layers[:-1]):
        body[f"layer{i}"], body[f"relu{i}"] = layer, nn.ReLU()
    return nn.Sequential(OrderedDict(body=nn.Sequential(body), head=layers[-1]))
