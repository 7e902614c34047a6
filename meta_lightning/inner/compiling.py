"""Compiled passes of a meta-batch."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from meta_lightning.inner.params import tree_flatten, tree_leaves, tree_map

aten = torch.ops.aten
Pass = Callable[..., Any]  # from containers of tensors to containers of tensors
MOST = 32  # graphs: a learning rate that changes at every step would compile one per step


class CompiledPasses:
    """Compiles a pass once per signature of its inputs, and runs it; uncompiled with a warning if that fails."""

    # torch.compile has no double backward: make_fx traces the pass, i.e. forward, inner loop and meta-gradient, into a
    # graph that needs no further differentiation. Its Python numbers are constants; tensors are read at each call

    def __init__(self) -> None:
        self.passes: dict[Hashable, Pass] = {}

    def __reduce__(self) -> tuple[type["CompiledPasses"], tuple[()]]:
        """Copy without graphs, which read the tensors of the original learner."""
        return CompiledPasses, ()

    def run(self, function: Pass, key: Hashable, *args: Any) -> Any:
        """Return ``function(*args)`` up to the rounding of fused kernels."""
        tensors, structure = tree_flatten(args)
        device = tensors[0].device
        casts = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = (key, casts, str(structure), *((t.shape, t.dtype, t.device) for t in tensors))
        if key not in self.passes and len(self.passes) == MOST:
            rank_zero_warn(f"Further passes run uncompiled: {MOST} graphs of other shapes or settings exist already")
            return function(*args)
        if key not in self.passes:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the draws belong to training
                function(*args)  # raise the pass's own errors, and run its one-time checks, outside the trace
                try:
                    self.passes[key] = compile_pass(function, *args)
                except torch.OutOfMemoryError:
                    raise
                except Exception as reason:  # any kind: the compiler's, or of a missing compiler
                    rank_zero_warn(f"A pass runs uncompiled, since compiling failed: {reason}")
                    self.passes[key] = function
        return self.passes[key](*args)


def compile_pass(function: Pass, *args: Any) -> Pass:
    """Trace the function on these arguments, compile the graph and run it once."""
    rank_zero_info("Compiling a pass, which takes seconds to minutes …")
    device = tree_leaves(args)[0].device
    on_cuda = device.type == "cuda"
    graph = make_fx(lambda *args: function(*args))(*args)  # make_fx counts a method's self as an argument
    for node in graph.graph.nodes:
        if node.target is aten.view.default:  # compiled kernels return other strides than traced
            node.target = aten.reshape.default
    graph.recompile()
    compiled = torch.compile(graph, fullgraph=True, dynamic=False, mode="reduce-overhead" if on_cuda else None)

    def run(*args: Any) -> Any:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):  # the casts are in the graph
            if not on_cuda:
                return compiled(*args)
            torch.compiler.cudagraph_mark_step_begin()
            # the next replay overwrites the results
            return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, compiled(*args))

    for _ in range(2 if on_cuda else 1):  # the second run records the CUDA graph
        run(*args)
    return run
