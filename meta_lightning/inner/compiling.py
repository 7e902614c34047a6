"""Compiled passes of a meta-batch."""

import math
import operator
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from meta_lightning.inner.params import tree_flatten, tree_leaves, tree_map, tree_unflatten
from meta_lightning.inner.state import equal
from meta_lightning.random_states import drew_from, random_states, set_random_states

aten = torch.ops.aten
Pass = Callable[..., Any]  # from containers of tensors to containers of tensors
Kernels = Callable[..., Sequence[Any]]  # from tensors to tensors
# of results on a GPU, relative, and in multiples of what a pass differs by from itself: a GPU adds in any order, some
# ReLUs of a pass then fall on the other side of 0, and Adam takes full steps of gradients that are rounding (speed.md)
ROUNDING, OF_ITSELF = 0.02, 3.0
MOST = 32  # graphs
SEEN = 1000  # signatures: a learning rate that changes at every step would make one per step


class CompiledPasses:
    """Records a pass once per signature of its inputs, and replays it; runs it, with a warning, if that fails.

    The first ``after`` passes of a signature run as they are. The record is a list of torch's own kernels, which
    TorchScript runs, or, if ``fuse``, of those of torch.compile; on a GPU a CUDA graph.
    """

    def __init__(self, fuse: bool, after: int) -> None:
        self.fuse, self.after = fuse, after
        self.refused = False
        self.seen: Counter[Hashable] = Counter()  # passes by signature before they are recorded
        self.passes: dict[Hashable, Pass] = {}
        self.replays: dict[Hashable, int] = {}
        self.memory: Any = None  # that all CUDA graphs share: no result outlives the next replay

    def __reduce__(self) -> tuple[type["CompiledPasses"], tuple[bool, int]]:
        """Copy without graphs, which read the tensors of the original learner."""
        return CompiledPasses, (self.fuse, self.after)

    def run(
        self, function: Pass, key: Callable[[], Hashable], buffers: Callable[[], Iterable[Tensor]], *args: Any
    ) -> Any:
        """Return ``function(*args)``, with ``fuse`` up to the rounding of fused kernels.

        ``key`` returns all that the function depends on besides the arguments, ``buffers`` the tensors that it must not
        change. The function runs as well at the replays 1, 2, 4, 8, …, with other data and parameters than when it was
        recorded: what it depends on besides, unseen, shows there.
        """
        tensors, structure = tree_flatten(args)
        device = tensors[0].device
        casts = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        signature = (key(), casts, str(structure), *((t.shape, t.stride(), t.dtype, t.device) for t in tensors))
        if signature not in self.passes:
            if self.refused:
                return function(*args)
            self.seen[signature] += 1
            if self.seen[signature] > self.after:
                return self.record(signature, function, key, buffers, *args)
            if len(self.seen) > SEEN:
                return self.refuse(f"they have had {SEEN:,} different shapes or settings", function(*args))
            return function(*args)
        replay = self.passes[signature]
        self.replays[signature] += 1
        if replay == function or self.fuse or self.replays[signature].bit_count() > 1:
            return replay(*args)
        return self.compared(replay, function, *args)

    def record(
        self,
        signature: Hashable,
        function: Pass,
        key: Callable[[], Hashable],
        buffers: Callable[[], Iterable[Tensor]],
        *args: Any,
    ) -> Any:
        """Return ``function(*args)``, and keep what replays it."""
        if len(self.passes) == MOST:
            return self.refuse(f"{MOST} graphs of other shapes or settings exist already", function(*args))
        device = tree_leaves(args)[0].device
        before, known, kept = random_states(device), key(), [buffer.clone() for buffer in buffers()]
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
        try:
            set_random_states(before, device)  # the draws belong to training
            replay = self.fastest(function, result, before, after, *args)
        finally:
            set_random_states(before if self.fuse else after, device)
        self.passes[signature], self.replays[signature] = replay, 0
        return replay(*args) if self.fuse else result  # a resumed run starts with compiled kernels too

    def fastest(self, function: Pass, result: Any, before: dict[str, Any], after: dict[str, Any], *args: Any) -> Pass:
        """The fastest form of a pass that can be made, if none the function itself, with a warning."""
        device, best = tree_leaves(args)[0].device, function
        try:
            if self.fuse or device.type != "cuda":
                graph, structure = traced(function, *args)
                try:
                    kernels = graph if device.type == "cuda" else interpreted(graph)
                    best = self.checked(as_pass(kernels, structure), function, result, before, after, *args)
                except Exception:  # of any kind: the graph itself has the same bits, and takes longer
                    best = self.checked(as_pass(graph, structure), function, result, before, after, *args)
            if self.fuse:
                try:
                    compiled = as_pass(compiled_by_torch(graph), structure)
                    compiled(*args)  # compiles
                    best = compiled
                except Exception as reason:  # any kind: the compiler's, or of a missing compiler
                    rank_zero_warn(f"A pass is recorded, since compiling it failed: {reason}")
            if device.type == "cuda":
                best = self.captured(best, *args)
        except Exception as reason:  # any kind: of the recorder, or of the device
            rank_zero_warn(f"A pass runs as it is, since recording it failed: {reason}")
        return best

    def compared(self, replay: Pass, function: Pass, *args: Any) -> Any:
        """Return ``function(*args)``, and forget all records if that is not what the replay returns."""
        device = tree_leaves(args)[0].device
        before = random_states(device)
        try:
            result = function(*args)
        except torch.OutOfMemoryError:  # beside a CUDA graph, which keeps the memory of a pass
            return replay(*args)
        after = random_states(device)
        try:
            self.checked(replay, function, result, before, after, *args)
        except Exception as reason:  # any kind: of kernels that do not suit the new values
            self.passes.clear()
            return self.refuse(f"the record of a pass is not what the pass is now: {reason}", result)
        finally:
            set_random_states(after, device)
        return result

    def refuse(self, reason: str, result: Any) -> Any:
        """Record no further pass, and return the result."""
        rank_zero_warn(f"Further passes run as they are: {reason}")
        self.refused = True
        return result

    def checked(
        self, replay: Pass, function: Pass, result: Any, before: dict[str, Any], after: dict[str, Any], *args: Any
    ) -> Pass:
        """The replay; raise RuntimeError unless it has the function's result and random states after it."""
        device = tree_leaves(args)[0].device

        def repeated(one: Pass) -> Any:
            set_random_states(before, device)
            return one(*args)

        # a pass may set random states, as checkpointing with dropout does; TorchScript drops draws that nobody reads
        replayed = repeated(replay)
        if device.type == "cpu":
            pairs = zip(tree_leaves(replayed), tree_leaves(result), strict=True)
            same = all(equal(a, b) for a, b in pairs) and not drew_from(after, random_states(device))
        else:
            same = same_to_rounding(replayed, result, lambda: repeated(function))
        if not same:
            raise RuntimeError("the network or loss has another result when its kernels are replayed")
        return replay

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


def same_to_rounding(replayed: Sequence[Any], result: Sequence[Any], again: Callable[[], Sequence[Any]]) -> bool:
    """Whether each part of a result, such as a gradient or losses, is the same up to rounding, as that once more is."""
    differences = relative_differences(replayed, result)
    if max(differences) < ROUNDING:
        return True
    of_itself = relative_differences(again(), result)
    return all(d < max(ROUNDING, OF_ITSELF * own) for d, own in zip(differences, of_itself, strict=True))


def relative_differences(a: Sequence[Any], b: Sequence[Any]) -> list[float]:
    """``relative_difference`` of each part."""
    return [relative_difference(one, other) for one, other in zip(a, b, strict=True)]


def relative_difference(a: Any, b: Any) -> float:
    """‖a − b‖ / ‖b‖ of containers of tensors, without elements that are NaN or infinite in both."""
    of_difference = of_b = 0.0
    for one, other in zip(tree_leaves(a), tree_leaves(b), strict=True):
        finite = one.isfinite() | other.isfinite()
        of_difference += float((one - other)[finite].double().square().sum())
        of_b += float(other[finite].double().square().sum())
    return math.sqrt(of_difference / max(of_b, 1e-30))


class UnrecordableError(Exception):
    """What a record cannot follow; no error of a network, for which tasks would run in another way from now on."""


class ReadingNoMemory(TorchFunctionMode):
    """Raise where Python reads the memory of a tensor, of which torch sees no operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function unless it gives its tensor away."""
        if func in (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__):
            raise UnrecordableError(f"the network or loss reads values of a tensor ({func.__name__})")
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
            raise UnrecordableError(f"the network or loss reads values of a tensor ({func})")
        return func(*args, **(kwargs or {}))


class Recorder(ReadingNoValues):
    """Writes torch's kernels down as a graph of the tensors that it is given.

    As ``make_fx`` does, which simulates every kernel for what compilers need to know, at ten times the cost.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph, self.nodes = Graph(), WeakTensorKeyDictionary()
        self.constants: dict[str, Tensor] = {}
        self.given = memories(*inputs)  # and of constants
        self.made: set[int] = set()  # memory that kernels have allocated
        for i, tensor in enumerate(inputs):
            self.nodes[tensor] = self.graph.placeholder(f"input_{i}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function and write it down."""
        if func is aten.lift_fresh.default:  # a number of Python's, on which in-place kernels may work
            func = aten.lift_fresh_copy.default
            self.add_constant(args[0])
        if writes(func) and memories(*tree_leaves(args[0])) - self.made:
            raise UnrecordableError(f"the network or loss writes into a tensor that is not its own ({func})")
        arguments, keywords = tree_map(self.node_of, (tuple(args), kwargs or {}))
        results = super().__torch_dispatch__(func, types, args, kwargs)
        node = self.graph.call_function(func, arguments, keywords)
        if isinstance(results, Tensor):
            self.add_result(results, node)
        elif isinstance(results, tuple | list):
            for i, result in enumerate(results):
                if isinstance(result, Tensor):
                    self.add_result(result, self.graph.call_function(operator.getitem, (node, i)))
        return results

    def node_of(self, value: Any) -> Any:
        """What stands for a value in the graph."""
        if isinstance(value, torch.Generator):
            raise UnrecordableError("the network or loss draws from a generator of its own")
        if not isinstance(value, Tensor):
            return value
        if value not in self.nodes:
            if self.made & memories(value):  # it would be read at each call, as it was
                raise UnrecordableError("a tensor of the pass comes from no kernel")
            self.add_constant(value)
        return self.nodes[value]

    def add_result(self, tensor: Tensor, node: Node) -> None:
        """A tensor that a kernel has made."""
        self.nodes[tensor] = node
        self.made |= memories(tensor) - self.given

    def add_constant(self, tensor: Tensor) -> None:
        """A tensor from outside of the pass, such as a parameter, which is read at each call."""
        name = f"constant_{len(self.constants)}"
        self.constants[name] = tensor
        self.given |= memories(tensor)
        self.nodes[tensor] = self.graph.get_attr(name)


def memories(*tensors: Any) -> set[int]:
    """Where the memory of tensors and their views starts; sparse ones and torch's implicit zeros have none."""
    found = set()
    for tensor in tensors:
        with suppress(RuntimeError):
            found.add(tensor.untyped_storage().data_ptr())
    return found - {0}


def writes(func: Any) -> bool:
    """Whether a kernel works in place, as its name says."""
    name: str = func.overloadpacket.__name__
    return name.startswith("__i") if name.startswith("__") else name.endswith("_")


def traced(function: Pass, *args: Any) -> tuple[GraphModule, Any]:
    """Record torch's kernels in the function, from tensors to a tuple, and the structure of its result."""
    # torch.compile has no double backward: the record has forward, inner loop and meta-gradient, and needs no further
    # differentiation. Its Python numbers are constants
    torch.clear_autocast_cache()  # whose casts of parameters are no kernels of the pass
    tensors, structure = tree_flatten(args)
    inputs = [tensor.detach() for tensor in tensors]  # of which no two are the same
    with Recorder(inputs) as recorder, ReadingNoMemory():
        results, of_results = tree_flatten(function(*tree_unflatten(inputs, structure)))
    recorder.graph.output(tuple(map(recorder.node_of, results)))
    return GraphModule(recorder.constants, recorder.graph), of_results


def interpreted(graph: GraphModule) -> Kernels:
    """The graph in TorchScript, which calls its kernels from C++ and not from Python."""
    constants = [node for node in graph.graph.nodes if node.op == "get_attr"]
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    lines = [f"def kernels({', '.join(map(in_torchscript, constants + inputs))}):"]
    for node in graph.graph.nodes:
        arguments = list(map(in_torchscript, node.args)) + [f"{k}={in_torchscript(v)}" for k, v in node.kwargs.items()]
        if node.target is operator.getitem:
            lines.append(f"    {node} = {arguments[0]}[{arguments[1]}]")
        elif node.op == "call_function":
            kernel = node.target.overloadpacket  # of which TorchScript chooses the overload
            if str(kernel) == "aten._to_copy" and not isinstance(node.args[0], Node):
                kernel = aten.scalar_tensor  # a number, by which vmap multiplies tensors without dimensions
            lines.append(f"    {node} = torch.ops.{kernel}({', '.join(arguments)})")
        elif node.op == "output":
            lines.append(f"    return ({''.join(f'{in_torchscript(part)}, ' for part in node.args[0])})")
    kernels: Kernels = torch.jit.CompilationUnit("\n".join([*lines, ""])).kernels
    values = [getattr(graph, node.target) for node in constants]

    def run(*tensors: Tensor) -> Sequence[Any]:
        # optimised execution takes up to half of a pass's memory again, and gains nothing
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return kernels(*values, *tensors)

    return run


def in_torchscript(value: Any) -> str:
    """How TorchScript writes a value of a graph."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(in_torchscript, value))}]"
    if isinstance(value, torch.device):
        return f"torch.device('{value}')"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    return value.name if isinstance(value, Node) else repr(value)


def as_pass(kernels: Kernels, structure: Any) -> Pass:
    """A pass that runs kernels, which need no autograd and no casts besides their own."""

    def run(*args: Any) -> Any:
        tensors = tree_leaves(args)
        with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            return tree_unflatten([*kernels(*tensors)], structure)

    return run


def compiled_by_torch(graph: GraphModule) -> Kernels:
    """The graph as torch.compile compiles it at the first call."""
    rank_zero_info("Compiling a pass, which takes seconds to minutes …")
    for node in graph.graph.nodes:
        if node.target is aten.view.default:  # compiled kernels return other strides than traced
            node.target = aten.reshape.default
    graph.recompile()
    compiled: Kernels = torch.compile(graph, fullgraph=True, dynamic=False)
    return compiled
