"""Tasks over one's own arrays, from Python, as a user of them would."""

import json
import math
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Seen, trainer

from meta_lightning import MAML, MLP, RegressionTasks, TaskBatch, TensorTasks
from meta_lightning.checks import InputError
from meta_lightning.data.tasks import SPLITS, Array, as_task_batch

# Lightning on what is meant: quick training, without workers, resumed by the command line elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

CLASSES, SAMPLES, FEATURES, SETS = 20, 12, 6, 10
QUICK: dict[str, Any] = {"meta_batch_size": 4, "epoch_length": 5, "val_tasks": 8, "test_tasks": 40}


def clusters(seed: int = 0) -> tuple[Array, Array]:
    """A Gaussian cloud a class, the classes interleaved and numbered 100, 103, …; numpy's own float64 and int64."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(CLASSES).repeat(SAMPLES))
    x = 2 * rng.standard_normal((CLASSES, FEATURES))[y] + rng.standard_normal((len(y), FEATURES))
    return x, 100 + 3 * y


def lines() -> list[tuple[Array, Array]]:
    """Straight lines of their own slope and offset, with 20, 21, … points; the points of a set know their set."""
    rng = np.random.default_rng(0)
    xs = [rng.uniform(-2, 2, 20 + number) for number in range(SETS)]
    return [(x, rng.normal() * x + rng.normal()) for x in xs]


def numbered(**options: Any) -> TensorTasks:
    """Samples that hold their own row number; class c has rows c, c + 20, …"""
    rows = torch.arange(CLASSES * SAMPLES)
    return TensorTasks(
        rows.view(-1, 1).float(), rows % CLASSES, **{"ways": 3, "shots": 2, "queries": 4} | QUICK | options
    )


def numbered_sets(**options: Any) -> RegressionTasks:
    """Points that hold the number of their set and their own."""
    xs = [torch.stack([torch.full((9 + n,), n), torch.arange(9 + n)], 1).float() for n in range(SETS)]
    return RegressionTasks([(x, x[:, 1]) for x in xs], **{"shots": 3, "queries": 5} | QUICK | options)


def same(a: TaskBatch, b: TaskBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -------------------------------------------------------------------------------------------------- from end to end


def test_maml_learns_from_ones_own_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = clusters()
    data = TensorTasks(x, y, ways=3, shots=2, queries=5, **QUICK)
    learner = MAML(MLP(FEATURES, [16], 3), inner_lr=0.1, inner_steps=3, outer_lr=0.01)
    fit = trainer(max_epochs=8)
    fit.fit(learner, data)
    (scores,) = fit.test(learner, data, verbose=False)
    assert scores["test/accuracy_before"] < 0.5  # of 3 classes never trained on
    assert scores["test/accuracy"] > 0.7
    assert scores["test/tasks"] == 40

    checkpoint = tmp_path / "last.ckpt"
    fit.save_checkpoint(checkpoint)
    trainer(max_epochs=9).fit(learner, data, ckpt_path=checkpoint, weights_only=True)


def test_maml_learns_from_ones_own_sets_of_points() -> None:
    torch.manual_seed(0)
    data = RegressionTasks(lines(), shots=5, queries=10, **QUICK)
    learner = MAML(MLP(1, [16], 1), inner_lr=0.05, inner_steps=3, outer_lr=0.01)
    fit = trainer(max_epochs=8)
    fit.fit(learner, data)
    (scores,) = fit.test(learner, data, verbose=False)
    assert scores["test/mse"] < 0.5 * scores["test/mse_before"]


@pytest.mark.parametrize(("make", "features"), [(numbered, 1), (numbered_sets, 2)])
def test_a_checkpoint_holds_the_arguments_but_not_the_data(make: Any, features: int, tmp_path: Path) -> None:
    data = make(splits={"train": np.arange(4), "val": range(4, 7)})
    fit = trainer(max_epochs=1)
    fit.fit(MAML(MLP(features, [2], 3 if make is numbered else 1)), data)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    hparams = torch.load(tmp_path / "last.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert hparams["shots"] == data.shots
    assert hparams["meta_batch_size"] == 4
    assert hparams["splits"] == {"train": [0, 1, 2, 3], "val": [4, 5, 6]}
    assert not {"x", "y", "tasks"} & {*hparams, *data.hparams, *data.hparams_initial}


# ------------------------------------------------------------------------------------------------------- the splits


@pytest.mark.parametrize(("make", "count"), [(numbered, CLASSES), (numbered_sets, SETS)])
def test_splits_by_lot_are_disjoint_and_of_the_shares_asked_for(make: Any, count: int) -> None:
    splits = make().splits
    assert [len(splits[split]) for split in SPLITS] == [0.6 * count, 0.2 * count, 0.2 * count]
    assert sorted(number for split in SPLITS for number in splits[split]) == list(range(count))
    halves = make(split_fractions=(0.5, 0.5, 0.0)).splits
    assert [len(halves[split]) for split in SPLITS] == [0.5 * count, 0.5 * count, 0]


def test_the_lot_depends_on_split_seed_alone() -> None:
    for make in (numbered, numbered_sets):
        splits = make().splits
        assert make(seed=1, shots=1).splits == splits
        assert make(split_seed=1).splits != splits


def test_tasks_hold_only_what_is_in_their_split() -> None:
    given = {"train": [7, 3, 11, 0], "val": (1, 2, 4), "test": np.array([5, 6, 8])}
    classes = numbered(splits=given)
    for split, members in given.items():
        batch = classes.task_set(split).batch(range(30))
        assert set((torch.cat([batch.support_x, batch.query_x], 1) % CLASSES).unique().tolist()) == set(members)
    sets = numbered_sets(splits={"train": [1, 2], "val": [0]})
    assert sets.task_set("train").batch(range(30)).support_x[..., 0].unique().tolist() == [1, 2]
    assert sets.task_set("val").batch(range(30)).query_x[..., 0].unique().tolist() == [0]


def test_a_split_that_is_not_asked_for_may_be_left_out() -> None:
    data = numbered_sets(splits={"train": [0, 1, 2]})
    trainer(max_epochs=1, limit_val_batches=0).fit(MAML(MLP(2, [2], 1)), data)
    with pytest.raises(ValueError, match=r"\btest split .*\b1 .* 0"):
        data.task_set("test")


# -------------------------------------------------------------------------------------------------------- the tasks


def test_a_task_of_classes_is_n_classes_with_k_and_q_samples() -> None:
    data = numbered(train_shots=3, train_queries=5)
    for split, shots, queries in (("train", 3, 5), ("val", 2, 4), ("test", 2, 4)):
        batch = data.task_set(split).batch(range(20))
        assert batch.support_x.shape == (20, 3 * shots, 1)
        assert batch.query_x.shape == (20, 3 * queries, 1)
        assert batch.support_y.tolist() == [[label for label in range(3) for _ in range(shots)]] * 20
        rows = torch.cat([batch.support_x, batch.query_x], 1).squeeze(2)
        assert all(len(task.unique()) == 3 * (shots + queries) for task in rows)
        classes = torch.cat([batch.support_x.view(20, 3, -1), batch.query_x.view(20, 3, -1)], 2) % CLASSES
        assert (classes == classes[:, :, :1]).all()


def test_training_may_have_other_ways_and_a_range_of_shots() -> None:
    data = numbered(train_ways=4, train_shots=(1, 5))
    tasks = data.task_set("train")
    batches = [tasks.batch(range(4 * j, 4 * j + 4)) for j in range(40)]
    assert {batch.support_x.shape[1] for batch in batches} == {4 * shots for shots in (1, 2, 3, 4, 5)}
    assert {batch.query_x.shape[1] for batch in batches} == {4 * 4}
    assert data.task_set("val").batch([0]).support_x.shape[1] == 3 * 2


def test_training_may_have_a_range_of_ways() -> None:
    data = numbered(train_ways=(2, 5), train_shots=(1, 3))
    batches = [batch for _ in range(8) for batch in data.train_dataloader()]
    assert {int(batch.support_y.max()) + 1 for batch in batches} <= {2, 3, 4, 5}
    tasks = data.task_set("train")
    ways = [tasks.batch(range(4 * j, 4 * j + 4)).query_y.shape[1] / 4 for j in range(60)]
    assert {*ways} == {2, 3, 4, 5}
    for split in ("val", "test"):
        assert same(data.task_set(split).batch(range(9)), numbered().task_set(split).batch(range(9)))


@pytest.mark.parametrize("train_ways", [None, (2, 9)])
def test_labels_of_the_split_are_the_numbers_of_its_classes(train_ways: Any) -> None:
    order = [7, 3, 11, 0, 19, 4, 5, 6, 16]  # in no order
    splits = {"train": order, "val": range(8, 11), "test": range(12, 16)}
    own, data = (numbered(splits=splits, train_ways=train_ways, train_labels=labels) for labels in ("task", "split"))
    met = set()
    for block in range(30):
        batch, expected = (each.task_set("train").batch(range(4 * block, 4 * block + 4)) for each in (data, own))
        assert torch.equal(batch.support_x, expected.support_x)  # the same tasks …
        assert torch.equal(batch.query_x, expected.query_x)
        for x, y in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y)):
            assert y.dtype == torch.int64
            assert (x.squeeze(2) % CLASSES).tolist() == torch.tensor(order)[y].tolist()
            met |= {*y.flatten().tolist()}
    assert met == {*range(9)}  # … in which all classes occur
    for split in ("val", "test"):
        assert same(data.task_set(split).batch(range(9)), own.task_set(split).batch(range(9)))


def test_a_resumed_run_goes_on_with_a_range_of_ways(tmp_path: Path) -> None:
    def run(max_steps: int, ckpt_path: Path | None = None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        torch.manual_seed(0)
        seen, network = Seen(), MLP(1, [4], 5)
        fit = trainer(max_steps=max_steps, callbacks=[seen], limit_val_batches=0)
        data = numbered(train_ways=(2, 5), train_shots=(1, 3))
        fit.fit(MAML(network), data, ckpt_path=ckpt_path, weights_only=True)
        fit.save_checkpoint(tmp_path / f"{max_steps}.ckpt")
        return seen.batches, [p.detach().clone() for p in network.parameters()]

    whole, expected = run(13)
    before, _ = run(8)  # in the middle of an epoch
    after, theta = run(13, tmp_path / "8.ckpt")
    assert len({batch.shape for batch in whole}) > 3
    assert all(torch.equal(a, b) for a, b in zip(before + after, whole, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(theta, expected, strict=True))
    hparams = torch.load(tmp_path / "8.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert (hparams["train_ways"], hparams["train_shots"], hparams["train_labels"]) == ([2, 5], [1, 3], "task")


def test_a_task_of_points_is_k_and_q_points_of_one_set() -> None:
    data = numbered_sets(train_shots=2, train_queries=7)
    for split, shots, queries in (("train", 2, 7), ("val", 3, 5), ("test", 3, 5)):
        batch = data.task_set(split).batch(range(20))
        assert batch.support_x.shape == (20, shots, 2)
        assert batch.support_y.shape == (20, shots, 1)
        assert batch.query_y.shape == (20, queries, 1)
        x, y = torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)
        assert all(len(task.unique()) == 1 for task in x[..., 0])
        assert all(len(task.unique()) == shots + queries for task in x[..., 1])
        assert torch.equal(x[..., 1:], y)


def test_every_set_comes_once_a_turn_and_every_point_equally_often() -> None:
    data = numbered_sets(splits={"train": range(SETS)})
    batch = data.task_set("train").batch(range(400 * SETS))
    met = batch.support_x[:, 0, 0].view(400, SETS)
    assert (met.sort(1).values == torch.arange(SETS)).all()
    assert len({tuple(turn) for turn in met.tolist()}) > 390  # in an order drawn anew
    of_set_4 = torch.cat([batch.support_x, batch.query_x], 1)[batch.support_x[:, 0, 0] == 4][..., 1].long()
    counts, expected = of_set_4.flatten().bincount().double(), 400 * 8 / 13
    assert ((counts - expected).square() / expected).sum() < 33  # chi-square, 12 degrees of freedom, p ≈ 1e-3


@pytest.mark.parametrize("make", [numbered, numbered_sets])
def test_task_i_depends_on_seed_split_and_i_alone(make: Any) -> None:
    tasks = make().task_set("train")
    forwards = [tasks.batch([i]) for i in (0, 1, 25)]
    backwards = [make().task_set("train").batch([i]) for i in (25, 1, 0)]
    assert all(same(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))
    assert same(pickle.loads(pickle.dumps(tasks)).batch([25]), forwards[2])  # as a worker under spawn has it
    assert same(TaskBatch(*(part[2:] for part in tasks.batch([0, 1, 25]))), forwards[2])
    assert not same(make(seed=1).task_set("train").batch([0]), forwards[0])
    val = make(splits={"val": range(6)}).task_set("val").batch([0])
    assert not same(make(splits={"train": range(6)}).task_set("train").batch([0]), val)


# -------------------------------------------------------------------------------------------------------- the types


def test_uint8_is_scaled_and_nothing_else() -> None:
    options: dict[str, Any] = {"ways": 3, "shots": 2, "queries": 4} | QUICK
    pixels, y = torch.full((CLASSES * SAMPLES, 2), 255, dtype=torch.uint8), torch.arange(CLASSES * SAMPLES) % CLASSES

    def drawn(x: Any) -> torch.Tensor:
        return as_task_batch(TensorTasks(x, y, **options).task_set("train").batch([0])).query_x  # as learners do

    assert torch.equal(drawn(pixels), torch.ones(1, 12, 2))
    assert torch.equal(drawn(pixels.double()), torch.full((1, 12, 2), 255.0))
    assert torch.equal(drawn(pixels.int()), torch.full((1, 12, 2), 255))  # tokens
    sets = RegressionTasks([(pixels[:20], pixels[:20])] * 5, shots=3, queries=5, **QUICK)
    batch = as_task_batch(sets.task_set("train").batch([0]))
    assert torch.equal(batch.support_x, torch.ones(1, 3, 2))
    assert torch.equal(batch.support_y, torch.full((1, 3, 2), 255.0))  # targets are in their own unit


def test_arrays_of_any_layout_are_taken_without_a_copy_where_that_can_be() -> None:
    x, y = clusters()
    single = x.astype(np.float32)
    single.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = TensorTasks(single, y, ways=3, queries=5)
    assert data.x.data_ptr() == single.ctypes.data
    expected = data.task_set("train").batch([3])
    for other_x, other_y in (
        (x[::-1].copy()[::-1], y.astype(np.uint16)),  # of negative stride
        (np.asfortranarray(x), y.astype(np.uint8)),
        (x.tolist(), y.tolist()),
        (torch.from_numpy(x).requires_grad_(), torch.from_numpy(y).int()),
    ):
        batch = TensorTasks(other_x, other_y, ways=3, queries=5).task_set("train").batch([3])
        assert same(batch, expected)
        assert batch.support_x.dtype == torch.float32
        assert not batch.support_x.requires_grad


# ---------------------------------------------------------------------------------------------------- what is refused


def refused(message: str, x: Any = None, y: Any = None, **options: Any) -> None:
    own_x, own_y = clusters()
    with pytest.raises(ValueError, match=message):
        TensorTasks(own_x if x is None else x, own_y if y is None else y, **{"ways": 3, "queries": 5} | options).setup()


def test_errors_of_classes_name_argument_expected_and_got() -> None:
    x, y = clusters()
    refused(r"x and y .*\b240 .*\b239", y=y[1:])
    refused(r"\by .*torch\.float64\b.*RegressionTasks", y=y.astype(float))
    refused(r"\by .*\[M\].*\[240, 1\]", y=y[:, None])
    refused(r"\by .*numbers or names, got object", y=np.array([None] * 240))
    refused(r"\bx .*array of numbers", x=[[1.0], [1.0, 2.0]])
    refused(r"\bx .*torch\.complex128", x=x + 1j)
    refused(r"\bx .*single number", x=torch.tensor(1.0))
    refused(r"\bways .*\b4 .*val .* 5", ways=5)
    refused(r"shots \+ queries .*\b12\b.*train .*\+ 12", queries=12)
    refused(r"\btrain_ways .*\b2\b.* 1", train_ways=1)
    refused(r"\btrain_ways .*\b2\b.*range.*\(1, 5\)", train_ways=(1, 5))
    refused(r"\btrain_ways .*range.*\(5, 4\)", train_ways=(5, 4))
    refused(r"^train_ways .*\b12 .*train .*\(5, 13\)", train_ways=(5, 13))
    refused(r"^train_ways .*\b12 .*train .* 13", train_ways=13)
    refused(r"^train_ways .*from 2 to 4 .*train .*\(2, 5\)$", train_ways=(2, 5), splits={"train": [100, 103, 106, 109]})
    refused(r"train_labels .*'task', 'split'.*'all'", train_labels="all")
    refused(r"\btrain_shots .*range\b.* 0", train_shots=0)
    refused(r"split_seed .* -1", split_seed=-1)
    spoilt = x.copy()
    spoilt[[7, 9], 2] = math.nan, math.inf
    refused(r"\bx .*\b2 of 240 .*\b7, 9", x=spoilt)


def test_errors_of_splits_name_argument_expected_and_got() -> None:
    refused(r"splits .*\[1\]", splits={"train": [100, 1]})
    refused(r"splits .*\bonce\b.*\[103\]", splits={"train": [100, 103], "val": [103]})
    refused(r"splits .*'train', 'val' .*'test'.*\['valid'\]", splits={"valid": [100]})
    for fractions in ((0.5, 0.5), (0.5, 0.6, -0.1), (0.5, 0.1, 0.1), (math.nan, 0.5, 0.5)):
        refused(rf"split_fractions .*{re.escape(str(fractions))}", split_fractions=fractions)


def test_errors_of_sets_name_argument_expected_and_got() -> None:
    sets = lines()

    def refused_sets(message: str, changed: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            RegressionTasks([*sets[:4], changed, *sets[5:]], splits={"train": range(SETS)}, **options).setup()

    x, y = sets[4]
    refused_sets(r"x and y of task 4 .*\b24 .*\b23", (x, y[1:]))
    refused_sets(r"\by of task 4 .*\b24 of 24\b", (x, y * math.nan))
    refused_sets(r"tasks .*\[1\], torch\.float32\b.*task 0\b.*\[24\]", (np.eye(24), y))
    refused_sets(r"tasks .*\b3 parts in 4", (x, y, y))
    refused_sets(r"shots \+ queries .*\b9\b.*task 4 .*train .* 8 \+ 2", (x[:9], y[:9]), shots=8, queries=2)
    refused_sets(r"^queries .* 0", (x, y), queries=0)


def test_random_splits_that_are_too_small_say_what_would_do() -> None:
    def advice(classes: int, **options: Any) -> str:
        x, y = torch.rand(6 * classes, 2), torch.arange(6 * classes) % classes
        options = {"queries": 2, "ways": 5} | options
        with pytest.raises(InputError, match=r"^(?:train_)?ways must be at most .* split\), got ") as caught:
            [TensorTasks(x, y, **options).task_set(split) for split in SPLITS]
        message = str(caught.value).partition("; ")[2]
        if fractions := re.search(r'--data\.split_fractions "(\[.*\])" would do(?: for (\d+) ways)?$', message):
            remedy: dict[str, Any] = {"split_fractions": json.loads(fractions[1])}
            remedy |= {} if fractions[2] is None else {"ways": int(fractions[2]), "train_ways": None}
            [TensorTasks(x, y, **options | remedy).task_set(split) for split in SPLITS]
        return message

    assert advice(19) == '--data.split_fractions "[0.4, 0.3, 0.3]" would do'
    assert advice(15) == '--data.split_fractions "[0.38, 0.31, 0.31]" would do'
    assert advice(30, train_ways=20) == '--data.split_fractions "[0.68, 0.16, 0.16]" would do'
    assert advice(30, train_ways=(5, 20)) == '--data.split_fractions "[0.68, 0.16, 0.16]" would do'
    assert re.fullmatch(r"the three splits need 15 together; .* would do for 4 ways", advice(14))
    assert re.fullmatch(r"the three splits need 30 together; .* would do for 5 ways", advice(19, train_ways=20))
    assert advice(5) == "the three splits need 15 together"
    for classes in range(15, 60, 7):
        assert "would do" in advice(classes, split_fractions=(0.98, 0.01, 0.01))
    with pytest.raises(InputError, match=r"^ways .*\b2 \(classes of the val split\), got 5$"):  # given, not drawn
        TensorTasks(torch.rand(60, 2), torch.arange(60) % 10, splits={"val": [1, 2]}, queries=2).task_set("val")


def test_random_splits_without_a_set_say_what_would_do() -> None:
    sets = lines()[:4]
    options = {"shots": 5, "queries": 5}
    with pytest.raises(InputError, match=r'^the val split .*\b1 .* got 0; .*"\[0\.6, 0\.2, 0\.2\]" would do$'):
        RegressionTasks(sets, split_fractions=(0.9, 0.05, 0.05), **options).task_set("val")
    RegressionTasks(sets, split_fractions=(0.6, 0.2, 0.2), **options).task_set("val")
    with pytest.raises(InputError, match=r"^the val split .* got 0; the three splits need 3 together$"):
        RegressionTasks(sets[:2], **options).task_set("val")
    with pytest.raises(InputError, match=r"^the val split .* got 0$"):
        RegressionTasks(sets, splits={"train": range(4)}, **options).task_set("val")
