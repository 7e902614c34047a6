"""A run that is killed and resumed again and again ends as one that was not."""

import csv
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from meta_lightning.cli import main

TESTS = Path(__file__).parent
FIT = ["fit", "--config", str(TESTS / "long.yaml"), "--ckpt_path", "last"]
ALGORITHMS = {
    "MAML": ["--model", "MAML"],
    "FOMAML": ["--model", "FOMAML"],
    "Reptile": ["--model", "Reptile", "--model.inner_optimizer", "adam", "--model.inner_batch_size", "3"],
}


def fit(folder: Path, step: int, seconds: float, *args: str) -> int:
    """Run or resume in a folder, until killed some time into a meta-iteration; -1 for never."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(TESTS / "killed_fit.py"), str(step), str(seconds), *FIT, *args]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180, check=False)
    assert run.returncode in (0, -9), run.stderr
    return run.returncode


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Tensors equal to the last bit, wherever they stand."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(whole: Path, resumed: Path, board: bool = True) -> None:
    """The same weights, optimizer, random states, best score and progress; and the same curves, each step once."""
    (a,), (b,) = (list(folder.glob("logs/board/*/checkpoints/last.ckpt")) for folder in (whole, resumed))
    last, again = (torch.load(path, weights_only=True) for path in (a, b))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "random_states", "loops", "global_step", "epoch"):
        assert_equal(last[key], again[key], key)
    best, best_again = (torch.load(path.with_stem("best"), weights_only=True) for path in (a, b))
    assert_equal(best["state_dict"], best_again["state_dict"], "best")
    (table,), (table_again,) = (list(folder.glob("logs/table/*/metrics.csv")) for folder in (whole, resumed))
    rows, rows_again = (list(csv.DictReader(path.open())) for path in (table, table_again))
    assert rows == rows_again
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(last["global_step"]))
    if board:
        assert scalars(whole) == scalars(resumed)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves, but for the one of the time."""
    (run,) = folder.glob("logs/board/*")
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = {*events.Tags()["scalars"]} - {"train/tasks_per_second"}
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def killed_again_and_again(tmp_path: Path, seed: int, kills: int, *args: str) -> int:
    """Kill at random, resume and compare; returns how often the process was killed."""
    rng = random.Random(seed)
    fit(tmp_path / "whole", -1, 0, *args)
    resumed = tmp_path / "resumed"
    steps = sorted(rng.sample(range(1, 60), kills))
    done = sum(fit(resumed, step, rng.uniform(0, 0.03), *args) == -9 for step in steps)
    fit(resumed, -1, 0, *args)
    assert_same_run(tmp_path / "whole", resumed)
    return done


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    assert killed_again_and_again(tmp_path, 0, 2, *ALGORITHMS["Reptile"]) == 2


@pytest.mark.parametrize(
    "option", ["auto", *(pytest.param(option, marks=pytest.mark.slow) for option in ("record", "true", "false"))]
)
def test_a_killed_run_is_the_same_however_its_passes_run(option: str, tmp_path: Path) -> None:
    """``auto`` records from another meta-iteration on in the run that is resumed."""
    options = ["--model.compile_passes", option]
    fit(tmp_path / "whole", -1, 0, *options)
    assert fit(tmp_path / "resumed", 25, 0.01, *options) == -9
    fit(tmp_path / "resumed", -1, 0, *options)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("MAML", ["--trainer.val_check_interval", "3"]),
        ("Reptile", ["--trainer.val_check_interval", "1.0", "--checkpoint.every_n_steps", "0"]),
        ("FOMAML", ["--trainer.check_val_every_n_epoch", "2", "--trainer.val_check_interval", "1.0"]),
    ],
)
def test_a_run_that_is_stopped_after_every_step(
    algorithm: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, by SIGTERM."""
    args = [*FIT, *ALGORITHMS[algorithm], "--data.epoch_length", "4", "--trainer.max_steps", "10", *options]
    for folder in ("whole", "stopped"):
        Path(folder).mkdir()
    monkeypatch.chdir("whole")
    main(args)
    monkeypatch.chdir(tmp_path / "stopped")
    stopped = [*args, "--trainer.callbacks+=killed_fit.Terminate"]
    for _ in range(9):
        with pytest.raises(SystemExit, match="143"):
            main(stopped)
    main(stopped)
    # TensorBoard orders what one process wrote within a second by name, the tenth file before the ninth
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", board=False)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_many_kills(algorithm: str, num_workers: int, tmp_path: Path) -> None:
    args = [*ALGORITHMS[algorithm], f"--data.num_workers={num_workers}"]
    assert killed_again_and_again(tmp_path, num_workers, 5, *args) == 5


@pytest.mark.slow
def test_killed_ranks(tmp_path: Path) -> None:
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    assert killed_again_and_again(tmp_path, 3, 3, *ALGORITHMS["Reptile"], *ranks) == 3
