"""The record of a run."""

import json
import mmap
import os
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import TINY
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from meta_lightning.cli import main
from meta_lightning.runs import machine
from meta_lightning.runs.machine import PeakMemory, keep_freed_memory
from meta_lightning.runs.record import POINTS, curves, finite

RUN = Path("lightning_logs/version_0")
FIXED = ["--trainer.logger", "lightning.pytorch.loggers.TensorBoardLogger", "--trainer.logger.save_dir", "logs"]
FIXED += ["--trainer.logger.name=", "--trainer.logger.version=0", "--checkpoint.dirpath=kept"]


def read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(), parse_constant=pytest.fail)
    return record


@pytest.mark.usefixtures("glyphs")
def test_fit_and_test_leave_a_record() -> None:
    main(["fit", "--config", str(TINY), "--seed_everything", "7", "--model", "FOMAML"])
    record = read(RUN / "fit.json")
    assert (record["algorithm"], record["seed"], record["steps"]) == ("FOMAML", 7, 4)
    assert record["config"]["model"]["init_args"]["network"]["init_args"]["filters"] == 4
    assert record["config"]["data"]["init_args"]["val_tasks"] == 3
    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"]["cores"] == os.cpu_count()
    assert record["tasks_per_second"] == pytest.approx(4 * 2 / record["train_seconds"])
    assert record["peak_memory"] > 0
    assert record["validation_seconds"] > 0
    events = EventAccumulator(str(RUN)).Reload()
    assert record["curves"]["val/accuracy"] == [[e.step, e.value] for e in events.Scalars("val/accuracy")]
    assert [step for step, _ in record["curves"]["train/loss"]] == [0, 1, 2, 3]
    assert record["figures"]["val/loss"] == pytest.approx(events.Scalars("val/loss")[-1].value, rel=1e-6)

    # the interval of a single task is none, and JSON has no NaN
    main(["test", "--ckpt_path", str(RUN / "checkpoints/last.ckpt"), "--data.test_tasks", "1"])
    test = read(Path("lightning_logs/version_1/test.json"))
    assert test["algorithm"] == "FOMAML"
    assert test["figures"]["test/tasks"] == 1
    assert test["figures"]["test/accuracy_ci95"] is None
    assert test["test_seconds"] > 0
    assert "train_seconds" not in test


@pytest.mark.usefixtures("glyphs")
def test_a_resumed_run_counts_on() -> None:
    main(["fit", "--config", str(TINY), *FIXED, "--trainer.max_steps", "3"])
    first = read(Path("logs/version_0/fit.json"))
    main(["fit", "--config", str(TINY), *FIXED, "--trainer.max_steps", "5", "--ckpt_path", "kept/last.ckpt"])
    second = read(Path("logs/version_0/fit.json"))
    assert (first["steps"], second["steps"]) == (3, 5)
    assert second["train_seconds"] > first["train_seconds"]
    assert second["validation_seconds"] >= first["validation_seconds"]
    assert {step for step, _ in second["curves"]["train/loss"]} == {0, 1, 2, 3, 4}


def test_long_curves_are_thinned_evenly(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    for step in range(1000):
        logger.log_metrics({"loss": step / 8}, step)
    found = curves(L.Trainer(logger=logger, accelerator="cpu"))["loss"]
    steps = [step for step, _ in found]
    assert (len(steps), steps[0], steps[-1]) == (POINTS, 0, 999)
    assert {after - before for before, after in pairwise(steps)} == {5, 6}
    assert all(value == step / 8 for step, value in found)


def test_peak_memory_is_that_since_the_start() -> None:
    # mapped anew: what an allocator kept of earlier tests was resident before
    memory = PeakMemory(torch.device("cpu"))
    with mmap.mmap(-1, 100_000_000) as large:
        large.write(b"1" * len(large))
    assert 90 < memory.peak() < 250
    memory.start()
    assert memory.peak() < 50


def test_memory_that_was_freed_and_kept_is_in_no_peak() -> None:
    keep_freed_memory()
    torch.ones(25_000_000)
    memory = PeakMemory(torch.device("cpu"))
    torch.ones(25_000_000)
    assert 90 < memory.peak() < 250
    memory.start()
    assert memory.peak() < 50


def test_commit_of_a_checkout_and_of_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CHECKOUT", tmp_path)
    assert machine.commit() is None

    def git(*args: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=b", *args]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "first")
    git("tag", "v1", "-m", "v1")
    assert machine.commit() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("b")
    assert machine.commit() == git("rev-parse", "HEAD") + "-dirty"


def test_json_has_neither_nan_nor_infinity() -> None:
    assert [finite(value) for value in (0.5, float("nan"), float("inf"))] == [0.5, None, None]


def test_the_commit_is_that_of_the_checkout() -> None:
    if not (machine.CHECKOUT / ".git").exists():
        pytest.skip("not in a checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert str(machine.commit()).startswith(head.stdout.strip())
