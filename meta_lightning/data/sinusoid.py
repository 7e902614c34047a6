"""The sinusoid regression of the MAML paper."""

import math
from collections.abc import Sequence
from dataclasses import field

import numpy as np
import torch
from torch import Tensor

from meta_lightning.checks import require_at_least
from meta_lightning.data.module import FewShotDataModule, options
from meta_lightning.data.streams import uniforms
from meta_lightning.data.tasks import Count, DrawnTasks, Split, TaskBatch, TaskSet


@options
class Sinusoid(FewShotDataModule):
    """Regression of a sine wave from K points (Finn et al., 2017, section 5.1).

    Each task is a wave with amplitude uniform in [0.1, 5] and phase uniform in [0, π]; x is uniform in [−5, 5]. The
    loss is the mean squared error.

    Raises:
        InputError: If an option is outside its range.
    """

    shots: int = 10
    queries: int = 10
    test_queries: int = 100
    """Query points in validation and test; ``queries`` applies to training."""
    train_queries: int | None = field(default=None, init=False)
    meta_batch_size: int = 25
    epoch_length: int = 1000
    val_tasks: int = 600

    def __post_init__(self) -> None:
        """Check the number of query points."""
        super().__post_init__()
        require_at_least(1, test_queries=self.test_queries)

    def sizes(self, split: Split) -> tuple[Count, int]:
        """Support and query points of the tasks of a split."""
        shots, queries = super().sizes(split)
        return shots, queries if split == "train" else self.test_queries

    def task_set(self, split: Split) -> TaskSet:
        """The waves of a split."""
        return SineWaves(**self.draws(split))


class SineWaves(DrawnTasks):
    """Numbered sine waves, drawn in blocks."""

    prefetch = 4096  # tasks

    def __post_init__(self) -> None:
        """Start without a block."""
        super().__post_init__()
        self.first, self.drawn_ahead = 0, (torch.empty(0, 0, 1),) * 2

    def batch(self, tasks: Sequence[int]) -> TaskBatch:
        """Points of these waves.  # T K 1, T K 1, T Q 1, T Q 1"""
        first, last = min(tasks), max(tasks)
        if last - first >= self.prefetch:
            x, y = self.waves(tasks)
        else:
            if not self.first <= first <= last < self.first + len(self.drawn_ahead[0]):
                self.first, self.drawn_ahead = first, self.waves(range(first, first + self.prefetch))
            rows = torch.tensor(tasks) - self.first
            x, y = (part[rows] for part in self.drawn_ahead)
        return TaskBatch(*(part[:, samples] for samples in self.parts(tasks) for part in (x, y)))

    def waves(self, tasks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The points of each wave.  # T K+Q 1, T K+Q 1"""
        u = uniforms(self.entropy, tasks, 2 + self.drawn)[:, :, None]  # T 2+K+Q 1
        amplitude, phase, x = 0.1 + 4.9 * u[:, :1], math.pi * u[:, 1:2], 10.0 * u[:, 2:] - 5.0
        return torch.from_numpy(x).float(), torch.from_numpy(amplitude * np.sin(x - phase)).float()
