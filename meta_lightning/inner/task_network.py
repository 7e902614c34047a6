"""Predictions and losses of all tasks at once, each with its own parameters."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from meta_lightning.checks import require
from meta_lightning.inner.exact import Exact, differentiable_attention
from meta_lightning.inner.heads import ways_of
from meta_lightning.inner.params import Params, of_network
from meta_lightning.inner.state import form, hooked_parameters
from meta_lightning.inner.traits import Traits

try:
    from meta_lightning.inner.kernels import TasksAsChannels
except ImportError as error:  # private names of torch, which may go with any version
    rank_zero_warn(
        f"torch's own rules for vmap are used, which are slower: this version of torch lacks a name ({error})"
    )
    TasksAsChannels = Exact  # type: ignore[assignment,misc]

MANY_VALUES = 2**16  # in the inputs of a task: five 84×84 colour images have more, 75 28×28 ones less (speed.md)

# from predictions and targets of one task to a scalar; the union lets the command line build modules
Loss = nn.Module | Callable[[Tensor, Tensor], Tensor]


def ignored_class(loss: Any) -> int:
    """The class number that a loss leaves out."""
    ignored = getattr(loss, "ignore_index", None)
    return ignored if isinstance(ignored, int) else -100


def default_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error for floating-point targets, cross-entropy for class numbers."""
    return F.mse_loss(predictions, targets) if targets.is_floating_point() else F.cross_entropy(predictions, targets)


class TaskNetwork:
    """Applies a network and a loss to every task with its own parameters: several tasks by ``vmap`` where possible."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner  # its network and loss may be replaced
        self.traits: Traits | None = None
        self.examined: tuple[Any, ...] = ()  # the form of network and loss that has these traits
        self.known: dict[tuple[Any, ...], Traits] = {}  # of training and evaluation
        self.modules: list[nn.Module] = []  # of the network; kept, since forms hold their ids
        self.loops_over_tasks = False
        self.said: set[str] = set()
        self.shapes_checked: set[tuple[torch.Size, torch.Size]] = set()

    def examine(self, x: Tensor, y: Tensor | None = None) -> Traits:
        """Find the traits of network and loss in their present setting from the first task.  # T S ..., T S ..."""
        network, loss = self.owner.network, None if y is None else self.owner.loss
        present, traits = form(network, loss), self.traits
        # the forward of a network whose tasks go in turn changes its attributes itself
        if traits is not None and (present == self.examined or (traits.in_turn and len(present) == len(self.examined))):
            return traits
        if self.modules != (modules := [*network.modules()]):
            self.modules, self.known = modules, {}
        if present not in self.known:
            head = getattr(self.owner, "head_start", None)
            rows = 0 if y is None or head is None or not head.computed else ways_of(y, ignored_class(loss))
            self.known[present] = Traits.of(network, loss, x[0], None if y is None else y[0], rows)
        self.examined, self.traits = present, self.known[present]
        self.loops_over_tasks = bool(self.traits.looped or self.traits.in_turn)
        self.say("Tasks run in a loop, since ", self.traits.looped)
        self.say("Tasks run one after another, since ", self.traits.in_turn)
        if size := self.traits.size:
            unless = "unless that is meant, the batches lack the dimension of the tasks"
            self.say("The network takes no other number of samples per task than ", f"{size}; {unless}")
        self.say("Hooks on parameters see the meta-gradient only: ", ", ".join(hooked_parameters(network)))
        return self.traits

    def say(self, message: str, reason: str) -> None:
        """Warn once, if there is a reason."""
        if reason and reason not in self.said:
            self.said.add(reason)
            rank_zero_warn(message + reason)

    def predict(self, params: Params, x: Tensor) -> Tensor:
        """Predictions of every task with its own parameters.  # T S ... -> T S ..."""
        if self.traits is None:
            self.examine(x)
        return self.over_tasks(self.predict_task, params, x)

    def predict_task(self, params: Params, x: Tensor) -> Tensor:
        """Predictions of one task.  # S ... -> S ..."""
        assert self.traits is not None
        return self.traits.forward(self.owner.network, of_network(params), x)

    def require_last(self, layer: str, x: Tensor) -> None:
        """Raise InputError unless this is the layer with parameters that runs last.  # T S ..."""
        last = (self.traits or self.examine(x)).last
        ran = f"the last layer with parameters that is called, which is {last!r}"
        require(last == layer, f"layer of head_start must be {ran}, got {layer!r}")

    def features(self, params: Params, x: Tensor, layer: str) -> Tensor:
        """Inputs of a layer that runs once, for every task.  # T S ... -> T S D"""
        if self.traits is None:
            self.examine(x)
        inputs: list[Tensor] = []

        def features_of_task(params: Params, x: Tensor) -> Tensor:
            inputs.clear()
            self.predict_task(params, x)
            require(len(inputs) == 1, f"layer of head_start must run once, got {len(inputs)} runs of {layer}")
            return inputs[0]

        module = self.owner.network.get_submodule(layer)

        def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            inputs.append([*args, *kwargs.values()][0])

        hook = module.register_forward_pre_hook(note, with_kwargs=True)
        try:
            return self.over_tasks(features_of_task, params, x)
        finally:
            hook.remove()

    def predict_queries(self, params: Params, support_x: Tensor, query_x: Tensor, transductive: bool) -> Tensor:
        """Predictions of every task's queries with its own parameters.  # T R ..."""
        if transductive:
            return self.predict(params, query_x)
        if self.traits is None:
            self.examine(support_x)

        def predict_alone(params: Params, support_x: Tensor, query_x: Tensor) -> Tensor:
            def predict_query(query: Tensor) -> Tensor:
                return self.predict_task(params, torch.cat([support_x, query[None]]))[-1]

            return self.over_tasks(predict_query, query_x)

        # as many queries at once as need no more memory than a transductive forward
        at_once = max(1, query_x.shape[1] // (support_x.shape[1] + 1))
        parts = query_x.split(at_once, dim=1)
        return torch.cat([self.over_tasks(predict_alone, params, support_x, part) for part in parts], dim=1)

    def losses(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Every task's loss.  # T S ..., T S ... -> T"""
        shapes = predictions.shape, targets.shape
        if self.owner.loss is default_loss and shapes not in self.shapes_checked:
            # once per number of classes and samples: reading the targets synchronises with the device
            check_outputs(predictions, targets)
            self.shapes_checked.add(shapes)
        losses = self.over_tasks(self.owner.loss, predictions, targets)
        require(losses.ndim == 1, f"loss must give a scalar per task, got shape {tuple(losses.shape[1:])}")
        return losses

    def losses_of(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """Every task's loss with its own parameters.  # T S ..., T S ... -> T"""
        return self.losses(self.predict(params, x), y)

    def over_tasks(self, function: Callable[..., Tensor], *stacked: Params | Tensor) -> Tensor:
        """Apply a function of one task to all tasks.  # -> T ..."""
        if not self.loops_over_tasks and (len(stacked[-1]) > 1 or faster_stacked(*stacked)):
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

    def functions(self) -> Any:
        """What replaces functions of torch in a loop; nothing where none is called, since it costs time."""
        return Exact() if self.traits is None or self.traits.replaced else nullcontext()


def faster_stacked(*stacked: Params | Tensor) -> bool:
    """Whether a single task, which Passes may give on a CPU, is faster by vmap, with its kernels (measured)."""
    params, x = stacked[0], stacked[-1]
    if not isinstance(params, dict) or isinstance(x, dict) or x.device.type != "cpu" or x.numel() < MANY_VALUES:
        return False
    return x.numel() > sum(p.numel() for p in params.values()) // 2


def together(function: Callable[..., Tensor], *stacked: Params | Tensor) -> Tensor:
    """Apply a function of one task to all tasks by vmap."""
    with differentiable_attention(), TasksAsChannels():
        result: Tensor = vmap(function, randomness="different")(*stacked)
    return result


def one_by_one(function: Callable[..., Tensor], functions: Any, *stacked: Params | Tensor) -> Tensor:
    """Apply a function of one task to each task in a loop."""
    with differentiable_attention(), functions:
        return torch.stack([function(*task) for task in zip(*map(parts_of_tasks, stacked), strict=True)])


def parts_of_tasks(stacked: Params | Tensor) -> Sequence[Any]:
    """The tasks' parts of a tensor, or of parameters.  # T ... -> T of ..."""
    if isinstance(stacked, dict):
        parts = zip(*map(parts_of_tasks, stacked.values()), strict=True)
        return [dict(zip(stacked, of_task, strict=True)) for of_task in parts]
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
