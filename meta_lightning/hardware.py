"""Precisions and strategies of the Trainer in which the inner loop works."""

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from meta_lightning.checks import require

PRECISIONS = ("32-true", "bf16-mixed", "64-true")


def require_precision(precision: str) -> None:
    """Refuse precisions that lose the steps of the inner loop.

    Raises:
        InputError: With the reason.
    """
    reason = (
        "its scaler covers the outer loss only, and gradients of the inner loop underflow"
        if precision == "16-mixed"
        else "θ itself would be held in it, and rounded to 8 or 11 bits the inner steps vanish"
    )
    require(
        precision in PRECISIONS,
        f"trainer.precision must be one of {', '.join(PRECISIONS)}, got {precision}: {reason}",
    )


def require_whole_network(strategy: Strategy) -> None:
    """Refuse strategies that shard the network.

    Raises:
        InputError: With the reason.
    """
    require(
        not isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy),
        "trainer.strategy must leave the whole network to every process, as ddp does, got "
        f"{type(strategy).__name__}: it shards θ, of whose whole parameters the inner loop makes a copy for every task",
    )
