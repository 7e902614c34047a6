"""What is done to a batch of images on its way to the network."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ImageTransforms:
    """What happens to images, whole batches at once and on the device that holds them.

    Args:
        mean: Subtracted from each channel of the pixels, which are in [0, 1]; together with ``std``.
        std: What each channel is divided by then.
        support: Augmentation of the training tasks' support images: a module that takes and gives a batch ``B C H W``,
            such as those of kornia.augmentation, which treat each image of a batch differently.
        query: Augmentation of the training tasks' query images.
    """

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    support: nn.Module | None = None
    query: nn.Module | None = None

    def __call__(self, x: Tensor, augmentation: nn.Module | None, seed: int) -> Tensor:
        """Augment, then normalise.  # B C H W, float in [0, 1]

        Args:
            x: The images.
            augmentation: The module to augment with, if any.
            seed: Of the augmentation's random numbers, so that the same tasks look the same again.
        """
        if augmentation is not None:
            with torch.random.fork_rng([x.device] if x.is_cuda else []):
                torch.manual_seed(seed)
                x = augmentation(x)
        if self.mean is not None and self.std is not None:
            x = (x - x.new_tensor(self.mean).view(-1, 1, 1)) / x.new_tensor(self.std).view(-1, 1, 1)
        return x
