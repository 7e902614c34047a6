"""Whether memory stays flat over a long `fit` with validation every 100 steps.

    OMP_NUM_THREADS=1 python benchmarks/soak.py [--minutes 30] [argument of fit …]

Runs maml.yaml with both loggers and checkpoints in a temporary folder, notes the resident memory (Linux: /proc) after
each validation, and prints the least-squares slope of those after the first fifth.
"""

import argparse
import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from meta_lightning.cli import main

PAGE = os.sysconf("SC_PAGE_SIZE")


class Memory(L.Callback):
    """Notes time, step and resident memory after each validation."""

    notes: list[tuple[float, int, float]] = []  # noqa: RUF012  # of the one run, made by the command line

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6
        self.notes.append((time.monotonic() / 60, trainer.global_step, resident))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    known, rest = parser.parse_known_args()
    seconds = int(known.minutes * 60)
    duration = f"{seconds // 86400:02}:{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    options = f"""fit --config maml.yaml --model.outer_lr_decay constant
    --trainer.max_steps -1 --trainer.max_time {duration} --trainer.val_check_interval 100 --trainer.log_every_n_steps 10
    --trainer.enable_progress_bar false --trainer.logger+=TensorBoardLogger --trainer.logger.save_dir=.
    --trainer.logger+=CSVLogger --trainer.logger.save_dir=table --trainer.callbacks+=__main__.Memory
    --data.val_tasks 48 --data.queries 5 --checkpoint.every_n_steps 50"""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        main([*options.split(), *rest])
    minutes, steps, resident = np.array(Memory.notes).T
    settled = minutes >= minutes[0] + (minutes[-1] - minutes[0]) / 5
    slope, _ = np.polyfit(minutes[settled], resident[settled], 1)
    print(
        f"{len(minutes)} validations over {minutes[-1] - minutes[0]:.1f} minutes and {steps[-1]:.0f} steps: resident "
        f"memory {resident[0]:.0f} MB after the first, {resident[settled][0]:.0f} MB after a fifth, "
        f"{resident[-1]:.0f} MB after the last, at most {resident.max():.0f} MB; slope {slope:+.3f} MB a minute"
    )
