"""Pictures of tasks: a row per class, with its support set and its queries."""

import math
from collections.abc import Iterable, Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from meta_lightning.data.tasks import Array, TaskBatch

INK, MUTED, SUPPORT, RIGHT, WRONG = "#1f2933", "#8a94a0", "#2f6fb7", "#2e8b57", "#c8372d"
INCHES, STEP, GAP = 0.85, 1.16, 0.35  # width of a picture; in such widths: from picture to picture, support to queries
HEADING, NAME, LINE = 0.45, 0.28, 1.65  # heights of a table's heading, a class name, and name, picture and caption
COLUMNS, EXAMPLES = 10, 5  # queries per line, and support pictures per class of the contact sheet
TASK_CLASSES, TASK_EXAMPLES, TASK_QUERIES = 6, 3, 5  # pictures of a task


class Answer(NamedTuple):
    """A query and its predicted class."""

    image: Array  # C H W, uint8
    name: str | None  # None before prediction
    probability: float
    truth: str | None  # None if unknown


Table = tuple[Mapping[str, Sequence[Array]], Sequence[Answer]]  # support pictures by class name (uint8), and queries


def draw_contact_sheet(
    support: Mapping[str, Sequence[Array]], answers: Sequence[Answer], ink: bool, path: Path
) -> None:
    """Draw support pictures and answers into a PNG file; a row per class has the queries that were taken for it."""
    support = {name: images[:EXAMPLES] for name, images in support.items()}
    draw_tables([(support, answers)], ink).savefig(path, dpi=100, pil_kwargs={"optimize": True})


def classifies_pictures(task: TaskBatch) -> bool:
    """Whether ``table_of`` accepts a task, which has no task dimension."""
    x, y = task.query_x, task.query_y
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    return x.ndim == 4 and x.shape[1] in (1, 3) and y.ndim == 1 and not y.is_floating_point()


def table_of(task: TaskBatch, names: Sequence[str], predictions: Tensor | None = None) -> Table:
    """The first classes of a task, whose queries have ``predictions`` if there are any.  # R N"""

    def name(label: int) -> str:
        return f"{label + 1} {names[label]}" if label < len(names) else f"class {label + 1}"

    support, answers = {}, []
    for label in task.support_y.unique()[:TASK_CLASSES].tolist():
        support[name(label)] = [pixels(x) for x in task.support_x[task.support_y == label][:TASK_EXAMPLES]]
        for i in (task.query_y == label).nonzero().flatten()[:TASK_QUERIES].tolist():
            answer = Answer(pixels(task.query_x[i]), None, 0.0, name(label))
            if predictions is not None:
                probability, answered = predictions[i].softmax(0).max(0)
                answer = answer._replace(name=name(int(answered)), probability=float(probability))
            answers.append(answer)
    return support, answers


def draw_tables(tables: Sequence[Table], ink: bool, axes: Axes | None = None) -> Figure:
    """Draw tables with a row per class one below the other; ``ink`` is 255 on 0 and shown dark on light.

    A query is in the row of the class that it was taken for or, where that is not drawn, in the row of its true class.
    """
    figure = Figure()
    axes = axes or figure.add_axes((0, 0, 1, 1))
    rows = [
        [
            (name, images, [a for a in answers if name == (a.name if a.name in support else a.truth)])
            for name, images in support.items()
        ]
        for support, answers in tables
    ]
    captions = shortened({name: "" for _, answers in tables for a in answers for name in (a.name, a.truth) if name}, 11)
    left = STEP * max(len(images) for table in rows for _, images, _ in table) + GAP  # of the queries
    width = left + STEP * min(COLUMNS, max(3, *(len(answers) for table in rows for *_, answers in table)))
    top = 0.0
    for table in rows:
        axes.text(0, top + 0.32, "Support", color=INK, weight="bold", size=8)
        axes.text(left, top + 0.32, "Queries", color=INK, weight="bold", size=8)
        top += HEADING
        headings = shortened([name for name, *_ in table], int(10 * width))
        for name, images, answers in table:
            y = top + NAME
            axes.text(0, y - 0.04, headings[name], color=INK, size=7, va="bottom")
            for column, image in enumerate(images):
                draw_picture(axes, image, ink, column * STEP, y, SUPPORT)
            for number, (image, answer, probability, truth) in enumerate(answers):
                line, column = divmod(number, COLUMNS)
                colour = MUTED if None in (answer, truth) else RIGHT if answer == truth else WRONG
                caption = "" if answer is None else f"{100 * probability:.0f} %"
                if colour == WRONG:
                    caption += f"\nis {captions[str(truth)]}" if answer == name else f"\nas {captions[str(answer)]}"
                draw_picture(axes, image, ink, left + column * STEP, y + line * LINE, colour, caption)
            top += LINE * max(1, math.ceil(len(answers) / COLUMNS))
    axes.set(xlim=(-0.15, width), ylim=(top, 0), aspect="equal", anchor="N")
    axes.set_axis_off()
    figure.set_size_inches(INCHES * width, INCHES * top)
    return figure


def draw_picture(axes: Axes, image: Array, ink: bool, x: float, y: float, colour: str, caption: str = "") -> None:
    """Draw a picture with a frame, one unit wide, and a caption.  # C H W"""
    shown = (255 - image if ink else image).transpose(1, 2, 0)
    axes.imshow(shown, cmap="gray", vmin=0, vmax=255, extent=(x, x + 1, y + 1, y), interpolation="bicubic")
    axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=colour, linewidth=1.6))
    axes.text(x, y + 1.05, caption, color=colour, size=7, va="top", linespacing=1.1)


def shortened(names: Iterable[str], length: int) -> dict[str, str]:
    """Names in at most ``length`` characters, with spaces for underscores, cut so that they differ."""
    spaced = {name: name.replace("_", " ") for name in names}
    long = [name for name in spaced.values() if len(name) > length]
    same, kept = len(commonprefix(long)), length - 1  # noqa: RUF071  # of characters, not of folders
    short: dict[str, str] = {}
    for head, tail in ((kept, 0), (kept // 2, kept - kept // 2), (0, kept)):
        short = {n: s if s not in long else f"{s[:head]}…{s[len(s) - tail :]}" for n, s in spaced.items()}
        if len({*short.values()}) == len(short):
            return short
    return {n: s if s not in long else f"…{s[same : same + kept]}" for n, s in spaced.items()}


def pixels(image: Tensor) -> Array:
    """An image scaled to 0 … 255 from its darkest to its brightest value.  # C H W, uint8"""
    scaled: Array = (255 * (image - image.min()) / (image.max() - image.min()).clamp(min=1e-8)).byte().numpy()
    return scaled
