"""The queue of long trainings, stopped and killed again and again."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OPTIONS = ["--name=tiny", "--data.epoch_length=250", "--checkpoint.every_n_steps=20"]
PROGRAM = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import run_queue
run_queue.CELLS = {{"tiny": ({str(TINY)!r}, 1500, {OPTIONS})}}
run_queue.main()
"""
LAST = Path("runs/tiny-seed0/checkpoints/last.ckpt")
BREAKS = 10


def queue(out: Path, *args: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROGRAM, "--out", str(out), "--records", str(out / "records"), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def changed(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def same_figures(record: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on interruptions: all figures and curves, and no times."""
    parts = {"fit": record["fit"], **record["tests"]}
    for part in parts.values():
        part["curves"].pop("train/tasks_per_second", None)
    return {name: (part["figures"], part["curves"], part.get("of_tasks")) for name, part in parts.items()}


@pytest.mark.slow
def test_a_queue_that_is_stopped_ten_times_leaves_the_same_record(tmp_path: Path) -> None:
    whole, broken, rng = tmp_path / "whole", tmp_path / "broken", random.Random(0)
    assert "tiny: transductive-1 " in queue(whole).communicate()[0]
    for _ in range(BREAKS):
        before, process = changed(broken / LAST), queue(broken)
        while changed(broken / LAST) == before:
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1))
        if rng.random() < 0.5:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 1
        else:  # the training as well: its command line names the folder
            subprocess.run(["pkill", "-KILL", "-f", str(broken)], check=False)
            assert process.wait(60) == -signal.SIGKILL
        assert "of 1500 meta-iterations" in queue(broken, "--status").communicate()[0]
    assert "tiny: transductive-1 " in queue(broken).communicate()[0]
    records = [json.loads((out / "records" / "tiny-seed0.json").read_text()) for out in (whole, broken)]
    assert same_figures(records[0]) == same_figures(records[1])
    states = [torch.load(out / LAST, weights_only=True)["state_dict"] for out in (whole, broken)]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
