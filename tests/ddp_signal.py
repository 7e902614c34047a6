"""Callbacks for the command line: a signal to the second of several processes, parameters that are unfrozen."""

import os
import signal
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BaseFinetuning


class Terminate(L.Callback):
    """Sends SIGTERM to the second process alone, and fails if a step asks the devices for a decision."""

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.strategy.reduce_boolean_decision = None  # type: ignore[assignment,method-assign]

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


class Unfreeze(BaseFinetuning):
    """Trains the features from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.network.features)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.network.features, optimizer, lr=0.01)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        weights = torch.cat([p.detach().flatten() for p in pl_module.network.parameters()])
        torch.save(weights, f"unfrozen-{trainer.global_rank}.pt")
