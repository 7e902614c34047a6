"""The outer loop as a Lightning module has it: its learning rate, steps that are skipped, what it logs."""

import math
from abc import ABC
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from meta_lightning.algorithms.learner import Learner
from meta_lightning.checks import require, require_at_least, require_choice, require_positive
from meta_lightning.hardware import require_precision, require_whole_network
from meta_lightning.losses import Loss
from meta_lightning.machine import keep_freed_memory
from meta_lightning.outer_loop import DECAYS, Decay, Scheduler, is_finite, schedule_from, undone_unless
from meta_lightning.tasks import TaskBatch, as_task_batch


class OuterLoop(Learner, ABC):
    """A learner whose θ is moved once a meta-iteration; how is the algorithms' own.

    Raises:
        InputError: If an argument is outside its range.
    """

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
        outer_lr: float,
        outer_lr_decay: Decay,
        scheduler: Scheduler | None,
        max_skipped: int,
    ) -> None:
        super().__init__(
            network,
            loss,
            inner_lr,
            inner_steps,
            test_inner_steps,
            tasks_per_pass=tasks_per_pass,
            compile_passes=compile_passes,
            inner_freeze=inner_freeze,
            outer_freeze=outer_freeze,
        )
        require_positive(outer_lr=outer_lr)
        require_at_least(0, max_skipped=max_skipped)
        require_choice(DECAYS, outer_lr_decay=outer_lr_decay)
        self.automatic_optimization = False
        self.outer_lr = outer_lr
        self.outer_lr_decay: Decay = outer_lr_decay
        self.scheduler = scheduler
        self.schedule: LRScheduler
        self.outer_options: list[dict[str, Any]] = []  # of the optimizer's groups, as it was made
        self.max_skipped = max_skipped
        self.skipped: Tensor
        self.skipped_in_a_row: Tensor
        for counter in ("skipped", "skipped_in_a_row"):
            self.register_buffer(counter, torch.zeros((), dtype=torch.int64), persistent=False)
        self.gradients_checked = False

    def outer_lr_factor(self, step: int) -> float:
        """What ``outer_lr`` is multiplied by at this meta-iteration, by ``outer_lr_decay``."""
        # the number of steps is known only once the Trainer has its data
        return DECAYS[self.outer_lr_decay](step / self.trainer.estimated_stepping_batches if step else 0.0)

    def setup(self, stage: str) -> None:
        """Refuse a precision or strategy in which nothing can be adapted."""
        require_precision(str(self.trainer.precision))
        require_whole_network(self.trainer.strategy)

    def on_fit_start(self) -> None:
        """Refuse what cannot work, before anything is trained."""
        if self.device.type == "cpu":
            keep_freed_memory()
        require(
            self.scheduler is not None
            or self.outer_lr_decay == "constant"
            or math.isfinite(self.trainer.estimated_stepping_batches),
            f"outer_lr_decay {self.outer_lr_decay!r} needs an end of training: expected trainer.max_steps or "
            "trainer.max_epochs, got neither",
        )

    def on_train_start(self) -> None:
        """Let the arguments beat what a resumed checkpoint says of the optimizer, and go on with the schedule."""
        optimizer = self.outer_optimizer().optimizer
        scheduler = self.scheduler or (lambda optimizer: LambdaLR(optimizer, self.outer_lr_factor))
        self.schedule = schedule_from(scheduler, optimizer, self.outer_options, self.global_step)
        optimizer.load_state_dict(optimizer.state_dict())  # which puts its tensors where its options want them

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

    def outer_optimizer(self) -> LightningOptimizer:
        """The outer optimizer, or what stands in for it."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        return optimizer

    @contextmanager
    def outer_iteration(self, update: Any) -> Iterator[LightningOptimizer]:
        """Around what moves θ and steps the optimizer: it is undone, and counted, where the update is not finite.

        Args:
            update: The tensors that θ is moved by, the same on all ranks.
        """
        optimizer, finite = self.outer_optimizer(), is_finite(update)
        moved = [*self.learned(self.meta_parameters()).values(), *self.buffers()]
        with torch.no_grad(), undone_unless(finite, moved, optimizer.optimizer):
            yield optimizer
        self.schedule.step()
        self.skipped += ~finite
        self.skipped_in_a_row.add_(1).mul_(~finite)

    def log_training(self, losses: Tensor, scores: dict[str, Tensor]) -> Tensor:
        """Log a meta-batch's mean loss and scores, after its outer step.

        It waits for the device at the log interval only, and where an epoch or training ends.

        Args:
            losses: Every task's loss.  # T
            scores: Every task's scores by name.  # T

        Raises:
            FloatingPointError: If more than ``max_skipped`` meta-iterations in a row were skipped.
        """
        loss, trainer = losses.detach().mean(), self.trainer
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning declares it nowhere
        due = interval > 0 and self.global_step % interval == 0
        if due or trainer.is_last_batch or self.global_step == trainer.max_steps:
            if self.skipped:
                rank_zero_warn("Meta-iterations are skipped whose update is not finite; train/skipped is their number")
            if self.skipped_in_a_row > self.max_skipped:
                self.stop_skipping(loss)
            values = {"train/loss": loss} | {f"train/{name}": value.mean() for name, value in scores.items()}
            # fetched here, once, and not by the progress bar at every step
            self.log_dict({name: value.cpu() for name, value in values.items()}, prog_bar=True, batch_size=len(losses))
            self.log("train/skipped", self.skipped.cpu().float())
        return loss

    def stop_skipping(self, loss: Tensor) -> NoReturn:
        """Say why training ends."""
        checkpoint = self.trainer.checkpoint_callback
        kept = getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", "")
        raise FloatingPointError(
            f"the loss became {loss.item()}, or its gradient not finite, at step {self.global_step - 1}: inner_lr "
            f"{self.inner_lr} or outer_lr {self.outer_lr} is probably too large, or the data are not finite. "
            f"{self.skipped_in_a_row.item()} meta-iterations in a row were skipped, θ was left as it was before them; "
            f"last checkpoint: {kept or 'none yet'}"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the counts of skipped meta-iterations."""
        checkpoint["skipped"] = torch.stack([self.skipped, self.skipped_in_a_row])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the counts of skipped meta-iterations."""
        for counter, count in zip((self.skipped, self.skipped_in_a_row), checkpoint.get("skipped", ()), strict=False):
            counter.copy_(count)
