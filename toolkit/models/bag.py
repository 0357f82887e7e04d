"""A bag of features, for text."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from toolkit.errors import UserError


class Mean(nn.Module):
    """The mean embedding of the features of each text; feature 0 is filling and counts nowhere."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(features, width)

    def forward(self, x: Tensor) -> Tensor:
        """Features (texts, length), of an integer type, to embeddings (texts, width)."""
        there = (x != 0).unsqueeze(-1).to(self.table.weight.dtype)
        return (self.table(x) * there).sum(1) / there.sum(1).clamp(min=1)


def bag(inputs: tuple[int, ...], outputs: int, seed: int = 0, width: int = 128, features: int = 8192) -> nn.Sequential:
    """The mean of the embeddings of a text's features, a layer of ReLU, and a linear head, after Joulin et al. 2017 (fastText,
    which has no hidden layer); parameters `body.*` and `head.*`. Input (texts, length) of feature numbers below `features`."""
    if len(inputs) != 1:
        raise UserError(f"bag takes rows of feature numbers, but an example has shape {inputs}; use another --model")
    generator = torch.Generator().manual_seed(seed)
    mean, hidden, head = Mean(features, width), nn.Linear(width, width), nn.Linear(width, outputs)
    nn.init.normal_(mean.table.weight, generator=generator)
    for layer in (hidden, head):
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
    body = nn.Sequential(OrderedDict(mean=mean, hidden=hidden, relu=nn.ReLU()))
    return nn.Sequential(OrderedDict(body=body, head=head))
