"""Pictures of tasks: on the contact sheet, the dashboard and for --print_data."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from meta_lightning.cli import main
from meta_lightning.data.tasks import TaskBatch
from meta_lightning.drawing import INK, MUTED, RIGHT, SUPPORT, WRONG, Answer, draw_tables, table_of
from meta_lightning.show import draw_task

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


def test_a_query_is_in_the_row_of_its_class_or_of_its_answer_if_that_is_unknown() -> None:
    image = np.zeros((1, 8, 8), np.uint8)
    answers = [
        Answer(image, "a", 0.9, "a"),
        Answer(image, "b", 0.8, "a"),
        Answer(image, "b", 0.7, None),
        Answer(image, None, 0.0, "b"),
    ]
    (axes,) = draw_tables([({"a": [image], "b": [image]}, answers)], ink=False).axes
    drawn = [(to_hex(patch.get_edgecolor()), patch.get_y()) for patch in axes.patches]
    below = max(y for _, y in drawn)
    assert [(colour, y == below) for colour, y in drawn] == [
        (SUPPORT, False),
        (RIGHT, False),
        (WRONG, False),
        (SUPPORT, True),
        (MUTED, True),
        (MUTED, True),
    ]
    texts = {text.get_text(): to_hex(text.get_color()) for text in axes.texts if text.get_text()}
    expected = {"Support": INK, "Queries": INK, "a": INK, "b": INK, "90 %": RIGHT, "80 %\nb": WRONG, "70 %": MUTED}
    assert texts == expected


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
