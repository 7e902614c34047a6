"""The regression of the MAML paper."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from meta_lightning.checks import require_at_least
from meta_lightning.data.base import TaskDataModule
from meta_lightning.tasks import Array, Split, TaskBatch, TaskSet


class Sinusoid(TaskDataModule):
    """Regress a sine wave from K points (Finn et al., 2017, section 5.1).

    Each task is a wave of amplitude in [0.1, 5] and phase in [0, π]; x is uniform in [−5, 5], and the loss is the mean
    squared error.

    Args:
        shots: Support points (K).
        queries: Query points in training.
        test_queries: Query points in validation and test.
        train_shots: Support points in training. Default: ``shots``.
        meta_batch_size: Tasks a meta-iteration, over all processes together (B).
        epoch_length: Meta-iterations an epoch.
        val_tasks: Validation tasks.
        test_tasks: Test tasks, also those of ``predict``.
        seed: Seed of the tasks.
        num_workers: Processes that load; with 0 the training process does.

    Raises:
        InputError: If an argument is outside its range.
    """

    def __init__(
        self,
        shots: int = 10,
        queries: int = 10,
        test_queries: int = 100,
        train_shots: int | None = None,
        meta_batch_size: int = 25,
        epoch_length: int = 1000,
        val_tasks: int = 600,
        test_tasks: int = 600,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(meta_batch_size, epoch_length, val_tasks, test_tasks, seed, num_workers)
        self.train_shots = shots if train_shots is None else train_shots
        require_at_least(1, shots=shots, queries=queries, test_queries=test_queries, train_shots=self.train_shots)
        self.shots = shots
        self.queries = queries
        self.test_queries = test_queries

    def task_set(self, split: Split) -> TaskSet:
        """The waves of a split."""
        shots, queries = (self.train_shots, self.queries) if split == "train" else (self.shots, self.test_queries)
        return SineWaves(shots, queries, self.seed, split)


class SineWaves(TaskSet):
    """Numbered sine waves.

    Args:
        shots: Support points (K).
        queries: Query points (Q).
        seed: Seed of the tasks.
        split: The split's name.
    """

    def __init__(self, shots: int, queries: int, seed: int, split: Split) -> None:
        super().__init__(seed, split)
        self.shots = shots
        self.queries = queries

    def batch(self, tasks: Sequence[int]) -> TaskBatch:
        """Points of these waves.  # T K 1, T K 1, T Q 1, T Q 1"""
        x, y = (torch.tensor(np.array(part), dtype=torch.float32) for part in zip(*map(self.wave, tasks), strict=True))
        K = self.shots
        return TaskBatch(x[:, :K], y[:, :K], x[:, K:], y[:, K:])

    def wave(self, task: int) -> tuple[Array, Array]:
        """The points of one wave.  # K+Q 1, K+Q 1"""
        rng = self.rng(task)
        amplitude, phase = rng.uniform(0.1, 5.0), rng.uniform(0.0, math.pi)
        x = rng.uniform(-5.0, 5.0, (self.shots + self.queries, 1))
        return x, amplitude * np.sin(x - phase)
