"""Precisions and strategies of the Trainer in which the inner loop works, and what a CPU needs to work fast."""

import ctypes

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from meta_lightning.checks import require

MALLOPT = ((-1, -1), (-4, 0))  # malloc.h: M_TRIM_THRESHOLD, never; M_MMAP_MAX, no block of its own
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


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees for its next use, as torch keeps a GPU's.

    glibc hands large blocks back at once, and the kernel then clears every page of the next ones, in every pass of a
    meta-batch; what that costs stands in ``benchmarks/results/speed.md``. Other libraries of C are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in MALLOPT:
            mallopt(parameter, value)
