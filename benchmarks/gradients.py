"""Whether a device computes what float64 on the CPU does: gradients of every kernel, DDP, and resuming.

    python benchmarks/gradients.py [--device cuda] [--fused]

Each row has a relative error, ‖on the device − float64 on the CPU‖ / ‖float64 on the CPU‖, beside its bound; the exit
status is 1 if one exceeds it. On a GPU the passes are CUDA graphs unless the row says otherwise. --fused adds a pass
with the kernels of torch.compile, which takes a minute. TF32 is off.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from workloads import relative_error

from meta_lightning import FOMAML, IMAML, MAML, MLP, Conv4, MetaLearner, Reptile, ResNet12, Sinusoid, TaskBatch
from meta_lightning.inner.params import Params
from meta_lightning.inner.rules import Adam, MetaSGD

WAYS, IMAGE = 3, 16
STEPS, RESUMED_AT = 6, 3
# smooth, so that rounding crosses no kink of ReLU or max-pooling: float32 is compared as well
SMOOTH = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1, bias=False),  # the gradient of a bias here is rounding only, which Adam scales up
    nn.BatchNorm2d(8),
    nn.Softplus(),
    nn.AvgPool2d(2),
    nn.Conv2d(8, 8, 3, stride=2, bias=False),
    nn.BatchNorm2d(8),
    nn.Tanh(),
    nn.Flatten(),
    nn.Linear(72, WAYS),
)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "smooth": lambda: copy.deepcopy(SMOOTH),
    "Conv4, stride": lambda: Conv4(WAYS, 3, IMAGE, 8, "stride"),
    "Conv4, max-pool": lambda: Conv4(WAYS, 3, IMAGE, 8, "max_pool"),
    "ResNet-12": lambda: ResNet12(WAYS, 3, [4, 8, 8, 8]),
    "conv1d": lambda: nn.Sequential(
        nn.Flatten(2), nn.Conv1d(3, 8, 5, stride=3), nn.BatchNorm1d(8), nn.Softplus(), nn.Flatten(), nn.LazyLinear(WAYS)
    ),
    "MLP": lambda: nn.Sequential(nn.Flatten(), MLP(3 * IMAGE * IMAGE, [16], WAYS)),
}
ALGORITHMS: dict[str, Callable[..., MetaLearner]] = {
    "MAML": MAML,
    "MAML, recomputed": lambda *args, **options: MAML(*args, recompute_inner_steps=True, **options),
    "MAML, MetaSGD": lambda *args, **options: MAML(*args, inner_rule=MetaSGD(), **options),
    "FOMAML": FOMAML,
    "IMAML": IMAML,
    "Reptile": Reptile,
    "Reptile, Adam": lambda *args, **options: Reptile(*args, inner_rule=Adam(), **options),
}


def batch(dtype: torch.dtype, device: str) -> TaskBatch:
    """Four tasks of one support and two query images per class."""
    rng = torch.Generator().manual_seed(1)

    def part(each: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(4, WAYS * each, 3, IMAGE, IMAGE, dtype=torch.float64, generator=rng)
        return x.to(device, dtype), torch.arange(WAYS, device=device).repeat_interleave(each).repeat(4, 1)

    return TaskBatch(*part(1), *part(2))


def update(algorithm: str, network: nn.Module, dtype: torch.dtype, device: str, **options: Any) -> Params:
    """The meta-gradient, or Reptile's mean θ'."""
    options = {"inner_lr": 0.05, "inner_steps": 2, "compile_passes": "record"} | options
    learner = ALGORITHMS[algorithm](network, **options).to(device, dtype)
    tasks = batch(dtype, device)
    for _ in range(2):  # the second runs the graph of the first
        if isinstance(learner, MAML):
            result = learner.meta_gradient(tasks)[0]
        else:
            support = learner.support(tasks.support_x, tasks.support_y, learner.inner_steps)
            result = learner.in_passes(learner.adapt_pass, support)[0]
    return {name: p.detach().cpu().double() for name, p in result.items()}


def gradients(device: str, fused: bool) -> Iterator[tuple[str, float, float]]:
    """Rows of what is compared, the relative error and its bound."""

    def made(name: str) -> nn.Module:
        torch.manual_seed(0)
        network = NETWORKS[name]().double()
        network(batch(torch.float64, "cpu").query_x[0])  # gives lazy layers their shape
        return network

    for network in NETWORKS:
        for algorithm in ALGORITHMS if network == "smooth" else ("MAML", "FOMAML", "Reptile"):
            exact = update(algorithm, made(network), torch.float64, "cpu")
            ways: dict[str, tuple[torch.dtype, float, dict[str, Any]]] = {"float64": (torch.float64, 1e-10, {})}
            if network == "smooth":
                ways["one task at a time"] = torch.float64, 1e-10, {"tasks_per_pass": 1}
                ways["float32"] = torch.float32, 1e-4, {}
                ways["float64, uncompiled"] = torch.float64, 1e-10, {"compile_passes": False}
                if fused and algorithm == "MAML":
                    ways["float32, fused"] = torch.float32, 1e-4, {"compile_passes": True}
            for way, (dtype, bound, options) in ways.items():
                on_device = update(algorithm, made(network), dtype, device, **options)
                yield f"{network}, {algorithm}, {way}", relative_error(on_device, exact), bound


def trained(folder: str, device: str, steps: int, ckpt_path: str | None = None, **options: Any) -> MetaLearner:
    """A short fit on sinusoids, whose last checkpoint is in the folder."""
    L.seed_everything(0)
    learner = MAML(MLP(), inner_steps=2, compile_passes="record")
    trainer = L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(learner, Sinusoid(epoch_length=4, meta_batch_size=4), ckpt_path=ckpt_path, weights_only=False)
    trainer.save_checkpoint(Path(folder) / "last.ckpt")
    return learner.cpu()


def trainings(device: str) -> Iterator[tuple[str, float, float]]:
    """Rows of trainings that must agree to the bit, or with float64's rounding."""
    with tempfile.TemporaryDirectory() as folder:
        alone = trained(folder, device, STEPS).state_dict()
        resumed = trained(folder, device, RESUMED_AT) and trained(folder, device, STEPS, f"{folder}/last.ckpt")
        yield f"resumed at step {RESUMED_AT}", relative_error(resumed.state_dict(), alone), 0.0
        in_ddp = trained(folder, device, STEPS, strategy="ddp").state_dict()
        yield "DDP, one process", relative_error(in_ddp, alone), 1e-6


def main(device: str, fused: bool) -> bool:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    good = True
    for rows in (gradients(device, fused), trainings(device)):
        for name, error, bound in rows:
            good &= error <= bound
            print(f"{'ok  ' if error <= bound else 'FAIL'} {error:.0e} (at most {bound:.0e})  {name}", flush=True)
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fused", action="store_true")
    arguments = parser.parse_args()
    sys.exit(not main(arguments.device, arguments.fused))
