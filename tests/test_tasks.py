import itertools
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from meta_lightning.data.loading import MetaBatches
from meta_lightning.data.tasks import FewShotTasks, Split, TaskBatch

CLASSES, SAMPLES = 12, 7


def few_shot(seed: int = 0, split: Split = "train", **options: Any) -> FewShotTasks:
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


def drawn_by_numpy(task: int, ways: int, count: int = 5) -> tuple[list[int], Tensor]:
    """The classes of a task of seed 0 and their sample numbers: what no version may change.  # N, N K+Q"""
    rng = np.random.default_rng((0, 0, task))
    classes = rng.choice(CLASSES, ways, replace=False)
    members = classes[:, None] + CLASSES * np.arange(SAMPLES)
    return classes.tolist(), torch.from_numpy(rng.permuted(members, axis=1)[:, :count])


@pytest.mark.parametrize("ways", [2, 5, 12])
@pytest.mark.parametrize("ranged", [False, True])
def test_tasks_are_those_of_every_version(ways: int, ranged: bool) -> None:
    tasks = few_shot(ways=(ways, ways) if ranged else ways, block=4)
    for first in (0, 4, 400):
        batch = tasks.batch(range(first, first + 4))
        for task, (support_x, support_y, query_x, query_y) in enumerate(zip(*batch, strict=True), first):
            classes, rows = drawn_by_numpy(task, ways)
            assert torch.equal(support_x.flatten(), rows[:, :2].flatten())
            assert torch.equal(query_x.flatten(), rows[:, 2:].flatten())
            assert support_y.tolist() == [label for label in range(ways) for _ in range(2)]
            assert query_y.tolist() == [label for label in range(ways) for _ in range(3)]
            assert tasks.class_names(task) == [str(c) for c in classes]


def ways_and_shots(tasks: FewShotTasks, blocks: int) -> list[tuple[int, int]]:
    """N and K of the first blocks of 4 tasks; all classes have as many support samples."""
    batches = [tasks.batch(range(4 * block, 4 * block + 4)) for block in range(blocks)]
    counts = [[support_y.bincount().tolist() for support_y in batch.support_y] for batch in batches]
    assert all(len({*map(tuple, of_block)}) == len({*of_block[0]}) == 1 for of_block in counts)
    return [(len(of_block[0]), of_block[0][0]) for of_block in counts]


def test_the_tasks_of_a_block_share_a_number_of_ways_from_the_range() -> None:
    met = [ways for ways, _ in ways_and_shots(few_shot(ways=(3, 6), block=4), 200)]
    assert all(30 < met.count(ways) < 70 for ways in (3, 4, 5, 6))
    assert len(met) == 200
    assert met == [ways for ways, _ in ways_and_shots(few_shot(ways=(3, 6), block=4), 200)]
    for other in (few_shot(ways=(3, 6), block=4, seed=1), few_shot(ways=(3, 6), block=4, split="val")):
        assert met != [ways for ways, _ in ways_and_shots(other, 200)]
    assert {*ways_and_shots(few_shot(ways=(5, 6), block=4), 20)} == {(5, 2), (6, 2)}  # both ends are in it


def test_ways_and_shots_of_a_block_are_drawn_independently() -> None:
    both = ways_and_shots(few_shot(ways=(3, 5), shots=(1, 3), block=4), 180)
    assert all(8 < both.count(pair) < 36 for pair in itertools.product((3, 4, 5), (1, 2, 3)))
    expected = [np.random.default_rng((0, 0, block, 4)).integers(1, 3, endpoint=True) for block in range(180)]
    assert [shots for _, shots in both] == expected  # which no version may change
    assert [shots for _, shots in ways_and_shots(few_shot(shots=(1, 3), block=4), 180)] == expected
    assert [ways for ways, _ in both] == [ways for ways, _ in ways_and_shots(few_shot(ways=(3, 5), block=4), 180)]


@pytest.mark.parametrize("label_space", ["task", "split"])
def test_a_range_of_ways_does_not_depend_on_how_a_block_is_loaded(label_space: str) -> None:
    options: dict[str, Any] = {"ways": (2, 12), "shots": (1, 3), "block": 4, "label_space": label_space}
    blocks = [few_shot(**options).batch(range(4 * block, 4 * block + 4)) for block in range(20)]
    tasks = pickle.loads(pickle.dumps(few_shot(**options)))  # as a worker under spawn has it
    for block, task in itertools.product(reversed(range(20)), range(4)):
        alone = tasks.batch([4 * block + task])
        assert same(alone, TaskBatch(*(part[task : task + 1] for part in blocks[block])))
    for rank in range(2):
        share = MetaBatches(tasks, 4, rank=rank, world_size=2)
        assert all(same(share[j], TaskBatch(*(part[rank::2] for part in blocks[j]))) for j in (7, 3))


@pytest.mark.parametrize("ways", [5, (2, 9)])
@pytest.mark.parametrize("label_space", ["task", "split"])
def test_labels_stand_for_the_classes_that_are_named(ways: Any, label_space: str) -> None:
    tasks = few_shot(ways=ways, block=4, label_space=label_space)
    for block in range(10):
        batch = tasks.batch(range(4 * block, 4 * block + 4))
        for task, (support_x, support_y, query_x, query_y) in enumerate(zip(*batch, strict=True), 4 * block):
            names = tasks.class_names(task)
            assert tasks.class_groups(task) == names
            assert len(names) == (CLASSES if label_space == "split" else int(query_y.max()) + 1)
            for x, y in ((support_x, support_y), (query_x, query_y)):
                assert [names[label] for label in y.tolist()] == [str(row % CLASSES) for row in x.flatten().tolist()]


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
    with pytest.raises(ValueError, match=r"\bways .*\b12 .*train .*\(2, 13\)"):
        few_shot(ways=(2, 13))
    for ways in ((1, 5), (5, 4), (2, 3, 4)):
        with pytest.raises(ValueError, match=rf"\bways .*\b2\b.*range.*{re.escape(str(ways))}"):
            few_shot(ways=ways)
    with pytest.raises(ValueError, match=r"shots \+ queries .*\b7\b.* 4 \+ 4"):
        few_shot(shots=4, queries=4)
    with pytest.raises(ValueError, match=r"meta_batch_size .*processes, 2\b.* 5"):
        MetaBatches(few_shot(), 5, world_size=2)
    with pytest.raises(ValueError, match=r"train tasks .*processes, 4\b.* 3"):
        MetaBatches(few_shot(), 8, 3, world_size=4)
