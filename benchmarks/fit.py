"""What a whole `fit` - data, logging, checkpoints, dashboard - adds to its passes.

    python benchmarks/fit.py [glyphs] [sinusoid] [--steps 300] [--compile_passes record] [--accelerator gpu]

glyphs: MAML, Conv4 with 32 filters, 2 inner steps and 8 tasks. sinusoid: MAML, MLP 40-40, 1 inner step
and 25 tasks, as in the paper. Each row has the milliseconds per meta-iteration of the pass alone (the meta-gradient of
one batch on the device), of the whole fit, and of a bare Lightning loop around the same pass: manual optimization,
clipping, fused Adam, the same logger. The three are measured in turn, and the smallest of three runs counts.
"""

import argparse
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from meta_lightning import MAML, MLP, Conv4, Dashboard, Glyphs, Sinusoid, TaskDataModule
from meta_lightning.data.tasks import TaskBatch, as_task_batch
from meta_lightning.runs.checkpoint_callback import Checkpoints
from meta_lightning.runs.machine import keep_freed_memory

Workload = tuple[Callable[..., MAML], TaskDataModule]
WORKLOADS: dict[str, Callable[[], Workload]] = {
    "glyphs": lambda: (
        lambda **options: MAML(Conv4(filters=32), inner_lr=0.2, inner_steps=2, **options),
        Glyphs(train_queries=5, meta_batch_size=8, epoch_length=10**6),
    ),
    "sinusoid": lambda: (
        lambda **options: MAML(MLP(), inner_lr=0.01, inner_steps=1, **options),
        Sinusoid(meta_batch_size=25, epoch_length=10**6),
    ),
}
COMPILE: dict[str, Any] = {"false": False, "record": "record", "true": True}


class Bare(L.LightningModule):
    """The least that a Lightning loop with manual optimization does around a pass, always of the same batch."""

    def __init__(self, learner: MAML, batch: TaskBatch) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = learner.network
        self.meta_gradient = lambda: learner.meta_gradient(batch)[0]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        gradient = self.meta_gradient().values()
        terms = [(p * g).sum() for p, g in zip(self.network.parameters(), gradient, strict=True)]
        self.manual_backward(torch.stack(terms).sum())
        self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()
        if self.trainer.global_step % self.trainer.log_every_n_steps == 0:
            self.log("train/loss", torch.zeros(()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), 1e-9, fused=True)


class Clock(L.Callback):
    """Notes when training steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.ends.append(time.perf_counter())


def fit(module: L.LightningModule, data: Any, steps: int, accelerator: str, *callbacks: L.Callback) -> float:
    """Seconds per step of a fit, without its first ten."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=1,
            max_steps=steps + 10,
            default_root_dir=folder,
            callbacks=[clock, *callbacks],
            num_sanity_val_steps=0,
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=bool(callbacks),
        )
        trainer.fit(module, data)
    return (clock.ends[-1] - clock.ends[9]) / steps


def bare_pass(learner: MAML, batch: TaskBatch, steps: int) -> float:
    """Seconds per meta-gradient."""
    learner.meta_gradient(batch)
    start = time.perf_counter()
    for _ in range(steps):
        learner.meta_gradient(batch)
    if batch.support_x.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def measure(name: str, steps: int, compile_passes: str, accelerator: str) -> str:
    make, data = WORKLOADS[name]()
    data.prepare_data()
    device = "cuda" if accelerator == "gpu" else "cpu"
    if device == "cpu":
        keep_freed_memory()  # as the fit does
    batch = as_task_batch(TaskBatch(*(p.to(device) for p in data.task_set("train").batch(range(data.meta_batch_size)))))
    learner = make(compile_passes=COMPILE[compile_passes])
    times: dict[str, list[float]] = {"pass": [], "fit": [], "bare": []}
    for _ in range(3):
        learner.to(device)  # each fit ends with moving it to the CPU
        times["pass"].append(bare_pass(learner, batch, steps))
        times["fit"].append(fit(learner, data, steps, accelerator, Checkpoints(), Dashboard()))
        learner.to(device)
        loader = DataLoader([torch.zeros(1)] * (steps + 10), batch_size=None)  # type: ignore[arg-type]
        times["bare"].append(fit(Bare(learner, batch), loader, steps, accelerator))
    of_pass, of_fit, of_bare = (1e3 * min(of_runs) for of_runs in times.values())
    return (
        f"{name}, compile_passes {compile_passes}: pass {of_pass:.2f} ms, bare loop around it {of_bare:.2f} ms, "
        f"fit {of_fit:.2f} ms: {of_pass / of_fit:.0%} pass, {of_fit - of_bare:+.2f} ms above the bare loop"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), help=", ".join(WORKLOADS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--compile_passes", choices=COMPILE, default="record")
    parser.add_argument("--accelerator", default="gpu" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"{torch.get_num_threads()} threads, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}")
    for name in arguments.workloads:
        print(measure(name, arguments.steps, arguments.compile_passes, arguments.accelerator), flush=True)
