"""Meta-train a learner in one call, or restore it from a checkpoint."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from meta_lightning.algorithms import ALGORITHMS, MetaLearner
from meta_lightning.checks import require_choice
from meta_lightning.data.tasks import TaskBatch
from meta_lightning.inner.heads import HeadStart
from meta_lightning.inner.rules import InnerRule
from meta_lightning.inner.samples import Output
from meta_lightning.inner.task_network import Loss
from meta_lightning.outer.update import OuterOptimizer
from meta_lightning.runs.checkpoint_file import restore


def train_maml(
    model: nn.Module,
    task_dataloader: Iterable[TaskBatch],
    inner_lr: float = 0.01,
    outer_lr: float | None = None,
    inner_steps: int = 5,
    algorithm: str = "maml",
    optimizer_cls: OuterOptimizer | None = None,
) -> tuple[nn.Module, MetaLearner, list[float]]:
    """Meta-train a network for one pass over a loader, one meta-iteration per batch of tasks.

    Args:
        model: The network, trained in place. The running statistics of batch norm are left unchanged: the learner
            normalises by batch statistics.
        task_dataloader: Yields ``TaskBatch`` or plain ``(support_x, support_y, query_x, query_y)``, each with a leading
            task dimension.
        inner_lr: Inner learning rate (α).
        outer_lr: Outer learning rate; None uses the algorithm's default.
        inner_steps: Number of inner steps (K).
        algorithm: Name of the algorithm: ``maml``, ``fomaml``, ``reptile`` or another of ``ALGORITHMS``.
        optimizer_cls: Class of the outer optimizer; None uses the algorithm's default. Reptile takes no optimizer.

    Returns:
        The network, the learner (for adaptation), and the mean loss of each meta-iteration.

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
    if isinstance(loader, list | tuple):  # Lightning treats a sequence as several loaders
        loader = DataLoader(loader, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(learner, loader)
    return model, learner, [loss.item() for loss in losses]


def load_learner(
    path: str | Path,
    network: nn.Module | None = None,
    loss: Loss | None = None,
    inner_rule: InnerRule | None = None,
    head_start: HeadStart | None = None,
    output: Output | None = None,
) -> MetaLearner:
    """Load the learner of a checkpoint, of any algorithm, on the CPU and in evaluation mode.

    Args:
        path: The checkpoint: a path, or ``hub:NAME`` for one that comes with the package.
        network: A network with the architecture of the trained one; it receives the parameters. Required if the
            network was built in Python: only checkpoints of the command line describe it.
        loss: The loss, if it was passed in Python: checkpoints do not store it.
        inner_rule: The inner rule, if its class cannot be imported.
        head_start: The head start, if its class cannot be imported.
        output: The function ``output``, if it was passed in Python.

    Raises:
        InputError: If the file is not a checkpoint of a learner, or ``network`` is missing or does not match.
    """
    objects: dict[str, Any] = {
        "network": network,
        "loss": loss,
        "inner_rule": inner_rule,
        "head_start": head_start,
        "output": output,
    }
    learner: MetaLearner = restore(path, **objects)
    return learner
