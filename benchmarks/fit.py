"""Steps a second of a whole `fit` - data, logging, progress bar, checkpoints - against the bare training step.

    python benchmarks/fit.py [--steps 30] [--tasks 32] [--accelerator gpu]

MAML, 64 filters, 5 inner steps, 5-way 1-shot 15-query tasks of 28×28 characters. The bare step is the meta-gradient and
the optimizer's step on one batch that is already on the device, timed before and after the fit.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings

import lightning as L
import torch

from meta_lightning import MAML, Conv4, Glyphs
from meta_lightning.data.tasks import TaskBatch, as_task_batch
from meta_lightning.runs.checkpoint_callback import Checkpoints
from meta_lightning.runs.machine import keep_freed_memory


def bare(learner: MAML, batch: TaskBatch, repeats: int) -> list[float]:
    """Seconds of each bare step."""
    optimizer = torch.optim.Adam(learner.meta_parameters().values(), learner.outer_lr)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        gradient, *_ = learner.meta_gradient(batch)
        for name, p in learner.meta_parameters().items():
            p.grad = gradient[name]
        torch.nn.utils.clip_grad_norm_(learner.meta_parameters().values(), 1.0)
        optimizer.step()
        if batch.support_x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[1:]


class Clock(L.Callback):
    """Times the training steps, from the end of one to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.ends.append(time.perf_counter())


def main(steps: int, tasks: int, accelerator: str) -> None:
    data = Glyphs(meta_batch_size=tasks, epoch_length=steps, val_tasks=tasks)
    data.prepare_data()
    learner = MAML(Conv4())
    device = "cuda" if accelerator == "gpu" else "cpu"
    if device == "cpu":
        keep_freed_memory()  # as the fit does
    batch = as_task_batch(TaskBatch(*(part.to(device) for part in data.task_set("train").batch(range(tasks)))))
    times = bare(learner.to(device), batch, steps // 2)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=1,
            max_steps=steps,
            default_root_dir=folder,
            callbacks=[clock, Checkpoints()],
            log_every_n_steps=10,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        trainer.fit(learner, data)
    times += bare(learner.to(device), batch, steps // 2)
    whole = (clock.ends[-1] - clock.ends[0]) / (len(clock.ends) - 1)
    step = statistics.mean(times)
    print(f"{tasks} tasks: bare step {step * 1e3:.1f} ms, in fit {whole * 1e3:.1f} ms: {step / whole:.1%} of its rate")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tasks", type=int, default=32)
    parser.add_argument("--accelerator", default="gpu" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main(arguments.steps, arguments.tasks, arguments.accelerator)
