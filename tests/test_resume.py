"""Stopping and going on."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Seen, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from meta_lightning import FOMAML, MAML, MLP, MetaLearner, RegressionTasks, Reptile, Sinusoid


@pytest.mark.parametrize("algorithm", [MAML, FOMAML, Reptile])
# mid-epoch, at an epoch's end, mid-epoch later on; epochs have 10
@pytest.mark.parametrize(("stop", "num_workers"), [(4, 0), (10, 0), (13, 0), (4, 2)])
def test_a_resumed_run_meets_the_tasks_that_come_next(
    algorithm: type[MetaLearner], stop: int, num_workers: int, sinusoid: Sinusoid, tmp_path: Path
) -> None:
    sinusoid.num_workers = num_workers

    def run(max_steps: int, ckpt_path: Path | None = None) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(0)
        network, seen = MLP(hidden=[8]), Seen()
        checkpoints = ModelCheckpoint(tmp_path / "checkpoints", "{step}", save_last=True, every_n_train_steps=stop)
        fit = trainer(max_steps=max_steps, callbacks=[seen, checkpoints], enable_checkpointing=True)
        learner = algorithm(network=network, outer_lr_decay="cosine", inner_steps=2)  # type: ignore[call-arg]
        learner.outer_update.factor = lambda step: 0.9**step  # type: ignore[method-assign]  # whatever max_steps is
        fit.fit(learner, sinusoid, ckpt_path=ckpt_path)
        assert fit.global_step == max_steps
        return seen.batches, [p.detach().clone() for p in network.parameters()]

    whole, expected = run(23)
    before, _ = run(stop)
    after, theta = run(23, tmp_path / "checkpoints" / f"step={stop}.ckpt")
    assert len(before + after) == len(whole)
    assert all(torch.equal(a, b) for a, b in zip(before + after, whole, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(theta, expected, strict=True))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_resume_goes_on(number: int, status: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "meta_lightning", "fit", "--config", "sinusoid/maml_10shot.yaml"]
    command += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.val_tasks", "10"]
    command += ["--trainer.log_every_n_steps", "1", "--data.epoch_length", "100"]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("best.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == status
    (last,) = tmp_path.rglob("last.ckpt")
    found = re.search(r"Interrupted .*\b(\d+) .*--ckpt_path (\S+)", said)
    assert found, said
    stopped = int(found[1])
    assert Path(found[2]) == last
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == stopped
    command += ["--ckpt_path", str(last), "--trainer.max_steps", str(stopped + 5)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert torch.load(last, weights_only=True)["global_step"] == stopped + 5
    (run_folder,) = (tmp_path / "lightning_logs").iterdir()
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(stopped + 5))


def test_a_fit_resumed_within_an_epoch_knows_that_samples_are_pixels(tmp_path: Path) -> None:
    sets = [(torch.randint(0, 256, (30, 4), dtype=torch.uint8), torch.randn(30)) for _ in range(6)]
    data = RegressionTasks(sets, shots=3, queries=3, meta_batch_size=2, epoch_length=6, val_tasks=2)
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    first, resumed = (MAML(MLP(4, [3], 1), inner_steps=1) for _ in range(2))
    trainer(max_steps=4, callbacks=[every], limit_val_batches=0, enable_checkpointing=True).fit(first, data)
    trainer(max_steps=5, limit_val_batches=0).fit(resumed, data, ckpt_path=tmp_path / "step=3.ckpt")
    assert first.form.pixels
    assert resumed.form == first.form
