"""The shared model of several sub-tasks: a perceptron that takes images of any shape as vectors."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from toolkit.errors import UserError
from toolkit.models.mlp import mlp


class BigModel(nn.Sequential):
    """Linear layers with ReLU between them on flattened inputs (n, ...) of `sizes[0]` numbers; `body.layerN.*` and `head.*`.

    Weights are normal with variance 2 / inputs (He et al. 2015, equation 10), biases 0: `mlp`'s own tiny weights suit
    regression from one number only. Raises UserError for fewer than two sizes, and for a size below 1.
    """

    def __init__(self, sizes: Sequence[int] = (100, 50, 10), seed: int = 0) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise UserError(
                f"sizes {tuple(sizes)} make no network; give the inputs, any hidden widths and the outputs, each 1 up"
            )
        layers = mlp(sizes, seed)
        generator = torch.Generator().manual_seed(seed)
        for name, p in layers.named_parameters():
            if name.endswith("weight"):
                nn.init.kaiming_normal_(p, nonlinearity="relu", generator=generator)
        super().__init__(OrderedDict(flatten=nn.Flatten(), **dict(layers.named_children())))
