"""What MAML, FOMAML and Reptile share: the inner loop over a meta-batch, evaluation and the checkpoint's guard."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.func import functional_call

from meta_lightning import inner_loop
from meta_lightning.checkpoints import verify_checkpoint
from meta_lightning.checks import require, require_at_least, require_choice, require_positive
from meta_lightning.inner_loop import Adapted, Params
from meta_lightning.losses import Loss, check_outputs, default_loss, score
from meta_lightning.metrics import TaskMean
from meta_lightning.networks import with_batch_statistics
from meta_lightning.tasks import TaskBatch

Decay = Literal["constant", "linear", "cosine"]
DECAYS: dict[Decay, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2.0,
}


class MetaLearner(L.LightningModule, ABC):
    """A network's initialisation θ, learnt so that a few gradient steps on a new task's support set suffice.

    The base of the algorithms. They differ in ``training_step``; the inner loop (``adapt``) is one for training,
    validation, test, prediction and use from Python.

    Every argument is described in the algorithms.

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
        outer_lr: float,
        outer_lr_decay: Decay,
    ) -> None:
        super().__init__()
        require_positive(inner_lr=inner_lr, outer_lr=outer_lr)
        test_inner_steps = inner_steps if test_inner_steps is None else test_inner_steps
        require_at_least(1, inner_steps=inner_steps, test_inner_steps=test_inner_steps)
        require_choice(DECAYS, outer_lr_decay=outer_lr_decay)
        # a configuration describes objects in plain words; from Python they are objects, which a checkpoint that is
        # loaded with weights_only cannot hold
        self.save_hyperparameters(ignore=[] if _given_hyperparameters.get() else ["network", "loss", "optimizer"])
        self.automatic_optimization = False
        self.network = with_batch_statistics(network)
        self.loss = loss or default_loss
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.test_inner_steps = test_inner_steps
        self.outer_lr = outer_lr
        self.outer_lr_decay: Decay = outer_lr_decay
        self.loops_over_tasks = inner_loop.wrong_under_vmap(self.network)
        self.outputs_checked = False
        self.evaluation: dict[str, TaskMean] = {}

    @abstractmethod
    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """One meta-iteration; returns the mean loss of the meta-batch."""

    # ------------------------------------------------------------------------------------------------ the inner loop

    def meta_parameters(self) -> Params:
        """θ: the network's parameters that are trained."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

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

    def forward_tasks(self, params: Params, x: Tensor) -> Tensor:
        """Predictions of every task with its own parameters.  # T S ... -> T S ..."""
        return self.over_tasks(lambda params, x: functional_call(self.network, params, (x,)), params, x)

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

    def inner_batches(self, x: Tensor, y: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
        """The support samples and targets of each inner step: all of them.  # T S ..., T S ..."""
        return [(x, y)] * steps

    def adapt(self, params: Params, x: Tensor, y: Tensor, steps: int, create_graph: bool = False) -> Adapted:
        """The inner loop: gradient steps on the support sets of all tasks at once.

        Args:
            params: Task-stacked parameters to start from.
            x: Support samples.  # T S ...
            y: Support targets.  # T S ...
            steps: Number of inner steps.
            create_graph: Keep the graph of the inner gradients (see ``inner_loop.adapt``).
        """
        optimizer, state = self.inner_optimizer()
        batches = self.inner_batches(x, y, steps)

        def support_losses(params: Params, step: int) -> Tensor:
            x, y = batches[step]
            return self.task_losses(self.forward_tasks(params, x), y)

        return inner_loop.adapt(support_losses, params, steps, optimizer, state, create_graph)

    def inner_update(self, support_x: Tensor, support_y: Tensor) -> Params:
        """θ' of one task.

        In training mode θ' keeps its graph to θ: a loss of it has the gradient of MAML, to first order for FOMAML and
        Reptile. In evaluation mode it takes ``test_inner_steps`` steps and comes detached.

        Args:
            support_x: Support samples.  # S ...
            support_y: Support targets.  # S ...
        """
        steps = self.inner_steps if self.training else self.test_inner_steps
        theta = inner_loop.stack(self.meta_parameters(), tasks=1)
        with torch.enable_grad():
            adapted = self.adapt(theta, support_x[None], support_y[None], steps, self.second_order and self.training)
        params = inner_loop.unstack(adapted.params, 0)
        return params if self.training else {name: p.detach() for name, p in params.items()}

    def forward_with_weights(self, query_x: Tensor, adapted_params: Params) -> Tensor:
        """Predictions of one task with the parameters that ``inner_update`` gave.  # R ... -> R ..."""
        return self.forward_tasks({name: p[None] for name, p in adapted_params.items()}, query_x[None])[0]

    # ------------------------------------------------------------------------------------------------ the outer loop

    def outer_lr_factor(self, step: int) -> float:
        """What ``outer_lr`` is multiplied by at this meta-iteration, by ``outer_lr_decay``."""
        # the number of steps is known only once the Trainer has its data
        return DECAYS[self.outer_lr_decay](step / self.trainer.estimated_stepping_batches if step else 0.0)

    def on_fit_start(self) -> None:
        """Refuse what cannot work, before anything is trained."""
        require(
            self.trainer.precision != "16-mixed",
            "trainer.precision must not be 16-mixed: its scaler covers the outer loss only, and gradients of the inner "
            "loop underflow; bf16-mixed works",
        )
        require(
            self.outer_lr_decay == "constant" or math.isfinite(self.trainer.estimated_stepping_batches),
            f"outer_lr_decay {self.outer_lr_decay!r} needs an end of training: expected trainer.max_steps or "
            "trainer.max_epochs, got neither",
        )

    def log_training(self, losses: Tensor, scores: dict[str, Tensor], update: Params) -> Tensor:
        """Log a meta-batch's mean loss and scores, and stop before what is not finite spoils θ.

        Args:
            losses: Every task's loss.  # T
            scores: Every task's scores by name.  # T
            update: What θ is about to be moved by: the meta-gradient, or the adapted parameters.

        Raises:
            FloatingPointError: If a task's loss or the update is NaN or infinite.
        """
        loss = losses.detach().mean()
        if not torch.stack([loss, *(u.detach().sum() for u in update.values())]).isfinite().all():
            checkpoint = self.trainer.checkpoint_callback
            kept = getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", "")
            raise FloatingPointError(
                f"the loss became {loss.item()}, or its gradient not finite, at step {self.global_step}: inner_lr "
                f"{self.inner_lr} or outer_lr {self.outer_lr} is probably too large, or the data are not finite. θ was "
                f"left as it was before this step; last checkpoint: {kept or 'none yet'}"
            )
        values = {"train/loss": loss} | {f"train/{name}": value.mean() for name, value in scores.items()}
        self.log_dict(values, prog_bar=True, batch_size=len(losses))
        return loss

    # ------------------------------------------------------------------------------------------------ evaluation

    def adapt_for_evaluation(self, batch: TaskBatch) -> tuple[Params, Params]:
        """θ and θ' of every task, outside of any graph to the network's parameters."""
        # Lightning evaluates in inference mode, whose tensors autograd refuses even in enable_grad: hence the clones
        with torch.inference_mode(False), torch.enable_grad():
            x, y = batch.support_x.clone(), batch.support_y.clone()
            theta = inner_loop.stack(inner_loop.leaves(self.meta_parameters()), len(x))
            return theta, self.adapt(theta, x, y, self.test_inner_steps).params

    def evaluate(self, batch: TaskBatch, stage: str) -> None:
        """Adapt to each task and note its query loss and scores, before and after."""
        batch = TaskBatch(*batch)
        theta, adapted = self.adapt_for_evaluation(batch)
        for moment, params in (("_before", theta), ("", adapted)):
            predictions = self.forward_tasks(params, batch.query_x)
            values = {"loss": self.task_losses(predictions, batch.query_y)} | score(predictions, batch.query_y)
            for name, tasks in values.items():
                key = f"{stage}/{name}{moment}"
                if key not in self.evaluation:
                    self.evaluation[key] = TaskMean().to(self.device)
                self.evaluation[key].update(tasks)

    def log_evaluation(self, stage: str) -> None:
        """Log each value's mean over the tasks of all ranks, and its 95 % confidence interval."""
        for name, metric in self.evaluation.items():
            mean, ci95, tasks = metric.compute()
            self.log(name, mean, prog_bar=name.endswith(("/accuracy", "/mse")), sync_dist=True)
            self.log(f"{name}_ci95", ci95, sync_dist=True)
            self.log(f"{stage}/tasks", tasks, sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        """Begin the statistics anew."""
        self.evaluation = {}

    def on_test_epoch_start(self) -> None:
        """Begin the statistics anew."""
        self.evaluation = {}

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Evaluate a batch of validation tasks."""
        self.evaluate(batch, "val")

    def test_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Evaluate a batch of test tasks."""
        self.evaluate(batch, "test")

    def predict_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """Class probabilities (for regression: predictions) of each task's queries.  # T R N, T R D"""
        batch = TaskBatch(*batch)
        _, adapted = self.adapt_for_evaluation(batch)
        predictions = self.forward_tasks(adapted, batch.query_x)
        return predictions if batch.query_y.is_floating_point() else predictions.softmax(2)

    def on_validation_epoch_end(self) -> None:
        """Log the validation."""
        self.log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the test."""
        self.log_evaluation("test")

    # ------------------------------------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the algorithm in the checkpoint."""
        checkpoint["algorithm"] = type(self).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another algorithm or network (InputError)."""
        verify_checkpoint(checkpoint, type(self).__name__, self.state_dict())
