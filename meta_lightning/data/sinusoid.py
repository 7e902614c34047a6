"""The sinusoid regression of the MAML paper."""

import math
from collections.abc import Sequence
from dataclasses import field

import numpy as np
import torch

from meta_lightning.checks import require_at_least
from meta_lightning.data.module import FewShotDataModule, options
from meta_lightning.data.tasks import Array, DrawnTasks, Shots, Split, TaskBatch, TaskSet


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

    def sizes(self, split: Split) -> tuple[Shots, int]:
        """Support and query points of the tasks of a split."""
        shots, queries = super().sizes(split)
        return shots, queries if split == "train" else self.test_queries

    def task_set(self, split: Split) -> TaskSet:
        """The waves of a split."""
        return SineWaves(**self.draws(split))


class SineWaves(DrawnTasks):
    """Numbered sine waves."""

    def batch(self, tasks: Sequence[int]) -> TaskBatch:
        """Points of these waves.  # T K 1, T K 1, T Q 1, T Q 1"""
        x, y = (torch.tensor(np.array(part), dtype=torch.float32) for part in zip(*map(self.wave, tasks), strict=True))
        return TaskBatch(*(part[:, samples] for samples in self.parts(tasks) for part in (x, y)))

    def wave(self, task: int) -> tuple[Array, Array]:
        """The points of one wave.  # K+Q 1, K+Q 1"""
        rng = self.rng(task)
        amplitude, phase = rng.uniform(0.1, 5.0), rng.uniform(0.0, math.pi)
        x = rng.uniform(-5.0, 5.0, (self.drawn, 1))
        return x, amplitude * np.sin(x - phase)
