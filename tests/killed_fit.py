"""The command line, killed so many seconds into a meta-iteration: killed_fit.py STEP SECONDS fit …; -1 for never."""

import os
import signal
import sys
import threading
from typing import Any

import lightning as L
from torch import Tensor, nn

from meta_lightning.cli import main


class DropoutMLP(nn.Module):
    """A regression network that draws random numbers of its own, in training and in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y + 0.01 * nn.functional.dropout(y, 0.5, training=True)


class Kill(L.Callback):
    """Kills the process some time into a meta-iteration, wherever it then is."""

    def __init__(self, step: int, seconds: float) -> None:
        self.step, self.seconds = step, seconds

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


class Terminate(L.Callback):
    """Asks every meta-iteration to be the last."""

    def on_train_batch_start(self, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    step, seconds, *arguments = sys.argv[1:]
    callbacks = ["--trainer.callbacks+=killed_fit.Kill", f"--trainer.callbacks.step={step}"]
    main([*arguments, *callbacks, f"--trainer.callbacks.seconds={seconds}"])
