"""The papers' second network for colour images, deeper and wider than Conv4."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from meta_lightning.checks import require, require_at_least
from meta_lightning.networks.conv4 import require_images

SLOPE = 0.1


class ResNet12(nn.Module):
    """Four residual blocks of three 3×3 convolutions, the average of their map, and a linear head.

    The form is that of the code of Lee et al. (2019, MetaOptNet, https://arxiv.org/abs/1904.03758): leaky ReLU of slope
    0.1, no biases, and convolutions that start with He et al.'s normal weights. Two settings of ``filters`` are
    published: 64, 128, 256, 512 by Oreshkin et al. (2018, TADAM, https://arxiv.org/abs/1805.10123; with swish there),
    of 8.0 million parameters, and 64, 160, 320, 640 by Lee et al., of 12.4 million. Lee et al. drop whole regions
    (DropBlock) and give their own classifiers the map as it is; here single values are dropped and the map is averaged,
    as in TADAM, so that images of any size serve.

    Args:
        ways: Outputs, one per class (N).
        channels: Channels of the images (C).
        filters: Channels of each of the four blocks.
        drop: Share of the values dropped after each block in training, others in each inner step; Lee et al. use 0.1.

    Raises:
        InputError: If an argument is outside its range, or images are smaller than 16 pixels.

    Shapes:
        Input ``S C H W``, output ``S N``.
    """

    def __init__(
        self, ways: int = 5, channels: int = 3, filters: Sequence[int] = (64, 128, 256, 512), drop: float = 0.0
    ) -> None:
        super().__init__()
        require_at_least(1, ways=ways, channels=channels)
        require(
            len(filters) == 4 and min(filters) >= 1,
            f"filters must be 4 numbers of at least 1, one a block, got {list(filters)}",
        )
        require(0 <= drop < 1, f"drop must be at least 0 and less than 1, got {drop}")
        blocks = [ResidualBlock(inputs, outputs, drop) for inputs, outputs in pairwise([channels, *filters])]
        self.features = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(filters[-1], ways)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images.  # S C H W -> S N"""
        require_images(x, self.channels)
        require(min(x.shape[-2:]) >= 16, f"images must be at least 16×16 for four poolings, got {tuple(x.shape[-2:])}")
        logits: Tensor = self.head(self.features(x))
        return logits


class ResidualBlock(nn.Module):
    """Three 3×3 convolutions with batch norm beside a 1×1 one, added, and a map of half the size."""

    def __init__(self, inputs: int, outputs: int, drop: float) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *normalised(inputs, outputs, 3),
            nn.LeakyReLU(SLOPE),
            *normalised(outputs, outputs, 3),
            nn.LeakyReLU(SLOPE),
            *normalised(outputs, outputs, 3),
        )
        self.shortcut = nn.Sequential(*normalised(inputs, outputs, 1))
        self.pool = nn.Sequential(nn.MaxPool2d(2), nn.Dropout(drop))

    def forward(self, x: Tensor) -> Tensor:
        """The block's map.  # S C H W -> S C H/2 W/2"""
        pooled: Tensor = self.pool(F.leaky_relu(self.residual(x) + self.shortcut(x), SLOPE))
        return pooled


def normalised(inputs: int, outputs: int, kernel: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution that keeps the map's size, and batch norm by the batch's own statistics."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution, nn.BatchNorm2d(outputs, track_running_stats=False)
