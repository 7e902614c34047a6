"""Trains and tests the algorithms on as many gloo processes as torchrun starts: ddp_script.py FOLDER.

Each process leaves NAME-RANK.pt: its parameters, the figures of the test, and the tasks that it met.
"""

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from meta_lightning import FOMAML, MAML, MLP, MetaLearner, Reptile, Sinusoid


class Seen(L.Callback):
    """Notes the support sets that this process meets, and what it logs in training."""

    def __init__(self) -> None:
        self.tasks: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, *args: Any) -> None:
        self.tasks["train"] += batch[0]

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, *args: Any) -> None:
        self.tasks["val"] += batch[0]

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.logged.append({name: value.item() for name, value in trainer.logged_metrics.items()})

    def on_test_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, *args: Any) -> None:
        self.tasks["test"] += batch[0]


def learners() -> dict[str, MetaLearner]:
    """The algorithms, Reptile with its inner Adam and minibatches besides."""
    common: dict[str, Any] = {"inner_steps": 3, "outer_lr_decay": "linear"}
    minibatches: dict[str, Any] = {"inner_batch_size": 4, "test_inner_batch_size": 3, "inner_lr": 0.001}
    return {
        "MAML": MAML(MLP(hidden=[8]), **common),
        "FOMAML": FOMAML(MLP(hidden=[8]), **common),
        "Reptile": Reptile(MLP(hidden=[8]), **common),
        "Reptile, Adam": Reptile(MLP(hidden=[8]), inner_optimizer="adam", **common, **minibatches),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    L.seed_everything(0)
    for name, learner in learners().items():
        # 9 and 11 tasks in batches of 8 leave the ranks unequal shares
        data = Sinusoid(meta_batch_size=8, test_queries=10, epoch_length=25, val_tasks=9, test_tasks=11)
        seen = Seen()
        trainer = L.Trainer(
            accelerator="cpu",
            devices=int(os.environ["LOCAL_WORLD_SIZE"]),
            strategy=DDPStrategy(process_group_backend="gloo"),
            precision="64-true",
            max_steps=50,
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            callbacks=[seen],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(learner, data)
        (figures,) = trainer.test(learner, data, verbose=False)
        tasks = {split: torch.stack(supports) for split, supports in seen.tasks.items()}
        left = {"state": learner.state_dict(), "figures": figures, "tasks": tasks, "logged": seen.logged}
        torch.save(left, Path(sys.argv[1], f"{name}-{trainer.global_rank}.pt"))
