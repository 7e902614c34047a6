"""What adapts: a network, its initialisation θ and the inner loop over the tasks of a batch."""

import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from meta_lightning import inner_loop
from meta_lightning.adaptation.adapting import adapt_learner
from meta_lightning.adaptation.predictor import Predictor
from meta_lightning.checks import require, require_at_least, require_matches, require_positive
from meta_lightning.compiling import CompiledPasses, Pass
from meta_lightning.data.form import SampleForm
from meta_lightning.inner_loop import Adapted, Params
from meta_lightning.losses import Loss, check_outputs, default_loss
from meta_lightning.networks import other_names, with_batch_statistics
from meta_lightning.tasks import Array, TaskBatch, scale_pixels

Support = list[tuple[Tensor, Tensor]]  # samples and targets of each inner step: K of T S ..., T S ...

# Input values of a pass on a CPU: with more, its maps outgrow the caches (benchmarks/results/speed.md)
CACHED_VALUES = 2**19


class Learner(L.LightningModule):
    """A network that adapts to tasks by gradient steps from its initialisation θ.

    Its one inner loop, ``adapt_tasks``, serves training, validation, test, prediction and use from Python. The
    arguments are described in the algorithms.

    Raises:
        InputError: If an argument is outside its range.
    """

    second_order = False  # whether training differentiates through the inner gradients

    def __init__(
        self,
        network: nn.Module,
        loss: Loss | None,
        inner_lr: float,
        inner_steps: int,
        test_inner_steps: int | None,
        tasks_per_pass: int | None,
        compile_passes: bool,
        inner_freeze: Sequence[str],
        outer_freeze: Sequence[str],
    ) -> None:
        super().__init__()
        test_inner_steps = inner_steps if test_inner_steps is None else test_inner_steps
        require_positive(inner_lr=inner_lr)
        require_at_least(1, inner_steps=inner_steps, test_inner_steps=test_inner_steps)
        if tasks_per_pass is not None:
            require_at_least(1, tasks_per_pass=tasks_per_pass)
        learnt = [name for name, p in loss.named_parameters() if p.requires_grad] if isinstance(loss, nn.Module) else []
        require(not learnt, f"loss must have no parameters to learn, which belong into the network, got {learnt}")
        self.network = with_batch_statistics(network)
        self.loss = loss or default_loss
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.test_inner_steps = test_inner_steps
        self.tasks_per_pass = tasks_per_pass
        self.tasks_that_fit: int | None = None  # in memory, as far as it is known
        self.compiled_passes = CompiledPasses() if compile_passes else None
        names = [name for name, p in network.named_parameters() if p.requires_grad]
        self.inner_frozen = require_matches(names, inner_freeze=inner_freeze)
        self.outer_frozen = require_matches(names, outer_freeze=outer_freeze)
        for argument, frozen in (("inner_freeze", self.inner_frozen), ("outer_freeze", self.outer_frozen)):
            require(not names or len(frozen) < len(names), f"{argument} must leave a parameter, got patterns of all")
        # cuDNN's kernels have no second derivative, and no first one in evaluation mode
        self.recurrent = any(isinstance(module, nn.RNNBase) for module in network.modules())
        self.loops_over_tasks = inner_loop.wrong_under_vmap(self.network)
        self.aliases = other_names(self.network)
        self.outputs_checked = False
        self.form = SampleForm()
        self.description: dict[str, Any] | None = None  # the network in plain words, where a configuration gave it

    def meta_parameters(self) -> Params:
        """θ: the network's parameters that are trained or adapted."""
        frozen = self.inner_frozen & self.outer_frozen
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad and name not in frozen}

    def adapted(self, params: Params) -> Params:
        """What the inner steps move."""
        return {name: p for name, p in inner_loop.weights(params).items() if name not in self.inner_frozen}

    def learned(self, params: Params) -> Params:
        """What the outer steps move."""
        return {name: p for name, p in params.items() if name not in self.outer_frozen}

    def over_tasks(self, function: Callable[..., Tensor], *stacked: Params | Tensor) -> Tensor:
        """A function of one task on all tasks at once or, when vmap has refused it, one after another.  # -> T ..."""
        if not self.loops_over_tasks:
            try:
                return inner_loop.together(function, *stacked)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as refusal:
                # a fault of the function's own is raised by the loop as well, and so is not taken for vmap's
                result = inner_loop.one_by_one(function, *stacked)
                self.loops_over_tasks = True
                rank_zero_warn(f"The tasks run one after another, since vmap refuses the network or loss: {refusal}")
                return result
        return inner_loop.one_by_one(function, *stacked)

    def compiled(self, function: Pass) -> Pass:
        """The pass, compiled where that is asked for."""
        if self.compiled_passes is None:
            return function
        # all that a pass takes from the learner: a callback may change it, and moving to a device replaces buffers
        frozen = frozenset(self.inner_frozen), frozenset(self.outer_frozen)
        modes = [module.training for module in self.modules()]
        tensors = [id(tensor) for tensor in (*self.parameters(), *self.buffers())]
        key = (function.__name__, self.inner_optimizer()[0], *frozen, *modes, *tensors, *self.meta_parameters())
        return partial(self.compiled_passes.run, function, key)

    def in_passes(self, function: Callable[..., tuple[Any, ...]], *stacked: Any) -> tuple[Any, ...]:
        """A function of a meta-batch, of ``tasks_per_pass`` tasks at a time; out of memory halves that, which it says.

        Args:
            function: Takes the tasks' parts of ``stacked``; returns a mean over them and whatever else it has a task.
            stacked: Task-stacked tensors, or containers of such.

        Returns:
            The mean over all tasks, and what else there is, task-stacked.
        """
        parts = tree_leaves(stacked)
        tasks, on_cpu = len(parts[0]), parts[0].device.type == "cpu"
        wanted = self.tasks_per_pass or (self.tasks_in_caches(parts) if on_cpu else tasks)
        while True:
            size = min(tasks, wanted, self.tasks_that_fit or tasks)
            parts = [tree_map(operator.itemgetter(slice(i, i + size)), stacked) for i in range(0, tasks, size)]
            try:
                means, *others = zip(*(function(*part) for part in parts), strict=True)
                break
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self.tasks_that_fit = -(-size // 2)
                rank_zero_warn(f"Out of memory: from now on at most {self.tasks_that_fit} tasks go in a pass")
        if len(parts) == 1:
            return means[0], *(other[0] for other in others)
        weights = [min(size, tasks - i) / tasks for i in range(0, tasks, size)]
        mean = tree_map(lambda *of_parts: sum(w * m for w, m in zip(weights, of_parts, strict=True)), *means)
        return mean, *map(torch.cat, others)

    def tasks_in_caches(self, parts: Sequence[Tensor]) -> int:
        """How many tasks' maps and parameters a CPU's caches hold, for these task-stacked inputs of a pass."""
        # θ', its gradient and its change weigh as well: a quarter, by what was measured of Reptile
        parameters = sum(p.numel() for p in self.meta_parameters().values())
        return max(1, CACHED_VALUES // max(parameters // 4, *(part[0].numel() for part in parts)))

    def forward_tasks(self, params: Params, x: Tensor) -> Tensor:
        """Predictions of every task with its own parameters.  # T S ... -> T S ..."""
        return self.over_tasks(self.forward_task, params, x)

    def forward_task(self, params: Params, x: Tensor) -> Tensor:
        """Predictions of one task.  # S ... -> S ..."""
        weights = inner_loop.weights(params)
        weights |= {alias: weights[name] for alias, name in self.aliases.items() if name in weights}
        with torch.backends.cudnn.flags(enabled=False) if self.recurrent else nullcontext():
            # torch's own tying restores the parameters of a module that stands in two places in the wrong order
            predictions: Tensor = functional_call(self.network, weights, (x,), tie_weights=False)
        return predictions

    def forward_queries(self, params: Params, support_x: Tensor, query_x: Tensor, transductive: bool = True) -> Tensor:
        """Predictions of every task's queries with its own parameters.  # T R ...

        Args:
            params: Task-stacked parameters.
            support_x: Support samples, which matter where the queries do not go forward together.  # T S ...
            query_x: Query samples.  # T R ...
            transductive: Whether the queries of a task go forward together, so that batch norm takes their common
                statistics (Finn et al., 2017), or each alone with the support set (Nichol et al., 2018, section 6.1).
        """
        if transductive:
            return self.forward_tasks(params, query_x)

        def forward_alone(params: Params, support_x: Tensor, query_x: Tensor) -> Tensor:
            def forward_query(query: Tensor) -> Tensor:
                return self.forward_task(params, torch.cat([support_x, query[None]]))[-1]

            return self.over_tasks(forward_query, query_x)

        # as many queries at once as take no more memory than all of them together would
        at_once = max(1, query_x.shape[1] // (support_x.shape[1] + 1))
        parts = query_x.split(at_once, dim=1)
        return torch.cat([self.over_tasks(forward_alone, params, support_x, part) for part in parts], dim=1)

    def task_losses(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Every task's loss.  # T S ..., T S ... -> T"""
        if self.loss is default_loss and not self.outputs_checked:
            # once, since to look at the targets waits for the device
            check_outputs(predictions, targets)
            self.outputs_checked = True
        losses = self.over_tasks(self.loss, predictions, targets)
        require(losses.ndim == 1, f"loss must give a scalar a task, got shape {tuple(losses.shape[1:])}")
        return losses

    def inner_optimizer(self) -> tuple[inner_loop.InnerOptimizer[Any], Any]:
        """The rule of the inner steps, and the state in which it meets every task."""
        return inner_loop.SGD(self.inner_lr), None

    def inner_batches(self, x: Tensor, y: Tensor, steps: int) -> Support:
        """The support samples and targets of each inner step: all of them.  # T S ..., T S ..."""
        return [(x, y)] * steps

    def support_losses(self, support: Support) -> Callable[[Params, int], Tensor]:
        """Task-stacked parameters and an inner step's number to every task's loss in that step.  # T"""
        return lambda params, step: self.task_losses(self.forward_tasks(params, support[step][0]), support[step][1])

    def adapt_tasks(self, params: Params, support: Support, create_graph: bool = False) -> Adapted:
        """The inner loop: gradient steps on the support sets of all tasks at once.

        Args:
            params: Task-stacked parameters to start from.
            support: The samples and targets of each inner step, as ``inner_batches`` gives them.
            create_graph: Keep the graph of the inner gradients (see ``inner_loop.adapt``).
        """
        optimizer, state = self.inner_optimizer()
        losses, adapted = self.support_losses(support), self.adapted(params)
        return inner_loop.adapt(losses, params, len(support), optimizer, state, adapted, create_graph)

    def without_gradient(self, batch: TaskBatch) -> list[str]:
        """The names in θ that the support loss of the first task does not depend on."""
        theta = inner_loop.leaves(inner_loop.stack(inner_loop.weights(self.meta_parameters()), 1))
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):  # no step draws otherwise
            losses = self.task_losses(self.forward_tasks(theta, batch.support_x[:1]), batch.support_y[:1])
        grads = torch.autograd.grad(losses.sum(), list(theta.values()), allow_unused=True)
        return [name for name, g in zip(theta, grads, strict=True) if g is None]

    def inner_update(self, support_x: Tensor, support_y: Tensor) -> Params:
        """θ' of one task.

        In training mode θ' keeps its graph to θ: a loss of it has the gradient of MAML, to first order for FOMAML and
        Reptile. In evaluation mode it takes ``test_inner_steps`` steps and comes detached.

        Args:
            support_x: Support samples; uint8 pixels are scaled to [0, 1], and normalised by whoever trained with
                ``ImageTransforms(mean, std)``: see there.  # S ...
            support_y: Support targets.  # S ...
        """
        steps = self.inner_steps if self.training else self.test_inner_steps
        theta = inner_loop.stack(self.meta_parameters(), tasks=1)
        with torch.enable_grad():
            support = self.inner_batches(scale_pixels(support_x)[None], support_y[None], steps)
            adapted = self.adapt_tasks(theta, support, self.second_order and self.training)
        params = inner_loop.unstack(inner_loop.weights(adapted.params), 0)
        return params if self.training else {name: p.detach() for name, p in params.items()}

    def forward_with_weights(self, query_x: Tensor, adapted_params: Params) -> Tensor:
        """Predictions of one task with the parameters that ``inner_update`` gave.  # R ... -> R ..."""
        return self.forward_tasks({name: p[None] for name, p in adapted_params.items()}, scale_pixels(query_x)[None])[0]

    def adapt(
        self,
        x: Tensor | Array,
        y: Tensor | Array | Sequence[str],
        steps: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Predictor:
        """A predictor for one task, adapted to its support set: the one inner loop, in evaluation mode.

        For more classes than the network has outputs its last linear layer grows, see ``networks.widened``.

        Args:
            x: Support samples as the data set holds them: uint8 pixels, or what else the network takes. They are
                normalised as in training.  # S ...
            y: Class of each sample, a number or a name; for regression its target, floating-point.  # S, S D
            steps: Inner steps. Default: ``test_inner_steps``.
            class_names: Names of the classes, in the sorted order of y's values. Default: those values.

        Raises:
            InputError: If the samples or targets do not fit each other or the network, or there are more classes than
                the network can be given outputs for.
            FloatingPointError: If the inner steps diverge.
        """
        return adapt_learner(self, x, y, self.test_inner_steps if steps is None else steps, class_names)
