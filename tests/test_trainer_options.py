"""The Trainer's own options, with each algorithm."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Seen, printed_config, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from meta_lightning import FOMAML, MAML, MLP, MetaLearner, Reptile, Sinusoid
from meta_lightning.cli import main

TINY = str(Path(__file__).parent / "tiny.yaml")
SINUSOID = ["fit", "--config", TINY, "--data", "Sinusoid", "--data.val_tasks", "3"]
SINUSOID += ["--model.network", "meta_lightning.MLP", "--checkpoint.monitor", "val/mse", "--checkpoint.mode", "min"]
ALGORITHMS = ["MAML", "FOMAML", "Reptile"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_fast_dev_run_leaves_nothing(algorithm: str) -> None:
    main([*SINUSOID, "--model", algorithm, "--trainer.fast_dev_run", "2"])
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("name", "given", "must"), [("barebones", "true", "false"), ("enable_checkpointing", "false", "true")]
)
def test_runs_of_the_command_line_keep_checkpoints(name: str, given: str, must: str) -> None:
    message = f"error: trainer.{name} must be {must} on the command line, whose runs keep checkpoints, got {given}"
    with pytest.raises(SystemExit, match=message):
        main([*SINUSOID, f"--trainer.{name}", given, "--trainer.max_steps", "1"])
    assert not list(Path().iterdir())


@pytest.mark.parametrize("algorithm", [MAML, FOMAML, Reptile])
@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"overfit_batches": 2, "max_epochs": 3}, [0, 1, 0, 1, 0, 1]),
        ({"overfit_batches": 0.5, "max_steps": 6}, [0, 1, 2, 3, 4, 0]),
        ({"limit_train_batches": 3, "max_epochs": 2}, [0, 1, 2, 3, 4, 5]),
        ({"limit_train_batches": 0.2, "max_steps": 3}, [0, 1, 2]),
    ],
)
def test_limits(
    algorithm: type[MetaLearner], options: dict[str, Any], batches: list[int], mlp: MLP, sinusoid: Sinusoid
) -> None:
    seen = Seen()
    fit = trainer(callbacks=[seen], limit_val_batches=1, limit_test_batches=1, **options)
    learner = algorithm(network=mlp)  # type: ignore[call-arg]
    fit.fit(learner, sinusoid)
    tasks, size = sinusoid.task_set("train"), sinusoid.meta_batch_size
    expected = [tasks.batch(range(j * size, (j + 1) * size)).support_x for j in batches]
    assert len(seen.batches) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(seen.batches, expected, strict=True))
    assert fit.test(learner, sinusoid, verbose=False)[0]["test/tasks"] == size


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_max_time_stops_and_a_longer_one_goes_on(algorithm: str) -> None:
    args = [*SINUSOID, "--model", algorithm, "--ckpt_path", "last"]
    main([*args, "--trainer.max_steps", "-1", "--trainer.max_time", "00:00:00:01"])
    (last,) = Path().rglob("last.ckpt")
    steps = [torch.load(last, weights_only=True)["global_step"]]
    assert steps[0] > 0
    main([*args, "--trainer.max_steps", str(steps[0] + 3), "--trainer.max_time", "00:01:00:00"])
    steps.append(torch.load(last, weights_only=True)["global_step"])
    assert steps[1] == steps[0] + 3
    (run,) = Path("lightning_logs").iterdir()
    logged = [event.step for event in EventAccumulator(str(run)).Reload().Scalars("train/loss")]
    assert logged == list(range(steps[1]))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_several_loggers(algorithm: str) -> None:
    loggers = ["--trainer.logger+=TensorBoardLogger", "--trainer.logger.save_dir=board"]
    loggers += ["--trainer.logger+=CSVLogger", "--trainer.logger.save_dir=table"]
    main([*SINUSOID, "--model", algorithm, *loggers])
    (table,) = Path("table").rglob("metrics.csv")
    rows = list(csv.DictReader(table.open()))
    curve = EventAccumulator("board/lightning_logs/version_0").Reload().Scalars("train/loss")
    losses = {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}
    assert {event.step: pytest.approx(event.value) for event in curve} == losses
    assert [*losses] == [0, 1, 2, 3]
    assert Path("board/lightning_logs/version_0/checkpoints/last.ckpt").exists()


def test_weights_and_biases_by_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    """Parsed only: it is no dependency."""
    config = printed_config(capsys, *SINUSOID, "--trainer.logger", "WandbLogger", "--trainer.logger.offline", "true")
    assert config["trainer"]["logger"]["class_path"] == "lightning.pytorch.loggers.WandbLogger"
    assert config["trainer"]["logger"]["init_args"]["offline"] is True
