"""Passes of a meta-batch as compiled graphs."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

aten = torch.ops.aten
Pass = Callable[..., Any]  # of containers of tensors, and to such
MOST = 32  # graphs: a rate that falls at every step would make as many as there are steps


class CompiledPasses:
    """Compiles a pass once for every shape of what it is given, and runs it.

    ``torch.compile`` cannot go through derivatives of derivatives. So the pass is first written down operation by
    operation, forward, inner loop and meta-gradient, as a graph that holds no derivative to be taken any more; that is
    fused into few kernels, and on CUDA replayed as one graph. A pass that cannot be compiled runs as it is, and a
    warning says why.

    A graph holds the numbers that the pass found in Python, and reads anew the tensors that it found there, such as θ.
    """

    def __init__(self) -> None:
        self.passes: dict[Hashable, Pass] = {}

    def __reduce__(self) -> tuple[type["CompiledPasses"], tuple[()]]:
        """A copy compiles anew: the graphs read the tensors of the learner that they were made of."""
        return CompiledPasses, ()

    def run(self, function: Pass, key: Hashable, *args: Any) -> Any:
        """``function(*args)``, to the rounding of fused kernels."""
        tensors, structure = tree_flatten(args)
        device = tensors[0].device
        casts = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = (key, casts, str(structure), *((t.shape, t.dtype, t.device) for t in tensors))
        if key not in self.passes and len(self.passes) == MOST:
            rank_zero_warn(f"Further passes run as they are: {MOST} are compiled, of other shapes or settings")
            return function(*args)
        if key not in self.passes:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # draws what training will
                function(*args)  # raises what it raises anyway, and asks what it asks but once
                try:
                    self.passes[key] = compile_pass(function, *args)
                except torch.OutOfMemoryError:
                    raise
                except Exception as reason:  # the compiler's, or for want of one, of any kind
                    rank_zero_warn(f"A pass runs as it is, since it cannot be compiled: {reason}")
                    self.passes[key] = function
        return self.passes[key](*args)


def compile_pass(function: Pass, *args: Any) -> Pass:
    """The function's operations on these arguments as one compiled graph, which has been run."""
    rank_zero_info("Compiling a pass, which takes from seconds to minutes …")
    device = tree_leaves(args)[0].device
    on_cuda = device.type == "cuda"
    graph = make_fx(lambda *args: function(*args))(*args)  # which counts the self of a method as an argument
    for node in graph.graph.nodes:
        if node.target is aten.view.default:  # the compiled kernels' strides are not the traced ones'
            node.target = aten.reshape.default
    graph.recompile()
    compiled = torch.compile(graph, fullgraph=True, dynamic=False, mode="reduce-overhead" if on_cuda else None)

    def run(*args: Any) -> Any:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):  # the graph has its casts in it
            if not on_cuda:
                return compiled(*args)
            torch.compiler.cudagraph_mark_step_begin()
            return tree_map_only(Tensor, Tensor.clone, compiled(*args))  # the next replay overwrites its results

    for _ in range(2 if on_cuda else 1):  # the second run is the one that records a CUDA graph
        run(*args)
    return run
