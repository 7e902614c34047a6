"""Milliseconds per meta-gradient of a ResNet-18 that is frozen in front of a head, and sizes of saved predictors.

    python benchmarks/backbone.py

The network is written without ``Backbone``, so that the script runs on versions before it too: put another checkout in
PYTHONPATH. "first" is the first meta-iteration, in which no sample is known; the others are of the same tasks, as from
the second epoch of training on. "at every inner step" is the same network as a module that is no chain, whose frozen
body therefore runs in every pass. Times are those of the processor, one thread.
"""

import argparse
import inspect
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torchvision.models import resnet18

from meta_lightning import FOMAML, MAML, MetaLearner, Predictor, TaskBatch

WAYS, SHOTS, QUERIES, STEPS = 5, 1, 5, 5


def network() -> nn.Sequential:
    """A frozen body in front of a head."""
    torch.manual_seed(0)
    body = resnet18()
    body.fc = nn.Identity()
    return nn.Sequential(body.requires_grad_(False), nn.Linear(512, WAYS))


class Apart(nn.Module):
    """A network whose frozen body runs at every inner step, since nothing says that it comes first."""

    def __init__(self, chain: nn.Sequential) -> None:
        super().__init__()
        self.body, self.head = chain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Body, then head."""
        predictions: torch.Tensor = self.head(self.body(x))
        return predictions


def batch(tasks: int, size: int) -> TaskBatch:
    """Tasks of random pictures."""

    def samples(per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.arange(WAYS).repeat_interleave(per_class)
        return torch.rand(tasks, len(y), 3, size, size), y.expand(tasks, -1)

    return TaskBatch(*samples(SHOTS), *samples(QUERIES))


def milliseconds(learner: MAML, tasks: TaskBatch, repeats: int) -> list[float]:
    """Of meta-gradients in turn."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        learner.meta_gradient(tasks)
        times.append(1000 * (time.process_time() - start))
    return times


def sizes(learner: MetaLearner, tasks: TaskBatch) -> str:
    """Of a whole predictor and of a delta, which is loaded onto its base."""
    if "delta" not in inspect.signature(Predictor.save).parameters:
        return "no deltas in this version"
    predictor = learner.adapt(tasks.support_x[0], tasks.support_y[0])
    with tempfile.TemporaryDirectory() as folder:
        whole, delta = Path(folder, "whole.safetensors"), Path(folder, "delta.safetensors")
        predictor.save(whole)
        predictor.save(delta, delta=True)
        loaded = Predictor.load(delta, network())
        x = tasks.query_x[0]
        same = "equal" if torch.equal(loaded(x), predictor(x)) else "OTHER"
        return f"whole {whole.stat().st_size:,} B, delta {delta.stat().st_size:,} B, whose predictions are {same}"


def main() -> None:
    """Print a line per algorithm, and the sizes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=84, help="pixels")
    parser.add_argument("--tasks", type=int, default=2, help="in a meta-batch")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    tasks = batch(options.tasks, options.size)
    for algorithm in (FOMAML, MAML):
        learner = algorithm(network(), inner_steps=STEPS, compile_passes=False)
        first, *others = milliseconds(learner, tasks, options.repeats + 1)
        name = f"{algorithm.__name__}, {options.tasks} tasks of {options.size} px, {STEPS} steps"
        print(f"{name}: first {first:.0f} ms, then {median(others):.1f} ms (least {min(others):.1f})", flush=True)
        _, *apart = milliseconds(algorithm(Apart(network()), inner_steps=STEPS, compile_passes=False), tasks, 3)
        print(f"{name}, at every inner step: {median(apart):.0f} ms")
    print(sizes(learner, tasks))


if __name__ == "__main__":
    main()
