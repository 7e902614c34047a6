"""Transforms of a batch of images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meta_lightning.checks import require, require_positive
from meta_lightning.data.tasks import TaskBatch, as_task_batch


@dataclass(frozen=True)
class ImageTransforms:
    """Normalisation and augmentation of images, of a whole meta-batch at once and on the training device.

    Augmentation is a function of (seed, meta-iteration, rank): resuming reproduces it, but it depends on the number of
    processes, unlike the tasks themselves.

    ``inner_update`` and ``forward_with_weights`` do not normalise: after training with ``mean`` and ``std`` pass them
    ``transforms.normalise(scale_pixels(x))``, with ``scale_pixels`` from ``meta_lightning.data.tasks``.

    Args:
        mean: Subtracted from each channel of the pixels, which are in [0, 1]; requires ``std``.
        std: Divisor of each channel, after ``mean`` is subtracted.
        support: Augmentation of the training tasks' support images: a module from images ``B C H W`` in [0, 1] to such
            images. It should transform each image of a batch differently, like those of kornia.augmentation.
        query: Augmentation of the training tasks' query images.

    Raises:
        InputError: If ``mean`` and ``std`` do not have one number per channel each, or a ``std`` is not greater than 0.
    """

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    support: nn.Module | None = None
    query: nn.Module | None = None

    def __post_init__(self) -> None:
        mean, std = list(self.mean or []), list(self.std or [])
        require(len(mean) == len(std), f"mean and std must have one number per channel each, got {mean} and {std}")
        for value in std:
            require_positive(std=value)

    def __call__(self, batch: TaskBatch, training: bool, seed: int) -> TaskBatch:
        """Augment training tasks, with ``seed`` instead of the global random state, and normalise."""
        if self == ImageTransforms():
            return batch
        support_x, support_y, query_x, query_y = as_task_batch(batch)
        if training:
            with torch.random.fork_rng([support_x.device] if support_x.is_cuda else []):
                torch.manual_seed(seed)
                support_x, query_x = augment(self.support, support_x), augment(self.query, query_x)
        return TaskBatch(self.normalise(support_x), support_y, self.normalise(query_x), query_y)

    def normalise(self, x: Tensor) -> Tensor:
        """Subtract ``mean`` from pixels in [0, 1] and divide by ``std``.  # ... C H W"""
        if not self.mean or not self.std:
            return x
        require(len(self.mean) == x.shape[-3], f"mean must have {x.shape[-3]} numbers (channels), got {self.mean}")
        return (x - x.new_tensor(self.mean).view(-1, 1, 1)) / x.new_tensor(self.std).view(-1, 1, 1)


def augment(module: nn.Module | None, x: Tensor) -> Tensor:
    """Apply a module that takes a batch of images.  # T S C H W"""
    return x if module is None else module(x.flatten(0, 1)).unflatten(0, x.shape[:2])
