"""What a prediction is worth: losses and scores of tasks."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from meta_lightning.checks import require

Loss = Callable[[Tensor, Tensor], Tensor]  # predictions and targets of one task to a scalar


def default_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error for floating-point targets, cross-entropy for class numbers."""
    return F.mse_loss(predictions, targets) if targets.is_floating_point() else F.cross_entropy(predictions, targets)


def check_outputs(predictions: Tensor, targets: Tensor) -> None:
    """Refuse a network whose predictions do not fit the targets.  # T S ..., T S ...

    Raises:
        ValueError: If there are fewer outputs than classes, or a regression's outputs have not the targets' shape.
    """
    if targets.is_floating_point():
        require(
            predictions.shape == targets.shape,
            "network must give predictions of the targets' shape: expected "
            f"{tuple(targets.shape[1:])} a task, got {tuple(predictions.shape[1:])}",
        )
    else:
        classes = int(targets.max()) + 1
        require(
            predictions.shape[-1] >= classes,
            f"network must give an output for each class: expected at least {classes}, got {predictions.shape[-1]}",
        )


def score(predictions: Tensor, targets: Tensor) -> tuple[str, Tensor]:
    """Every task's "mse" for floating-point targets, "accuracy" for class numbers.  # T R ..., T R ... -> T"""
    if targets.is_floating_point():
        return "mse", (predictions - targets).square().flatten(1).mean(1)
    return "accuracy", (predictions.argmax(-1) == targets).flatten(1).float().mean(1)
