"""Functions of torch with a wrong second derivative or a wrong rule for ``vmap``, and right ones in their place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


class Exact(TorchFunctionMode):
    """Calls ``EXACT`` in place of torch's functions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the replacement, or the function itself."""
        return EXACT.get(func, func)(*args, **(kwargs or {}))


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``torch._weight_norm``, whose kernel has a wrong second derivative: ``g v / ‖v‖``."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``F.embedding``, of which vmap ignores ``padding_idx``, and whose sparse gradients have no second derivative."""
    if padding_idx is not None:
        rows = torch.arange(len(weight), device=weight.device) == padding_idx % len(weight)
        weight = torch.where(rows.unsqueeze(1), weight.detach(), weight)
    return F.embedding(input, weight, None, max_norm, norm_type, scale_grad_by_freq)


EXACT: dict[Any, Any] = {torch._weight_norm: weight_norm, F.embedding: embedding}


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Call the modules inside transformer layers in evaluation mode too.

    torch's fast path reads their weights instead, and so misses adapters, which peft puts in the place of modules.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Use attention kernels with a second derivative."""
    with without_fast_path(), sdpa_kernel(SDPBackend.MATH):
        yield
