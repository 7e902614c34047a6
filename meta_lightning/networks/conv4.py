"""The four-block convolutional network of the papers."""

from typing import Literal, get_args

from torch import Tensor, nn

from meta_lightning.checks import InputError, require, require_at_least, require_choice

Halving = Literal["stride", "max_pool"]


class Conv4(nn.Module):
    """Four blocks of 3×3 convolution, batch norm and ReLU, and a linear head (Vinyals et al., 2016; Finn et al., 2017).

    For Omniglot, Finn et al. use 64 filters and stride 2, and average the 2×2 map before the head; for mini-ImageNet,
    32 filters and 2×2 max-pooling, and flatten the map. The initialisation is PyTorch's: after 1,000 meta-iterations of
    MAML on glyphs its accuracy was 5 points above that of the Xavier-uniform initialisation of Finn et al.
    Input ``S C H W``, output ``S N``.

    Args:
        ways: Outputs, one per class (N).
        channels: Channels of the images (C).
        image_size: Height and width of the images, in pixels.
        filters: Channels of each block.
        downsample: Halve the map with a stride of 2 or with 2×2 max-pooling.
    """

    def __init__(
        self, ways: int = 5, channels: int = 1, image_size: int = 28, filters: int = 64, downsample: Halving = "stride"
    ) -> None:
        super().__init__()
        require_at_least(1, ways=ways, channels=channels, filters=filters)
        require_choice(get_args(Halving), downsample=downsample)
        strided = downsample == "stride"
        require(strided or image_size >= 16, f"image_size must be at least 16 for four poolings, got {image_size}")
        self.channels, self.image_size, self.strided = channels, image_size, strided
        layers: list[nn.Module] = []
        for inputs in (channels, filters, filters, filters):
            layers.append(nn.Conv2d(inputs, filters, 3, stride=2 if strided else 1, padding=1))
            layers += [nn.BatchNorm2d(filters, track_running_stats=False), nn.ReLU()]
            layers += [] if strided else [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1) if strided else nn.Identity(), nn.Flatten())
        self.head = nn.Linear(filters if strided else filters * (image_size // 16) ** 2, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits of images.  # S C H W -> S N"""
        require_images(x, self.channels)
        if not self.strided and any(side // 16 != self.image_size // 16 for side in x.shape[2:]):
            raise InputError(f"network expects image_size {self.image_size}, got images of size {tuple(x.shape[2:])}")
        logits: Tensor = self.head(self.features(x))
        return logits


def require_images(x: Tensor, channels: int) -> None:
    """Refuse images of other channels, for which torch's error would name weights only."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise InputError(f"network expects channels {channels}, got samples of shape (C, H, W) = {tuple(x.shape[1:])}")
