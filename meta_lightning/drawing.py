"""Support pictures and answers on one sheet, to see at a glance what was learnt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from meta_lightning.data.tasks import Array

COLUMNS = 10  # of queries
EXAMPLES = 5  # support pictures of a class that are shown
STEP, LINE = 1.16, 1.52  # from a picture to the next, and from a row to the next, with room for two lines of text
INK, MUTED, SUPPORT, RIGHT, WRONG = "#1f2933", "#8a94a0", "#2f6fb7", "#2e8b57", "#c8372d"


class Answer(NamedTuple):
    """A query and what was said of it."""

    image: Array  # C H W, uint8
    name: str
    probability: float
    truth: str | None  # where it is known


def draw_contact_sheet(
    support: Mapping[str, Sequence[Array]], answers: Sequence[Answer], ink: bool, path: Path
) -> None:
    """Draw the support pictures framed on the left, and the answers beside them, right and wrong in colour."""
    examples = min(EXAMPLES, max(map(len, support.values())))
    left = examples * STEP + 0.5
    width = left + min(COLUMNS, max(len(answers), 3)) * STEP
    height = max(len(support), -(-len(answers) // COLUMNS)) * LINE + 0.5
    figure, axes = sheet(width, height, scale=0.95)
    axes.text(0, 0.3, "Support", color=INK, weight="bold")
    axes.text(left, 0.3, "Queries", color=INK, weight="bold")
    for row, (name, images) in enumerate(support.items()):
        for column, image in enumerate(images[:EXAMPLES]):
            draw_picture(axes, image, ink, column * STEP, 0.5 + row * LINE, SUPPORT)
        axes.text(0, 0.5 + row * LINE + 1.17, shortened(name, 15 * examples), color=INK, size=7)
    for number, answer in enumerate(answers):
        x, y = left + number % COLUMNS * STEP, 0.5 + number // COLUMNS * LINE
        known = answer.truth is not None
        colour = (RIGHT if answer.name == answer.truth else WRONG) if known else MUTED
        draw_picture(axes, answer.image, ink, x, y, colour)
        said: dict[str, Any] = {"color": colour if known else INK, "size": 7}
        axes.text(x, y + 1.17, shortened(answer.name, 10), **said)
        axes.text(x + 1, y + 1.17, f"{100 * answer.probability:.0f} %", ha="right", **said)
        if known and answer.name != answer.truth:
            axes.text(x, y + 1.35, f"is {shortened(str(answer.truth), 14)}", color=MUTED, size=7)
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})


def sheet(width: float, height: float, scale: float) -> tuple[Figure, Axes]:
    """An empty sheet of so many units, from the left and from the top, each of ``scale`` inches."""
    figure = Figure(figsize=(scale * width, scale * height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.15, width), ylim=(height, 0), aspect="equal")
    axes.set_axis_off()
    return figure, axes


def draw_picture(axes: Axes, image: Array, ink: bool, x: float, y: float, colour: str) -> None:
    """One picture in a frame, a unit wide."""
    pixels = (255 - image if ink else image).transpose(1, 2, 0)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=(x, x + 1, y + 1, y), interpolation="bicubic")
    axes.plot([x, x + 1, x + 1, x, x], [y, y, y + 1, y + 1, y], color=colour, linewidth=1.6, solid_joinstyle="round")


def shortened(name: str, length: int) -> str:
    """A name that fits."""
    return name if len(name) <= length else name[: length - 1] + "…"


def pixels(image: Tensor) -> Array:
    """An image from its darkest to its brightest as 0 to 255.  # C H W"""
    scaled: Array = (255 * (image - image.min()) / (image.max() - image.min()).clamp(min=1e-8)).byte().numpy()
    return scaled
