"""Schedules, steps that are skipped, and what waits for the device: with Lightning's own callbacks and loggers."""

import copy
import csv
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import Seen, trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from meta_lightning import FOMAML, MAML, MLP, MetaLearner, MetaSGD, Reptile, Sinusoid, TaskBatch
from meta_lightning import Adam as InnerAdam
from meta_lightning.checks import InputError
from meta_lightning.outer.update import undone_unless

ALGORITHMS: list[Any] = [MAML, FOMAML, Reptile]
# Lightning on what is meant: tasks from a list, no validation, no optimizer in Reptile, a checkpoint a step
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

SCRIPT = Path(__file__).parent / "ddp_guard_script.py"


def warm_up_then_cosine(optimizer: Optimizer) -> LRScheduler:
    parts = [LinearLR(optimizer, 0.1, total_iters=5), CosineAnnealingLR(optimizer, 10)]
    return SequentialLR(optimizer, parts, milestones=[5])


SCHEDULERS = pytest.mark.parametrize(
    "scheduler",
    [
        pytest.param(partial(CosineAnnealingLR, T_max=12), id="cosine"),
        pytest.param(partial(StepLR, step_size=4, gamma=0.5), id="step"),
        pytest.param(partial(LinearLR, start_factor=0.1, total_iters=6), id="warm-up"),
        pytest.param(partial(OneCycleLR, max_lr=0.5, total_steps=20, cycle_momentum=False), id="one-cycle"),
        pytest.param(warm_up_then_cosine, id="sequential"),
    ],
)


def rates_alone(scheduler: Callable[[Optimizer], LRScheduler], lr: float, steps: int) -> list[float]:
    """The learning rates that torch's scheduler gives an optimizer of its own."""
    optimizer = SGD([torch.zeros(1)], lr)
    schedule, rates = scheduler(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def logged(logger: CSVLogger, name: str) -> list[float]:
    """A column of a CSV log."""
    return [float(row[name]) for row in csv.DictReader(Path(logger.log_dir, "metrics.csv").open()) if row[name]]


# ----------------------------------------------------------------------------------------------------------- schedules


@SCHEDULERS
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_schedules_are_torchs_own_and_are_logged(
    algorithm: Any, scheduler: Any, mlp: MLP, sinusoid: Sinusoid, tmp_path: Path
) -> None:
    logger = CSVLogger(tmp_path)
    learner = algorithm(mlp, scheduler=scheduler, outer_lr=0.1, outer_lr_decay="linear")
    options = {"logger": logger, "log_every_n_steps": 1, "callbacks": [LearningRateMonitor("step")]}
    trainer(max_steps=12, limit_val_batches=0, **options).fit(learner, sinusoid)
    expected = rates_alone(scheduler, 0.1, 12)
    assert logged(logger, "train/outer_lr") == pytest.approx(expected, rel=1e-6)
    monitored = "lr-_MockOptimizer" if algorithm is Reptile else "lr-Adam"
    assert logged(logger, monitored) == pytest.approx(expected, rel=1e-6)


@SCHEDULERS
@pytest.mark.parametrize("algorithm", [MAML, Reptile])
def test_a_resumed_schedule_goes_on(
    algorithm: Any, scheduler: Any, sinusoid: Sinusoid, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def run(max_steps: int, ckpt_path: Path | None = None, outer_lr: float = 0.1) -> tuple[list[Tensor], float]:
        torch.manual_seed(0)
        network = MLP(hidden=[8])
        fit = trainer(max_steps=max_steps, limit_val_batches=0)
        learner = algorithm(network, scheduler=scheduler, outer_lr=outer_lr, inner_steps=2)
        fit.fit(learner, sinusoid, ckpt_path=ckpt_path)
        fit.save_checkpoint(tmp_path / f"{max_steps}.ckpt")
        return [p.detach().clone() for p in network.parameters()], learner.optimizers().param_groups[0]["lr"]

    whole, lr = run(12)
    run(7)
    resumed, lr_resumed = run(12, tmp_path / "7.ckpt")
    assert lr == lr_resumed
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    _, halved = run(12, tmp_path / "7.ckpt", outer_lr=0.05)
    assert halved == pytest.approx(rates_alone(scheduler, 0.05, 13)[-1])
    assert not [w for w in recwarn if "lr_scheduler.step" in str(w.message)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_schedulers_that_need_a_metric_are_refused(algorithm: Any, mlp: MLP, sinusoid: Sinusoid) -> None:
    before = copy.deepcopy(mlp.state_dict())
    with pytest.raises(ValueError, match=r"scheduler .*ReduceLROnPlateau\b.* metrics"):
        trainer(max_steps=3, num_sanity_val_steps=0).fit(algorithm(mlp, scheduler=ReduceLROnPlateau), sinusoid)
    torch.testing.assert_close(mlp.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_early_stopping(algorithm: Any, mlp: MLP, sinusoid: Sinusoid) -> None:
    # the number of tasks never grows: the first validation sets it, the two after it are too many
    stopping = EarlyStopping("val/tasks", patience=2, mode="max")
    fit = trainer(max_steps=100, callbacks=[stopping])
    fit.fit(algorithm(mlp), sinusoid)
    assert fit.global_step == 30
    fit = trainer(max_steps=100, limit_val_batches=0, callbacks=[EarlyStopping("train/outer_lr", patience=1)])
    fit.fit(algorithm(mlp), sinusoid)
    assert fit.global_step == 20


# ----------------------------------------------------------------------------------------------------- what is skipped


def batches_of(sinusoid: Sinusoid, number: int) -> list[TaskBatch]:
    return [sinusoid.task_set("train").batch(range(4 * i, 4 * i + 4)) for i in range(number)]


def spoilt(batch: TaskBatch, value: float) -> TaskBatch:
    """A batch of which a single number is not finite: a support target, which all three algorithms see."""
    y = batch.support_y.clone()
    y[0, 0] = value
    return batch._replace(support_y=y)


class Foreign(Optimizer):
    """Of another package: it has the option fused, and does not look at found_inf."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr, "fused": None})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["mean"] = 0.9 * state.get("mean", torch.zeros_like(p)) + p.grad
                p -= group["lr"] * state["mean"]


OPTIMIZERS = {
    "foreign": Foreign,
    "adam": Adam,
    "sgd": SGD,
    "momentum": partial(SGD, momentum=0.9, dampening=0.5),
    "asgd": torch.optim.ASGD,
    "amsgrad": partial(Adam, amsgrad=True),
}


@pytest.mark.parametrize(("bad", "value"), [([0, 1], float("nan")), ([2, 5], float("inf"))], ids=str)
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        *(pytest.param(MAML, {"optimizer": optimizer}, id=name) for name, optimizer in OPTIMIZERS.items()),
        pytest.param(FOMAML, {"learn_inner_lr": True}, id="fomaml"),
        pytest.param(Reptile, {}, id="reptile"),
        pytest.param(Reptile, {"inner_optimizer": "adam"}, id="reptile-adam"),
    ],
)
def test_a_skipped_step_is_as_if_it_had_not_been(
    algorithm: Any, options: dict[str, Any], bad: list[int], value: float, sinusoid: Sinusoid
) -> None:
    good = batches_of(sinusoid, 6)
    mixed = [spoilt(batch, value) if i in bad else batch for i, batch in enumerate(good)]
    kept = [batch for i, batch in enumerate(good) if i not in bad]

    def run(batches: list[TaskBatch]) -> tuple[MetaLearner, L.Trainer]:
        torch.manual_seed(0)
        learner = algorithm(MLP(hidden=[8]), inner_steps=2, outer_lr=0.01, **options)
        fit = trainer(max_steps=len(batches), limit_val_batches=0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Meta-iterations are skipped")
            fit.fit(learner, DataLoader(batches, batch_size=None))
        return learner, fit

    learner, fit = run(mixed)
    expected, of_kept = run(kept)
    assert fit.global_step == 6
    assert fit.callback_metrics["train/skipped"] == learner.outer_update.skipped == len(bad)
    torch.testing.assert_close(learner.state_dict(), expected.state_dict(), rtol=0, atol=0)
    states = [run.optimizers[0].state_dict() for run in (fit, of_kept)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_too_many_in_a_row_end_training(algorithm: Any, mlp: MLP, sinusoid: Sinusoid, tmp_path: Path) -> None:
    good = batches_of(sinusoid, 12)

    def run(bad: set[int], **options: Any) -> L.Trainer:
        batches = [spoilt(batch, float("nan")) if i in bad else batch for i, batch in enumerate(good)]
        checkpoints = ModelCheckpoint(tmp_path / str(bad), every_n_train_steps=1, save_last=True)
        options |= {"limit_val_batches": 0, "enable_checkpointing": True, "callbacks": [checkpoints]}
        fit = trainer(max_steps=12, **options)
        with pytest.warns(UserWarning, match="train/skipped"):
            fit.fit(algorithm(mlp, max_skipped=3), DataLoader(batches, batch_size=None))
        return fit

    assert run({1, 2, 3, 5, 6, 7, 9}, log_every_n_steps=1).callback_metrics["train/skipped"] == 7
    with pytest.raises(FloatingPointError, match=r"loss .*\bnan\b.*step 7\b.* 4 consecutive.*last\.ckpt"):
        run({1, *range(4, 12)}, log_every_n_steps=1)
    with pytest.raises(FloatingPointError, match=r"step 8\b.* 5 consecutive"):
        run(set(range(4, 12)), log_every_n_steps=9)
    with pytest.raises(FloatingPointError, match=r"step 11\b.* 4 consecutive meta-iterations"):  # where training ends
        run(set(range(8, 12)))
    assert all(p.isfinite().all() for p in mlp.parameters())


def test_the_count_goes_on_after_a_resume(mlp: MLP, sinusoid: Sinusoid, tmp_path: Path) -> None:
    batches = [spoilt(batch, float("nan")) for batch in batches_of(sinusoid, 3)]

    def run(max_steps: int, ckpt_path: Path | None = None) -> None:
        fit = trainer(max_steps=max_steps, max_epochs=9, limit_val_batches=0, log_every_n_steps=1)
        fit.fit(MAML(mlp, max_skipped=3), DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
        fit.save_checkpoint(tmp_path / "a.ckpt")

    with pytest.warns(UserWarning, match="skipped"):
        run(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(FloatingPointError, match=r"step 3\b.* 4 consecutive meta-iterations"):
            run(6, tmp_path / "a.ckpt")


def test_state_that_an_optimizer_keeps_elsewhere_is_undone_as_well() -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = Adam([p], 0.1)
    for condition in (False, True, False):
        before = copy.deepcopy((p.detach(), dict(optimizer.state)))
        p.grad = torch.ones(3)
        with torch.no_grad(), undone_unless(torch.tensor(condition), [p], optimizer):
            optimizer.step()
        after = (p.detach(), dict(optimizer.state))
        same = torch.equal(before[0], after[0])
        assert same != condition
        assert len(optimizer.state) == len(before[1]) or condition
    assert optimizer.state[p]["step"] == 1


class Odd(SGD):
    """Keeps state where some optimizers of other packages do: numbers, containers, and options of its groups."""

    def __init__(self, params: Any, lr: float, d0: float = 1e-3) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group.update(d0=d0, d=d0, calls=0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["total"] = 1 + self.state.get("total", 0)  # of no parameter
        for group in self.param_groups:
            group["calls"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state.setdefault("first", p.grad.clone())
                state["steps"] = state.get("steps", 0) + 1
                state["past"] = [*state.get("past", ()), p.grad.clone()]
                state.pop("gone", None)
                state["grown"] = torch.zeros(state["steps"])
                if state["steps"] == 1:
                    state["gone"] = torch.ones(1)
                group["d"] = max(group["d"], float(p.grad.norm()))
                p -= group["lr"] * p.grad


def contents(optimizer: Optimizer) -> Any:
    """All that an optimizer keeps, in comparable values."""
    return repr(optimizer.state_dict())


@pytest.mark.parametrize("later", [False, True])
def test_a_skipped_step_leaves_no_state_of_any_kind(later: bool) -> None:
    p, q = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = Odd([p, q], 0.1)
    if later:  # the state of q is first created in the step that is skipped
        p.grad = torch.ones(3)
        optimizer.step()
    before = contents(optimizer), p.detach().clone()
    p.grad, q.grad = torch.full((3,), torch.nan), torch.full((2,), torch.nan)
    with torch.no_grad(), undone_unless(torch.tensor(False), [p, q], optimizer):
        optimizer.step()
    assert contents(optimizer) == before[0]
    assert torch.equal(p, before[1])
    assert torch.equal(q, torch.ones(2))
    q.grad = torch.ones(2)
    p.grad = torch.ones(3)
    with torch.no_grad(), undone_unless(torch.tensor(True), [p, q], optimizer):
        optimizer.step()
    assert optimizer.state[q]["steps"] == 1
    assert optimizer.state[p]["steps"] == 1 + later


@pytest.mark.parametrize("decay", ["constant", "linear"])
def test_what_an_optimizer_keeps_in_its_groups_survives_a_resume(
    decay: Any, sinusoid: Sinusoid, tmp_path: Path
) -> None:
    def run(max_steps: int, ckpt_path: Path | None = None, **options: Any) -> tuple[list[Tensor], dict[str, Any]]:
        torch.manual_seed(0)
        network = MLP(hidden=[8])
        learner = MAML(network, optimizer=partial(Odd, **options), outer_lr_decay=decay, inner_steps=2)
        if decay == "linear":
            learner.outer_update.factor = lambda step: 0.9**step  # type: ignore[method-assign]  # whatever max_steps is
        fit = trainer(max_steps=max_steps, limit_val_batches=0)
        fit.fit(learner, sinusoid, ckpt_path=ckpt_path)
        fit.save_checkpoint(tmp_path / f"{max_steps}.ckpt")
        group = fit.optimizers[0].param_groups[0]
        return [p.detach().clone() for p in network.parameters()], {**group, "params": None}

    whole, group = run(8)
    assert group["calls"] == 8
    assert group["d"] > group["d0"]
    run(5)
    resumed, again = run(8, tmp_path / "5.ckpt")
    assert again == group
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert run(8, tmp_path / "5.ckpt", d0=0.5)[1]["d0"] == 0.5  # an argument, which the command line may change


@pytest.mark.parametrize("algorithm", [MAML, Reptile])
def test_a_resume_meets_the_next_tasks_though_the_steps_were_asked_for_before(
    algorithm: Any, sinusoid: Sinusoid, tmp_path: Path
) -> None:
    """``estimated_stepping_batches`` makes Lightning ask for the loader's iterator before the run is restored."""

    class Asks(algorithm):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            assert self.trainer.estimated_stepping_batches == 20
            return super().configure_optimizers()

    def run(stop: int | None, ckpt_path: Path | None = None, workers: int = 0) -> list[Tensor]:
        seen = Seen()
        sinusoid.num_workers = workers
        fit = trainer(max_epochs=2, callbacks=[seen, *([StopAt(stop)] if stop else [])], limit_val_batches=0)
        with suppress(KeyboardInterrupt, SystemExit):
            fit.fit(Asks(MLP(hidden=[8]), outer_lr_decay="linear", inner_steps=1), sinusoid, ckpt_path=ckpt_path)
        fit.save_checkpoint(tmp_path / "stopped.ckpt")
        return seen.batches

    whole = run(None)
    first = run(13)
    for workers in (0, 1):
        rest = run(None, tmp_path / "13.ckpt", workers)
        assert len(rest) == 7
        assert all(torch.equal(a, b) for a, b in zip(whole, [*first[:13], *rest], strict=True))


class StopAt(Callback):
    """Saves a checkpoint between two steps, and stops."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(f"{self.step}.ckpt")
            trainer.should_stop = True
            raise KeyboardInterrupt


class Waits(TorchDispatchMode):
    """Counts the numbers that are read, each of which makes the host wait for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        self.number += func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)
        return func(*args, **(kwargs or {}))


class WaitsOfEveryStep(Callback):
    """Counts from the start of each step to the start of the next, loggers included."""

    def __init__(self) -> None:
        self.steps: list[Waits] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.on_train_end()
        self.steps.append(Waits())
        self.steps[-1].__enter__()

    def on_train_end(self, *args: Any) -> None:
        if self.steps:
            self.steps[-1].__exit__(None, None, None)


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        # Adam's count of steps is on the host where its parameters are on the CPU
        pytest.param(MAML, {"optimizer": partial(SGD, momentum=0.9)}, id="maml"),
        pytest.param(MAML, {"optimizer": SGD, "recompute_inner_steps": True, "learn_inner_lr": True}, id="recompute"),
        pytest.param(FOMAML, {"optimizer": SGD, "inner_freeze": ["head.*"]}, id="fomaml"),
        pytest.param(Reptile, {"outer_lr": 0.1}, id="reptile"),
        pytest.param(Reptile, {"inner_optimizer": "adam"}, id="reptile-adam"),
    ],
)
def test_nothing_waits_for_the_device_but_at_the_log_interval(
    algorithm: Any,
    options: dict[str, Any],
    mlp: MLP,
    sinusoid: Sinusoid,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the progress bar reads at every step what was fetched for it, which on the CPU one cannot tell from the device
    results = "lightning.pytorch.trainer.connectors.logger_connector.result"
    monkeypatch.setattr(f"{results}.convert_tensors_to_scalars", lambda value: value)
    monkeypatch.setattr("meta_lightning.outer.update.known_to_hold", lambda condition: False)  # as on a device
    counting, loader = WaitsOfEveryStep(), DataLoader(batches_of(sinusoid, 20), batch_size=None)
    fit = trainer(max_steps=12, log_every_n_steps=5, logger=CSVLogger("."), callbacks=[counting])
    fit.fit(algorithm(mlp, **options), loader)
    # the network is examined before the first step
    assert [step for step, waits in enumerate(counting.steps) if waits.number] == [0, 4, 9, 11]


@pytest.mark.parametrize("algorithm", ["MAML", "FOMAML", "Reptile"])
def test_ranks_skip_alike(algorithm: str, tmp_path: Path) -> None:
    """One rank's task is not finite: no rank moves, though something is frozen and rates are learnt."""
    command = [sys.executable, str(SCRIPT), algorithm]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, timeout=180)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["skipped"] == second["skipped"] == 2
    for state in ("after", "before_skipped", "after_skipped"):
        torch.testing.assert_close(first[state], second[state], rtol=0, atol=0)
    torch.testing.assert_close(first["before_skipped"], first["after_skipped"], rtol=0, atol=0)
    moved = {name for name, p in first["after"].items() if not torch.equal(p, first["before_skipped"][name])}
    assert moved == {name for name in first["after"] if "features.1" not in name}


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small: on a busy machine threads mostly wait for each other
    yield
    torch.set_num_threads(threads)


def test_a_network_may_stay_as_it_is() -> None:
    """What the outer loop freezes keeps its place in the user's network."""
    network = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    MAML(network, outer_freeze=["0.*"], inner_freeze=["0.*"])
    assert all(p.requires_grad for p in network.parameters())


# ------------------------------------------------------------------------------------------------ refused in a sentence


@pytest.mark.parametrize("algorithm", [MAML, Reptile])
def test_what_torch_compile_made_is_refused(algorithm: Any, mlp: MLP, sinusoid: Sinusoid) -> None:
    with pytest.raises(InputError, match=r"network must not come from torch\.compile, got network;"):
        algorithm(torch.compile(mlp))
    with pytest.raises(InputError, match=r"loss must not come from torch\.compile, got loss;"):
        algorithm(mlp, torch.compile(nn.functional.mse_loss))
    with pytest.raises(InputError, match=r"learner must not come from torch\.compile"):
        trainer(max_steps=1).fit(torch.compile(algorithm(mlp)), sinusoid)  # type: ignore[arg-type]
    mlp.head.compile()
    with pytest.raises(InputError, match=r"network must not come from torch\.compile, got network\.head;"):
        algorithm(mlp)


class Returns(MAML):
    """Its optimizers are what a function of its parameters returns."""

    def __init__(self, made: Any) -> None:
        super().__init__(MLP(hidden=[8]), inner_steps=1)
        self.made = made

    def configure_optimizers(self) -> Any:
        return self.made([*self.network.parameters()])


def with_scheduler(scheduler: Any, **options: Any) -> Callable[[Any], Any]:
    def made(params: Any) -> Any:
        optimizer = SGD(params, 0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler(optimizer), **options}}

    return made


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (torch.optim.LBFGS, r"optimizer must step without arguments, got LBFGS, whose step needs closure"),
        (lambda params: [SGD(params[:1], 0.1), Adam(params[1:])], r"configure_optimizers must .*one .*got SGD, Adam"),
        (lambda params: None, r"configure_optimizers must return one optimizer, got None"),
        (with_scheduler(ReduceLROnPlateau, monitor="val/mse"), r"scheduler of configure_optimizers .*metrics"),
    ],
)
def test_optimizers_of_a_subclass_that_are_refused(made: Any, message: str, sinusoid: Sinusoid) -> None:
    with pytest.raises(InputError, match=message):
        trainer(max_steps=1).fit(Returns(made), sinusoid)


def test_an_optimizer_of_a_subclass_has_the_schedule_of_the_options(sinusoid: Sinusoid) -> None:
    learner = Returns(lambda params: SGD(params, 0.1))
    learner.outer_update.decay = "linear"
    fit = trainer(max_steps=4, limit_val_batches=0)
    fit.fit(learner, sinusoid)
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)
    assert fit.callback_metrics["train/outer_lr"] == pytest.approx(0.1 / 4)


@pytest.mark.parametrize(("interval", "frequency", "expected"), [("step", 1, 0.1 / 2**6), ("step", 2, 0.1 / 2**3)])
def test_a_scheduler_of_a_subclass_is_stepped_and_resumed(
    interval: str, frequency: int, expected: float, sinusoid: Sinusoid, tmp_path: Path
) -> None:
    scheduler = partial(StepLR, step_size=1, gamma=0.5)

    def run(steps: int, path: Path | None = None) -> float:
        fit = trainer(max_steps=steps, limit_val_batches=0)
        fit.fit(Returns(with_scheduler(scheduler, interval=interval, frequency=frequency)), sinusoid, ckpt_path=path)
        fit.save_checkpoint(tmp_path / "last.ckpt")
        lr: float = fit.optimizers[0].param_groups[0]["lr"]
        return lr

    assert run(6) == pytest.approx(expected)
    run(4)
    assert run(6, tmp_path / "last.ckpt") == pytest.approx(expected)


def test_training_under_fabric_is_refused(mlp: MLP, sinusoid: Sinusoid) -> None:
    fabric, learner = L.Fabric(accelerator="cpu"), MAML(mlp, inner_steps=1)
    module, _ = fabric.setup(learner, SGD(learner.parameters(), 0.1))
    module.mark_forward_method("training_step")
    with pytest.raises(InputError, match=r"training_step must run under a Trainer, got Fabric"):
        module.training_step(next(iter(sinusoid.train_dataloader())), 0)


def test_a_call_predicts_without_adaptation(mlp: MLP) -> None:
    x = torch.randn(5, 1)
    assert torch.equal(Reptile(mlp)(x), mlp(x))


@pytest.mark.parametrize("inner_rule", [MetaSGD(), InnerAdam()])
def test_parameters_that_an_inner_rule_does_not_know_are_refused(inner_rule: Any, mlp: MLP, sinusoid: Sinusoid) -> None:
    mlp.head.requires_grad_(False)
    learner = MAML(mlp, inner_rule=inner_rule, inner_steps=1)
    mlp.head.requires_grad_(True)
    with pytest.raises(InputError, match=r"inner_rule .*got head\.bias, head\.weight, unfrozen later"):
        trainer(max_steps=1).fit(learner, sinusoid)


def test_patterns_also_hold_for_parameters_that_are_unfrozen_later(mlp: MLP) -> None:
    mlp.features.requires_grad_(False)
    learner = MAML(mlp, inner_freeze=["features.*"])
    mlp.features.requires_grad_(True)
    assert {*learner.adapted(learner.meta_parameters())} == {"head.weight", "head.bias"}
    mlp.features.requires_grad_(False)
    with pytest.raises(InputError, match=r"inner_freeze must leave a parameter"):
        MAML(mlp, inner_freeze=["head.*"])


@pytest.mark.parametrize("callback", [StochasticWeightAveraging(0.1), ModelPruning("l1_unstructured")])
def test_a_subclass_that_defines_callbacks_is_checked_as_well(callback: Any, mlp: MLP, sinusoid: Sinusoid) -> None:
    class Own(MAML):
        def configure_callbacks(self) -> Any:
            return []

    with pytest.raises(InputError, match=rf"trainer\.callbacks must not hold {type(callback).__name__}"):
        trainer(max_steps=1, callbacks=[callback]).fit(Own(mlp), sinusoid)
