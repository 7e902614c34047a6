"""Several processes do what one does with the same meta-batches."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
NAMES = ["MAML", "FOMAML", "Reptile", "Reptile, Adam"]
FIT = ["-m", "meta_lightning", "fit", "--config", str(TESTS / "tiny.yaml"), "--data", "Sinusoid"]
FIT += ["--model.network", "meta_lightning.MLP", "--checkpoint.monitor", "val/mse", "--checkpoint.mode", "min"]
FIT += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def ended(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400, check=False)


def run(folder: Path, *command: str) -> None:
    done = ended(folder, *command)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, list[Any]]]:
    """What each of so many processes leaves, by the algorithm."""

    @cache
    def processes(ranks: int) -> dict[str, list[Any]]:
        folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
        run(folder, *TORCHRUN, str(ranks), str(TESTS / "ddp_script.py"), str(folder))
        return {
            name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(ranks)]
            for name in NAMES
        }

    return processes


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_ranks_agree_with_one_process(name: str, ranks: int, left: Callable[[int], dict[str, list[Any]]]) -> None:
    (alone,) = left(1)[name]
    first, *others = left(ranks)[name]
    for other in others:
        assert all(torch.equal(other["state"][key], value) for key, value in first["state"].items())
    for key, value in alone["state"].items():
        assert torch.allclose(first["state"][key], value, rtol=0, atol=1e-9), key
    assert first["figures"] == pytest.approx(alone["figures"], abs=1e-9, rel=1e-6)
    assert first["figures"]["test/tasks"] == 11
    assert len(first["logged"]) == 50
    for others, own in zip(first["logged"], alone["logged"], strict=True):
        assert own["train/loss"] > 0
        assert others == pytest.approx(own, abs=1e-9, rel=1e-9)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_ranks_share_the_tasks(split: str, ranks: int, left: Callable[[int], dict[str, list[Any]]]) -> None:
    """Disjoint, and together those of one process."""

    def tasks(process: Any) -> list[bytes]:
        return [support.numpy().tobytes() for support in process["tasks"][split]]

    (alone,) = left(1)["MAML"]
    shares = [tasks(process) for process in left(ranks)["MAML"]]
    assert sorted(task for share in shares for task in share) == sorted(tasks(alone))
    distinct = [{*share} for share in shares]
    assert sum(map(len, distinct)) == len(set.union(*distinct)) == {"train": 400, "val": 9, "test": 11}[split]


def test_the_command_line_starts_its_ranks(tmp_path: Path) -> None:
    run(tmp_path, sys.executable, *FIT)
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 4


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path) -> None:
    options = ["--trainer.max_steps=20", "--data.epoch_length=20", "--trainer.callbacks+=ddp_signal.Terminate"]
    done = ended(tmp_path, *TORCHRUN, "2", *FIT, *options)
    assert done.returncode != 0
    (last,) = tmp_path.rglob("last.ckpt")
    # received in meta-iteration 3 (from 0), asked about at its end, answered at the end of the next one
    assert torch.load(last, weights_only=True)["global_step"] == 5, done.stderr


@pytest.mark.parametrize("algorithm", ["MAML", "Reptile"])
def test_what_is_unfrozen_later_is_averaged_or_refused(algorithm: str, tmp_path: Path) -> None:
    """DDP averages the parameters that it has wrapped; Reptile averages by itself."""
    options = ["--model", algorithm, "--data.epoch_length=2", "--trainer.callbacks+=ddp_signal.Unfreeze"]
    done = ended(tmp_path, *TORCHRUN, "2", *FIT, *options)
    if algorithm == "MAML":
        assert done.returncode != 0
        assert "must train the same parameters from the start, got features.1.bias, features.1.weight" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        a, b = (torch.load(tmp_path / f"unfrozen-{rank}.pt", weights_only=True) for rank in range(2))
        assert torch.equal(a, b)


def test_torchrun_starts_and_resumes(tmp_path: Path) -> None:
    for max_steps in (3, 5):
        run(tmp_path, *TORCHRUN, "2", *FIT, "--trainer.max_steps", str(max_steps), "--ckpt_path", "last")
    (last,) = tmp_path.rglob("last.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == 5
    assert len(checkpoint["random_states"]) == 2
