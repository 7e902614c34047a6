"""Compiled passes of a meta-batch."""

import pickle
import random
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from meta_lightning.inner.params import tree_flatten, tree_leaves, tree_map, tree_unflatten

aten = torch.ops.aten
Pass = Callable[..., Any]  # from containers of tensors to containers of tensors
MOST = 32  # graphs: a learning rate that changes at every step would compile one per step


class CompiledPasses:
    """Compiles a pass once per signature of its inputs, and runs it; uncompiled with a warning if that fails.

    On a GPU the pass is recorded as a CUDA graph, with torch's own kernels or, if ``fuse``, with those of torch.compile.
    """

    def __init__(self, fuse: bool) -> None:
        self.fuse = fuse
        self.passes: dict[Hashable, Pass] = {}
        self.memory: Any = None  # that all CUDA graphs share: no result outlives the next replay

    def __reduce__(self) -> tuple[type["CompiledPasses"], tuple[bool]]:
        """Copy without graphs, which read the tensors of the original learner."""
        return CompiledPasses, (self.fuse,)

    def run(self, function: Pass, key: Hashable, *args: Any) -> Any:
        """Return ``function(*args)``, with ``fuse`` up to the rounding of fused kernels."""
        tensors, structure = tree_flatten(args)
        device = tensors[0].device
        casts = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = (key, casts, str(structure), *((t.shape, t.dtype, t.device) for t in tensors))
        if key not in self.passes and len(self.passes) == MOST:
            rank_zero_warn(f"Further passes run uncompiled: {MOST} graphs of other shapes or settings exist already")
            return function(*args)
        if key not in self.passes:
            on_cuda = device.type == "cuda"
            with isolate_rng(include_cuda=on_cuda):  # the draws belong to training
                before = states_of_python()
                function(*args)  # raise the pass's own errors, and run its one-time checks, outside the trace
                try:
                    if states_of_python() != before:
                        raise RuntimeError("it draws random numbers of Python or NumPy")  # noqa: TRY301
                    compiled = fused(function, *args) if self.fuse else function
                    self.passes[key] = self.captured(compiled, *args) if on_cuda else compiled
                except torch.OutOfMemoryError:
                    raise
                except Exception as reason:  # any kind: the compiler's, or of a missing compiler
                    rank_zero_warn(f"A pass runs uncompiled, since compiling failed: {reason}")
                    self.passes[key] = function
        return self.passes[key](*args)

    def captured(self, function: Pass, *args: Any) -> Pass:
        """Record the kernels of the function on these arguments as a CUDA graph, which one launch replays."""
        tensors, structure = tree_flatten(args)
        static = [tensor.clone() for tensor in tensors]
        arguments = tree_unflatten(static, structure)
        self.memory = self.memory or torch.cuda.graph_pool_handle()
        device = static[0].device
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        # casts that autocast keeps would stay in the graph's memory
        casts = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        with torch.cuda.device(device), torch.autocast(device.type, *casts, cache_enabled=False):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function(*arguments)  # libraries allocate their workspaces
            torch.cuda.current_stream().wait_stream(stream)
            # thread_local: another thread, NCCL's or a loader's, may call CUDA meanwhile
            with torch.cuda.graph(graph, self.memory, stream, capture_error_mode="thread_local"):
                results = function(*arguments)

        def run(*args: Any) -> Any:
            with torch.no_grad():
                for kept, new in zip(static, tree_leaves(args), strict=True):
                    kept.copy_(new)
                graph.replay()
                # the next replay overwrites the results
                return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, results)

        return run


def fused(function: Pass, *args: Any) -> Pass:
    """Trace the function on these arguments, compile the graph and run it once."""
    # torch.compile has no double backward: make_fx traces the pass, i.e. forward, inner loop and meta-gradient, into a
    # graph that needs no further differentiation. Its Python numbers are constants; tensors are read at each call
    rank_zero_info("Compiling a pass, which takes seconds to minutes …")
    device = tree_leaves(args)[0].device
    graph = make_fx(lambda *args: function(*args))(*args)  # make_fx counts a method's self as an argument
    for node in graph.graph.nodes:
        if node.target is aten.view.default:  # compiled kernels return other strides than traced
            node.target = aten.reshape.default
    graph.recompile()
    compiled = torch.compile(graph, fullgraph=True, dynamic=False)

    def run(*args: Any) -> Any:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):  # the casts are in the graph
            return compiled(*args)

    run(*args)
    return run


def states_of_python() -> bytes:
    """The states of the generators whose draws a graph would repeat."""
    return pickle.dumps((random.getstate(), np.random.get_state()))
