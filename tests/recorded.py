"""Trainings whose figures were recorded, to see whether a change of the code changes a bit of them.

    python tests/recorded.py CASE ...  # records these trainings anew: say in the commit why they changed
    python tests/recorded.py           # and writes the checkpoints anew, by the code of now: drops what they are for

Figures are bit-equal on the machine and the versions that recorded them, and close on others.
"""

import hashlib
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from meta_lightning import FOMAML, MAML, MetaLearner, Reptile, TaskBatch, load_learner
from meta_lightning.cli import main

DATA = Path(__file__).parent / "data"
TINY = Path(__file__).parent / "tiny.yaml"
STEPS = 20
ADAM = {"inner_optimizer": "adam", "inner_lr": 0.01, "inner_batch_size": 4, "outer_lr": 1.0, "outer_lr_decay": "linear"}


class Case(NamedTuple):
    """A training: the algorithm, its options, and whether the network drops."""

    algorithm: type[MetaLearner]
    options: Mapping[str, Any] = MappingProxyType({})
    dropout: bool = False


CASES = {
    "maml": Case(MAML),
    "maml-recomputed": Case(MAML, {"recompute_inner_steps": True}),
    "maml-dropout": Case(MAML, dropout=True),
    "maml-recomputed-dropout": Case(MAML, {"recompute_inner_steps": True}, dropout=True),
    "maml-inner_freeze": Case(MAML, {"inner_freeze": ["0.*", "1.*"]}),
    "maml-outer_freeze": Case(MAML, {"outer_freeze": ["0.*", "1.*"]}),
    "maml-passes": Case(MAML, {"tasks_per_pass": 2, "outer_lr_decay": "cosine"}),
    "meta-sgd": Case(MAML, {"learn_inner_lr": True}),
    "meta-sgd-recomputed": Case(MAML, {"learn_inner_lr": True, "recompute_inner_steps": True}),
    "fomaml": Case(FOMAML),
    "fomaml-dropout": Case(FOMAML, dropout=True),
    "fomaml-inner_freeze": Case(FOMAML, {"inner_freeze": ["6.*"], "gradient_clip_val": None}),
    "fomaml-meta-sgd": Case(FOMAML, {"learn_inner_lr": True}),
    "reptile": Case(Reptile),
    "reptile-dropout": Case(Reptile, dropout=True),
    "reptile-freeze": Case(Reptile, {"inner_freeze": ["0.*"], "outer_freeze": ["6.bias"]}),
    "reptile-adam": Case(Reptile, ADAM),
}
CHECKPOINTS: dict[str, list[str]] = {
    "maml": ["--model.learn_inner_lr=true"],
    "fomaml": ["--model.outer_lr_decay=linear"],
    "reptile": [f"--model.{name}={value}" for name, value in ADAM.items()],
}
RESUMED = ["--trainer.max_steps=6", "--trainer.enable_progress_bar=false"]


def figures(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of each tensor its sum of squares, and of all of them together a digest of their bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    squares = {name: tensor.detach().double().square().sum().item() for name, tensor in tensors.items()}
    return {"bits": digest.hexdigest(), "squares": squares}


def twenty_steps(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """θ after 20 meta-iterations of 5 tasks, and the losses on the way."""
    threads, default = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.3 if case.dropout else 0.0),
            nn.Flatten(),
            nn.Linear(54, 3),
        )
        y = torch.arange(3)
        batches = [
            TaskBatch(torch.randn(5, 6, 1, 6, 6), y.repeat(5, 2), torch.randn(5, 9, 1, 6, 6), y.repeat(5, 3))
            for _ in range(STEPS)
        ]
        losses = Losses()
        options: dict[str, Any] = {"inner_lr": 0.1, "inner_steps": 3, **case.options}
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=STEPS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[losses],
        )
        trainer.fit(case.algorithm(network, **options), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
        return {**figures(dict(network.named_parameters())), "losses": losses.values}
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(default)


class Losses(L.Callback):
    """Keeps the loss of every meta-iteration."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(outputs["loss"].item())


def resumed(path: Path, folder: Path) -> dict[str, Any]:
    """The learner's state after a checkpoint of 3 meta-iterations has gone on for 3 more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        main(["fit", f"--ckpt_path={path}", *RESUMED, f"--checkpoint.dirpath={folder}"])
    finally:
        torch.set_num_threads(threads)
    state = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    return figures({name: value for name, value in state.items() if name.startswith("network.")})


def adapted(path: Path) -> dict[str, Any]:
    """What a checkpoint's learner predicts after it was adapted to five images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        images = torch.randint(256, (15, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        predictor = load_learner(path).adapt(images[:5], torch.arange(5))
        return figures({"probabilities": predictor.predict_proba(images[5:])})
    finally:
        torch.set_num_threads(threads)


def fingerprint() -> str:
    """A digest of the processor and the versions that rounding depends on."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text().partition("\n\n")[0].splitlines() if table.exists() else [platform.processor()]
    kept = ("vendor_id", "cpu family", "model", "stepping", "cache size", "flags")
    described = [line for line in lines if line.startswith(kept)]
    described += [str(torch.__version__), torch.backends.cpu.get_cpu_capability(), version("lightning")]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()


def record_steps(found: dict[str, Any], cases: Iterable[str]) -> None:
    """Record trainings of 20 steps."""
    for name, dtype in product(cases, (torch.float32, torch.float64)):
        found["steps"][f"{name}-{str(dtype).removeprefix('torch.')}"] = twenty_steps(CASES[name], dtype)


def record_checkpoints(found: dict[str, Any], folder: Path) -> None:
    """Write the checkpoints, and record what becomes of them."""
    for name, options in CHECKPOINTS.items():
        model = {"maml": "MAML", "fomaml": "FOMAML", "reptile": "Reptile"}[name]
        there = folder / name
        short = ["--trainer.max_steps=3", f"--checkpoint.dirpath={there}"]
        main(["fit", f"--config={TINY}", f"--model={model}", *options, *short])
        shutil.copy(there / "last.ckpt", DATA / f"{name}.ckpt")
        found["adapted"][name] = adapted(DATA / f"{name}.ckpt")
        found["resumed"][name] = resumed(DATA / f"{name}.ckpt", folder / f"{name}-resumed")


if __name__ == "__main__":
    figures_file = DATA / "recorded.json"
    record = json.loads(figures_file.read_text()) if sys.argv[1:] else {"steps": {}, "resumed": {}, "adapted": {}}
    if record.get("fingerprint", fingerprint()) != fingerprint():
        sys.exit("error: the other figures were recorded on another machine or with other versions: record all of them")
    record_steps(record, sys.argv[1:] or CASES)
    if not sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            record_checkpoints(record, Path(folder))
    figures_file.write_text(json.dumps(record | {"fingerprint": fingerprint()}, indent=1) + "\n")
