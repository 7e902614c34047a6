"""Lightning's loggers and profilers: the checks of what each does here."""

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import loggers, profilers
from lightning.pytorch.loggers.logger import rank_zero_experiment
from registry import EPOCH, ONE, History, case, equal, fitted, learner_of, plain, quiet, sines, state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from meta_lightning import MAML, MetaLearner

Algorithm = type[MetaLearner]
STEPS = 2 * EPOCH


def logged(algorithm: Algorithm, logger: Any) -> list[float]:
    """The losses of a training with this logger."""
    history = History()
    fitted(algorithm, history, logger=logger, log_every_n_steps=1)
    return history.losses


@case("loggers", "Logger", "works", "a subclass gets metrics and hyperparameters", algorithms=ONE)
def logger(algorithm: Algorithm) -> None:
    class Kept(loggers.Logger):
        name, version = "kept", 0

        def __init__(self) -> None:
            self.metrics: list[Any] = []

        @property
        @rank_zero_experiment
        def experiment(self) -> Any:
            return None

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.metrics.append((step, dict(metrics)))

        def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
            self.params = dict(params)

    kept = Kept()
    losses = logged(algorithm, kept)
    found = {step: metrics["train/loss"] for step, metrics in kept.metrics if "train/loss" in metrics}
    assert found == {step: pytest.approx(loss) for step, loss in enumerate(losses)}
    assert [step for step, metrics in kept.metrics if "val/mse" in metrics] == [3, 7]
    assert kept.params["inner_steps"] == 2


@case("loggers", "CSVLogger", "works", "a row per logged step, and the hyperparameters", algorithms=ONE)
def csv_logger(algorithm: Algorithm) -> None:
    losses = logged(algorithm, loggers.CSVLogger("logs"))
    folder = Path("logs/lightning_logs/version_0")
    with (folder / "metrics.csv").open() as file:
        found = {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}
    assert found == {step: pytest.approx(loss) for step, loss in enumerate(losses)}
    assert "inner_steps: 2" in (folder / "hparams.yaml").read_text()


@case(
    "loggers",
    "TensorBoardLogger",
    "works",
    "scalars and HParams; with `log_graph` the network, without adaptation",
    algorithms=ONE,
)
def tensorboard_logger(algorithm: Algorithm) -> None:
    learner, history = learner_of(algorithm), History()
    learner.example_input_array = torch.zeros(3, 1)
    quiet(history, logger=loggers.TensorBoardLogger("logs", log_graph=True), log_every_n_steps=1).fit(learner, sines())
    found = EventAccumulator("logs/lightning_logs/version_0").Reload()
    losses = {event.step: event.value for event in found.Scalars("train/loss")}
    assert losses == {step: pytest.approx(loss) for step, loss in enumerate(history.losses)}
    assert "inner_steps: 2" in Path("logs/lightning_logs/version_0/hparams.yaml").read_text()
    assert any("Linear[head]" in node.name for node in found.Graph().node)


def of_package(name: str, package: str, what: str, make: Any, account: str = "") -> None:
    """Register a logger whose package need not be installed, and that may need an account by a variable."""

    @case("loggers", name, "works", f"{what}; needs `{package}`", algorithms=ONE)
    def check(algorithm: Algorithm) -> None:
        pytest.importorskip(package)
        if account and account not in os.environ:
            pytest.skip(f"{name} needs {account}")
        made = make(getattr(loggers, name))
        written: list[Any] = []
        log_metrics = made.log_metrics

        def noted(metrics: Any, step: int | None = None) -> None:
            written.append(metrics)
            log_metrics(metrics, step)

        made.log_metrics = noted
        losses = logged(algorithm, made)
        assert [m["train/loss"] for m in written if "train/loss" in m] == pytest.approx(losses)


of_package("WandbLogger", "wandb", "logs offline too", lambda kind: kind(offline=True))
of_package("MLFlowLogger", "mlflow", "logs into a database", lambda kind: kind(tracking_uri="sqlite:///mlflow.db"))
of_package("CometLogger", "comet_ml", "logs offline too", lambda kind: kind(online=False))
of_package(
    "LitLogger",
    "litlogger",
    "logs to its service, with an account; run only where there is one",
    lambda kind: kind(save_logs=False),
    account="LIGHTNING_API_KEY",
)


@case("profilers", "Profiler", "works", "a subclass gets start and stop of every action", algorithms=ONE)
def profiler(algorithm: Algorithm) -> None:
    class Kept(profilers.Profiler):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.done: list[str] = []

        def start(self, action_name: str) -> None:
            self.open.append(action_name)

        def stop(self, action_name: str) -> None:
            self.open.remove(action_name)
            self.done.append(action_name)

    kept = Kept()
    learner = fitted(algorithm, profiler=kept)
    assert not kept.open
    assert kept.done.count("optimizer_step") == STEPS
    assert kept.done.count("[Strategy]SingleDeviceStrategy.training_step") == STEPS
    assert equal(state(learner), plain(algorithm))


@case("profilers", "SimpleProfiler", "works", "reports hooks and steps by time", algorithms=ONE)
def simple_profiler(algorithm: Algorithm) -> None:
    kept = profilers.SimpleProfiler(".", "simple")
    fitted(algorithm, profiler=kept)
    assert len(kept.recorded_durations["optimizer_step"]) == STEPS
    assert f"[LightningModule]{algorithm.__name__}.on_train_batch_start" in Path("fit-simple.txt").read_text()


@case("profilers", "AdvancedProfiler", "works", "reports the functions of each action by time")
def advanced_profiler(algorithm: Algorithm) -> None:
    fitted(algorithm, profiler=profilers.AdvancedProfiler(".", "advanced"))
    name = "meta_gradient" if algorithm is MAML else "adapt_pass"
    assert f"({name})" in Path("fit-advanced.txt").read_text()


@case("profilers", "PassThroughProfiler", "works", "does nothing", algorithms=ONE)
def pass_through_profiler(algorithm: Algorithm) -> None:
    assert equal(state(fitted(algorithm, profiler=profilers.PassThroughProfiler())), plain(algorithm))


@case("profilers", "PyTorchProfiler", "works", "reports the operators by time")
def pytorch_profiler(algorithm: Algorithm) -> None:
    operators = profilers.PyTorchProfiler(".", "operators", emit_nvtx=False)
    learner = fitted(algorithm, profiler=operators)
    assert "aten::addmm" in Path("fit-operators.txt").read_text()
    assert equal(state(learner), plain(algorithm))


@case("profilers", "XLAProfiler", "works", "as Lightning says; needs `torch_xla`", algorithms=ONE)
def xla_profiler(algorithm: Algorithm) -> None:
    pytest.importorskip("torch_xla")
    fitted(algorithm, profiler=profilers.XLAProfiler())
