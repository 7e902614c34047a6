"""Loggers that show figures: TensorBoard, Weights & Biases and MLflow, each by its own calls."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from PIL import Image

BOARDS = (TensorBoardLogger, WandbLogger, MLFlowLogger)


def show_figure(board: Logger, name: str, figure: Figure, step: int) -> None:
    """Show a figure under a name that may hold a slash."""
    if isinstance(board, TensorBoardLogger):
        board.experiment.add_figure(name, figure, step)
    elif isinstance(board, WandbLogger):
        board.log_image(name, [picture(figure)], step)
    elif isinstance(board, MLFlowLogger):
        board.experiment.log_image(board.run_id, picture(figure), key=name, step=step)


def show_hyperparameters(
    board: Logger, evaluation: str, params: Mapping[str, Any], values: Mapping[str, float], step: int
) -> None:
    """Show hyperparameters, and on TensorBoard the values of an evaluation beside them, in a row of its name."""
    flat = flattened(params)
    if isinstance(board, TensorBoardLogger):
        # one folder has one row: validation and tests of one logger get a folder each
        row = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in flat.items()}
        board.experiment.add_hparams(row | {"stage": evaluation}, dict(values), run_name=evaluation, global_step=step)
        return
    if isinstance(board, MLFlowLogger):  # which refuses to change a parameter
        known = board.experiment.get_run(board.run_id).data.params
        flat = {name: value for name, value in flat.items() if name not in known}
    board.log_hyperparams(flat)


def flattened(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested hyperparameters by names with slashes."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        flat |= flattened(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def picture(figure: Figure) -> Image.Image:
    """A figure as pixels."""
    file = BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file)
