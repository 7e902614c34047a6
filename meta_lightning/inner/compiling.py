"""Compiled passes of a meta-batch."""

import warnings
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from meta_lightning.inner.params import tree_flatten, tree_leaves, tree_map, tree_unflatten
from meta_lightning.inner.state import equal
from meta_lightning.random_states import drew_from, random_states, set_random_states

aten = torch.ops.aten
Pass = Callable[..., Any]  # from containers of tensors to containers of tensors
MOST = 32  # graphs: a learning rate that changes at every step would compile one per step


class CompiledPasses:
    """Records a pass once per signature of its inputs, and replays it; runs it, with a warning, if that fails.

    The record is a list of torch's own kernels, which TorchScript runs, or, if ``fuse``, of those of torch.compile; on
    a GPU a CUDA graph.
    """

    def __init__(self, fuse: bool) -> None:
        self.fuse = fuse
        self.refused = False
        self.passes: dict[Hashable, Pass] = {}
        self.memory: Any = None  # that all CUDA graphs share: no result outlives the next replay

    def __reduce__(self) -> tuple[type["CompiledPasses"], tuple[bool]]:
        """Copy without graphs, which read the tensors of the original learner."""
        return CompiledPasses, (self.fuse,)

    def run(
        self, function: Pass, key: Callable[[], Hashable], buffers: Callable[[], Iterable[Tensor]], *args: Any
    ) -> Any:
        """Return ``function(*args)``, with ``fuse`` up to the rounding of fused kernels.

        ``key`` returns all that the function depends on besides the arguments, ``buffers`` the tensors that it must not
        change.
        """
        tensors, structure = tree_flatten(args)
        device = tensors[0].device
        casts = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        known = key()
        signature = (known, casts, str(structure), *((t.shape, t.dtype, t.device) for t in tensors))
        if signature not in self.passes:
            if self.refused:
                return function(*args)
            if len(self.passes) == MOST:
                return self.refuse(f"{MOST} graphs of other shapes or settings exist already", function(*args))
            before, kept = random_states(device), [buffer.clone() for buffer in buffers()]
            result = function(*args)  # raise the pass's own errors, and run its one-time checks, outside the trace
            after = random_states(device)
            drew = drew_from(before, after)
            # what a graph would repeat, or recording do several times
            if drew & {"python", "numpy"}:
                return self.refuse("the pass draws random numbers of Python or NumPy", result)
            if device.type == "cuda" and "torch" in drew:
                return self.refuse("the pass draws random numbers on the CPU", result)
            if key() != known:
                return self.refuse("the pass changes attributes of its modules", result)
            if not all(map(equal, buffers(), kept)):
                return self.refuse("the pass changes buffers", result)
            best = function
            try:
                set_random_states(before, device)  # the draws belong to training
                if self.fuse or device.type != "cuda":
                    graph = traced(function, *args)
                    best = replaying(graph, result, before, *args)
                if self.fuse:
                    compiled = partial(without_autograd, compiled_by_torch(graph))
                    compiled(*args)  # compiles
                    best = compiled
                elif device.type != "cuda":
                    with suppress(Exception):  # of any kind: the graph itself has the same bits, and takes longer
                        best = replaying(interpreted(graph), result, before, *args)
                if device.type == "cuda":
                    best = self.captured(best, *args)
            except Exception as reason:  # any kind: the compiler's, of a missing compiler, or of the device
                rank_zero_warn(f"A pass runs uncompiled, since compiling failed: {reason}")
            finally:
                set_random_states(before, device)
            self.passes[signature] = best
        return self.passes[signature](*args)

    def refuse(self, reason: str, result: Any) -> Any:
        """Compile no further pass, and return the result."""
        rank_zero_warn(f"Further passes run uncompiled: {reason}")
        self.refused = True
        return result

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
        restored = torch.cuda.stream(torch.cuda.current_stream(device))  # a recording that fails leaves its own behind
        with restored, torch.autocast(device.type, *casts, cache_enabled=False):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), ReadingNoValues():
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


class ReadingNoMemory(TorchFunctionMode):
    """Raise where Python reads the memory of a tensor, of which torch sees no operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function unless it gives its tensor away."""
        if func in (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__):
            raise RuntimeError(f"the network or loss reads values of a tensor ({func.__name__})")
        return func(*args, **(kwargs or {}))


class ReadingNoValues(TorchDispatchMode):
    """Raise where Python reads values of a tensor, on which it may branch: a record would keep the branch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function unless its result, or its result's shape, depends on values."""
        # by numbers, an index has a shape that does not depend on them
        by_numbers = func is aten.index.Tensor and all(i is None or i.dtype == torch.int64 for i in args[1])
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags} and not by_numbers:
            raise RuntimeError(f"the network or loss reads values of a tensor ({func})")
        return func(*args, **(kwargs or {}))


def traced(function: Pass, *args: Any) -> GraphModule:
    """Record torch's kernels in the function."""
    # torch.compile has no double backward: make_fx traces the pass, i.e. forward, inner loop and meta-gradient, into a
    # graph that needs no further differentiation. Its Python numbers are constants; tensors are read at each call
    with ReadingNoValues(), ReadingNoMemory():
        graph: GraphModule = make_fx(lambda *args: function(*args))(*args)  # a method's self would count
    return graph


def replaying(graph: Pass, result: Any, states: dict[str, Any], *args: Any) -> Pass:
    """The graph as a pass; raise RuntimeError unless it has the function's result in the same random states."""
    # a pass that sets random states, as checkpointing with dropout does, or draws from generators of its own
    set_random_states(states, tree_leaves(args)[0].device)
    replay = partial(without_autograd, graph)
    pairs = zip(tree_leaves(replay(*args)), tree_leaves(result), strict=True)
    if not all(torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True) for ours, theirs in pairs):
        raise RuntimeError("the network or loss has another result when its kernels are replayed")
    return replay


def interpreted(graph: GraphModule) -> Pass:
    """The graph in TorchScript, which calls its kernels from C++ and not from Python."""
    kernels = Graph()
    results: Any = kernels.graph_copy(graph.graph, {})
    kernels.output(tuple(results))
    for node in kernels.nodes:
        if str(node.target) == "aten._to_copy.default" and not isinstance(node.args[0], Node):
            node.target = aten.scalar_tensor.default  # a number, by which vmap multiplies tensors without dimensions
        node.target = getattr(node.target, "overloadpacket", node.target)  # TorchScript chooses the overload itself
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; without it the graph runs itself
        script = torch.jit.script(GraphModule(graph, kernels))
    return lambda *args: graph.graph.process_outputs(script(*graph.graph.process_inputs(*args)))


def without_autograd(graph: Pass, *args: Any) -> Any:
    """Run a graph, which needs no autograd and no casts besides its own."""
    with torch.no_grad(), torch.autocast(tree_leaves(args)[0].device.type, enabled=False):
        return graph(*args)


def compiled_by_torch(graph: GraphModule) -> Pass:
    """The graph as torch.compile compiles it at the first call."""
    rank_zero_info("Compiling a pass, which takes seconds to minutes …")
    for node in graph.graph.nodes:
        if node.target is aten.view.default:  # compiled kernels return other strides than traced
            node.target = aten.reshape.default
    graph.recompile()
    compiled: Pass = torch.compile(graph, fullgraph=True, dynamic=False)
    return compiled
