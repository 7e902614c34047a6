"""Predictions and losses of all tasks at once, each with its own parameters."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from meta_lightning.checks import require
from meta_lightning.inner.exact import Exact, differentiable_attention
from meta_lightning.inner.feature_cache import FeatureCache
from meta_lightning.inner.frozen import Split, is_chain, reason_against, split
from meta_lightning.inner.heads import HeadStart, ways_of
from meta_lightning.inner.params import Params, of_network, tree_flatten, tree_leaves, tree_map, tree_unflatten
from meta_lightning.inner.samples import (
    FrozenFeatures,
    Output,
    Padded,
    Samples,
    bare,
    collated,
    first_task,
    length,
    one_task,
    padded_like,
    structure_of,
    valid,
    values_of,
)
from meta_lightning.inner.state import form, hooked_parameters, identity
from meta_lightning.inner.task_loss import TaskLoss, TaskPredictor
from meta_lightning.inner.traits import Traits

try:
    from meta_lightning.inner.kernels import TasksAsChannels
except ImportError as error:  # private names of torch, which may go with any version
    rank_zero_warn(
        f"torch's own rules for vmap are used, which are slower: this version of torch lacks a name ({error})"
    )
    TasksAsChannels = Exact  # type: ignore[assignment,misc]

MANY_VALUES = 2**16  # in the inputs of a task: five 84×84 colour images have more, 75 28×28 ones less (speed.md)

# from predictions and targets of one task to a scalar, or a TaskLoss; the union lets the command line build modules
Loss = nn.Module | Callable[[Any, Any], Tensor]


def ignored_class(loss: Any) -> int:
    """The class number that a loss leaves out."""
    ignored = getattr(loss, "ignore_index", None)
    return ignored if isinstance(ignored, int) else -100


def default_loss(predictions: Tensor, targets: Tensor | Padded) -> Tensor:
    """Mean squared error for floating-point targets, cross-entropy for class numbers; both ignore padding."""
    if not isinstance(targets, Padded):
        return (
            F.mse_loss(predictions, targets) if targets.is_floating_point() else F.cross_entropy(predictions, targets)
        )
    y: Tensor = targets.values
    mask = targets.mask.view(-1, *[1] * (y.ndim - 1))
    if not y.is_floating_point():
        return F.cross_entropy(predictions, torch.where(mask, y, -100))
    return (predictions - y).square().mul(mask).sum() / mask.expand(y.shape).sum()


class Owner(Protocol):
    """What a ``TaskNetwork`` reads of its learner."""

    network: nn.Module  # it and the loss may be replaced
    loss: Any  # a Loss, or a TaskLoss
    head_start: HeadStart
    output: Output | None

    @property
    def fixed(self) -> Collection[str]:
        """Names of the network's parameters that are not trained."""

    @property
    def keeps_features(self) -> bool:
        """Whether features of frozen modules are kept."""

    @property
    def keywords(self) -> bool | None:
        """Whether the entries of samples are keywords of the network's forward."""


class TaskNetwork:
    """Applies a network and a loss to every task with its own parameters: several tasks by ``vmap`` where possible."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.traits: Traits | None = None
        self.examined: tuple[Any, ...] = ()  # the form of network and loss that has these traits
        self.known: dict[tuple[Any, ...], Traits] = {}  # of training and evaluation
        self.modules: list[Any] = []  # of the network, and the loss; kept, since forms hold their ids
        self.loops_over_tasks = False
        self.traced = False
        self.said: set[str] = set()
        self.parts: Split | None = None  # of the network, where frozen modules run first
        self.once: dict[tuple[Any, ...], str | None] = {}  # why these do not run once per sample, by their form
        self.cache = FeatureCache(getattr(owner.network, "cache_dir", None))
        self.shapes_checked: set[tuple[torch.Size, torch.Size]] = set()

    def find_parts(self) -> Split | None:
        """The frozen modules that run first, and the rest of the network."""
        network, self.parts = self.owner.network, None
        if is_chain(network):  # others have no parts, which costs no time then
            fixed, named = self.owner.fixed, network.named_parameters()
            self.parts = split(network, {id(p) for name, p in named if p.requires_grad and name not in fixed})
        return self.parts

    def ahead(self, x: Samples) -> Samples:
        """Features of the frozen modules that run first; the samples where there are none.  # T S ... -> T S ...

        Other methods take either, and call this for samples: at every inner step, unless the features were made before.
        """
        if isinstance(x, Padded):
            return x._replace(values=self.ahead(x.values))
        if not isinstance(x, Tensor) or isinstance(self.owner.loss, TaskLoss) or not (parts := self.find_parts()):
            return x
        self.forget_others()
        present = x.dtype, *form(self.owner.network, None)
        if present not in self.once:
            self.once[present] = reason_against(parts.frozen, x[0].detach())
            self.say("Frozen modules run at every inner step, since they ", self.once[present] or "")
        if self.once[present] != "":
            return x
        return FrozenFeatures(self.cache.features(parts.frozen, x, self.owner.keeps_features))

    def ahead_of_both(self, support_x: Samples, query_x: Samples) -> tuple[Samples, Samples]:
        """``ahead`` of support and query samples, where possible at once: the weights are compared each time."""
        if isinstance(support_x, Tensor) and isinstance(query_x, Tensor) and self.find_parts():
            (T, S, *sample), others = support_x.shape, (query_x.shape[0], *query_x.shape[2:])
            if others == (T, *sample) and support_x.dtype == query_x.dtype:
                x = self.ahead(torch.cat([support_x, query_x], 1))
                return tree_map(lambda t: t[:, :S].contiguous(), x), tree_map(lambda t: t[:, S:].contiguous(), x)
        return self.ahead(support_x), self.ahead(query_x)

    def examine(self, x: Samples, y: Samples | None = None) -> Traits:
        """Find the traits of network and loss in their present setting from the first task.  # T S ..., T S ..."""
        network, loss = self.owner.network, None if y is None else self.owner.loss
        kinds = tuple(tensor.is_floating_point() for tensor in tree_leaves(x))
        given = structure_of(bare(x)), kinds, isinstance(x, Padded), identity(self.owner.output), network.training
        present, traits = (given, *form(network, loss)), self.traits
        # the forward of a network whose tasks go in turn changes its attributes itself
        alike = len(present) == len(self.examined) and given == self.examined[0]
        if traits is not None and (present == self.examined or (traits.in_turn and alike)):
            return traits
        self.forget_others()
        if present not in self.known:
            ways = 0 if y is None else ways_of(y, ignored_class(loss))
            largest = int(x.mask.sum(1).argmax()) if isinstance(x, Padded) else 0  # shows most
            seen, targets = tree_map(lambda t: t[largest], (x, () if y is None else y))
            targets = None if y is None else targets
            seen = first_task(self.ahead(one_task(seen)))
            if isinstance(values_of(seen), FrozenFeatures):
                assert self.parts is not None
                network, seen = self.parts.rest, bare(seen)
            self.known[present] = Traits.of(
                network,
                loss,
                self.inputs(seen),
                targets,
                ways=ways,
                computed=self.owner.head_start.computed,
                keywords=self.owner.keywords,
                output=self.owner.output,
                seen=seen,
            )
        self.examined, self.traits = present, self.known[present]
        self.loops_over_tasks = bool(self.traits.looped or self.traits.in_turn)
        self.say("Tasks run in a loop, since ", self.traits.looped)
        self.say("Tasks run one after another, since ", self.traits.in_turn)
        if size := self.traits.size:
            unless = "unless that is meant, the batches lack the dimension of the tasks"
            self.say("The network takes no other number of samples per task than ", f"{size}; {unless}")
        self.say("Hooks on parameters see the meta-gradient only: ", ", ".join(hooked_parameters(network)))
        return self.traits

    def forget_others(self) -> None:
        """Forget forms of other modules, whose ids may be given to new ones."""
        if self.modules != (modules := [*self.owner.network.modules(), self.owner.loss]):
            self.modules, self.known, self.once = modules, {}, {}

    def inputs(self, x: Samples) -> Samples:
        """What the network takes of the samples of a task: of those of a TaskLoss, a part.  # S ..."""
        if not isinstance(self.owner.loss, TaskLoss):
            return x
        return Padded(self.owner.loss.inputs(x.values), x.mask) if isinstance(x, Padded) else self.owner.loss.inputs(x)

    def say(self, message: str, reason: str) -> None:
        """Warn once, if there is a reason."""
        if reason and reason not in self.said:
            self.said.add(reason)
            rank_zero_warn(message + reason)

    def predict(self, params: Params, x: Samples) -> Samples:
        """Predictions of every task with its own parameters.  # T S ... -> T S ..."""
        x = self.ahead(x)
        if self.traits is None:
            self.examine(x)
        return self.over_tasks(self.predict_task, params, x)

    def predict_task(self, params: Params, x: Samples) -> Samples:
        """Predictions of one task, those of padding included.  # S ... -> S ..."""
        assert self.traits is not None
        x = self.inputs(x)
        if isinstance(x, Padded) and self.traits.mixes:
            return padded_like(self.predict_valid(params, valid(x)), x.mask)
        return self.predict_valid(params, values_of(x))

    def predict_valid(self, params: Params, x: Samples) -> Samples:
        """Predictions of one task without padding, or with padding that does not matter.  # S ... -> S ..."""
        assert self.traits is not None
        network = self.owner.network
        if isinstance(x, FrozenFeatures):
            parts = self.parts or self.find_parts()
            assert parts is not None
            network, x = parts.rest, x.values
        return self.traits.forward(network, of_network(params), x)

    def require_last(self, layer: str, x: Samples) -> None:
        """Raise InputError unless this is the layer with parameters that runs last.  # T S ..."""
        last = (self.traits or self.examine(x)).last
        ran = f"the last layer with parameters that is called, which is {last!r}"
        require(last == layer, f"layer of head_start must be {ran}, got {layer!r}")

    def features(self, params: Params, x: Samples, layer: str) -> Tensor:
        """Inputs of a layer that runs once, for every task.  # T S ... -> T S D"""
        x = self.ahead(x)
        if self.traits is None:
            self.examine(x)
        inputs: list[Tensor] = []

        def features_of_task(params: Params, x: Samples) -> Tensor:
            inputs.clear()
            self.predict_task(params, x)
            require(len(inputs) == 1, f"layer of head_start must run once, got {len(inputs)} runs of {layer}")
            mixes = self.traits is not None and self.traits.mixes
            features: Tensor = padded_like(inputs[0], x.mask) if isinstance(x, Padded) and mixes else inputs[0]
            return features

        module = self.owner.network.get_submodule(layer)

        def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            inputs.append([*args, *kwargs.values()][0])

        hook = module.register_forward_pre_hook(note, with_kwargs=True)
        try:
            of_tasks: Tensor = self.over_tasks(features_of_task, params, x)
            return of_tasks
        finally:
            hook.remove()

    def predict_queries(self, params: Params, support_x: Samples, query_x: Samples, transductive: bool) -> Samples:
        """Predictions of every task's queries with its own parameters.  # T R ..."""
        support_x, query_x = self.ahead(support_x), self.ahead(query_x)
        traits = self.traits or self.examine(support_x)
        padded = any(isinstance(x, Padded) for x in (support_x, query_x))
        if transductive or (padded and not traits.mixes):  # then a prediction depends on its own sample only
            return self.predict(params, query_x)
        require(
            not padded,
            "transductive must be true, since the samples of a task affect each other and tasks are of "
            "unequal size, got false",
        )

        def predict_alone(params: Params, support_x: Samples, query_x: Samples) -> Samples:
            def predict_query(query: Samples) -> Samples:
                together = tree_map(lambda s, q: torch.cat([s, q[None]]), support_x, query)
                return tree_map(lambda t: t[-1], self.predict_task(params, together))

            return self.over_tasks(predict_query, query_x)

        # as many queries at once as need no more memory than a transductive forward
        at_once = max(1, length(query_x, 1) // (length(support_x, 1) + 1))
        starts = range(0, length(query_x, 1), at_once)
        parts = [tree_map(lambda t, i=i: t[:, i : i + at_once], query_x) for i in starts]
        answers = [self.over_tasks(predict_alone, params, support_x, part) for part in parts]
        return tree_map(lambda *of_parts: torch.cat(of_parts, dim=1), *answers)

    def losses(self, predictions: Samples, targets: Samples) -> Tensor:
        """Every task's loss.  # T S ..., T S ... -> T"""
        if self.owner.loss is default_loss:
            y = values_of(targets)
            tensors = isinstance(predictions, Tensor) and isinstance(y, Tensor)
            came = f"got {type(predictions).__name__} and {type(y).__name__}"
            require(tensors, f"loss must be given unless predictions and targets are tensors, {came}")
            shapes = predictions.shape, y.shape
            if not self.traced and shapes not in self.shapes_checked:
                # once per number of classes and samples: reading the targets synchronises with the device
                check_outputs(predictions, y)
                self.shapes_checked.add(shapes)
        elif isinstance(targets, Padded):
            # any loss, of the samples that are there
            tasks = zip(parts_of_tasks(predictions), parts_of_tasks(targets), strict=True)
            return scalars(torch.stack([self.owner.loss(valid(Padded(p, y.mask)), valid(y)) for p, y in tasks]))
        return scalars(self.over_tasks(self.owner.loss, predictions, targets))

    def losses_of(self, params: Params, start: Params, x: Samples, y: Samples) -> Tensor:
        """Every task's loss with its own parameters; ``start`` is θ'_0 for a TaskLoss.  # T S ..., T S ... -> T"""
        if not isinstance(self.owner.loss, TaskLoss):
            return self.losses(self.predict(params, x), y)
        if self.traits is None:
            self.examine(x, y)
        if isinstance(x, Padded):  # any loss, of the samples that are there
            return scalars(one_by_one(self.task_loss, self.functions(), params, start, x, y))
        return scalars(self.over_tasks(self.task_loss, params, start, x, y))

    def query(self, params: Params, start: Params, x: Samples, y: Samples) -> tuple[Tensor, Samples]:
        """Every task's query loss and predictions; a TaskLoss has none of the latter.  # T S ... -> T, T S ..."""
        if isinstance(self.owner.loss, TaskLoss):
            return self.losses_of(params, start, x, y), ()
        predictions = self.predict(params, x)
        return self.losses(predictions, y), predictions

    def task_loss(self, params: Params, start: Params, x: Samples, y: Samples) -> Tensor:
        """A TaskLoss of one task.  # S ..., S ..."""
        network = TaskPredictor(self.predict_valid, of_network(params), of_network(start))
        loss: Tensor = self.owner.loss(network, valid(x), valid(y))
        return loss

    def over_tasks(self, function: Callable[..., Any], *stacked: Samples) -> Any:
        """Apply a function of one task to all tasks.  # -> T ..."""
        if not self.loops_over_tasks and not self.traced and (length(stacked[-1]) > 1 or faster_stacked(*stacked)):
            try:
                return together(function, *stacked)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as refusal:
                # an error of the function itself is raised by the loop as well
                result = one_by_one(function, self.functions(), *stacked)
                self.loops_over_tasks = True
                reason = f"vmap does not support the network or loss: {refusal}"
                self.say("Tasks run in a loop, since ", reason)
                if self.traits is not None:
                    self.traits = self.known[self.examined] = self.traits._replace(looped=reason)
                return result
        return one_by_one(function, self.functions(), *stacked)

    def around(self) -> AbstractContextManager[Any]:
        """What must be open around a pass and its backward: if that runs the forward again, the same attention."""
        recomputes = self.traits is not None and self.traits.recomputes
        return differentiable_attention() if recomputes else nullcontext()

    @contextmanager
    def being_traced(self) -> Iterator[None]:
        """Loop over tasks and read no targets: a trace has symbols in place of sizes and values."""
        self.traced = True
        try:
            yield
        finally:
            self.traced = False

    def functions(self) -> Any:
        """What replaces functions of torch in a loop; nothing where none is called, since it costs time."""
        return Exact() if self.traits is None or self.traits.replaced else nullcontext()


def scalars(losses: Tensor) -> Tensor:
    """Losses, which must be one number per task.  # T"""
    require(losses.ndim == 1, f"loss must give a scalar per task, got shape {tuple(losses.shape[1:])}")
    return losses


def faster_stacked(*stacked: Samples) -> bool:
    """Whether a single task, which Passes may give on a CPU, is faster by vmap, with its kernels (measured)."""
    params, x = stacked[0], bare(stacked[-1])
    if not isinstance(params, dict) or not isinstance(x, Tensor) or x.device.type != "cpu" or x.numel() < MANY_VALUES:
        return False
    return bool(x.numel() > sum(p.numel() for p in params.values()) // 2)


def together(function: Callable[..., Any], *stacked: Samples) -> Any:
    """Apply a function of one task to all tasks by vmap."""
    with differentiable_attention(), TasksAsChannels():
        return vmap(function, randomness="different")(*stacked)


def one_by_one(function: Callable[..., Any], functions: Any, *stacked: Samples) -> Any:
    """Apply a function of one task to each task in a loop."""
    with differentiable_attention(), functions:
        return collated([function(*task) for task in parts_of_tasks(stacked)])


def parts_of_tasks(stacked: Samples) -> Sequence[Any]:
    """The tasks' parts of a tensor or a nest, such as parameters.  # T ... -> T of ..."""
    if not isinstance(stacked, Tensor):
        tensors, structure = tree_flatten(stacked)
        return [tree_unflatten(of_task, structure) for of_task in zip(*map(parts_of_tasks, tensors), strict=True)]
    if len(stacked) == 1:
        return [stacked.squeeze(0)]
    # the backward of indexing allocates zeros for all tasks, once per task; that of unbind copies once. Samples are
    # copied, since a network may write into its input, which views of one tensor do not allow
    return stacked.unbind() if stacked.requires_grad else [stacked[task].clone() for task in range(len(stacked))]


def check_outputs(predictions: Tensor, targets: Tensor) -> None:
    """Raise InputError if predictions do not fit the targets of ``default_loss``.  # T S N ..., T S ..."""
    if targets.is_floating_point():
        came, expected = tuple(predictions.shape[1:]), tuple(targets.shape[1:])
        hint = "; class numbers must be int64" if len(came) == len(expected) + 1 else ""
        message = f"network must give outputs of the targets' shape {expected} per task, got {came}{hint}"
        require(came == expected, message)
    else:
        require(targets.dtype == torch.int64, f"targets must be int64 class numbers or real, got {targets.dtype}")
        classes, outputs = int(targets.max()) + 1, predictions.shape[2] if predictions.ndim > 2 else 0
        require(
            outputs >= classes,
            f"network must give an output for each class: expected at least {classes}, got {outputs}",
        )
        shape = [*targets.shape[1:2], outputs, *targets.shape[2:]]
        shapes = f"{list(predictions.shape[1:])} for targets of shape {list(targets.shape[1:])}"
        require(list(predictions.shape[1:]) == shape, f"network must give outputs {shape} per task, got {shapes}")
