"""Networks of the papers."""

from meta_lightning.networks.backbone import Backbone as Backbone
from meta_lightning.networks.conv4 import Conv4 as Conv4
from meta_lightning.networks.mlp import MLP as MLP
from meta_lightning.networks.resnet12 import ResNet12 as ResNet12
