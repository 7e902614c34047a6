"""The networks of the papers; the learners take any other ``nn.Module`` as well."""

from meta_lightning.networks.conv4 import Conv4
from meta_lightning.networks.mlp import MLP
from meta_lightning.networks.resnet12 import ResNet12

__all__ = ["MLP", "Conv4", "ResNet12"]
