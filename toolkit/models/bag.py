"""A bag of features, for text."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from toolkit.errors import UserError


class Bag(nn.Module):
    """The sum of the embeddings of the features of each text, brought to the length `reach`; feature `padding` is filling and
    counts nowhere. A text without features has the embedding 0."""

    def __init__(self, features: int, width: int, reach: float, padding: int = 0) -> None:
        super().__init__()
        self.table, self.reach, self.padding = nn.Embedding(features, width), reach, padding

    def forward(self, x: Tensor) -> Tensor:
        """Features (texts, length), int64 or int32, to embeddings (texts, width)."""
        there = (x != self.padding).unsqueeze(-1).to(self.table.weight.dtype)
        total: Tensor = (self.table(x) * there).sum(1)
        # A root has no derivative at 0, which is where a text without features is.
        return total * (self.reach * (total.square().sum(1, keepdim=True) + 1e-6).rsqrt())


def bag(
    inputs: tuple[int, ...],
    outputs: int,
    seed: int = 0,
    width: int = 256,
    features: int = 4096,
    depth: int = 0,
    reach: float = 4.0,
    padding_token: int = 0,
) -> nn.Sequential:
    """The summed embeddings of a text's features at unit length times `reach`, `depth` layers of ReLU, and a linear head.

    After Joulin et al. 2017 (fastText), who take the mean. Departure: its direction alone, since the mean of many features is
    short, and methods that compare distances would compare how long the texts are. Input (texts, length) of feature numbers
    below `features`, `padding_token` filling; parameters `body.bag.table.weight`, `body.layerN.*` and `head.*`. Embeddings
    start normal with variance 1, other weights Glorot-uniform, biases at 0. Raises UserError for other inputs and for sizes
    that make no network.
    """
    if len(inputs) != 1:
        raise UserError(f"bag takes rows of feature numbers, but an example has shape {inputs}; use another --model")
    if min(width, outputs, features - 1) < 1 or depth < 0 or not 0 < reach < float("inf"):
        raise UserError(
            f"{outputs} outputs, width {width}, {features} features, depth {depth}, reach {reach} make no bag; give at least "
            "1, 1, 2 and 0, and a positive reach"
        )
    generator = torch.Generator().manual_seed(seed)
    body: OrderedDict[str, nn.Module] = OrderedDict(bag=Bag(features, width, reach, padding_token))
    for i in range(depth):
        body[f"layer{i}"], body[f"relu{i}"] = nn.Linear(width, width), nn.ReLU()
    model = nn.Sequential(OrderedDict(body=nn.Sequential(body), head=nn.Linear(width, outputs)))
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
    return model
