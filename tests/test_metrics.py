import math

import numpy as np
import pytest
import torch

from meta_lightning import TaskMean


def test_mean_and_interval_are_numpys() -> None:
    values = np.random.default_rng(0).normal(size=600)
    metric = TaskMean()
    for part in np.split(values, [16, 100, 590]):
        metric.update(torch.tensor(part))
    mean, interval, tasks = metric.compute()
    assert tasks == 600
    assert mean.item() == pytest.approx(values.mean(), rel=1e-12)
    assert interval.item() == pytest.approx(1.96 * values.std(ddof=1) / math.sqrt(600), rel=1e-12)


def test_interval_covers_the_truth_19_times_in_20() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        metric = TaskMean()
        metric.update(torch.tensor(rng.binomial(5, 0.9, size=600) / 5))
        mean, interval, _ = metric.compute()
        covered += abs(mean.item() - 0.9) <= interval.item()
    assert 0.92 < covered / 400 < 0.98


def test_one_task_has_a_mean_and_no_interval() -> None:
    metric = TaskMean()
    metric.update(torch.tensor([0.5]))
    mean, interval, _ = metric.compute()
    assert mean == 0.5
    assert interval.isnan()
