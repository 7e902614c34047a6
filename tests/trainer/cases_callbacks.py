"""Lightning's callbacks: the checks of what each does here."""

import csv
import io
import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch import callbacks as lc
from lightning.pytorch.loggers import CSVLogger
from registry import (
    EPOCH,
    ONE,
    TASKS,
    History,
    bad_sines,
    case,
    close,
    equal,
    fitted,
    kept,
    learner_of,
    meta_batch,
    plain,
    quiet,
    sines,
    state,
)
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from meta_lightning import MAML, MetaLearner, Reptile, load_learner
from meta_lightning.checks import InputError

Algorithm = type[MetaLearner]


class Failing(lc.Callback):
    """Ends training before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("a failure")


def resumed_is_uninterrupted(algorithm: Algorithm, *kinds: Callable[[], lc.Callback], **of: Any) -> None:
    """Three epochs give the same θ with a resume after two."""
    whole, part, rest = (learner_of(algorithm, **of) for _ in range(3))
    steps: dict[str, Any] = {"max_epochs": -1, "max_steps": 3 * EPOCH}
    quiet(*(kind() for kind in kinds), **steps).fit(whole, sines())
    with pytest.raises(RuntimeError, match="a failure"):
        quiet(*(kind() for kind in kinds), kept("part"), Failing(2 * EPOCH), **steps).fit(part, sines())
    fit = quiet(*(kind() for kind in kinds), kept("rest"), **steps)
    fit.fit(rest, sines(), ckpt_path="part/last.ckpt", weights_only=True)
    assert equal(state(rest), state(whole))
    assert not equal(state(part), state(whole))


def averages(theta: list[dict[str, Tensor]], decay: float | None) -> list[dict[str, Tensor]]:
    """The average after each step: exponential, or with equal weights."""
    found = [theta[0]]
    for count, new in enumerate(theta[1:], start=2):
        weight = 1 / count if decay is None else 1 - decay
        found.append({name: old + weight * (new[name] - old) for name, old in found[-1].items()})
    return found


def check_averages(algorithm: Algorithm, averaging: lc.WeightAveraging, decay: float | None) -> None:
    history = History()
    learner = fitted(algorithm, averaging, history, kept("averaged"))
    expected = averages(history.theta, decay)
    assert not close(expected[-1], history.theta[-1])
    assert [close(*pair) for pair in zip(history.validated, expected[3::4], strict=True)] == [True, True]
    assert close(state(learner), expected[-1])
    saved = torch.load("averaged/last.ckpt", weights_only=True)
    assert close(saved["state_dict"], expected[-1])
    assert equal(saved["current_model_state"], history.theta[-1])
    loaded = load_learner("averaged/last.ckpt", network=learner_of(algorithm).network)
    assert close(state(loaded), expected[-1])


@case("callbacks", "WeightAveraging", "works", "averages θ; what is validated and saved is the average")
def weight_averaging(algorithm: Algorithm) -> None:
    check_averages(algorithm, lc.WeightAveraging(), None)


@case("callbacks", "EMAWeightAveraging", "works", "averages θ; what is validated and saved is the average; resumes")
def ema_weight_averaging(algorithm: Algorithm) -> None:
    check_averages(algorithm, lc.EMAWeightAveraging(decay=0.5), 0.5)
    resumed_is_uninterrupted(algorithm, lambda: lc.EMAWeightAveraging(decay=0.5))
    learner = learner_of(algorithm)
    quiet(lc.EMAWeightAveraging(decay=0.9)).fit(learner, bad_sines())
    assert learner.outer_update.skipped == 3  # a count is not averaged
    assert all(p.isfinite().all() for p in learner.parameters())


@case("callbacks", "StochasticWeightAveraging", "refused", "ends with automatic optimization; WeightAveraging averages")
def stochastic_weight_averaging(algorithm: Algorithm) -> None:
    with pytest.raises(InputError, match=r"callbacks .*StochasticWeightAveraging.* use .*WeightAveraging"):
        fitted(algorithm, lc.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), max_epochs=4)


@case("callbacks", "ModelPruning", "refused", "replaces parameters of θ; `outer_freeze` keeps parameters")
def model_pruning(algorithm: Algorithm) -> None:
    with pytest.raises(InputError, match=r"callbacks .*ModelPruning\b"):
        fitted(algorithm, lc.ModelPruning("l1_unstructured", amount=0.5))


@case("callbacks", "GradientAccumulationScheduler", "refused", "`meta_batch_size` is the number of tasks of an update")
def gradient_accumulation_scheduler(algorithm: Algorithm) -> None:
    with pytest.raises(InputError, match=r"callbacks .*GradientAccumulationScheduler\b"):
        fitted(algorithm, lc.GradientAccumulationScheduler({0: 2}))


class Unfreezing(lc.BaseFinetuning):
    """Trains the features from the second epoch on."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.network.features)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.network.features, optimizer, **self.options)
        if epoch >= 1:  # Lightning freezes again when training resumes
            self.make_trainable(pl_module.network.features)


def in_two_phases(algorithm: Algorithm, **of: Any) -> list[dict[str, Tensor]]:
    """θ after an epoch with frozen features, and after another of a new learner without."""
    learner = learner_of(algorithm, **of)
    loaders = [[meta_batch(number) for number in range(first, first + EPOCH)] for first in (0, EPOCH)]
    found = []
    for trains, batches in zip((False, True), loaders, strict=True):
        learner.network.features.requires_grad_(trains)  # type: ignore[operator,union-attr]
        learner = algorithm(network=learner.network, **{"inner_steps": 2, **of})
        loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        quiet(max_epochs=1).fit(learner, loader)
        found.append(state(learner))
    return found


def check_unfreezing(algorithm: Algorithm, **of: Any) -> None:
    history = History()
    fitted(algorithm, Unfreezing(lr=of.get("outer_lr")), history, of=of)
    frozen, trained = in_two_phases(algorithm, **of)
    assert equal(history.theta[EPOCH - 1], frozen)
    assert equal(history.theta[-1], trained)
    features = [name for name in frozen if ".features." in name]
    assert not any(torch.equal(frozen[name], trained[name]) for name in features)
    resumed_is_uninterrupted(algorithm, Unfreezing, outer_lr_decay="linear")


@case(
    "callbacks",
    "BaseFinetuning",
    "works",
    "unfreezes in both loops, in one process; the schedule moves the groups of `configure_optimizers`; resumes where "
    "`finetune_function` makes trainable what was",
    with_="MAML",
    algorithms=[MAML],
)
def base_finetuning(algorithm: Algorithm) -> None:
    check_unfreezing(algorithm, optimizer=SGD, outer_lr=0.01)
    history = History()
    fitted(algorithm, Unfreezing(lr=0.5), history, of={"outer_lr_decay": "linear"})
    steps = [0.001 * (1 - step / 8) for step in range(8)]
    assert history.rates == [pytest.approx([rate, 0.5][: 1 + (step > 3)]) for step, rate in enumerate(steps)]


@case(
    "callbacks",
    "BaseFinetuning",
    "works",
    "unfreezes in both loops; the parameters move by ε, whatever the `lr` of their group",
    with_="Reptile",
    algorithms=[Reptile],
)
def base_finetuning_of_reptile(algorithm: Algorithm) -> None:
    check_unfreezing(algorithm, outer_lr=0.1)


class FrozenBody(MAML):
    @property
    def backbone(self) -> nn.Module:
        features: nn.Module = self.network.features  # type: ignore[assignment]
        return features


class ReptileBackbone(Reptile):
    backbone = FrozenBody.backbone


@case(
    "callbacks",
    "BackboneFinetuning",
    "works",
    "as Lightning says, of a subclass with `backbone`; that stays frozen when training resumes",
    with_="MAML",
    algorithms=[MAML],
)
def backbone_finetuning(algorithm: Algorithm) -> None:
    history = History()
    fitted(FrozenBody, lc.BackboneFinetuning(1), history, max_epochs=3)
    assert [rates[1:] for rates in history.rates[::EPOCH]] == [[], [pytest.approx(1e-4)], [pytest.approx(2e-4)]]
    first, *_, before = [theta["network.features.1.weight"] for theta in history.theta[:EPOCH]]
    assert torch.equal(first, before)
    assert not torch.equal(first, history.theta[EPOCH]["network.features.1.weight"])
    with pytest.raises((AttributeError, InputError), match=r"\bbackbone\b"):
        fitted(algorithm, lc.BackboneFinetuning(1))


@case(
    "callbacks",
    "BackboneFinetuning",
    "refused",
    "would move ε, which all parameters share",
    with_="Reptile",
    algorithms=[Reptile],
)
def backbone_finetuning_of_reptile(algorithm: Algorithm) -> None:
    with pytest.raises(InputError, match=r"\bBackboneFinetuning\b"):
        fitted(ReptileBackbone, lc.BackboneFinetuning(1), max_epochs=3)


@case(
    "callbacks",
    "LearningRateFinder",
    "works",
    'with `attr_name="outer_lr"` tries the whole range, then trains with its suggestion',
    with_="MAML",
    algorithms=[MAML],
)
def learning_rate_finder(algorithm: Algorithm) -> None:
    finder = lc.LearningRateFinder(1e-3, 0.5, num_training_steps=20, attr_name="outer_lr")
    learner, history = learner_of(algorithm, outer_lr=0.05), History()
    quiet(finder, history, max_epochs=1).fit(learner, sines(epoch_length=30))
    found = finder.optimal_lr
    assert found is not None
    tried = found.results["lr"]
    assert [tried[0], tried[-1], len(tried)] == [pytest.approx(1e-3), pytest.approx(0.5), 20]
    assert 1e-3 < learner.outer_lr == found.suggestion()
    assert history.rates == [[learner.outer_lr]] * 30
    assert history.meets(*range(30))
    plain = learner_of(algorithm, outer_lr=learner.outer_lr)
    quiet(max_epochs=1).fit(plain, sines(epoch_length=30))
    assert equal(state(plain), state(learner))


@case(
    "callbacks",
    "LearningRateFinder",
    "refused",
    "ε is no learning rate",
    with_="Reptile",
    algorithms=[Reptile],
)
def learning_rate_finder_of_reptile(algorithm: Algorithm) -> None:
    finder = lc.LearningRateFinder(1e-3, 0.5, num_training_steps=20, attr_name="outer_lr")
    with pytest.raises(InputError, match=r"outer_lr .*\bgot _ExponentialLR"):
        quiet(finder, max_epochs=1).fit(learner_of(algorithm), sines(epoch_length=30))


@case(
    "callbacks",
    "BatchSizeFinder",
    "works",
    'with `batch_arg_name="meta_batch_size"`; as meta-batches that do not fit into memory are taken in several passes, '
    "it goes on to `max_trials`",
)
def batch_size_finder(algorithm: Algorithm) -> None:
    finder = lc.BatchSizeFinder(batch_arg_name="meta_batch_size", max_trials=3, steps_per_trial=1)
    learner, data, history = learner_of(algorithm), sines(epoch_length=1000), History()
    quiet(finder, history, max_epochs=-1, max_steps=3).fit(learner, data)
    assert finder.optimal_batch_size == data.meta_batch_size == 8
    assert history.meets(0, 1, 2, tasks=8)
    plain = learner_of(algorithm)
    quiet(max_epochs=-1, max_steps=3).fit(plain, sines(epoch_length=1000, meta_batch_size=8))
    assert equal(state(plain), state(learner))


def rows(logger: CSVLogger) -> list[dict[str, str]]:
    """What a CSVLogger wrote."""
    logger.save()
    with Path(logger.log_dir, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def column(logger: CSVLogger, name: str) -> list[float]:
    return [float(row[name]) for row in rows(logger) if row[name]]


@case("callbacks", "LearningRateMonitor", "works", "logs `outer_lr` as the schedule moves it, for Reptile ε")
def learning_rate_monitor(algorithm: Algorithm) -> None:
    outer_lr = 0.001 if algorithm is MAML else 0.1
    expected = [outer_lr * (1 - step / 8) for step in range(8)]
    intervals: Any = (("step", slice(None)), ("epoch", slice(None, None, EPOCH)))
    for interval, steps in intervals:
        monitor, logger = lc.LearningRateMonitor(interval), CSVLogger(interval)
        fitted(algorithm, monitor, of={"outer_lr_decay": "linear"}, logger=logger, log_every_n_steps=1)
        ((name, values),) = monitor.lrs.items()
        assert values == pytest.approx(expected[steps])
        assert column(logger, name) == pytest.approx(expected[steps])


@case(
    "callbacks",
    "LearningRateMonitor",
    "works",
    "logs those of the outer optimizer, for Reptile 0",
    with_="`log_momentum`, `log_weight_decay`",
)
def learning_rate_monitor_of_other_options(algorithm: Algorithm) -> None:
    monitor, logger = lc.LearningRateMonitor(log_momentum=True, log_weight_decay=True), CSVLogger("logs")
    of = {"optimizer": AdamW} if algorithm is MAML else {}
    fitted(algorithm, monitor, of=of, logger=logger, log_every_n_steps=1)
    (momentum,) = monitor.last_momentum_values.values()
    (decay,) = monitor.last_weight_decay_values.values()
    assert [momentum, decay] == ([0.9, 0.01] if algorithm is MAML else [0, 0])


@case(
    "callbacks",
    "EarlyStopping",
    "works",
    "stops after the validation that patience, threshold or NaN call for",
    algorithms=ONE,
)
def early_stopping(algorithm: Algorithm) -> None:
    history = History()
    fitted(algorithm, lc.EarlyStopping("val/tasks", patience=2, mode="max"), history, max_epochs=10)
    assert history.validations == [4, 8, 12]
    quiet(lc.EarlyStopping("val/mse", stopping_threshold=torch.inf), history).fit(learner_of(algorithm), sines())
    assert history.validations == [4, 8, 12, 4]
    stopping = lc.EarlyStopping("train/loss", check_finite=True, check_on_train_epoch_end=True)
    fit = quiet(stopping, log_every_n_steps=1, max_epochs=5)
    fit.fit(learner_of(algorithm), bad_sines())
    assert fit.global_step == EPOCH  # the meta-batches 2 to 4 are NaN


@case("callbacks", "Timer", "works", "stops when the time is over, and counts that of each stage", algorithms=ONE)
def timer(algorithm: Algorithm) -> None:
    clock = lc.Timer(timedelta(milliseconds=300), interval="step")
    fit = quiet(clock, max_epochs=-1, max_steps=100_000)
    fit.fit(learner_of(algorithm), sines())
    assert 0 < fit.global_step < 100_000
    assert 0.3 <= clock.time_elapsed() < 10
    assert clock.time_elapsed("validate") > 0


@case("callbacks", "ThroughputMonitor", "works", "`batch_size_fn` gets the `TaskBatch`", algorithms=ONE)
def throughput_monitor(algorithm: Algorithm) -> None:
    logger = CSVLogger("logs")
    monitor = lc.ThroughputMonitor(lambda batch: len(batch.support_x), window_size=2)
    fitted(algorithm, monitor, logger=logger, log_every_n_steps=1)
    assert column(logger, "train/samples") == [TASKS * (step + 1) for step in range(2 * EPOCH)]
    assert all(rate > 0 for rate in column(logger, "train/device/samples_per_sec"))


@case(
    "callbacks",
    "DeviceStatsMonitor",
    "works",
    "logs what the accelerator tells, with `cpu_stats` that of the CPU",
    algorithms=ONE,
)
def device_stats_monitor(algorithm: Algorithm) -> None:
    pytest.importorskip("psutil")
    logger = CSVLogger("logs")
    fitted(algorithm, lc.DeviceStatsMonitor(cpu_stats=True), logger=logger, log_every_n_steps=1)
    for moment in ("start", "end"):
        assert len(column(logger, f"DeviceStatsMonitor.on_train_batch_{moment}/cpu_vm_percent")) == 2 * EPOCH


@case(
    "callbacks",
    "SpikeDetection",
    "works",
    "stops at a loss that is not finite, and writes the batches' numbers",
    algorithms=ONE,
)
def spike_detection(algorithm: Algorithm) -> None:
    assert equal(state(fitted(algorithm, lc.SpikeDetection(warmup=20))), plain(algorithm))
    with pytest.raises(TrainingSpikeException, match=r"\b2\b"):
        quiet(lc.SpikeDetection(warmup=1)).fit(learner_of(algorithm), bad_sines())
    assert "2" in Path("skip_batches.json").read_text()


def goes_on_from(path: str, algorithm: Algorithm, expected: dict[str, Tensor]) -> None:
    learner, fit = learner_of(algorithm), quiet()
    fit.fit(learner, sines(), ckpt_path=path, weights_only=True)
    assert fit.global_step == 2 * EPOCH
    assert equal(state(learner), expected)


@case("callbacks", "ModelCheckpoint", "works", "alone or beside `Checkpoints`; training resumes from what it saves")
def model_checkpoint(algorithm: Algorithm) -> None:
    every = lc.ModelCheckpoint("every", "{step}", every_n_train_steps=3, save_top_k=-1)
    best = lc.ModelCheckpoint("best", "{step}", monitor="val/mse")
    learner = fitted(algorithm, every, best, kept("ours"))
    assert {path.name for path in Path("every").iterdir()} == {"step=3.ckpt", "step=6.ckpt"}
    assert {path.name for path in Path("ours").iterdir()} >= {"best.ckpt", "last.ckpt"}
    (chosen,) = Path("best").iterdir()
    ours = torch.load("ours/best.ckpt", weights_only=True)["state_dict"]
    assert equal(torch.load(chosen, weights_only=True)["state_dict"], ours)
    fitted(algorithm, lc.ModelCheckpoint("alone", "{step}", every_n_train_steps=3, save_top_k=-1))
    for path in ("every/step=3.ckpt", "every/step=6.ckpt", "alone/step=3.ckpt"):
        goes_on_from(path, algorithm, state(learner))


@case("callbacks", "Checkpoint", "works", "training resumes from what a subclass saves", algorithms=ONE)
def checkpoint(algorithm: Algorithm) -> None:
    class AtEpochs(lc.Checkpoint):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(f"{trainer.global_step}.ckpt")

    goes_on_from("4.ckpt", algorithm, state(fitted(algorithm, AtEpochs())))


@case("callbacks", "OnExceptionCheckpoint", "works", "training resumes with the step that failed")
def on_exception_checkpoint(algorithm: Algorithm) -> None:
    with pytest.raises(RuntimeError, match="a failure"):
        fitted(algorithm, Failing(3), lc.OnExceptionCheckpoint("failed"))
    assert torch.load("failed/on_exception.ckpt", weights_only=True)["global_step"] == 3
    goes_on_from("failed/on_exception.ckpt", algorithm, plain(algorithm))


BACKWARD = ["on_before_backward", "on_after_backward"]


class Noted(lc.Callback):
    """Notes the hooks of training, in order."""

    def __init__(self) -> None:
        self.hooks: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if name.startswith("on_") and callable(found):
            self.hooks.append(name)
        return found


@case(
    "callbacks",
    "Callback",
    "works",
    "every hook, but `on_before_zero_grad`, and for Reptile those of backward, which it does not have",
)
def callback(algorithm: Algorithm) -> None:
    noted = Noted()
    fitted(algorithm, noted, max_steps=2, max_epochs=-1)
    first = noted.hooks.index("on_train_batch_start")
    backward = BACKWARD if algorithm is MAML else []
    step = ["on_train_batch_start", *backward, "on_before_optimizer_step", "on_train_batch_end"]
    assert noted.hooks[first : first + 2 * len(step)] == 2 * step
    called = {*noted.hooks}
    assert called >= {"on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_end", "on_fit_end"}
    assert "on_before_zero_grad" not in called


@case("callbacks", "LambdaCallback", "works", "as `Callback`", algorithms=ONE)
def lambda_callback(algorithm: Algorithm) -> None:
    losses: list[float] = []
    history = History()
    note = lc.LambdaCallback(on_train_batch_end=lambda trainer, learner, outputs, *_: losses.append(outputs["loss"]))
    fitted(algorithm, note, history)
    assert losses == history.losses
    assert len(losses) == 2 * EPOCH


@case(
    "callbacks",
    "BasePredictionWriter",
    "works",
    "gets the predictions of each meta-batch in order; `batch_indices` is empty",
)
def base_prediction_writer(algorithm: Algorithm) -> None:
    class Writer(lc.BasePredictionWriter):
        def __init__(self) -> None:
            super().__init__("batch_and_epoch")
            self.batches: list[tuple[int, Tensor]] = []

        def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, *args: Any) -> None:
            self.batches.append((args[-2], prediction))

        def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
            self.epoch = predictions

    writer, learner = Writer(), learner_of(algorithm)
    quiet(writer).predict(learner, sines())
    tasks = sines().task_set("test")
    for number, (batch_idx, prediction) in enumerate(writer.batches):
        batch = tasks.batch(range(number * TASKS, (number + 1) * TASKS))
        assert batch_idx == number
        for x, y, query, answer in zip(batch.support_x, batch.support_y, batch.query_x, prediction, strict=True):
            assert torch.allclose(learner.adapt(x, y)(query), answer, atol=1e-5)
    assert [len(part) for part in writer.epoch] == [TASKS, TASKS]


class Shown(lc.ProgressBar):
    def __init__(self) -> None:
        super().__init__()
        self.shown: list[dict[str, Any]] = []

    def disable(self) -> None:
        """A bar that shows nothing."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.shown.append(dict(self.get_metrics(trainer, pl_module)))


@case("callbacks", "ProgressBar", "works", "shows the training loss and the score of validation", algorithms=ONE)
def progress_bar(algorithm: Algorithm) -> None:
    bar, history = Shown(), History()
    fitted(algorithm, bar, history, enable_progress_bar=True, log_every_n_steps=1)
    assert [shown["train/loss"] for shown in bar.shown] == pytest.approx(history.losses)
    assert "val/mse" in bar.shown[-1]


@case("callbacks", "TQDMProgressBar", "works", "shows the training loss and the score of validation", algorithms=ONE)
def tqdm_progress_bar(algorithm: Algorithm) -> None:
    bar = lc.TQDMProgressBar()
    fitted(algorithm, bar, enable_progress_bar=True, log_every_n_steps=1)
    assert bar.train_progress_bar.n == EPOCH
    assert "train/loss=" in bar.train_progress_bar.postfix
    assert "val/mse=" in bar.train_progress_bar.postfix


@case(
    "callbacks",
    "RichProgressBar",
    "works",
    "shows the training loss and the score of validation; needs `rich`",
    algorithms=ONE,
)
def rich_progress_bar(algorithm: Algorithm) -> None:
    pytest.importorskip("rich")
    shown: list[dict[str, Any]] = []

    class Bar(lc.RichProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> Any:
            shown.append(dict(super().get_metrics(trainer, pl_module)))
            return shown[-1]

    fitted(algorithm, Bar(), enable_progress_bar=True, log_every_n_steps=1)
    assert {"train/loss", "val/mse"} <= shown[-1].keys()


def summary(algorithm: Algorithm, kind: type[lc.ModelSummary]) -> str:
    """What is said of a learner with an example of its input."""
    said = io.StringIO()
    log, handler = logging.getLogger(kind.__module__), logging.StreamHandler(said)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    learner = learner_of(algorithm)
    learner.example_input_array = torch.zeros(3, 1)
    try:
        quiet(kind(max_depth=2), enable_model_summary=True, max_steps=1).fit(learner, sines())
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    return said.getvalue()


@case(
    "callbacks",
    "ModelSummary",
    "works",
    "counts the parameters of θ; with `example_input_array` the sizes too",
    algorithms=ONE,
)
def model_summary(algorithm: Algorithm) -> None:
    lines = {
        line.split("|")[1].strip(): line for line in summary(algorithm, lc.ModelSummary).splitlines() if "|" in line
    }
    assert {"network", "network.features", "network.head"} <= lines.keys()
    assert [part.strip() for part in lines["network"].split("|")][2:4] == ["MLP", "25"]
    assert "[3, 8]" in lines["network.features"]
    assert "[3, 1]" in lines["network.head"]


@case("callbacks", "RichModelSummary", "works", "counts the parameters of θ; needs `rich`", algorithms=ONE)
def rich_model_summary(algorithm: Algorithm) -> None:
    pytest.importorskip("rich")
    seen: list[Any] = []

    class Kept(lc.RichModelSummary):
        @staticmethod
        def summarize(summary_data: Any, total_parameters: int, *args: Any, **kwargs: Any) -> None:
            seen.append(total_parameters)
            lc.RichModelSummary.summarize(summary_data, total_parameters, *args, **kwargs)

    quiet(Kept(), enable_model_summary=True, max_steps=1).fit(learner_of(algorithm), sines())
    assert seen == [25]
