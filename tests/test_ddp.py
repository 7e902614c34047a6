"""Two processes do what one does with the same meta-batches."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

TINY = Path(__file__).parent / "tiny.yaml"
SCRIPT = Path(__file__).parent / "ddp_script.py"


@pytest.mark.parametrize("algorithm", ["MAML", "FOMAML", "Reptile"])
def test_two_ranks_agree_with_one_process(algorithm: str, tmp_path: Path) -> None:
    runs = {}
    for devices in (1, 2):
        out = tmp_path / f"{devices}.pt"
        command = [sys.executable, str(SCRIPT), algorithm, str(devices), str(out)]
        subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, timeout=180)
        runs[devices] = torch.load(out, weights_only=True)
    for name, value in runs[1].items():
        assert torch.allclose(runs[2][name], value, rtol=1e-9, atol=1e-12), name


def test_the_command_line_starts_its_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "meta_lightning", "fit", "--config", str(TINY), "--data", "Sinusoid"]
    command += ["--model.network", "meta_lightning.MLP", "--checkpoint.monitor", "val/mse", "--checkpoint.mode", "min"]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, timeout=180)
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 4
