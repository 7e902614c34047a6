"""The parameters of Lightning's Trainer: the checks of what each does here."""

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import AsyncCheckpointIO, DoublePrecision, MixedPrecision, TorchCheckpointIO
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from registry import (
    EPOCH,
    ONE,
    TASKS,
    History,
    bad_sines,
    case,
    equal,
    fitted,
    kept,
    learner_of,
    plain,
    quiet,
    sines,
    state,
)
from torch import nn

from meta_lightning import MetaLearner, load_learner
from meta_lightning.checks import InputError

Algorithm = type[MetaLearner]


def refused(algorithm: Algorithm, match: str, **options: Any) -> None:
    """Refused before the first step, by a sentence that names the flag and the value."""
    history = History()
    with pytest.raises(InputError, match=match):
        fitted(algorithm, history, **options)
    assert not history.losses


@contextmanager
def seen_by(learner: MetaLearner, **attributes: Any) -> Iterator[None]:
    """Let a learner see a Trainer with attributes that cannot be had on every machine."""
    fit = quiet()
    learner.trainer = fit
    with pytest.MonkeyPatch.context() as patch:
        for name, value in attributes.items():
            patch.setattr(L.Trainer, name, property(lambda self, value=value: value))
        yield


@contextmanager
def a_process_group() -> Iterator[None]:
    """Leave neither the group nor its environment to other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        try:
            yield
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


@case("flags", "accelerator", "works", "CPU or GPU; θ and the tasks are there", algorithms=ONE)
def accelerator(algorithm: Algorithm) -> None:
    history = History()
    learner = fitted(algorithm, history, accelerator="cpu")
    assert {p.device.type for p in learner.parameters()} | {x.device.type for x in history.batches} == {"cpu"}
    if torch.cuda.is_available():
        history = History()
        fitted(algorithm, history, accelerator="gpu")
        assert {x.device.type for x in history.batches} == {"cuda"}


@case("flags", "strategy", "works", "one process or several, which share each meta-batch", with_="`auto`, `ddp`")
def strategy(algorithm: Algorithm) -> None:
    history = History()
    with a_process_group():
        learner = fitted(algorithm, history, strategy="ddp", use_distributed_sampler=True)
    assert equal(state(learner), plain(algorithm))
    assert history.meets(*range(2 * EPOCH))


@case(
    "flags",
    "strategy",
    "refused",
    "shards θ, which the inner loop copies",
    with_="`fsdp`, `deepspeed`, model parallel",
    algorithms=ONE,
)
def sharding_strategy(algorithm: Algorithm) -> None:
    for kind in (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy):
        sharding: Any = object.__new__(kind)  # DeepSpeed need not be installed
        learner = learner_of(algorithm)
        with (
            seen_by(learner, strategy=sharding, world_size=1, precision="32-true"),
            pytest.raises(InputError, match=rf"trainer\.strategy .*\b{kind.__name__}\b"),
        ):
            learner.setup("fit")


def check_shares(**options: Any) -> None:
    fit = quiet(strategy="ddp", **options)
    assert fit.world_size == 2
    data = sines()
    data.trainer = fit
    batches: Any = data.train_dataloader().dataset
    assert [*batches.numbers(0), *batches.numbers(1)] == [0, 2, 4, 6]  # those of the first process
    data = sines(meta_batch_size=3)
    data.trainer = fit
    with pytest.raises(InputError, match=r"meta_batch_size .*\b2\b.*\bgot 3\b"):
        data.train_dataloader()


@case(
    "flags",
    "devices",
    "works",
    "processes share each meta-batch; `meta_batch_size` is a multiple of their number",
    algorithms=ONE,
)
def devices(algorithm: Algorithm) -> None:
    check_shares(devices=2)


@case("flags", "num_nodes", "works", "as `devices`", algorithms=ONE)
def num_nodes(algorithm: Algorithm) -> None:
    check_shares(devices=1, num_nodes=2)


@case("flags", "precision", "works", "θ and the inner steps in it", with_="`32-true`, `64-true`")
def precision(algorithm: Algorithm) -> None:
    assert equal(state(fitted(algorithm, precision="32-true")), plain(algorithm))
    check_precision(algorithm, "64-true", torch.float64, 1e-4)


@case("flags", "precision", "works", "layers in bfloat16, θ and θ' in float32", with_="`bf16-mixed`")
def mixed_precision(algorithm: Algorithm) -> None:
    check_precision(algorithm, "bf16-mixed", torch.float32, 0.05)


def check_precision(algorithm: Algorithm, precision: str, dtype: torch.dtype, differs: float) -> None:
    """θ is of this dtype, and differs from that of a fit in float32, by less."""
    exact, found = plain(algorithm), state(fitted(algorithm, precision=precision))
    assert {p.dtype for p in found.values()} == {dtype}
    worst = max((found[name].float() - p).abs().max().item() for name, p in exact.items())
    assert 0 < worst < differs


@case(
    "flags",
    "precision",
    "refused",
    "inner steps would vanish in rounding or underflow",
    with_="`16-mixed`, `16-true`, `bf16-true`, `transformer-engine`",
    algorithms=ONE,
)
def low_precision(algorithm: Algorithm) -> None:
    for value in ("16-mixed", "16-true", "bf16-true", "transformer-engine", "transformer-engine-float16"):
        learner = learner_of(algorithm)
        with (
            seen_by(learner, precision=value),
            pytest.raises(InputError, match=rf"trainer\.precision .*\bgot {value}:"),
        ):
            learner.setup("fit")
    refused(algorithm, r"trainer\.precision .*\bgot bf16-true:", precision="bf16-true")


@case(
    "flags",
    "plugins",
    "works",
    "precisions as `precision`; `CheckpointIO` in place of that of `Checkpoints`",
    algorithms=ONE,
)
def plugins(algorithm: Algorithm) -> None:
    learner = fitted(algorithm, plugins=[DoublePrecision()])
    assert {p.dtype for p in learner.parameters()} == {torch.float64}
    refused(algorithm, r"trainer\.precision .*\bgot 16-mixed:", plugins=[MixedPrecision("16-mixed", "cpu")])
    expected = plain(algorithm)
    written: list[str] = []

    class Noted(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            written.append(Path(path).name)
            super().save_checkpoint(checkpoint, path, storage_options)

    for number, plugin in enumerate((Noted(), AsyncCheckpointIO())):
        fitted(algorithm, kept(str(number)), plugins=[plugin])
        assert equal(torch.load(f"{number}/last.ckpt", weights_only=True)["state_dict"], expected)
    assert {*written} == {"best.ckpt", "last.ckpt"}


@case(
    "flags",
    "sync_batchnorm",
    "refused",
    "batch norm has the statistics of one task, which is in one process",
    algorithms=ONE,
)
def sync_batchnorm(algorithm: Algorithm) -> None:
    with a_process_group():
        network = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        fit = quiet(sync_batchnorm=True, strategy="ddp")
        with pytest.raises(InputError, match=r"\bsync_batchnorm\b.*\bgot\b"):
            fit.fit(algorithm(network, inner_steps=2), sines())  # type: ignore[call-arg]
    assert fit.global_step == 0


@case("flags", "deterministic", "works", "sets torch's deterministic algorithms", algorithms=ONE)
def deterministic(algorithm: Algorithm) -> None:
    try:
        learner = fitted(algorithm, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert equal(state(learner), plain(algorithm))
        fitted(algorithm, deterministic="warn")
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@case("flags", "benchmark", "works", "sets that of cuDNN", algorithms=ONE)
def benchmark(algorithm: Algorithm) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "benchmark", False)
        learner = fitted(algorithm, benchmark=True)
        assert torch.backends.cudnn.benchmark
    assert equal(state(learner), plain(algorithm))


@case("flags", "fast_dev_run", "works", "runs so many meta-iterations and writes no files", algorithms=ONE)
def fast_dev_run(algorithm: Algorithm) -> None:
    history = History()
    fitted(algorithm, history, kept("checkpoints"), fast_dev_run=2, logger=True)
    assert history.meets(0, 1)
    assert history.validations == [2]
    assert not list(Path().iterdir())


class Failing(L.Callback):
    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == EPOCH + 1:
            raise RuntimeError("a failure")


@case("flags", "max_epochs", "works", "epochs of `epoch_length` meta-iterations; a decay ends with it")
def max_epochs(algorithm: Algorithm) -> None:
    history, of = History(), {"outer_lr_decay": "linear"}
    learner = fitted(algorithm, history, max_epochs=3, of=of)
    assert history.meets(*range(3 * EPOCH))
    (first,) = history.rates[0]
    assert history.rates == [[pytest.approx(first * (1 - step / 12))] for step in range(12)]
    with pytest.raises(RuntimeError, match="a failure"):
        fitted(algorithm, kept("part", every_n_steps=1), Failing(), max_epochs=3, of=of)
    rest, seen = learner_of(algorithm, **of), History()
    quiet(kept("rest"), seen, max_epochs=3).fit(rest, sines(), ckpt_path="part/last.ckpt", weights_only=True)
    assert seen.meets(*range(12 - len(seen.batches), 12))
    assert seen.rates == history.rates[-len(seen.rates) :]
    assert equal(state(rest), state(learner))


@case("flags", "max_steps", "works", "the number of meta-iterations; a decay ends with it")
def max_steps(algorithm: Algorithm) -> None:
    history = History()
    fitted(algorithm, history, max_epochs=-1, max_steps=6, of={"outer_lr_decay": "linear"})
    assert history.meets(*range(6))
    (first,) = history.rates[0]
    assert history.rates == [[pytest.approx(first * (1 - step / 6))] for step in range(6)]


class Asking(L.Callback):
    """Asks training to stop after the first step."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = True


@case("flags", "min_steps", "works", "meta-iterations before a callback may stop training", algorithms=ONE)
def min_steps(algorithm: Algorithm) -> None:
    for value, steps in ((None, 1), (6, 6)):
        history = History()
        fitted(algorithm, history, Asking(), min_steps=value, max_epochs=5)
        assert len(history.losses) == steps


@case("flags", "min_epochs", "works", "epochs before a callback may stop training", algorithms=ONE)
def min_epochs(algorithm: Algorithm) -> None:
    history = History()
    fitted(algorithm, history, Asking(), min_epochs=2, max_epochs=5)
    assert len(history.losses) == 2 * EPOCH


@case("flags", "max_time", "works", "stops training after it", algorithms=ONE)
def max_time(algorithm: Algorithm) -> None:
    fit = quiet(max_epochs=-1, max_steps=100_000, max_time=timedelta(milliseconds=300))
    fit.fit(learner_of(algorithm), sines())
    assert 0 < fit.global_step < 100_000


@case("flags", "overfit_batches", "works", "the first meta-batches again in each epoch")
def overfit_batches(algorithm: Algorithm) -> None:
    for value in (2, 0.5):
        history = History()
        quiet(history, overfit_batches=value).fit(learner_of(algorithm), sines(val_tasks=8))
        assert history.meets(0, 1, 0, 1)


@case("flags", "limit_train_batches", "works", "meta-iterations per epoch, or the part of it; the tasks go on")
def limit_train_batches(algorithm: Algorithm) -> None:
    for value in (3, 0.75):
        history = History()
        fitted(algorithm, history, limit_train_batches=value)
        assert history.meets(*range(6))


def check_limit(algorithm: Algorithm, split: str, method: str) -> None:
    for value, tasks in ((1, TASKS), (0.5, TASKS), (1.0, 2 * TASKS)):
        fit = quiet(**{f"limit_{split}_batches": value})
        found = getattr(fit, method)(learner_of(algorithm), sines(val_tasks=8), verbose=False)
        assert found[0][f"{split}/tasks"] == tasks


@case(
    "flags", "limit_val_batches", "works", "meta-batches per validation, or the part of it; 0 for none", algorithms=ONE
)
def limit_val_batches(algorithm: Algorithm) -> None:
    check_limit(algorithm, "val", "validate")
    history = History()
    fitted(algorithm, history, limit_val_batches=0)
    assert history.meets(*range(8))
    assert not history.validations


@case("flags", "limit_test_batches", "works", "meta-batches of the test, or the part of it", algorithms=ONE)
def limit_test_batches(algorithm: Algorithm) -> None:
    check_limit(algorithm, "test", "test")


@case("flags", "limit_predict_batches", "works", "meta-batches of the prediction, or the part of it", algorithms=ONE)
def limit_predict_batches(algorithm: Algorithm) -> None:
    for value in (1, 0.5):
        found = quiet(limit_predict_batches=value).predict(learner_of(algorithm), sines())
        assert found is not None
        assert [len(part) for part in found] == [TASKS]


@case("flags", "val_check_interval", "works", "meta-iterations, the part of an epoch, or time", algorithms=ONE)
def val_check_interval(algorithm: Algorithm) -> None:
    for value in (2, 0.5):
        history = History()
        fitted(algorithm, history, val_check_interval=value)
        assert history.validations == [2, 4, 6, 8]
    history = History()
    fitted(algorithm, history, val_check_interval=timedelta(0))
    assert history.validations == [*range(1, 9)]


@case(
    "flags",
    "check_val_every_n_epoch",
    "works",
    "epochs, or None for `val_check_interval` across epochs",
    algorithms=ONE,
)
def check_val_every_n_epoch(algorithm: Algorithm) -> None:
    for options, expected in (
        ({"check_val_every_n_epoch": 2}, [8]),
        ({"check_val_every_n_epoch": None, "val_check_interval": 3}, [3, 6]),
    ):
        history = History()
        fitted(algorithm, history, **options)  # type: ignore[arg-type]
        assert history.validations == expected


@case("flags", "num_sanity_val_steps", "works", "meta-batches of validation before training", algorithms=ONE)
def num_sanity_val_steps(algorithm: Algorithm) -> None:
    seen: list[bool] = []

    class Sanity(L.Callback):
        def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append(trainer.sanity_checking)

    for value, expected in ((0, 0), (1, 1), (-1, 3)):
        seen.clear()
        fit = quiet(Sanity(), num_sanity_val_steps=value)
        fit.fit(learner_of(algorithm), sines(val_tasks=12))
        assert sum(seen) == expected


def logged_steps(folder: str, name: str) -> list[int]:
    with Path(folder, "lightning_logs/version_0/metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row[name]]


@case(
    "flags",
    "log_every_n_steps",
    "works",
    "`train/…` is computed and logged every n meta-iterations",
    algorithms=ONE,
)
def log_every_n_steps(algorithm: Algorithm) -> None:
    for value, expected in ((1, [*range(8)]), (3, [2, 5])):
        fitted(algorithm, logger=CSVLogger(str(value)), log_every_n_steps=value)
        assert logged_steps(str(value), "train/loss") == expected


@case("flags", "logger", "works", "one, several, or none; True: TensorBoard", algorithms=ONE)
def logger(algorithm: Algorithm) -> None:
    fitted(algorithm, logger=True)
    assert list(Path("lightning_logs/version_0").glob("events.out.tfevents.*"))
    fitted(algorithm, logger=[CSVLogger("a"), CSVLogger("b")], log_every_n_steps=1)
    assert logged_steps("a", "train/loss") == logged_steps("b", "train/loss") == [*range(8)]
    before = {*Path().iterdir()}
    fitted(algorithm, logger=False)
    assert {*Path().iterdir()} == before


@case("flags", "callbacks", "works", "see the table of callbacks", algorithms=ONE)
def callbacks(algorithm: Algorithm) -> None:
    alone, first, second = History(), History(), History()
    fitted(algorithm, alone)
    fitted(algorithm, first, second)
    assert alone.losses == first.losses == second.losses


@case(
    "flags",
    "enable_checkpointing",
    "works",
    "Lightning's `ModelCheckpoint`, unless `Checkpoints` is given",
    algorithms=ONE,
)
def enable_checkpointing(algorithm: Algorithm) -> None:
    fitted(algorithm, enable_checkpointing=False)
    assert not list(Path().rglob("*.ckpt"))
    learner = fitted(algorithm, enable_checkpointing=True)
    (path,) = Path().rglob("*.ckpt")
    assert equal(state(load_learner(path, network=learner_of(algorithm).network)), state(learner))


@case("flags", "enable_progress_bar", "works", "Lightning's bar", algorithms=ONE)
def enable_progress_bar(algorithm: Algorithm) -> None:
    for value in (True, False):
        fit = quiet(enable_progress_bar=value)
        fit.fit(learner_of(algorithm), sines())
        assert any(isinstance(callback, ProgressBar) for callback in fit.callbacks) == value  # type: ignore[attr-defined]


@case("flags", "enable_model_summary", "works", "Lightning's summary", algorithms=ONE)
def enable_model_summary(algorithm: Algorithm) -> None:
    for value in (True, False):
        fit = quiet(enable_model_summary=value)
        fit.fit(learner_of(algorithm), sines())
        assert any(isinstance(callback, ModelSummary) for callback in fit.callbacks) == value  # type: ignore[attr-defined]


@case("flags", "enable_autolog_hparams", "works", "whether loggers get the hyperparameters", algorithms=ONE)
def enable_autolog_hparams(algorithm: Algorithm) -> None:
    for value in (True, False):
        logs = CSVLogger(str(value))
        fitted(algorithm, logger=logs, enable_autolog_hparams=value)
        assert bool(logs.experiment.hparams) == value


@case("flags", "default_root_dir", "works", "where logs and checkpoints go", algorithms=ONE)
def default_root_dir(algorithm: Algorithm) -> None:
    fitted(algorithm, default_root_dir="root", logger=True, enable_checkpointing=True)
    assert [path.name for path in Path().iterdir()] == ["root"]
    assert list(Path("root/lightning_logs/version_0/checkpoints").glob("*.ckpt"))


@case("flags", "model_registry", "works", "changes nothing unless a callback of `litmodels` uploads", algorithms=ONE)
def model_registry(algorithm: Algorithm) -> None:
    assert equal(state(fitted(algorithm, model_registry="a/b")), plain(algorithm))


@case("flags", "profiler", "works", "see the table of profilers", algorithms=ONE)
def profiler(algorithm: Algorithm) -> None:
    fit = quiet(profiler="simple")
    fit.fit(learner_of(algorithm), sines())
    profiler: Any = fit.profiler  # type: ignore[attr-defined]
    assert isinstance(profiler, SimpleProfiler)
    assert len(profiler.recorded_durations["optimizer_step"]) == 8


@case("flags", "barebones", "works", "neither logs, checkpoints, bar nor sanity check; the same θ")
def barebones(algorithm: Algorithm) -> None:
    learner = learner_of(algorithm)
    fit = L.Trainer(accelerator="cpu", devices=1, barebones=True, max_epochs=2, limit_val_batches=1)
    fit.fit(learner, sines())
    assert fit.global_step == 8
    assert equal(state(learner), plain(algorithm))
    assert not list(Path().iterdir())


@case("flags", "accumulate_grad_batches", "refused", "`meta_batch_size` is the number of tasks of an update")
def accumulate_grad_batches(algorithm: Algorithm) -> None:
    refused(algorithm, r"\baccumulate_grad_batches\b.*\b2\b", accumulate_grad_batches=2)


@case("flags", "gradient_clip_val", "refused", "an argument of MAML, FOMAML and IMAML; Reptile has no gradient")
def gradient_clip_val(algorithm: Algorithm) -> None:
    refused(algorithm, r"\bgradient_clip_val\b.*\b0\.5\b", gradient_clip_val=0.5)


@case("flags", "gradient_clip_algorithm", "refused", "an argument of MAML, FOMAML and IMAML; Reptile has no gradient")
def gradient_clip_algorithm(algorithm: Algorithm) -> None:
    refused(algorithm, r"(?i)\bgradient_clip_algorithm\b.*\bvalue\b", gradient_clip_algorithm="value")


@case("flags", "detect_anomaly", "works", "stops where a backward gives NaN, instead of skipping the meta-iteration")
def detect_anomaly(algorithm: Algorithm) -> None:
    fit = quiet(detect_anomaly=True)
    with pytest.raises(RuntimeError, match="returned nan values"):
        fit.fit(learner_of(algorithm), bad_sines())
    assert fit.global_step == 2
    assert equal(state(fitted(algorithm, detect_anomaly=True)), plain(algorithm))


@case("flags", "inference_mode", "works", "validation, test and prediction give the same with either value")
def inference_mode(algorithm: Algorithm) -> None:
    modes: list[bool] = []

    class Mode(L.Callback):
        def on_test_batch_end(self, *_: Any) -> None:
            modes.append(torch.is_inference_mode_enabled())

    a, b = (
        quiet(Mode(), inference_mode=value).test(learner_of(algorithm), sines(), verbose=False)
        for value in (True, False)
    )
    assert modes == [True, True, False, False]
    assert a == b


@case("flags", "use_distributed_sampler", "works", "our loaders share the tasks themselves, with either value")
def use_distributed_sampler(algorithm: Algorithm) -> None:
    for value in (True, False):
        history = History()
        with a_process_group():
            fitted(algorithm, history, use_distributed_sampler=value, strategy="ddp")
        assert history.meets(*range(8))


@case("flags", "reload_dataloaders_every_n_epochs", "works", "the tasks go on")
def reload_dataloaders_every_n_epochs(algorithm: Algorithm) -> None:
    history, made = History(), []
    data = sines()
    loader = data.train_dataloader
    data.train_dataloader = lambda: made.append(1) or loader()  # type: ignore[method-assign,func-returns-value]
    quiet(history, reload_dataloaders_every_n_epochs=1).fit(learner_of(algorithm), data)
    assert len(made) == 2
    assert history.meets(*range(8))
