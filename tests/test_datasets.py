"""Tasks over map-style data sets: torchvision's, Hugging Face's, and a user's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import trainer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import ToTensor

from meta_lightning import MAML, MLP, Conv4, DatasetTasks, RegressionTasks, TensorTasks
from meta_lightning.data.tasks import FewShotTasks, ReadSamples

SMALL: dict[str, Any] = {"queries": 2, "meta_batch_size": 2, "epoch_length": 3, "val_tasks": 2, "test_tasks": 2}
QUICK = SMALL | {"ways": 2}
CLASSES, EACH = 20, 6
X, Y = torch.rand(CLASSES * EACH, 4), torch.arange(CLASSES).repeat(EACH)
NAMES = [f"class {number:02}" for number in range(CLASSES)]


class Column(Dataset[Any]):
    """A set of dicts with columns and features, as those of Hugging Face."""

    def __init__(self, columns: dict[str, list[Any]], names: list[str] | None = None) -> None:
        self.columns, self.column_names = columns, [*columns]
        self.features = {"label": type("ClassLabel", (), {"names": names})()}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: int | str) -> Any:
        return self.columns[key] if isinstance(key, str) else {n: values[key] for n, values in self.columns.items()}


class Targets(TensorDataset):
    """A set with labels as an attribute, as those of torchvision."""

    def __init__(self) -> None:
        super().__init__(X, Y)
        self.targets, self.classes = Y.tolist(), NAMES


def columns(names: list[str] | None = NAMES) -> Column:
    return Column({"x": X.tolist(), "label": Y.tolist()}, names)


def huggingface() -> Any:
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    pyarrow = pytest.importorskip("pyarrow")
    floats, label = datasets.Sequence(datasets.Value("float32")), datasets.ClassLabel(names=NAMES)
    features = datasets.Features({"x": floats, "label": label})
    table = pyarrow.table({"x": X.tolist(), "label": Y.tolist()}, schema=features.arrow_schema)
    # with a fingerprint: its own hash of a table fails with some versions of pyarrow
    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=info, fingerprint="memory")


SETS: dict[str, Callable[[], Any]] = {
    "pairs": lambda: TensorDataset(X, Y),
    "targets": Targets,
    "columns": columns,
    "names": lambda: Column({"x": X.tolist(), "label": [NAMES[y] for y in Y]}),
    "huggingface": huggingface,
}


@pytest.mark.parametrize("in_memory", [True, False, None])
@pytest.mark.parametrize("made", SETS)
def test_tasks_are_those_of_the_same_arrays(made: str, in_memory: bool | None) -> None:
    data, expected = DatasetTasks(SETS[made](), in_memory=in_memory, **QUICK), TensorTasks(X, Y, **QUICK)
    for split in ("train", "val", "test"):
        ours, theirs = data.task_set(split), expected.task_set(split)
        for part, other in zip(ours.batch([0, 1]), theirs.batch([0, 1]), strict=True):
            torch.testing.assert_close(part, other, rtol=0, atol=1e-7)
        numbers = [int(name) for name in theirs.class_names(3)]
        assert ours.class_names(3) == ([*map(str, numbers)] if made == "pairs" else [NAMES[n] for n in numbers])


@pytest.mark.parametrize("made", ["pairs", "columns"])
def test_a_subset_has_the_labels_of_its_items(made: str) -> None:
    order = torch.randperm(len(X)).tolist()
    data = DatasetTasks(Subset(SETS[made](), order), **QUICK).task_set("train").batch([0])
    expected = TensorTasks(X[order], Y[order], **QUICK).task_set("train").batch([0])
    torch.testing.assert_close(data.support_x, expected.support_x)


def test_labels_may_be_given_or_named() -> None:
    class Renamed(Targets):
        def __init__(self) -> None:
            super().__init__()
            self.kind = self.targets
            del self.targets

    expected = TensorTasks(X, Y, **QUICK).task_set("train").batch([0]).support_x
    for dataset, labels in ((Renamed(), "kind"), (X, Y), (X.numpy(), Y.tolist()), (X, [NAMES[y] for y in Y])):
        torch.testing.assert_close(DatasetTasks(dataset, labels, **QUICK).task_set("train").batch([0])[0], expected)


def test_items_of_several_inputs_are_dicts() -> None:
    ids, mask = torch.randint(9, (len(X), 5)), torch.ones(len(X), 5).long()
    texts = {"text": ["…"] * len(X), "ids": ids.tolist(), "mask": mask.tolist(), "label": Y.tolist()}
    batch = DatasetTasks(Column(texts), inputs=["ids", "mask"], **QUICK).task_set("train").batch([0])
    assert {name: (part.dtype, part.shape) for name, part in batch.support_x.items()} == dict.fromkeys(
        ("ids", "mask"), (torch.int64, (1, 2, 5))
    )
    one = DatasetTasks(Column(texts), inputs="ids", **QUICK).task_set("train").batch([0])
    assert torch.equal(one.support_x, batch.support_x["ids"])
    with pytest.raises(ValueError, match=r"\btext of item 0 must be numbers .*tokenizer.*inputs.*got str"):
        DatasetTasks(Column(texts), **QUICK)
    with pytest.raises(ValueError, match=r"inputs must be keys of the items, text, ids, mask, label, got id"):
        DatasetTasks(Column(texts), inputs=["id"], **QUICK)


@pytest.mark.parametrize("workers", [0, 1])
def test_files_are_read_as_tasks_need_them(tmp_path: Path, workers: int) -> None:
    read: list[int] = []

    class Files(ImageFolder):
        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return super().__getitem__(index)

    for number in range(10):
        for image in range(4):
            path = tmp_path / f"{number}" / f"{image}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.random.default_rng(10 * number + image).integers(0, 256, (16, 16), np.uint8)).save(path)
    files = Files(str(tmp_path), loader=lambda path: Image.open(path).convert("L"))
    data = DatasetTasks(files, in_memory=False, **QUICK, num_workers=workers)
    assert isinstance(data.samples, ReadSamples)
    assert read == []  # labels are in targets
    learner = MAML(Conv4(ways=2, image_size=16, filters=4), inner_steps=1)
    trainer(max_steps=3).fit(learner, data)
    assert (learner.form.image_size, learner.form.channels, learner.form.pixels) == (16, 1, True)
    assert workers or 0 < len({*read}) <= 40
    whole = DatasetTasks(files, in_memory=True, **QUICK)
    assert torch.equal(whole.task_set("test").batch([5])[0], data.task_set("test").batch([5])[0])


def test_random_transforms_are_read_again() -> None:
    class Noisy(Targets):
        def __getitem__(self, index: int) -> Any:
            return torch.randn(4), self.targets[index]

    data = DatasetTasks(Noisy(), **QUICK)
    assert isinstance(data.samples, ReadSamples)
    assert not torch.equal(data.task_set("train").batch([0])[0], data.task_set("train").batch([0])[0])


def test_what_items_draw_in_a_worker_is_a_function_of_the_meta_iteration() -> None:
    class Noisy(Targets):
        def __getitem__(self, index: int) -> Any:
            return torch.randn(4) + np.random.rand(), self.targets[index]  # noqa: NPY002

    def drawn(start: int, seed: int = 0) -> list[Tensor]:
        data = DatasetTasks(Noisy(), **QUICK | {"num_workers": 1, "epoch_length": 4, "seed": seed})
        data.meta_iteration = lambda: start  # type: ignore[method-assign]
        return [batch.support_x for batch in data.task_loader("train", None)]

    first, resumed, other = drawn(0), drawn(3), drawn(0, seed=1)
    assert torch.equal(first[3], resumed[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_a_set_of_torchvision_trains_tests_and_adapts() -> None:
    data = DatasetTasks(FakeData(300, (1, 16, 16), 10, ToTensor()), **QUICK)
    learner = MAML(Conv4(ways=2, image_size=16, filters=4), inner_steps=1)
    trainer(max_steps=3).fit(learner, data)
    assert trainer().test(learner, data, verbose=False)[0]["test/tasks"] == 2


def test_small_classes_are_left_out_by_name() -> None:
    kept = torch.tensor([i for i in range(len(X)) if not (Y[i] in (3, 7) and i >= 2 * CLASSES)])
    dataset = Column({"x": X[kept].tolist(), "label": [NAMES[y] for y in Y[kept]]})
    with pytest.warns(UserWarning, match=r"fewer than 3 samples.*left out: class 03 \(2\), class 07 \(2\)$"):
        data = DatasetTasks(dataset, **QUICK)
    assert len(data.class_numbers.unique()) == CLASSES - 2
    splits = {"train": NAMES[:8], "val": NAMES[8:13], "test": NAMES[13:]}
    with pytest.warns(UserWarning, match="left out"):
        given = DatasetTasks(dataset, splits=splits, **QUICK)
    assert given.task_set("train").names == [name for name in NAMES[:8] if name not in (NAMES[3], NAMES[7])]


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ({"train": Targets()}, {}, r"dataset must be one set, such as dataset\['train'\], got a dict of train"),
        (iter([1]), {}, r"dataset must have a length and items by index, got list_iterator"),
        ([], {}, r"dataset must have items, got none in list"),
        (X, {}, r"labels must be given, since items are no pairs, got Tensor in item 0"),
        (Targets(), {"labels": [1, 2]}, r"labels must hold one per item of dataset, 120, got 2"),
        (TensorDataset(X, X), {}, r"labels must be numbers or names, got Tensor in item 0"),
        ([{"x": [1.0], "kind": 1}], {}, r"labels must name a key of the items, which have x, kind, got None"),
        (
            [(torch.rand(3 + i % 2), i % 2) for i in range(20)],
            {},
            r"one shape.*\[4\], .* in item 1 after \[3\]",
        ),
        (Targets(), {"queries": 9}, r"shots \+ queries must be at most 6, .*largest class, got 10"),
        (Targets(), {"splits": {"train": ["class 1"]}}, r"splits must hold classes, got \['class 1'\]"),
    ],
)
def test_what_is_refused(dataset: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DatasetTasks(dataset, **QUICK | options)


# -------------------------------------------------------------------------------------------------------------- arrays


def test_arrays_take_names_nests_and_frames() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame(X.numpy(), columns=list("abcd"))
    expected = TensorTasks(X, Y, **QUICK).task_set("train").batch([0])
    for x, y in ((frame, Y), (frame, pandas.Series([NAMES[y] for y in Y]))):
        torch.testing.assert_close(TensorTasks(x, y, **QUICK).task_set("train").batch([0]), expected)
    sets = [(frame[i : i + 6], frame["a"][i : i + 6]) for i in range(0, 120, 6)]
    tensors = [(x.to_numpy(), y.to_numpy()) for x, y in sets]
    options = SMALL | {"shots": 2}
    ours, theirs = (RegressionTasks(each, **options).task_set("train").batch([0]) for each in (sets, tensors))
    torch.testing.assert_close(ours, theirs)
    frame["b"] = "text"
    with pytest.raises(ValueError, match=r"\bx must .*numbers.*\bb\b"):
        TensorTasks(frame, Y, **QUICK)


def test_names_of_classes_are_names_of_tasks_and_splits() -> None:
    names = [NAMES[y] for y in Y]
    data = TensorTasks({"x": X, "more": (X, Y)}, names, splits={"train": NAMES[:10], "val": NAMES[10:]}, **QUICK)
    tasks = data.task_set("train")
    assert isinstance(tasks, FewShotTasks)
    assert tasks.names == NAMES[:10]
    x = tasks.batch([0]).support_x
    assert torch.equal(x["x"], x["more"][0])
    assert [NAMES[n] for n in x["more"][1][0].tolist()] == tasks.class_names(0)


def test_integers_are_features() -> None:
    x = torch.randint(9, (len(X), 4))
    learner = MAML(MLP(4, [8], 5), inner_steps=1)
    trainer(max_steps=2).fit(learner, TensorTasks(x, Y, **SMALL, ways=3))
    assert learner.form.floats
    assert learner.adapt(x[:5].numpy(), [*"abcde"]).predict(x[:5]) == learner.adapt(x[:5].float(), [*"abcde"]).predict(
        x[:5]
    )


def test_too_few_classes_say_which_argument_mends_it() -> None:
    with pytest.raises(ValueError, match=r"ways must be at most 2 .*got 5; .*split_fractions"):
        DatasetTasks(TensorDataset(X, Y % 10), **QUICK | {"ways": 5}).setup()


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 5)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(ids).mean(1))
        return logits


def test_integers_stay_integers_for_a_network_that_embeds_them() -> None:
    x = torch.randint(9, (len(X), 4))
    learner = MAML(Embedded(), inner_steps=1)
    trainer(max_steps=2).fit(learner, DatasetTasks(TensorDataset(x, Y), **QUICK))
    assert not learner.form.floats


def test_numbers_of_classes_stay_those_of_the_set() -> None:
    class Animals(Targets):
        def __init__(self) -> None:
            super().__init__()
            self.classes = ["zebra", "dog", "ant", *NAMES[3:]]

    splits = {"train": [0, 1], "val": ["ant", 3], "test": [4, 5]}
    data = DatasetTasks(Animals(), splits=splits, **QUICK)
    assert data.task_set("train").names == ["zebra", "dog"]
    assert data.task_set("val").names == ["ant", NAMES[3]]
    twice = Animals()
    twice.classes[1] = "zebra"
    with pytest.raises(ValueError, match=r"names of classes must differ, got zebra more than once"):
        DatasetTasks(twice, **QUICK)
    with pytest.raises(ValueError, match=r"labels must be numbers of the 20 named classes, got \[-1\]"):
        DatasetTasks(Column({"x": X.tolist(), "label": [-1, *Y.tolist()[1:]]}, NAMES), **QUICK)


def test_samples_of_another_type_are_refused() -> None:
    items = [([1, 2] if i == 0 else [0.5, 0.25], i % 2) for i in range(20)]
    for in_memory in (True, False):
        with pytest.raises(ValueError, match=r"one shape and type.*\[2\], torch.\w+ in item \d+ after \[2\], torch"):
            DatasetTasks(items, in_memory=in_memory, **QUICK).task_set("train").batch([*range(9)])


@pytest.mark.parametrize("seed", range(6))
def test_an_augmentation_that_is_rare_is_not_frozen(seed: int) -> None:
    class Flipped(Targets):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return (x.flip(0) if torch.rand(()) < 0.5 else x), y

    torch.manual_seed(seed)
    before = torch.get_rng_state()
    assert isinstance(DatasetTasks(Flipped(), **QUICK).samples, ReadSamples)
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_that_nothing_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must name a column or an attribute .*got 'fime'"):
        DatasetTasks(Targets(), "fime", **QUICK)


def test_pictures_of_a_palette_are_colours() -> None:
    image = Image.fromarray(np.full((4, 4, 3), (200, 10, 30), np.uint8)).convert("P")
    data = DatasetTasks([(image, n % 20) for n in range(120)], **QUICK)
    assert data.samples.shape == (120, 3, 4, 4)
    assert abs(int(data.samples[0, 0, 0, 0]) - 200) < 30
