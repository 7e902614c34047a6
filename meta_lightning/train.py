"""Learners in one call: meta-trained on the tasks of a loader, or restored from a checkpoint."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from meta_lightning.algorithms import FOMAML, MAML, MetaLearner, Reptile
from meta_lightning.checks import require_choice
from meta_lightning.data.tasks import TaskBatch
from meta_lightning.inner.rules import InnerRule
from meta_lightning.inner.task_network import Loss
from meta_lightning.outer.update import OuterOptimizer
from meta_lightning.runs.checkpoint_file import restore

ALGORITHMS: dict[str, type[MetaLearner]] = {"maml": MAML, "fomaml": FOMAML, "reptile": Reptile}


def train_maml(
    model: nn.Module,
    task_dataloader: Iterable[TaskBatch],
    inner_lr: float = 0.01,
    outer_lr: float | None = None,
    inner_steps: int = 5,
    algorithm: Literal["maml", "fomaml", "reptile"] = "maml",
    optimizer_cls: OuterOptimizer | None = None,
) -> tuple[nn.Module, MetaLearner, list[float]]:
    """Meta-train a network on the tasks of a loader, one meta-iteration a batch, once through.

    Args:
        model: The network, trained in place; batch norm's running statistics stay as they are, since the learner uses
            the batch's.
        task_dataloader: Yields ``TaskBatch`` or plain ``(support_x, support_y, query_x, query_y)``, each with a leading
            task dimension.
        inner_lr: Inner learning rate (α).
        outer_lr: Outer learning rate; None for the algorithm's own default.
        inner_steps: Inner steps (K).
        algorithm: Which of the three.
        optimizer_cls: The outer optimizer's class; None for the algorithm's own default. Reptile takes none.

    Returns:
        The network, the learner (to adapt with), and the mean loss of each meta-iteration.

    Raises:
        InputError: If an argument is outside its range, or an optimizer is given to Reptile.
    """
    require_choice(ALGORITHMS, algorithm=algorithm)
    given: dict[str, Any] = {"outer_lr": outer_lr, "optimizer": optimizer_cls}
    options = {name: value for name, value in given.items() if value is not None}
    learner = ALGORITHMS[algorithm](network=model, inner_lr=inner_lr, inner_steps=inner_steps, **options)
    losses: list[Tensor] = []
    recorder = LambdaCallback(on_train_batch_end=lambda trainer, learner, outputs, *_: losses.append(outputs["loss"]))
    trainer = L.Trainer(max_epochs=1, devices=1, callbacks=[recorder], logger=False, enable_checkpointing=False)
    loader: Any = task_dataloader
    if isinstance(loader, list | tuple):  # which Lightning would take for several loaders
        loader = DataLoader(loader, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(learner, loader)
    return model, learner, [loss.item() for loss in losses]


def load_learner(
    path: str | Path,
    network: nn.Module | None = None,
    loss: Loss | None = None,
    inner_rule: InnerRule | None = None,
) -> MetaLearner:
    """The learner of a checkpoint, whichever algorithm's it is, on the CPU and in evaluation mode.

    Args:
        path: The checkpoint.
        network: A network like the one that was trained, which takes its parameters. A checkpoint of the command line
            describes the network; one made in Python does not, and needs this.
        loss: The loss, where one was given in Python, of which a checkpoint knows nothing either.
        inner_rule: The inner rule, where its class cannot be imported.

    Raises:
        InputError: If it is no checkpoint of a learner, or ``network`` is missing or another.
    """
    learner: MetaLearner = restore(path, network=network, loss=loss, inner_rule=inner_rule)
    return learner
