"""The networks: what they compute, against the paper's formula written out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.models.resnet12 import resnet12


def test_resnet12_is_the_papers_formula() -> None:
    """Lee et al. 2019, section 4.1: each block is pool(leaky(convolutions(x) + shortcut(x))), then the global average."""
    model = resnet12(ways=5, size=16).eval()
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):  # type: ignore[union-attr]
                tensor.uniform_(0.5, 1.5)  # type: ignore[operator]
            module.bias.data.normal_()
            module.running_mean.normal_()  # type: ignore[union-attr]
    given = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def layer(x: Tensor, name: str, number: str, padding: int) -> Tensor:
        x = F.conv2d(x, given[f"{name}.conv{number}.weight"], padding=padding)
        norm = f"{name}.norm{number}"
        statistics = given[f"{norm}.running_mean"], given[f"{norm}.running_var"]
        return F.batch_norm(x, *statistics, given[f"{norm}.weight"], given[f"{norm}.bias"])

    x = images = torch.randn(3, 3, 16, 16)
    for i in range(4):
        name, beside = f"body.block{i}", x
        for j in range(3):
            x = layer(x, f"{name}.layers", str(j), 1)
            x = F.leaky_relu(x, 0.1) if j < 2 else x
        x = F.max_pool2d(F.leaky_relu(x + layer(beside, f"{name}.shortcut", "", 0), 0.1), 2)
    expected = x.mean((2, 3)) @ given["head.weight"].T + given["head.bias"]
    assert torch.allclose(model(images), expected, atol=1e-4 * float(expected.detach().abs().max()))
    assert sum(p.numel() for name, p in model.named_parameters() if name.startswith("body")) == 12_424_320
