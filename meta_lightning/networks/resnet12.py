"""ResNet-12, the papers' deeper and wider network for colour images."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from meta_lightning.checks import require, require_at_least
from meta_lightning.networks.conv4 import require_images

SLOPE = 0.1


class ResNet12(nn.Module):
    """Four residual blocks of three 3×3 convolutions, global average pooling, and a linear head.

    The blocks follow the code of Lee et al. (2019, MetaOptNet, https://arxiv.org/abs/1904.03758): leaky ReLU of slope
    0.1, no biases, and the normal initialisation of He et al. Two settings of ``filters`` are published: 64, 128, 256,
    512 (8.0 million parameters) by Oreshkin et al. (2018, TADAM, https://arxiv.org/abs/1805.10123, with swish), and 64,
    160, 320, 640 (12.4 million) by Lee et al. Lee et al. use DropBlock and pass the map to their classifiers
    unpooled; here, dropout is elementwise and the map is averaged as in TADAM, so that images may have any size.
    Input ``S C H W``, output ``S N``.

    Args:
        ways: Outputs, one per class (N).
        channels: Channels of the images (C).
        filters: Channels of each of the four blocks.
        drop: Dropout probability after each block, drawn again in each inner step; Lee et al. use 0.1.

    Raises:
        InputError: If an argument is outside its range, or images are smaller than 16 pixels.
    """

    def __init__(
        self, ways: int = 5, channels: int = 3, filters: Sequence[int] = (64, 128, 256, 512), drop: float = 0.0
    ) -> None:
        super().__init__()
        require_at_least(1, ways=ways, channels=channels)
        require(len(filters) == 4 and min(filters) >= 1, f"filters must be 4 positive numbers, got {list(filters)}")
        require(0 <= drop < 1, f"drop must be at least 0 and less than 1, got {drop}")
        blocks = [ResidualBlock(inputs, outputs, drop) for inputs, outputs in pairwise([channels, *filters])]
        self.features = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(filters[-1], ways)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """Class logits of images.  # S C H W -> S N"""
        require_images(x, self.channels)
        require(min(x.shape[-2:]) >= 16, f"images must be at least 16×16 for four poolings, got {tuple(x.shape[-2:])}")
        logits: Tensor = self.head(self.features(x))
        return logits


class ResidualBlock(nn.Module):
    """Three 3×3 convolutions plus a 1×1 shortcut, all with batch norm, and 2×2 max-pooling."""

    def __init__(self, inputs: int, outputs: int, drop: float) -> None:
        super().__init__()
        first, second, third = (normalised(channels, outputs, 3) for channels in (inputs, outputs, outputs))
        self.residual = nn.Sequential(*first, nn.LeakyReLU(SLOPE), *second, nn.LeakyReLU(SLOPE), *third)
        self.shortcut = nn.Sequential(*normalised(inputs, outputs, 1))
        self.pool = nn.Sequential(nn.MaxPool2d(2), nn.Dropout(drop))

    def forward(self, x: Tensor) -> Tensor:
        """The feature map of half the size.  # S C H W -> S C H/2 W/2"""
        pooled: Tensor = self.pool(F.leaky_relu(self.residual(x) + self.shortcut(x), SLOPE))
        return pooled


def normalised(inputs: int, outputs: int, kernel: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution with padding, and batch norm with batch statistics."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution, nn.BatchNorm2d(outputs, track_running_stats=False)
