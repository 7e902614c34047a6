"""Standard augmentation of few-shot papers, with kornia."""

from torch import Tensor, nn

from meta_lightning.checks import optional


class FlipCropJitter(nn.Module):
    """Random horizontal flip, crop after padding, and colour jitter, different for each image of a batch.

    The training augmentation of Chen et al. (2019, https://arxiv.org/abs/1904.04232) and many later papers. It runs on
    the images' device and needs kornia, which the extra ``augment`` installs. Input and output ``B C H W``, in [0, 1].

    Args:
        padding: Pixels of zero padding on each side before an image is cropped to its original size; 0 does not crop.
        jitter: Maximum relative change of brightness, contrast and saturation; 0 leaves the colours unchanged. Needs
            three channels.
        flip: Probability of the flip.

    Raises:
        MissingPackageError: If kornia is not installed.
    """

    def __init__(self, padding: int = 8, jitter: float = 0.4, flip: float = 0.5) -> None:
        super().__init__()
        with optional("FlipCropJitter", "augment"):
            from kornia import augmentation
        self.padding = padding
        self.crop = augmentation.RandomCrop
        self.layers = nn.Sequential(augmentation.RandomHorizontalFlip(p=flip))
        if jitter:
            self.layers.append(augmentation.ColorJitter(jitter, jitter, jitter, p=1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Augmented images.  # B C H W"""
        augmented: Tensor = self.layers(x)
        return self.crop(x.shape[-2:], padding=self.padding)(augmented) if self.padding else augmented
