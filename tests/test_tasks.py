import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from meta_lightning.data.loading import MetaBatches
from meta_lightning.data.tasks import FewShotTasks, Split, TaskBatch

CLASSES, SAMPLES = 12, 7


def few_shot(seed: int = 0, split: Split = "train", **options: int) -> FewShotTasks:
    """Tasks over "images" that hold their own row number, classes interleaved."""
    images = torch.arange(CLASSES * SAMPLES).view(-1, 1, 1, 1).int()
    labels = torch.arange(CLASSES * SAMPLES) % CLASSES
    return FewShotTasks(
        images, labels, range(CLASSES), **{"ways": 5, "shots": 2, "queries": 3} | options, seed=seed, split=split
    )


def same(a: TaskBatch, b: TaskBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_task_is_n_classes_with_k_support_and_q_query_samples() -> None:
    batch = few_shot().batch(range(50))
    assert batch.support_x.shape == (50, 10, 1, 1, 1)
    assert batch.query_x.shape == (50, 15, 1, 1, 1)
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        assert support_y.bincount().tolist() == [2] * 5
        assert query_y.bincount().tolist() == [3] * 5
        rows = torch.cat([support_x, query_x]).flatten()
        assert len(rows.unique()) == 25  # support and query share no sample
        classes = classes_by_label(rows, torch.cat([support_y, query_y]))
        assert len(set(classes)) == 5


def classes_by_label(rows: Tensor, labels: Tensor) -> list[int]:
    """The class behind each label; every label stands for one."""
    found = [set((rows[labels == label] % CLASSES).tolist()) for label in range(5)]
    assert all(len(classes) == 1 for classes in found)
    return [classes.pop() for classes in found]


def test_task_i_depends_on_seed_split_and_i_alone() -> None:
    tasks = few_shot()
    forwards, backwards = [tasks.batch([i]) for i in (0, 1, 2)], [few_shot().batch([i]) for i in (2, 1, 0)]
    np.random.default_rng(5)
    assert all(same(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))
    assert not same(few_shot(seed=1).batch([0]), forwards[0])
    assert not same(few_shot(split="val").batch([0]), forwards[0])
    assert not same(forwards[1], forwards[0])


def test_every_class_and_sample_is_drawn_equally_often() -> None:
    tasks = few_shot()
    rows = torch.tensor([tasks.rows(tasks.rng(i)) for i in range(2000)])
    counts = rows.flatten().bincount(minlength=CLASSES * SAMPLES).double()
    expected = 2000 * 25 / (CLASSES * SAMPLES)
    assert ((counts - expected).square() / expected).sum() < 130  # chi-square, 83 degrees of freedom, p ≈ 1e-3
    assert (rows[:, 0] % CLASSES).bincount(minlength=CLASSES).min() > 2000 / CLASSES * 0.7  # the label says nothing


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_tasks_of_each_meta_batch(world_size: int) -> None:
    tasks = few_shot()
    ranks = [MetaBatches(tasks, 8, rank=rank, world_size=world_size) for rank in range(world_size)]
    for iteration in (0, 1, 1000):
        shares = [rank[iteration].support_x for rank in ranks]
        together = torch.stack(shares, dim=1).flatten(0, 1)
        assert torch.equal(together, tasks.batch(range(8 * iteration, 8 * iteration + 8)).support_x)
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(shares, 2))


@pytest.mark.parametrize(("num_tasks", "world_size"), [(20, 1), (21, 2), (7, 4), (4, 4)])
def test_evaluation_meets_each_task_once(num_tasks: int, world_size: int) -> None:
    met = []
    for rank in range(world_size):
        batches = MetaBatches(few_shot(), 8, num_tasks, rank, world_size)
        met += [task for j in range(len(batches)) for task in batches.mine[j * batches.share : (j + 1) * batches.share]]
        assert sum(len(batches[j].support_x) for j in range(len(batches))) == len(batches.mine)
    assert sorted(met) == list(range(num_tasks))


def test_errors_name_argument_expected_and_got() -> None:
    with pytest.raises(ValueError, match=r"\bways .*\b12 .*train .* 13"):
        few_shot(ways=13)
    with pytest.raises(ValueError, match=r"shots \+ queries .*\b7\b.* 4 \+ 4"):
        few_shot(shots=4, queries=4)
    with pytest.raises(ValueError, match=r"meta_batch_size .*processes, 2\b.* 5"):
        MetaBatches(few_shot(), 5, world_size=2)
    with pytest.raises(ValueError, match=r"train tasks .*processes, 4\b.* 3"):
        MetaBatches(few_shot(), 8, 3, world_size=4)
