"""Small networks of the few-shot literature. Any other `nn.Module` works as well."""

from toolkit.models.conv4 import conv4
from toolkit.models.mlp import mlp

__all__ = ["conv4", "mlp"]
