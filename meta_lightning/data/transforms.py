"""What is done to a batch of images on its way to the network."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meta_lightning.checks import require, require_positive
from meta_lightning.data.tasks import TaskBatch, as_task_batch


@dataclass(frozen=True)
class ImageTransforms:
    """What happens to images, all of a meta-batch at once and on the device that trains.

    Augmentation is a function of (seed, meta-iteration, rank): the same after a resume, but not the same on one process
    and on several, which draw for their own tasks. The tasks themselves are; so is all that has no augmentation.

    ``inner_update`` and ``forward_with_weights`` take images as they are given: after training with ``mean`` and
    ``std`` give them ``transforms.normalise(scale_pixels(x))``, the latter from ``meta_lightning.data.tasks``.

    Args:
        mean: Subtracted from each channel of the pixels, which are in [0, 1]; together with ``std``.
        std: What each channel is divided by then.
        support: Augmentation of the training tasks' support images: a module that takes and gives images ``B C H W`` in
            [0, 1], such as those of kornia.augmentation, which treat each image of a batch differently.
        query: Augmentation of the training tasks' query images.

    Raises:
        InputError: If ``mean`` and ``std`` are not a number per channel each, or a deviation is not greater than 0.
    """

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    support: nn.Module | None = None
    query: nn.Module | None = None

    def __post_init__(self) -> None:
        """Refuse what is no mean and standard deviation a channel."""
        mean, std = list(self.mean or []), list(self.std or [])
        require(len(mean) == len(std), f"mean and std must have a number per channel each, got {mean} and {std}")
        for value in std:
            require_positive(std=value)

    def __call__(self, batch: TaskBatch, training: bool, seed: int) -> TaskBatch:
        """Augment, in training, then normalise.

        Args:
            batch: The tasks.
            training: Whether they are training tasks.
            seed: Of the augmentation's random numbers; the global ones are neither read nor moved.
        """
        if self == ImageTransforms():
            return batch
        support_x, support_y, query_x, query_y = as_task_batch(batch)
        if training:
            with torch.random.fork_rng([support_x.device] if support_x.is_cuda else []):
                torch.manual_seed(seed)
                support_x, query_x = augment(self.support, support_x), augment(self.query, query_x)
        return TaskBatch(self.normalise(support_x), support_y, self.normalise(query_x), query_y)

    def normalise(self, x: Tensor) -> Tensor:
        """Pixels in [0, 1] less ``mean``, by ``std``.  # ... C H W"""
        if not self.mean or not self.std:
            return x
        require(len(self.mean) == x.shape[-3], f"mean must have {x.shape[-3]} numbers (channels), got {self.mean}")
        return (x - x.new_tensor(self.mean).view(-1, 1, 1)) / x.new_tensor(self.std).view(-1, 1, 1)


def augment(module: nn.Module | None, x: Tensor) -> Tensor:
    """Images through an augmentation that takes a batch.  # T S C H W"""
    return x if module is None else module(x.flatten(0, 1)).unflatten(0, x.shape[:2])
