"""Adaptation itself as a program of ``torch.export``: support set and queries in, predictions of the queries out."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from traceback import FrameSummary
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.func import functional_call
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from meta_lightning.adaptation.adapt import numbered
from meta_lightning.adaptation.partitions import Combined
from meta_lightning.checks import InputError, require, require_choice
from meta_lightning.data.form import SampleForm
from meta_lightning.data.tasks import Array, scale_pixels
from meta_lightning.data.tensors import samples
from meta_lightning.files import require_writable, written_whole
from meta_lightning.inner.compiling import ReadingNoMemory, ReadingNoValues, UnrecordableError
from meta_lightning.inner.copies import copied
from meta_lightning.inner.params import tree_flatten, tree_leaves, tree_map, tree_unflatten
from meta_lightning.inner.samples import Samples, length, one_task
from meta_lightning.random_states import drew_from, kept_random_states, random_states
from meta_lightning.runs.machine import versions

DESCRIPTION = "description"  # name of the extra file
ANY = "any"  # number of samples
LEAST = 11  # samples of a trace: more than the sizes that are special, and few
TORCH = Path(torch.__file__).parent  # whose kernels give the same for any number of samples
CPU = torch.device("cpu")
Task = tuple[Samples, Samples, Samples]  # support samples, targets and queries: S ..., S ..., R ...
Adaptation = Callable[[Samples, Samples, Samples], Samples]  # from a task to predictions of its queries: R ...


class Adapting(nn.Module):
    """An adaptation as a module, whose parameters and buffers are all tensors that it reads.

    Args:
        learner: The learner, whose ``adapted_predictions`` it computes.
        form: Form of the samples.
        ways: Number of classes; 0 for regression.
        steps: Numbers of the samples that each inner step takes, None for all.
    """

    def __init__(self, learner: Any, form: SampleForm, ways: int, steps: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.learner, self.form, self.ways, self.steps = learner, form, ways, len(steps)
        for step, rows in enumerate(steps):
            self.register_buffer(f"rows{step}", rows)

    def forward(self, support_x: Samples, support_y: Samples, query_x: Samples) -> Samples:
        """Adapt to the support set and predict the queries.  # S ..., S ..., R ... -> R ..."""
        steps = [getattr(self, f"rows{step}") for step in range(self.steps)]
        return self.learner.adapted_predictions(self.form, self.ways, steps, support_x, support_y, query_x)


class Recorded(nn.Module):
    """The recorded kernels of an adaptation, as a module whose inputs are a task."""

    def __init__(self, graph: GraphModule, structure: Any) -> None:
        super().__init__()
        self.kernels, self.structure = graph, structure  # not "graph", which is an attribute of a program's own module

    def forward(self, support_x: Samples, support_y: Samples, query_x: Samples) -> Samples:
        """Adapt to the support set and predict the queries.  # S ..., S ..., R ... -> R ..."""
        return tree_unflatten(self.kernels(*tree_leaves((support_x, support_y, query_x))), self.structure)


def require_program_target(path: Path, overwrite: bool, argument: str) -> None:
    """Refuse a path to which an adaptation cannot be saved."""
    require_choice((".pt2",), **{f"the suffix of {argument}": path.suffix})
    require_writable(path, overwrite, argument)


def save_adaptation(
    learner: Any, path: Path, x: Samples | Array, y: Samples | Array | Sequence[str], steps: int, overwrite: bool
) -> dict[str, Any]:
    """Implement ``MetaLearner.export_adaptation`` for a copy of the learner on the CPU, in evaluation mode."""
    require_program_target(path, overwrite, "path")
    predictor = learner.adapt(x, y, steps)
    names, targets = numbered(y, None)
    classes, dtype = len(names or ()), next(learner.network.parameters()).dtype
    most = "y of the support set must hold no more classes than the network has outputs"
    unless = f"unless head_start computes rows for any number, got {classes}"
    require(not isinstance(predictor.network, Combined), f"{most}, {unless}")
    x, targets = tree_map(
        lambda t: t.to("cpu", dtype if t.is_floating_point() else t.dtype), (scale_pixels(samples(x, "x")), targets)
    )
    S = length(x)
    traits = learner.task_network.examine(*map(one_task, (predictor.form.network_input(x, dtype), targets)))
    must = "an adaptation that is exported must be of a network and a loss that do not change in forward"
    require(not traits.in_turn, f"{must}, got one for which {traits.in_turn}")
    # sample numbers in place of samples show which of them each step takes
    numbers = torch.arange(S)[None]
    taken = [rows[0] for rows, _ in learner.inner_batches(numbers, numbers, steps)]
    whole = all(torch.equal(rows, numbers[0]) for rows in taken)
    adapting = Adapting(learner, predictor.form, classes, [None] * len(taken) if whole else taken)
    task = x, targets, learner.task_network.inputs(x)
    require_function(adapting, task)

    def reference(x: Samples, y: Samples, query_x: Samples) -> Samples:
        with torch.no_grad():
            return learner.adapt(x, y, steps)(query_x)

    reasons = ["" if whole else "inner steps take minibatches, of which each is drawn for one number of samples"]
    reasons += [f"the network takes no other number of samples than {S}"] if traits.size else []
    program, any_support, any_query, reason = first_exported(adapting, reference, task, classes, *reasons)
    if not any_support:
        queries = "any number of" if any_query else S
        rank_zero_warn(f"The program takes {S} support samples and {queries} queries only, since {reason}")
    description = {
        "algorithm": type(learner).__name__,
        "inner_steps": len(taken),
        "classes": classes or None,
        "outputs": "logits" if classes else "values",
        "pixels": predictor.form.holds_pixels,
        "inputs": dict(zip(("support_x", "support_y", "query_x"), map(layout, task), strict=True)),
        "support_samples": ANY if any_support else S,
        "query_samples": ANY if any_query else S,
        "fixed_since": reason or None,
        "versions": {name: version for name, version in versions().items() if name in ("meta-lightning", "torch")},
    }
    with written_whole(path) as part:
        torch.export.save(program, part, extra_files={DESCRIPTION: json.dumps(description)})
    return description


def layout(samples: Samples) -> Any:
    """Shapes and dtypes of the tensors of a nest, with ``None`` for the number of samples."""
    return tree_map(lambda t: {"shape": [None, *t.shape[1:]], "dtype": str(t.dtype).removeprefix("torch.")}, samples)


def first_exported(
    adapting: Adapting, reference: Adaptation, task: Task, classes: int, of_support: str, of_both: str = ""
) -> tuple[ExportedProgram, bool, bool, str]:
    """A program for any number of samples, if not of queries, if not for those of the task, and why it is no other.

    ``of_support`` and ``of_both`` are reasons that are known why it is none for any number of support samples, or of
    queries either.

    Raises:
        InputError: If torch cannot export the adaptation, or all programs have other predictions than ``reference``.
    """
    reason = of_both or of_support
    for any_support, any_query in [(True, True), (False, True), (False, False)]:
        if (any_support and of_support) or (any_query and of_both):
            continue
        try:
            program = exported(adapting, task, any_support, any_query)
            failure = next(unequal(program, reference, task, classes, any_support, any_query), "")
        except InputError as error:
            failure = str(error)
        except Exception as error:  # torch raises what it likes
            failure = f"{type(error).__name__} of torch: {str(error).strip().partition(chr(10))[0]}"
        if not failure:
            return program, any_support, any_query, reason
        reason = reason or failure
    raise InputError(f"network, loss and inner rule must be such that torch can export them, got {failure}")


def exported(adapting: Adapting, example: Task, any_support: bool, any_query: bool) -> ExportedProgram:
    """The program, for any number of support samples or queries or for those of the example."""
    tensors = [*state_of(adapting).values(), *tree_leaves(example)]
    sizes = {size for tensor in tensors for size in tensor.shape}
    # a trace takes equal sizes of its inputs for the same size: hence numbers of samples that are no other size
    free = (n for n in range(LEAST, LEAST + len(sizes) + 2) if n not in sizes)
    support, query = (next(free) if dynamic else length(example[0]) for dynamic in (any_support, any_query))
    task = (*cycled(example[:2], support), cycled(example[2], query))
    dims = [{0: Dim.DYNAMIC} if dynamic else None for dynamic in (any_support, any_support, any_query)]
    shapes = tuple(tree_map(lambda _, dim=dim: dim, part) for dim, part in zip(dims, task, strict=True))
    fresh = cast(Adapting, copied(adapting))  # layers may keep what they meet in a trace
    recorded = record(fresh, task, any_support, any_query)
    with torch.no_grad():
        return export(recorded, task, dynamic_shapes=shapes, strict=False)


def record(adapting: Adapting, task: Task, any_support: bool, any_query: bool) -> Recorded:
    """Record the kernels of an adaptation, its gradients among them, for any number of samples or those of the task."""
    # torch.export takes no autograd.grad in a forward (2.14: "We found a fake tensor in the exported program constant's
    # list"). make_fx writes the derivatives down first, and torch.export gets a graph without any
    state = state_of(adapting)
    inputs, structure = tree_flatten(task)
    outputs: list[Any] = []  # the structure of the predictions

    def flat(*tensors: Tensor) -> list[Tensor]:
        task = tree_unflatten(list(tensors[len(state) :]), structure)
        leaves, after = tree_flatten(functional_call(adapting, dict(zip(state, tensors, strict=False)), task))
        outputs.append(after)
        return [leaf.detach() for leaf in leaves]

    mode: Literal["symbolic", "real"] = "symbolic" if any_support or any_query else "real"
    graph: GraphModule = make_fx(flat, tracing_mode=mode)(*state.values(), *inputs)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    of_support, of_query = placeholders[len(state)], placeholders[-1]
    require_no_branch(graph, [of_support] * any_support + [of_query] * any_query)
    for number, (node, value) in enumerate(zip(placeholders, state.values(), strict=False)):
        if node.users:  # not the rows that a head start replaces, for example
            graph.register_buffer(f"state{number}", value.detach().clone())
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(f"state{number}"))
        graph.graph.erase_node(node)
    graph.recompile()
    return Recorded(graph, outputs[-1])


def require_no_branch(graph: GraphModule, samples: Sequence[Node]) -> None:
    """Refuse a graph for which Python code outside of torch has decided something by the number of these samples."""
    counts = [node.meta["val"].shape[0] for node in samples]
    depends = "Python code of the network, loss or inner rule depends on the number of samples"
    for count in counts:
        if isinstance(count, int) or not count.node.expr.free_symbols:  # as of len(x), which a trace takes for a number
            raise InputError(depends)
    symbols = {count.node.expr for count in counts}
    for guard in graph.shape_env.guards if symbols and graph.shape_env else ():
        place = guard.sloc.framework_loc
        if not isinstance(place, FrameSummary) or Path(place.filename).is_relative_to(TORCH):
            continue
        if guard.expr.free_symbols & symbols:
            raise InputError(f"{depends}: {Path(place.filename).name}, line {place.lineno}")


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def require_function(adapting: Adapting, task: Task) -> None:
    """Refuse an adaptation that is no function of tensors alone, of which a record would keep one case."""
    expected = "an adaptation that is exported must"
    with kept_random_states(CPU) as before:
        try:
            with ReadingNoValues(), ReadingNoMemory():
                adapting(*task)
        except (RuntimeError, UnrecordableError) as error:
            raise InputError(f"{expected} be a function of tensors alone, got an error of torch: {error}") from None
        drew = sorted(drew_from(before, random_states(CPU)))
    came = f"got random numbers of {', '.join(drew)}"
    require(not drew, f"{expected} not draw random numbers, as dropout does that is active in evaluation, {came}")


def unequal(
    program: ExportedProgram, reference: Adaptation, example: Task, classes: int, any_support: bool, any_query: bool
) -> Iterator[str]:
    """Sizes at which the program has other predictions than the reference, by what is to be said of them."""
    module = program.module()
    for task in tasks_of(*example, classes, any_support, any_query):
        S, R = length(task[0]), length(task[2])
        pairs = zip(tree_leaves(module(*task)), tree_leaves(reference(*task)), strict=True)
        # rounding of other kernels
        if not all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True) for a, b in pairs):
            yield f"other predictions than those of adapt for {S} support samples and {R} queries"


def tasks_of(x: Samples, y: Samples, queries: Samples, classes: int, any_support: bool, any_query: bool) -> list[Task]:
    """The example, and tasks of all of its classes with fewer and with more samples.  # S ..., S ..., S ..."""
    S = length(x)
    few = torch.arange(min(S, 2))
    if classes:  # a sample of each
        few = torch.stack([(y == number).nonzero()[0, 0] for number in range(classes)])
    supports = [(x, y)] * 3
    if any_support:
        supports[1:] = tree_map(lambda t: t[few], (x, y)), cycled((x, y), 2 * S + 1)
    of_queries = [queries, cycled(queries, 1), cycled(queries, S + 2)] if any_query else [queries] * 3
    return [(*support, query) for support, query in zip(supports, of_queries, strict=True)]


def cycled(samples: Samples, count: int) -> Samples:
    """So many samples: the first ones again after the last.  # S ... -> count ..."""
    rows = torch.arange(count) % length(samples)
    return tree_map(lambda t: t[rows], samples)
