"""Meta-training in one call, for those who bring a network and a loader."""

from collections.abc import Iterable
from typing import Any, Literal

import lightning as L
from torch import Tensor, nn
from torch.utils.data import DataLoader

from meta_lightning.algorithms import FOMAML, MAML, MetaLearner, Reptile
from meta_lightning.algorithms.maml import OuterOptimizer
from meta_lightning.checks import require_choice
from meta_lightning.tasks import TaskBatch

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
    recorder = LossRecorder()
    trainer = L.Trainer(max_epochs=1, devices=1, callbacks=[recorder], logger=False, enable_checkpointing=False)
    loader: Any = task_dataloader
    if isinstance(loader, list | tuple):  # which Lightning would take for several loaders
        loader = DataLoader(loader, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(learner, loader)
    return model, learner, [loss.item() for loss in recorder.losses]


class LossRecorder(L.Callback):
    """Keeps the loss of every meta-iteration."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss that ``training_step`` returned."""
        self.losses.append(outputs["loss"])
