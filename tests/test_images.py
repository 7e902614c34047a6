"""What all image data modules can do, on small images."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meta_lightning import MAML, MLP, ImageTasks
from meta_lightning.data.cache import LabelledImages
from meta_lightning.data.transforms import ImageTransforms
from meta_lightning.loading import MetaBatches
from meta_lightning.tasks import SPLITS, TaskBatch, as_task_batch

SIZES = [9, 10, 11, 12]  # images of the classes, by turns


class Numbered(ImageTasks):
    """36 classes, 12 a split; the four pixels of an image are its number and its class, in base 256."""

    cache_name = "numbered"

    def build(self) -> LabelledImages:
        labels = np.repeat(np.arange(36), np.resize(SIZES, 36))
        rows = np.arange(len(labels))
        pixels = np.stack([rows // 256, rows % 256, labels, 0 * labels], axis=1).astype(np.uint8)
        return LabelledImages(pixels.reshape(-1, 1, 2, 2), labels, np.arange(36).astype(str), np.arange(36) // 12)


def rows_and_classes(x: Tensor) -> tuple[Tensor, Tensor]:
    pixels = x.long().flatten(-3)
    return pixels[..., 0] * 256 + pixels[..., 1], pixels[..., 2]


@settings(max_examples=60, deadline=None)
@given(
    ways=st.integers(2, 12),
    shots=st.integers(1, 5),
    queries=st.integers(1, 4),
    world_size=st.integers(1, 3),
    share=st.integers(1, 3),
    workers=st.sampled_from([0, 0, 0, 0, 0, 0, 0, 2]),
    split=st.sampled_from(SPLITS),
    iteration=st.integers(0, 10**6),
)
def test_tasks_are_what_few_shot_tasks_are(
    ways: int, shots: int, queries: int, world_size: int, share: int, workers: int, split: str, iteration: int
) -> None:
    data = Numbered(ways=ways, shots=shots, queries=queries, meta_batch_size=world_size * share, num_workers=workers)
    tasks = data.task_set(split)  # type: ignore[arg-type]
    ranks = [MetaBatches(tasks, world_size * share, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [rank[iteration] for rank in ranks]
    if workers:
        data.val_tasks = 3 * world_size
        batches += list(data.val_dataloader())
    for number, batch in enumerate(batches):
        first = 12 * SPLITS.index(split) if number < world_size else 12
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            assert sorted(support_y.tolist()) == sorted(list(range(ways)) * shots)
            assert sorted(query_y.tolist()) == sorted(list(range(ways)) * queries)
            rows, classes = rows_and_classes(torch.cat([support_x, query_x]))
            labels = torch.cat([support_y, query_y])
            assert len(set(rows.tolist())) == len(rows)  # support and query share no image
            assert len(set(zip(classes.tolist(), labels.tolist(), strict=True))) == ways  # labels stand for classes
            assert all(first <= c < first + 12 for c in classes.tolist())  # no class of another split
    together = torch.stack([batch.support_x for batch in batches[:world_size]], 1).flatten(0, 1)
    first_task = iteration * world_size * share
    assert torch.equal(together, tasks.batch(range(first_task, first_task + world_size * share)).support_x)


def test_other_ways_and_shots_in_training() -> None:
    data = Numbered(ways=3, shots=2, queries=4, train_ways=7, train_shots=1, train_queries=2, meta_batch_size=2)
    train, val = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    assert (train.support_x.shape[1], train.query_x.shape[1]) == (7, 14)
    assert (val.support_x.shape[1], val.query_x.shape[1]) == (6, 12)


def test_a_range_of_shots_is_drawn_for_each_meta_batch_and_alike_on_every_rank() -> None:
    tasks = Numbered(train_shots=(1, 5), queries=4, meta_batch_size=4).task_set("train")
    ranks = [MetaBatches(tasks, 4, rank=rank, world_size=2) for rank in range(2)]
    shots = [tuple(rank[j].support_x.shape[1] // 5 for rank in ranks) for j in range(100)]
    assert all(a == b for a, b in shots)
    assert {a for a, _ in shots} == {1, 2, 3, 4, 5}
    assert all(rank[7].query_x.shape[1] == 5 * 4 for rank in ranks)
    with pytest.raises(ValueError, match=r"shots must be at least 1, or a range \(least, most\), got \(3, 2\)"):
        Numbered(train_shots=(3, 2), queries=4).setup()


class Negative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 - x + torch.rand(len(x), 1, 1, 1)


def test_support_and_query_have_their_own_transforms_and_only_training_is_augmented() -> None:
    batch = Numbered(shots=2, queries=3).task_set("train").batch([4, 5])
    pixels = as_task_batch(batch)
    transforms = ImageTransforms(mean=[0.5], std=[0.25], support=Negative())
    before = torch.get_rng_state()
    augmented, again, plain = (transforms(batch, training, seed=3) for training in (True, True, False))
    assert torch.equal(before, torch.get_rng_state())
    noise = (augmented.support_x * 0.25 + 0.5) - (1 - pixels.support_x)
    assert noise.flatten(2).std(2).max() < 1e-6  # one number an image …
    assert len(noise[:, :, 0, 0, 0].unique()) == 20  # … another for each
    assert torch.equal(augmented.support_x, again.support_x)
    for x, expected in ((plain.support_x, pixels.support_x), (augmented.query_x, pixels.query_x)):
        assert torch.allclose(x * 0.25 + 0.5, expected, atol=1e-6)


def test_the_trainer_applies_the_transforms() -> None:
    class Seen(MAML):
        means: list[tuple[bool, float, float]]

        def adapt_tasks(self, params: Any, support: Any, *args: Any, **kwargs: Any) -> Any:
            x = support[0][0]
            self.means.append((self.training, x.min().item(), x.max().item()))
            return super().adapt_tasks(params, support, *args, **kwargs)

    class Zero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x

    learner = Seen(MLP(in_features=4, out_features=5))
    learner.means = []
    transforms = ImageTransforms(mean=[1.0], std=[2.0], support=Zero())
    data = Numbered(shots=2, queries=3, transforms=transforms, meta_batch_size=2, epoch_length=2, val_tasks=2)
    trainer(max_steps=2).fit(learner, data)
    train = [(least, most) for training, least, most in learner.means if training]
    evaluated = [most for training, _, most in learner.means if not training]
    assert train == [(-0.5, -0.5)] * 2
    assert all(most > -0.5 for most in evaluated)


def test_tasks_pickle_without_the_images_that_the_other_process_can_map() -> None:
    data = Numbered(shots=2, queries=3)
    tasks = data.task_set("test")
    pickled = pickle.dumps(tasks)
    assert len(pickled) < 10_000
    assert all(torch.equal(a, b) for a, b in zip(pickle.loads(pickled).batch([3]), tasks.batch([3]), strict=True))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_what_one_process_gives(context: str) -> None:
    loaders = [Numbered(shots=2, queries=3, val_tasks=40, num_workers=n).val_dataloader() for n in (0, 2)]
    loaders[1].multiprocessing_context = context
    batches: list[Sequence[TaskBatch]] = [list(loader) for loader in loaders]
    assert len(batches[0]) == len(batches[1]) == 3
    for a, b in zip(*batches, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_checkpoint_is_tested_on_another_data_module(tmp_path: Path) -> None:
    class Other(Numbered):
        """Another domain of the same image size."""

        cache_name = "other"

        def build(self) -> LabelledImages:
            data = super().build()
            return data._replace(images=255 - data.images, classes=np.array([f"other {c}" for c in data.classes]))

    learner = MAML(MLP(in_features=4, out_features=5))
    fit = trainer(max_steps=2, limit_val_batches=1)
    fit.fit(learner, Numbered(queries=3, meta_batch_size=2, epoch_length=2, test_tasks=4))
    (figures,) = trainer().test(learner, Other(queries=3, test_tasks=4), verbose=False)
    assert 0 <= figures["test/accuracy"] <= 1
    assert Other(queries=3).load().classes[0] == "other 0"


def test_a_test_needs_no_training_tasks() -> None:
    data = Numbered(shots=5, queries=4, train_shots=9, train_queries=9)
    data.setup("test")
    assert len(next(iter(data.test_dataloader())).support_x) == 16
    with pytest.raises(ValueError, match="of the train split, got 9"):
        data.setup("fit")


def test_a_data_module_pickles_after_it_was_loaded() -> None:
    data = Numbered(shots=2, queries=3)
    data.prepare_data()
    again = pickle.loads(pickle.dumps(data))
    tasks = pickle.loads(pickle.dumps(again.task_set("val")))
    assert torch.equal(tasks.batch([1]).support_x, data.task_set("val").batch([1]).support_x)


def test_checkpoints_of_python_objects_load_with_weights_only(tmp_path: Path) -> None:
    transforms = ImageTransforms(mean=[0.5], std=[0.25], support=Negative())
    data = Numbered(queries=3, seed=np.int64(3), transforms=transforms, cache_dir=tmp_path, test_tasks=4)  # type: ignore[arg-type]
    learner = MAML(MLP(in_features=4, out_features=5))
    fit = trainer(max_steps=1, limit_val_batches=0)
    fit.fit(learner, data)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert kept["transforms"] == {"mean": [0.5], "std": [0.25], "support": None, "query": None}
    assert (kept["seed"], kept["cache_dir"]) == (3, str(tmp_path))
    trainer().test(learner, data, ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)


def test_a_mean_without_a_deviation_a_channel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mean and std must have a number a channel each, got \[0.5\] and \[\]"):
        ImageTransforms(mean=[0.5])
    with pytest.raises(ValueError, match=r"std must be greater than 0, got 0.0"):
        ImageTransforms(mean=[0.5], std=[0.0])
    with pytest.raises(ValueError, match=r"mean must have 1 numbers, one a channel, got \[0.5, 0.5, 0.5\]"):
        ImageTransforms(mean=[0.5] * 3, std=[1.0] * 3)(Numbered(queries=3).task_set("val").batch([0]), False, 0)
