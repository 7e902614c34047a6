"""A callback for the command line: the second of several processes gets a signal, the others do not."""

import os
import signal
from typing import Any

import lightning as L


class Terminate(L.Callback):
    """Sends SIGTERM to the second process alone, and fails if a step asks the devices for a decision."""

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.strategy.reduce_boolean_decision = None  # type: ignore[assignment,method-assign]

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
