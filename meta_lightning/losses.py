"""What a prediction is worth: losses and scores of tasks."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from meta_lightning.checks import require

# predictions and targets of one task to a scalar; modules are named for the command line, which builds them
Loss = nn.Module | Callable[[Tensor, Tensor], Tensor]


def default_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error for floating-point targets, cross-entropy for class numbers."""
    return F.mse_loss(predictions, targets) if targets.is_floating_point() else F.cross_entropy(predictions, targets)


def check_outputs(predictions: Tensor, targets: Tensor) -> None:
    """Refuse a network whose predictions do not fit the targets of ``default_loss``.  # T S N ..., T S ...

    Raises:
        InputError: If there are fewer outputs than classes, or a regression's outputs have not the targets' shape.
    """
    if targets.is_floating_point():
        came, expected = tuple(predictions.shape[1:]), tuple(targets.shape[1:])
        require(came == expected, f"network must give outputs of the targets' shape {expected} a task, got {came}")
    else:
        classes, outputs = int(targets.max()) + 1, predictions.shape[2]
        require(
            outputs >= classes,
            f"network must give an output for each class: expected at least {classes}, got {outputs}",
        )


def score(predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Every task's accuracy for class numbers, mse for floating-point targets, where the shapes have a meaning.

    Args:
        predictions: Logits ``T S N …``, as cross-entropy takes them, or regressed values ``T S …``.
        targets: Class numbers or values.  # T S ...

    Returns:
        The score by its name; empty for predictions of another form, which only the user's loss understands.  # T
    """
    if targets.is_floating_point() and predictions.shape == targets.shape:
        return {"mse": (predictions - targets).square().flatten(1).mean(1)}
    if not targets.is_floating_point() and predictions.ndim == targets.ndim + 1:
        return {"accuracy": (predictions.argmax(2) == targets).flatten(1).float().mean(1)}
    return {}
