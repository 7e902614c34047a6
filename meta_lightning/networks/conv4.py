"""The four-block convolutional network of the papers."""

from typing import Literal

from torch import Tensor, nn

from meta_lightning.checks import require, require_at_least, require_choice


class Conv4(nn.Module):
    """Four blocks of 3×3 convolution, batch norm and ReLU, and a linear head (Vinyals et al., 2016; Finn et al., 2017).

    Finn et al. use 64 filters and stride 2 for Omniglot, whose 2×2 map is averaged before the head, and 32 filters and
    2×2 max-pooling for mini-ImageNet, whose map is flattened. Weights start as torch starts them: after 1,000
    meta-iterations of MAML on glyphs that was 5 points ahead of the Xavier-uniform start of Finn et al.

    Args:
        ways: Outputs, one per class (N).
        channels: Channels of the images (C).
        image_size: Height and width of the images, in pixels.
        filters: Channels of each block.
        downsample: Halve the map by a stride of 2 or by 2×2 max-pooling.

    Shapes:
        Input ``S C H W``, output ``S N``.
    """

    def __init__(
        self,
        ways: int = 5,
        channels: int = 1,
        image_size: int = 28,
        filters: int = 64,
        downsample: Literal["stride", "max_pool"] = "stride",
    ) -> None:
        super().__init__()
        require_at_least(1, ways=ways, channels=channels, filters=filters)
        require_choice(("stride", "max_pool"), downsample=downsample)
        strided = downsample == "stride"
        require(strided or image_size >= 16, f"image_size must be at least 16 for four poolings, got {image_size}")
        self.channels, self.image_size, self.strided = channels, image_size, strided
        layers: list[nn.Module] = []
        for inputs in (channels, filters, filters, filters):
            layers += [
                nn.Conv2d(inputs, filters, 3, stride=2 if strided else 1, padding=1),
                nn.BatchNorm2d(filters, track_running_stats=False),
                nn.ReLU(),
            ]
            if not strided:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1) if strided else nn.Identity(), nn.Flatten())
        self.head = nn.Linear(filters if strided else filters * (image_size // 16) ** 2, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images.  # S C H W -> S N"""
        require_images(x, self.channels)
        require(
            self.strided or all(side // 16 == self.image_size // 16 for side in x.shape[2:]),
            f"network must be made for the images of the data: expected image_size {self.image_size}, as it has, got "
            f"{tuple(x.shape[2:])}",
        )
        logits: Tensor = self.head(self.features(x))
        return logits


def require_images(x: Tensor, channels: int) -> None:
    """Refuse images that a network was not made for, of which torch would speak in shapes of weights."""
    require(
        x.ndim == 4 and x.shape[1] == channels,
        f"network must be made for the images of the data: expected channels {channels}, as it has, got samples of "
        f"shape (C, H, W) = {tuple(x.shape[1:])}",
    )
