"""What the algorithms share: a network that adapts to tasks, and its training, evaluation and checkpoints."""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from meta_lightning.adaptation.adapt import adapt_to
from meta_lightning.adaptation.predictor import Predictor
from meta_lightning.adaptation.surgery import in_evaluation
from meta_lightning.checks import (
    NamedOptions,
    require,
    require_at_least,
    require_matches,
    require_positive,
    require_precision,
    require_whole_network,
)
from meta_lightning.data.form import SampleForm, form_of
from meta_lightning.data.tasks import Array, TaskBatch, as_task_batch, scale_pixels
from meta_lightning.inner.loop import Adapted, InnerStep, Support, trajectory
from meta_lightning.inner.params import RULE, Params, for_rule, leaves, of_network, stack, unstack
from meta_lightning.inner.passes import Passes
from meta_lightning.inner.rules import FORMER_KEYS, InnerRule, as_rule
from meta_lightning.inner.task_network import Loss, TaskNetwork, default_loss
from meta_lightning.networks.batch_statistics import with_batch_statistics
from meta_lightning.outer.update import Decay, OuterOptimizer, OuterUpdate, Scheduler, is_finite
from meta_lightning.runs.checkpoint_file import load_network, network_description, renamed, verify_checkpoint
from meta_lightning.runs.machine import keep_freed_memory
from meta_lightning.scores import Evaluation, score


class MetaLearner(NamedOptions, L.LightningModule, ABC):
    """A learner whose initialisation θ is itself learnt, so that a few gradient steps on a new task suffice.

    The base of the algorithms, which differ in ``training_step``.

    Args:
        network: Any module from samples ``S …`` to predictions ``S …``; its parameters that require gradients are θ.
            Batch norm in it uses the batch's statistics.
        loss: Predictions and targets of one task to a scalar. Default: cross-entropy for integer targets, mean squared
            error for floating-point ones.
        test_inner_steps: Inner steps in validation, test and prediction. Default: ``inner_steps``.
        inner_rule: Rule of the inner steps: ``SGD`` (the default), ``MetaSGD``, ``Adam``, or an ``InnerRule`` of one's
            own.
        inner_freeze: Parameters that inner steps leave as they are, by patterns of their names: ``features.*`` adapts
            the head alone (ANIL, Raghu et al., 2020, https://arxiv.org/abs/1909.09157), ``head.*`` the body alone
            (BOIL, Oh et al., 2021, https://arxiv.org/abs/2008.08882).
        outer_freeze: Parameters that outer steps leave as they are, likewise.
        optimizer: The outer optimizer, called with the parameters and ``outer_lr``; Reptile has none.
        outer_lr_decay: How ``outer_lr`` falls over the training: not at all, linearly to zero, or to zero along half a
            cosine.
        scheduler: Makes a schedule of ``outer_lr``, in the place of ``outer_lr_decay``: any of
            ``torch.optim.lr_scheduler`` that goes by the number of steps alone. It steps once per meta-iteration.
        tasks_per_pass: Tasks of a meta-batch that are computed at once, which changes nothing but time, memory and the
            draws of dropout. Default: on a CPU as many as its caches hold, elsewhere all; fewer after running out of
            memory.
        compile_passes: Compile the passes of training with ``torch.compile``, which changes nothing but time, rounding
            and the draws of dropout. It takes from seconds to minutes, and a C++ compiler or, on a GPU, Triton. A
            branch of the network by a value of a buffer or a random number of Python stays as it was then.
        transductive: Whether evaluation sends a task's queries forward together, so that batch norm takes their common
            statistics (Finn et al., 2017), or each alone with the support set (Nichol et al., 2018, section 6.1).
        init_from: A checkpoint, of any algorithm, whose network's weights to start from.
        max_skipped: Meta-iterations in a row that may be skipped since their update is not finite; with more of them
            training ends, at the next log interval.

    Raises:
        InputError: If an argument is outside its range.
    """

    second_order: ClassVar[bool] = False  # whether training differentiates through the inner gradients
    greatest_outer_lr: ClassVar[float] = math.inf

    def __init__(
        self,
        network: nn.Module,
        loss: Loss | None = None,
        *,
        inner_lr: float,
        inner_steps: int,
        outer_lr: float,
        test_inner_steps: int | None = None,
        inner_rule: InnerRule | None = None,
        inner_freeze: Sequence[str] = (),
        outer_freeze: Sequence[str] = (),
        optimizer: OuterOptimizer | None = None,
        outer_lr_decay: Decay = "constant",
        scheduler: Scheduler | None = None,
        tasks_per_pass: int | None = None,
        compile_passes: bool = False,
        transductive: bool = True,
        init_from: str | None = None,
        max_skipped: int = 10,
    ) -> None:
        super().__init__()
        # a configuration describes objects in plain words; from Python they are objects, which a checkpoint that is
        # loaded with weights_only cannot hold. A checkpoint has the weights, and so does not need init_from
        objects = [] if _given_hyperparameters.get() else ["network", "loss", "optimizer", "scheduler", "inner_rule"]
        self.save_hyperparameters(ignore=["init_from", *objects])
        rule = as_rule(inner_rule)
        if inner_rule is not None and objects:
            self.save_hyperparameters({"inner_rule": rule.description()})
        test_inner_steps = inner_steps if test_inner_steps is None else test_inner_steps
        require_positive(inner_lr=inner_lr, outer_lr=outer_lr)
        most = self.greatest_outer_lr
        require(outer_lr <= most, f"outer_lr of {type(self).__name__} must be in (0, {most:g}], got {outer_lr}")
        require_at_least(1, inner_steps=inner_steps, test_inner_steps=test_inner_steps)
        learnt = [name for name, p in loss.named_parameters() if p.requires_grad] if isinstance(loss, nn.Module) else []
        require(not learnt, f"loss must have no parameters to learn, which belong into the network, got {learnt}")
        self.automatic_optimization = False
        self.inner_lr, self.inner_steps, self.test_inner_steps = inner_lr, inner_steps, test_inner_steps
        self.outer_lr, self.optimizer = outer_lr, optimizer
        self.transductive = transductive
        self.network = with_batch_statistics(network)
        self.loss = loss or default_loss
        if init_from is not None:
            load_network(self.network, init_from)
        names = [name for name, p in network.named_parameters() if p.requires_grad]
        self.inner_frozen = require_matches(names, inner_freeze=inner_freeze)
        self.outer_frozen = require_matches(names, outer_freeze=outer_freeze)
        for argument, frozen in (("inner_freeze", self.inner_frozen), ("outer_freeze", self.outer_frozen)):
            require(not names or len(frozen) < len(names), f"{argument} must leave a parameter, got patterns of all")
        self.task_network = TaskNetwork(self)
        self.inner_rule = rule
        self.inner_rule.prepare(self.adapted(self.network_parameters()), inner_lr)
        self.passes = Passes(tasks_per_pass, compile_passes)
        self.outer_update = OuterUpdate(outer_lr_decay, scheduler, max_skipped)
        self.evaluation = Evaluation()
        self.gradients_checked = False
        self.form = SampleForm()
        self.description = network_description(self.hparams)

    def network_parameters(self) -> Params:
        """The network's parameters that are trained or adapted."""
        frozen = self.inner_frozen & self.outer_frozen
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad and name not in frozen}

    def meta_parameters(self) -> Params:
        """θ: the network's parameters that are trained or adapted, and the inner rule's own, a dot before the name."""
        return self.network_parameters() | for_rule(dict(self.inner_rule.named_parameters()))

    def adapted(self, params: Params) -> Params:
        """What the inner steps move."""
        return {name: p for name, p in of_network(params).items() if name not in self.inner_frozen}

    def learned(self, params: Params) -> Params:
        """What the outer steps move."""
        return {name: p for name, p in params.items() if name not in self.outer_frozen}

    def inner_batches(self, x: Tensor, y: Tensor, steps: int) -> Support:
        """The support samples and targets of each inner step: all of them.  # T S ..., T S ..."""
        return [(x, y)] * steps

    def inner_trajectory(self, theta: Params, support: Support, **options: bool) -> Iterator[Adapted]:
        """θ' of every task after 1, …, K inner steps; the options are those of ``trajectory``."""
        step = InnerStep(self.task_network.losses_of, self.inner_rule, self.inner_lr, [*self.adapted(theta)])
        return trajectory(step, theta, support, **options)

    def inner_loop(self, theta: Params, support: Support, **options: bool) -> Adapted:
        """θ'_K of every task, with the graph to ``theta``, task-stacked; the options are those of ``trajectory``."""
        (adapted,) = deque(self.inner_trajectory(theta, support, **options), maxlen=1)  # which keeps θ'_K alone
        return adapted

    def in_passes(self, function: Callable[..., tuple[Any, ...]], *stacked: Any, compiled: bool) -> tuple[Any, ...]:
        """``Passes.run`` of a method of this learner: its first result is averaged, the others are concatenated."""
        theta, key = self.meta_parameters(), None
        if compiled and self.passes.compiled is not None:
            # all that a pass takes from the learner: a callback may change it, and moving to a device replaces buffers
            frozen = frozenset(self.inner_frozen), frozenset(self.outer_frozen)
            modes = [module.training for module in self.modules()]
            tensors = [id(tensor) for tensor in (*self.parameters(), *self.buffers())]
            rule = str(self.inner_rule.description())
            key = (function.__name__, self.inner_lr, rule, *frozen, *modes, *tensors, *theta)
        return self.passes.run(function, *stacked, parameters=sum(p.numel() for p in theta.values()), key=key)

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
        theta = stack(self.meta_parameters(), tasks=1)
        with torch.enable_grad():
            support = self.inner_batches(scale_pixels(support_x)[None], support_y[None], steps)
            adapted = self.inner_loop(theta, support, second_order=self.second_order and self.training)
        params = unstack(of_network(adapted.params), 0)
        return params if self.training else {name: p.detach() for name, p in params.items()}

    def forward_with_weights(self, query_x: Tensor, adapted_params: Params) -> Tensor:
        """Predictions of one task with the parameters that ``inner_update`` gave.  # R ... -> R ..."""
        params = {name: p[None] for name, p in adapted_params.items()}
        return self.task_network.predict(params, scale_pixels(query_x)[None])[0]

    def adapt(
        self,
        x: Tensor | Array,
        y: Tensor | Array | Sequence[str],
        steps: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Predictor:
        """A predictor for one task, adapted to its support set: the one inner loop, in evaluation mode.

        For more classes than the network has outputs its last linear layer grows, see ``surgery.widened_head``.

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
        steps = self.test_inner_steps if steps is None else steps
        require_at_least(1, steps=steps)

        def inner_loop(theta: Params, x: Tensor, y: Tensor) -> Params:
            adapted = self.inner_loop(leaves(stack(theta, 1)), self.inner_batches(x[None], y[None], steps))
            params: Params = unstack(of_network(adapted.params), 0)
            if not is_finite(params):
                raise FloatingPointError(
                    f"the adaptation diverged: its {steps} steps of inner_lr {self.inner_lr} are too large"
                )
            return params

        theta = self.meta_parameters()
        # what a parameter with more rows takes along; a state of the rule's is that of the rows that were trained
        grown_with = {name: [RULE + own for own in self.inner_rule.shaped_like(name)] for name in self.adapted(theta)}
        if tree_leaves(self.inner_rule.start()):
            grown_with = {}
        with in_evaluation(self):
            return adapt_to(self.network, theta, inner_loop, x, y, class_names, self.form, grown_with, self.description)

    @abstractmethod
    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """One meta-iteration; returns the mean loss of the meta-batch."""

    def setup(self, stage: str) -> None:
        """Refuse a precision or strategy in which nothing can be adapted."""
        require_precision(str(self.trainer.precision))
        require_whole_network(self.trainer.strategy)

    def on_fit_start(self) -> None:
        """Refuse what cannot work, before anything is trained, and note what the samples look like."""
        if self.device.type == "cpu":
            keep_freed_memory()
        self.outer_update.require_end(self.trainer)
        data: L.LightningDataModule | None = getattr(self.trainer, "datamodule", None)
        if data is not None:
            self.form = form_of(data.hparams, type(data))

    def on_train_start(self) -> None:
        """Begin the outer loop, or go on with it."""
        self.outer_update.begin(self.outer_optimizer().optimizer, self.trainer)

    def on_train_batch_start(self, batch: TaskBatch, batch_idx: int) -> None:
        """Log the outer learning rate with which θ is about to move, and name once what gets no gradient."""
        # on the CPU, where nobody waits for it
        self.log("train/outer_lr", torch.tensor(self.outer_optimizer().param_groups[0]["lr"]))
        if not self.gradients_checked:
            with self.trainer.precision_plugin.forward_context():
                unused = self.without_gradient(as_task_batch(batch))
            if unused:
                rank_zero_warn(
                    f"The loss does not depend on these parameters, which get no gradient: {', '.join(unused)}"
                )
            self.gradients_checked = True

    def without_gradient(self, batch: TaskBatch) -> list[str]:
        """The names of parameters that the support loss of the first task does not depend on."""
        theta = leaves(stack(self.network_parameters(), 1))
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):  # no step draws otherwise
            losses = self.task_network.losses_of(theta, batch.support_x[:1], batch.support_y[:1])
        grads = torch.autograd.grad(losses.sum(), list(theta.values()), allow_unused=True)
        return [name for name, g in zip(theta, grads, strict=True) if g is None]

    def outer_optimizer(self) -> LightningOptimizer:
        """The outer optimizer, or what stands in for it."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        return optimizer

    @contextmanager
    def outer_iteration(self, update: Any) -> Iterator[LightningOptimizer]:
        """``OuterUpdate.step``, around what moves θ by ``update``, the same on all ranks, and steps the optimizer."""
        optimizer = self.outer_optimizer()
        moved = [*self.learned(self.meta_parameters()).values(), *self.buffers()]
        with self.outer_update.step(update, moved, optimizer.optimizer):
            yield optimizer

    def log_training(self, losses: Tensor, scores: Mapping[str, Tensor]) -> Tensor:
        """Log a meta-batch's mean loss and scores, after its outer step.  # T, T

        Raises:
            FloatingPointError: If more than ``max_skipped`` meta-iterations in a row were skipped.
        """
        loss, trainer, outer = losses.detach().mean(), self.trainer, self.outer_update
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning declares it nowhere
        due = interval > 0 and self.global_step % interval == 0
        if due or trainer.is_last_batch or self.global_step == trainer.max_steps:
            if outer.skipped:
                rank_zero_warn("Meta-iterations are skipped whose update is not finite; train/skipped is their number")
            if outer.skipped_in_a_row > outer.max_skipped:
                checkpoint = trainer.checkpoint_callback
                kept = getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", "")
                raise FloatingPointError(
                    f"the loss became {loss.item()}, or its gradient not finite, at step {self.global_step - 1}: "
                    f"inner_lr {self.inner_lr} or outer_lr {self.outer_lr} is probably too large, or the data are not "
                    f"finite. {outer.skipped_in_a_row.item()} meta-iterations in a row were skipped, θ was left as it "
                    f"was before them; last checkpoint: {kept or 'none yet'}"
                )
            values = {"train/loss": loss} | {f"train/{name}": value.mean() for name, value in scores.items()}
            # fetched here, once, and not by the progress bar at every step
            self.log_dict({name: value.cpu() for name, value in values.items()}, prog_bar=True, batch_size=len(losses))
            self.log("train/skipped", outer.skipped.cpu().float())
        return loss

    def predict_tasks(self, batch: TaskBatch, each_step: bool = False) -> list[Tensor]:
        """Predictions of every task's queries before and after adaptation, or before and after each step.  # T R ..."""

        def predict(support: Support, support_x: Tensor, query_x: Tensor) -> tuple[Any, ...]:
            def answers(params: Params) -> Tensor:
                with torch.no_grad():
                    return self.task_network.predict_queries(params, support_x, query_x, self.transductive)

            theta = leaves(stack(self.meta_parameters(), len(query_x)))
            if each_step:
                return (), answers(theta), *(answers(step.params) for step in self.inner_trajectory(theta, support))
            return (), answers(theta), answers(self.inner_loop(theta, support).params)

        # Lightning evaluates in inference mode, whose tensors autograd refuses even in enable_grad: hence the clones
        with torch.inference_mode(False), torch.enable_grad():
            batch = TaskBatch(*(part.clone() for part in batch))
            support = self.inner_batches(batch.support_x, batch.support_y, self.test_inner_steps)
            _, *predictions = self.in_passes(predict, support, batch.support_x, batch.query_x, compiled=False)
        return predictions

    def on_validation_epoch_start(self) -> None:
        """Begin the statistics anew."""
        self.evaluation = Evaluation()

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """Adapt to each task, note its query loss and scores, before and after, and return the predictions after."""
        batch = as_task_batch(batch)
        for moment, predictions in zip(("_before", ""), self.predict_tasks(batch), strict=True):
            values = {"loss": self.task_network.losses(predictions, batch.query_y)} | score(predictions, batch.query_y)
            self.evaluation.update({name + moment: tasks for name, tasks in values.items()})
        return predictions

    def on_validation_epoch_end(self) -> None:
        """Log the statistics."""
        self.evaluation.log(self, "test" if self.trainer.testing else "val")

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """Class probabilities (for regression: predictions) of each task's queries.  # T R N, T R D"""
        batch = as_task_batch(batch)
        *_, predictions = self.predict_tasks(batch)
        return predictions if batch.query_y.is_floating_point() else predictions.softmax(2)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the algorithm in the checkpoint, and keep what was counted and found out."""
        checkpoint["algorithm"] = type(self).__name__
        checkpoint["tasks_that_fit"] = self.passes.tasks_that_fit
        checkpoint["skipped"] = torch.stack(self.outer_update.counters())

    def accept(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another algorithm or network (InputError), and name its state as this version does."""
        checkpoint["state_dict"] = renamed(checkpoint["state_dict"], FORMER_KEYS)
        verify_checkpoint(checkpoint, type(self).__name__, self.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint, or refuse it (InputError), and note what its samples looked like."""
        self.accept(checkpoint)
        self.form = form_of(checkpoint.get("datamodule_hyper_parameters", {}))
        self.description = network_description(checkpoint.get("hyper_parameters", {}))
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:  # elsewhere others may fit
            self.passes.tasks_that_fit = checkpoint.get("tasks_that_fit")
        for counter, count in zip(self.outer_update.counters(), checkpoint.get("skipped", ()), strict=False):
            counter.copy_(count)
