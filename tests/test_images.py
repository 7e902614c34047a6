"""What all image data modules can do, on small images."""

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from meta_lightning import MAML, MLP, ImageTasks, TaskDataModule, TensorTasks
from meta_lightning.checks import InputError
from meta_lightning.data.cache import LabelledImages
from meta_lightning.data.loading import MetaBatches
from meta_lightning.data.tasks import SPLITS, Split, TaskBatch, as_task_batch
from meta_lightning.data.transforms import ImageTransforms
from meta_lightning.show import show_data

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
    shots=st.one_of(st.integers(1, 5), st.tuples(st.integers(1, 3), st.integers(3, 5))),
    queries=st.integers(1, 4),
    world_size=st.integers(1, 3),
    share=st.integers(1, 3),
    workers=st.sampled_from([0, 0, 0, 0, 0, 0, 0, 2]),
    split=st.sampled_from(SPLITS),
    iteration=st.integers(0, 10**6),
)
def test_tasks_are_what_few_shot_tasks_are(
    ways: int,
    shots: int | tuple[int, int],
    queries: int,
    world_size: int,
    share: int,
    workers: int,
    split: Split,
    iteration: int,
) -> None:
    B = world_size * share
    data = Numbered(
        ways=ways,
        shots=shots if isinstance(shots, int) else shots[0],
        queries=queries,
        train_shots=shots,
        meta_batch_size=B,
    )
    tasks = data.task_set(split)
    least, most = (shots, shots) if isinstance(shots, int) else (shots if split == "train" else (shots[0], shots[0]))
    ranks = [
        list(DataLoader(MetaBatches(tasks, B, None, rank, world_size), None, sampler=[iteration], num_workers=workers))
        for rank in range(world_size)
    ]
    drawn = {batch.support_y.shape[1] // ways for (batch,) in ranks}
    assert len(drawn) == 1  # one number of shots a meta-batch, on every rank
    (K,) = drawn
    assert least <= K <= most
    first = 12 * SPLITS.index(split)
    for (batch,) in ranks:
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            assert sorted(support_y.tolist()) == sorted(list(range(ways)) * K)
            assert sorted(query_y.tolist()) == sorted(list(range(ways)) * queries)
            rows, classes = rows_and_classes(torch.cat([support_x, query_x]))
            labels = torch.cat([support_y, query_y])
            assert len(set(rows.tolist())) == len(rows)  # support and query share no image
            pairs = set(zip(classes.tolist(), labels.tolist(), strict=True))
            assert len(pairs) == len({c for c, _ in pairs}) == ways  # the labels are the classes, numbered anew
            assert all(first <= c < first + 12 for c in classes.tolist())  # no class of another split
    together = torch.stack([batch.support_x for (batch,) in ranks], 1).flatten(0, 1)
    assert torch.equal(together, tasks.batch(range(iteration * B, (iteration + 1) * B)).support_x)


def test_tasks_name_their_classes() -> None:
    tasks = Numbered(shots=2, queries=3).task_set("test")
    batch = tasks.batch(range(20))
    for task, (x, y) in enumerate(zip(batch.query_x, batch.query_y, strict=True)):
        _, classes = rows_and_classes(x)
        names = tasks.class_names(task)
        assert [names[label] for label in y.tolist()] == [str(c) for c in classes.tolist()]


def test_a_picture_of_the_data_is_what_training_sees_and_leaves_out_what_is_not_there(tmp_path: Path) -> None:
    class Seen(nn.Module):
        batches: ClassVar[list[Tensor]] = []

        def forward(self, x: Tensor) -> Tensor:
            self.batches.append(x)
            return x

    class TwoSplits(Numbered):
        cache_name = "two splits"

        def build(self) -> LabelledImages:
            data = super().build()
            return data._replace(splits=np.where(data.splits == 1, 0, data.splits))

    shown = show_data(TwoSplits(queries=3, transforms=ImageTransforms(support=Seen())), tmp_path / "data.png")
    assert len(Seen.batches) == 1  # of training only
    assert Seen.batches[0].shape == (5, 1, 2, 2)
    assert "  train 24 classes, 252 images, endless tasks, support [5, 1, 2, 2], query [15, 1, 2, 2]" in shown
    assert re.search(r"^  val   left out: ways .*\b0 .*val .* 5$", shown, re.M)
    assert "  test  12 classes, 126 images, 600 tasks" in shown
    with Image.open(tmp_path / "data.png") as picture:
        assert picture.size == (2 * 600, 720)
    with pytest.raises(ValueError, match=r"\bways .*\b12 .*test .* 30"):
        show_data(TwoSplits(ways=30, queries=3), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def on_a_gpu(data: TaskDataModule, free: int, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Let a data module believe in a GPU with so many bytes free; what it moves there is noted and stays."""
    moved: list[object] = []
    gpu = torch.device("cuda", 0)
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=gpu))  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    monkeypatch.setattr(Tensor, "to", lambda self, device: moved.append(device) or self)
    return moved


@pytest.mark.parametrize("make", [Numbered, lambda **o: TensorTasks(torch.rand(378, 4), torch.arange(378) % 20, **o)])
def test_samples_go_to_the_gpu_where_they_fit(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    options = {"ways": 2, "queries": 3}
    data = make(**options)
    nbytes = 378 * 4 * (1 if make is Numbered else 4)
    moved = on_a_gpu(data, 5 * nbytes, monkeypatch)
    data.setup("fit")
    assert moved == [torch.device("cuda", 0)]
    assert "stay in CPU memory" not in caplog.text

    data = make(**options)
    moved = on_a_gpu(data, 4 * nbytes, monkeypatch)
    data.setup("fit")
    assert moved == []
    assert caplog.text.count("stay in CPU memory: cuda:0 has") == 1

    data = make(**options, num_workers=1)  # which could not read it there
    moved = on_a_gpu(data, 5 * nbytes, monkeypatch)
    data.setup("fit")
    assert moved == []
    assert caplog.text.count("stay in CPU memory") == 1


def test_samples_that_are_on_a_gpu_have_no_workers() -> None:
    there = torch.empty(3, device="meta")
    with pytest.raises(InputError, match=r"num_workers .*\bmeta\b.* 2"):
        Numbered(num_workers=2).place(there)
    assert Numbered().place(there) is there


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
    with pytest.raises(ValueError, match=r"train_shots .*\(3, 2\)"):
        Numbered(train_shots=(3, 2), queries=4).setup()


def test_a_range_of_ways_is_drawn_for_each_meta_batch_and_alike_on_every_rank() -> None:
    tasks = Numbered(train_ways=(2, 12), queries=4, meta_batch_size=4).task_set("train")
    ranks = [MetaBatches(tasks, 4, rank=rank, world_size=2) for rank in range(2)]
    ways = [tuple(rank[j].query_x.shape[1] // 4 for rank in ranks) for j in range(100)]
    assert all(a == b for a, b in ways)
    assert {a for a, _ in ways} == {*range(2, 13)}
    workers, one = (DataLoader(ranks[1], None, sampler=[7, 0, 3], num_workers=n) for n in (2, 0))
    assert all(torch.equal(x, y) for a, b in zip(workers, one, strict=True) for x, y in zip(a, b, strict=True))
    with pytest.raises(InputError, match=r"^train_ways .*\b12 .*train .*\(5, 13\)"):
        Numbered(train_ways=(5, 13), queries=4).setup()
    Numbered(train_ways=(5, 13), queries=4).setup("test")


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

        def inner_trajectory(self, start: Any, support: Any, **options: bool) -> Any:
            x = support.x
            self.means.append((self.training, x.min().item(), x.max().item()))
            return super().inner_trajectory(start, support, **options)

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
    with pytest.raises(ValueError, match=r"shots \+ queries .*train .* 9 \+ 9"):
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
    with pytest.raises(ValueError, match=r"mean .*std .*\[0\.5\] .*\[\]"):
        ImageTransforms(mean=[0.5])
    with pytest.raises(ValueError, match=r"\bstd .* 0\.0"):
        ImageTransforms(mean=[0.5], std=[0.0])
    with pytest.raises(ValueError, match=r"\bmean .*\b1 .*\[0\.5, 0\.5, 0\.5\]"):
        ImageTransforms(mean=[0.5] * 3, std=[1.0] * 3)(Numbered(queries=3).task_set("val").batch([0]), False, 0)


def test_a_cache_is_compared_with_its_checksums_on_demand(tmp_path: Path) -> None:
    assert Numbered(queries=3, cache_dir=str(tmp_path)).load().images[-1, 0, 1, 1] == 0
    (file,) = tmp_path.glob("*/images.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    altered = Numbered(queries=3, cache_dir=str(tmp_path))
    altered.prepare_data()
    assert altered.load().images[-1, 0, 1, 1] == 1
    verified = Numbered(queries=3, cache_dir=str(tmp_path), verify_cache=True)
    with pytest.warns(UserWarning, match=r"corrupt \(wrong checksum of images\.npy\)"):
        verified.prepare_data()
    assert verified.load().images[-1, 0, 1, 1] == 0
