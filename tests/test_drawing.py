"""Pictures of tasks: on the contact sheet, the dashboard and for --print_data."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from meta_lightning import RegressionTasks, TaskDataModule, TensorTasks
from meta_lightning.cli import main
from meta_lightning.data.tasks import TaskBatch
from meta_lightning.drawing import INK, MUTED, RIGHT, SUPPORT, WRONG, Answer, draw_tables, shortened, table_of
from meta_lightning.show import draw_task, show_data

LONG = "a_class_with_a_name_of_many_words_and_letters"


def task(channels: int, ways: int = 5, shots: int = 2, queries: int = 3) -> TaskBatch:
    """A task of random pictures, whose mean is 4/9: inverted ones are brighter."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(ways * (shots + queries), channels, 8, 8, generator=generator) ** 1.25
    labels = [torch.arange(ways).repeat_interleave(number) for number in (shots, queries)]
    return TaskBatch(x[: ways * shots], labels[0], x[ways * shots :], labels[1])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [None, (5, 6), (4, 4)])
def test_no_text_overlaps_a_picture(channels: int, size: tuple[float, float] | None) -> None:
    table = table_of(task(channels), [LONG] * 5, torch.eye(5)[torch.arange(15) % 5])
    if size is None:  # as the dashboard and the contact sheet
        figure = draw_tables([table, table], ink=channels == 1)
    else:  # as --print_data
        table = table_of(task(channels), [LONG] * 5)
        figure = Figure(figsize=size, layout="constrained")
        draw_tables([table], channels == 1, figure.subplots())
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    texts = [text.get_window_extent() for text in axes.texts if text.get_text()]
    pictures = [image.get_window_extent() for image in axes.images]
    assert len(pictures) == (25 if size else 50)
    assert not any(text.overlaps(picture) for text, picture in itertools.product(texts, pictures))
    assert not any(one.overlaps(other) for one, other in itertools.combinations(texts, 2))


def test_a_query_is_in_the_row_of_the_class_that_it_was_taken_for() -> None:
    image = np.zeros((1, 8, 8), np.uint8)
    answers = [
        Answer(image, "a", 0.9, "a"),
        Answer(image, "b", 0.8, "a"),
        Answer(image, "b", 0.7, None),
        Answer(image, None, 0.0, "b"),
        Answer(image, "c", 0.6, "a"),  # whose row is not drawn
    ]
    (axes,) = draw_tables([({"a": [image], "b": [image]}, answers)], ink=False).axes
    drawn = [(to_hex(patch.get_edgecolor()), patch.get_y()) for patch in axes.patches]
    below = max(y for _, y in drawn)
    assert [(colour, y == below) for colour, y in drawn] == [
        (SUPPORT, False),
        (RIGHT, False),
        (WRONG, False),
        (SUPPORT, True),
        (WRONG, True),
        (MUTED, True),
        (MUTED, True),
    ]
    texts = {text.get_text(): to_hex(text.get_color()) for text in axes.texts if text.get_text()}
    expected = {"Support": INK, "Queries": INK, "a": INK, "b": INK, "90 %": RIGHT, "80 %\nis a": WRONG, "70 %": MUTED}
    assert texts == expected | {"60 %\nas c": WRONG}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["short", "other_one"], ["short", "other one"]),
        (["left_is_the_part_that_differs", "right_is_the_part_that_differs"], ["left is the…", "right is th…"]),
        (["all_begin_alike_and_end_1", "all_begin_alike_and_end_2"], ["all b… end 1", "all b… end 2"]),
        (["the_same_in_all_A_the_same_in_all", "the_same_in_all_B_the_same_in_all"], ["…A the same ", "…B the same "]),
        ([f"n{i:03}_a_very_long_name_{i % 2}" for i in range(3)], None),
    ],
)
def test_long_names_keep_the_part_that_differs(names: list[str], expected: list[str] | None) -> None:
    short = shortened(names, 12)
    assert [*short] == names
    assert all(len(name) <= 12 for name in short.values())
    assert len({*short.values()}) == len(names)
    if expected is not None:
        assert [*short.values()] == expected


def test_ink_is_dark_and_photographs_are_as_they_are() -> None:
    grey = task(1)
    batch = TaskBatch(*(part[None] for part in grey))
    means = {}
    for ink in (True, False, None):
        figure = Figure()
        draw_task(figure, batch, [], ink)
        means[ink] = np.mean([np.mean(image.get_array()) for image in figure.axes[0].images])
    assert means[None] == means[True] == pytest.approx(255 - means[False])
    brightness = np.mean([255 * np.mean(x.numpy()) for x in grey.support_x])
    assert abs(means[False] - brightness) < 10


def test_print_data_draws_photographs_in_their_colours(tmp_path: Path) -> None:
    colours = {"train": (250, 20, 20), "val": (20, 250, 20), "test": (20, 20, 250)}
    for (split, colour), name in itertools.product(colours.items(), "abcde"):
        folder = tmp_path / split / (split + name)
        folder.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 16 + number), colour).save(folder / f"{number}.png")
    data = f"--data meta_lightning.ImageFolderTasks --data.root {tmp_path} --data.image_size 16 --print_data"
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(TINY), *data.split()])
    with Image.open("data.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    panels = np.split(pixels, 3, axis=1)
    for channel, panel in enumerate(panels):
        others = [c for c in range(3) if c != channel]
        pure = (panel[..., channel] > 250) & (panel[..., others] < 5).all(-1)
        assert pure.sum() > 15 * 40**2  # 5 support and 10 query pictures


def arrays(*shape: int, dtype: torch.dtype = torch.uint8, **options: Any) -> TensorTasks:
    """25 classes of 6 samples of this shape."""
    x = torch.rand(150, *shape, generator=torch.Generator().manual_seed(0))
    x = x if dtype.is_floating_point else (200 * x).to(dtype)
    return TensorTasks(x, torch.arange(150) % 25, **{"queries": 2} | options)


def sets(x: tuple[int, ...], y: tuple[int, ...], **options: Any) -> RegressionTasks:
    """Ten sets of 20 points of these shapes."""
    return RegressionTasks([(torch.rand(20, *x), torch.rand(20, *y)) for _ in range(10)], **options)


DATA: dict[str, Callable[[], TaskDataModule]] = {
    "numbers": lambda: arrays(dtype=torch.float),
    "tokens": lambda: arrays(dtype=torch.int64),
    "vectors": lambda: arrays(4, dtype=torch.float),
    "sequences of tokens": lambda: arrays(7, dtype=torch.int64),
    "sequences": lambda: arrays(7, 3, dtype=torch.float),
    "matrices": lambda: arrays(9, 9),
    "volumes": lambda: arrays(1, 4, 4, 4),
    "grey": lambda: arrays(1, 9, 9),
    "colour": lambda: arrays(3, 9, 9),
    "colour, floating-point": lambda: arrays(3, 9, 9, dtype=torch.float),
    "colour, integers": lambda: arrays(3, 9, 9, dtype=torch.int64),
    "one row": lambda: arrays(3, 1, 9),
    "one column, grey": lambda: arrays(1, 9, 1),
    "one pixel": lambda: arrays(3, 1, 1),
    "two channels": lambda: arrays(2, 9, 9),
    "2 ways, 1 query": lambda: arrays(3, 9, 9, ways=2, queries=1),
    "more ways and pictures than are drawn": lambda: arrays(3, 9, 9, ways=8, split_fractions=(0.36, 0.32, 0.32)),
    "shots from a range": lambda: arrays(3, 9, 9, train_shots=(1, 4)),
    "ways from a range": lambda: arrays(3, 9, 9, train_ways=(2, 15), train_shots=(1, 4)),
    "labels of the split": lambda: arrays(3, 9, 9, train_labels="split"),
    "one split": lambda: arrays(3, 9, 9, split_fractions=(0, 0, 1)),
    "regression of numbers": lambda: sets((), ()),
    "regression of vectors": lambda: sets((4,), (2,)),
    "regression of pictures": lambda: sets((3, 5, 5), (2, 2)),
    "regression, one split": lambda: sets((), (), splits={"train": range(10)}),
}


def test_print_data_says_the_shapes_of_nests(tmp_path: Path) -> None:
    x = {"u": torch.randn(60, 3), "v": (torch.randn(60), torch.randn(60, 2, 4))}
    data = TensorTasks(x, torch.arange(60) % 12, ways=2, train_shots=(1, 3), queries=1)
    shown = show_data(data, tmp_path / "data.png")
    assert "train endless tasks, support {u: [2 to 6, 3], v: ([2 to 6], [2 to 6, 2, 4])}, query {u: [2, 3]" in shown


@pytest.mark.parametrize("name", DATA)
def test_print_data_draws_data_of_all_kinds(name: str, tmp_path: Path) -> None:
    data = DATA[name]()
    shown = show_data(data, tmp_path / "data.png")
    splits = 1 if "one split" in name else 3
    assert shown.count(" tasks, support [") == splits
    with Image.open(tmp_path / "data.png") as picture:
        assert picture.size == (600 * splits, 720)
        colours = np.asarray(picture.convert("RGB"))
    coloured = name.startswith(
        ("colour", "one row", "one pixel", "2 ways", "more", "shots", "ways", "labels", "one split")
    )
    if coloured or name in ("grey", "one column, grey"):
        blue = (colours == [47, 111, 183]).all(-1)  # frames of the support pictures
        assert blue.any()
    else:
        assert (colours == [31, 119, 180]).all(-1).any()  # points in matplotlib's first colour


def test_print_data_says_which_numbers_are_drawn_from_a_range(tmp_path: Path) -> None:
    shown = show_data(DATA["ways from a range"](), tmp_path / "data.png")
    assert "  train endless tasks, support [2 to 60, 3, 9, 9], query [4 to 30, 3, 9, 9]\n" in shown
    assert "  val   200 tasks, support [5, 3, 9, 9], query [10, 3, 9, 9]\n" in shown
    shown = show_data(sets((), (), train_shots=(3, 7)), tmp_path / "data.png")
    assert "  train endless tasks, support [3 to 7, 1], query [10, 1]\n" in shown


def test_pictures_of_the_split_s_labels_are_named_after_their_classes() -> None:
    data = arrays(3, 9, 9, train_labels="split", splits={"train": range(20, 25)})
    tasks = data.task_set("train")
    table, answers = table_of(TaskBatch(*(part[0] for part in tasks.batch([0]))), tasks.class_names(0))
    assert [*table] == [f"{n + 1} {20 + n}" for n in range(5)]
    assert {answer.truth for answer in answers} == {*table}


@pytest.mark.parametrize("channels", [1, 3])
def test_print_data_draws_folders_with_transforms(channels: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for c, number in itertools.product(range(10), range(2)):  # one support picture and one query
        (tmp_path / "p" / f"{c}").mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 256, (9, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).convert("RGB" if number else "L").save(tmp_path / "p" / f"{c}" / f"{number}.png")
    data = f"--data meta_lightning.ImageFolderTasks --data.root {tmp_path / 'p'} --data.image_size 8 --data.ways 2"
    numbers = [0.5] * channels
    transforms = f"--data.transforms.mean={numbers} --data.transforms.std={numbers}".replace(" 0", "0")
    options = f"{data} --data.channels {channels} --data.queries 1 {transforms} --print_data"
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", str(TINY), *options.split()])
    assert not caught.value.code
    with Image.open("data.png") as picture:
        assert picture.size == (1800, 720)
