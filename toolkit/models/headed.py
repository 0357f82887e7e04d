"""A library's model as body, a linear head of our own, and what images need before them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.data.bank import Tokens


class Prepare(nn.Module):
    """Images as a library's model takes them: grey ones repeated for three channels, `size` pixels wide by bilinear
    interpolation (0: as they are), minus `mean` and over `std` of each channel where these are given."""

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, grey: bool, size: int, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.grey, self.size = grey, size
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1) if mean else None)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1) if std else None)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, channels, height, width), of 1 channel if `grey`, to those that the body takes."""
        x = x.expand(-1, 3, -1, -1) if self.grey else x
        if self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        return x if self.mean is None or self.std is None else (x - self.mean) / self.std


class Headed(nn.Sequential):
    """A library's model as `body`, whose classifier is `nn.Identity`, and a linear `head`; before them `prepare`, where images
    need it. An `nn.Sequential`, so that what lies before the first adapting layer runs once per task (`modules.cut`).

    `pretrained_on` says what its weights were trained on, "" where they are new; `pretrained_classes` names the classes of
    that, where the library knows them, and `tokens` what the numbers are that it reads, where it reads texts.
    """

    body: nn.Module
    head: nn.Linear
    pretrained_on: str = ""
    pretrained_classes: tuple[str, ...] = ()
    tokens: Tokens | None = None


def new_head(features: int, outputs: int, seed: int) -> nn.Linear:
    """A linear head, Glorot-uniform by the seed, its bias 0."""
    with torch.random.fork_rng(devices=[]):
        head = nn.Linear(features, outputs)
    nn.init.xavier_uniform_(head.weight, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    return head
