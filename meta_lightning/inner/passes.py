"""Passes: chunks of the tasks of a meta-batch that fit into memory or caches."""

import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from meta_lightning.checks import require, require_at_least
from meta_lightning.inner.compiling import CompiledPasses
from meta_lightning.inner.params import tree_leaves, tree_map

# Input values per pass on a CPU; above this the activations exceed the caches (benchmarks/results/speed.md)
CACHED_VALUES = 2**19
# Passes of a shape after which compile_passes "auto" records it. Recording takes as long as 8 to 71 replays save,
# whatever the network (speed.md, "When compiling pays"): a training that goes on soon has it back
RECORD_AFTER = 20

Compile = bool | Literal["auto", "record"]


class Passes:
    """Applies functions of a meta-batch in chunks of ``tasks_per_pass`` tasks, compiled if they have a key."""

    def __init__(self, tasks_per_pass: int | None, compile_passes: Compile) -> None:
        if tasks_per_pass is not None:
            require_at_least(1, tasks_per_pass=tasks_per_pass)
        require(
            compile_passes in (True, False, "auto", "record"),
            f"compile_passes must be true, false, 'auto' or 'record', got {compile_passes!r}",
        )
        self.tasks_per_pass = tasks_per_pass
        self.tasks_that_fit: int | None = None  # in memory; None if unknown
        self.option: Compile = compile_passes
        after = RECORD_AFTER if compile_passes == "auto" else 0
        self.compiled = CompiledPasses(fuse=compile_passes is True, after=after)

    def run(
        self,
        function: Callable[..., tuple[Any, ...]],
        *stacked: Any,
        parameters: int,
        most: int | None = None,
        key: Callable[[], Hashable] | None = None,
        buffers: Callable[[], Iterable[Tensor]] = list,
    ) -> tuple[Any, ...]:
        """Apply ``function`` to chunks of tasks; average its first result, a mean, and concatenate the others."""
        if key is not None:
            function = partial(self.compiled.run, function, key, buffers)
        tensors = tree_leaves(stacked)
        tasks, values = len(tensors[0]), max(tensor[0].numel() for tensor in tensors)
        # θ', its gradient and its update take cache too: a quarter of θ's size, measured with Reptile
        cached = max(1, CACHED_VALUES // max(parameters // 4, values)) if tensors[0].device.type == "cpu" else tasks
        while True:
            size = min(tasks, most or self.tasks_per_pass or cached, self.tasks_that_fit or tasks)
            cuts = [operator.itemgetter(slice(i, i + size)) for i in range(0, tasks, size)]
            parts = [tree_map(cut, stacked) for cut in cuts] if len(cuts) > 1 else [stacked]
            try:
                means, *results = zip(*(function(*part) for part in parts), strict=True)
                break
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self.tasks_that_fit = -(-size // 2)
                rank_zero_warn(
                    f"Out of memory: reducing tasks_per_pass, at most {self.tasks_that_fit} tasks per pass from now on"
                )
        if len(parts) == 1:
            return means[0], *(result[0] for result in results)
        weights = [min(size, tasks - i) / tasks for i in range(0, tasks, size)]
        mean = tree_map(lambda *of_parts: weighted_sum(weights, of_parts), *means)
        return mean, *(tree_map(lambda *of_parts: torch.cat(of_parts), *of_chunks) for of_chunks in results)


def weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Σ w · t, with one temporary."""
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total
