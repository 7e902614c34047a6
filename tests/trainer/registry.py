"""What the cases share: public names of Lightning by introspection, the register of cases, and small trainings."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import lightning as L
import torch
from conftest import trainer
from lightning.pytorch import callbacks, loggers, profilers
from lightning.pytorch.tuner import Tuner
from torch import Tensor

from meta_lightning import MAML, MLP, MetaLearner, Reptile, Sinusoid, TaskBatch
from meta_lightning.data.tasks import TaskSet
from meta_lightning.runs.checkpoint_callback import Checkpoints

Check = Callable[[type[MetaLearner]], None]
BOTH = (MAML, Reptile)
ONE = (MAML,)  # where the algorithm does not matter

PUBLIC: dict[str, list[str]] = {
    "callbacks": list(callbacks.__all__),
    "tuner": [name for name in vars(Tuner) if not name.startswith("_")],
    "loggers": list(loggers.__all__),
    "profilers": list(profilers.__all__),
    "flags": list(inspect.signature(L.Trainer).parameters),
}


class Case(NamedTuple):
    """What one name of Lightning does here, and the check of it."""

    kind: str  # a key of PUBLIC
    name: str
    with_: str  # which values or algorithms the case is about; empty for all
    result: str  # works or refused
    what: str
    check: Check
    algorithms: Sequence[type[MetaLearner]]


CASES: list[Case] = []


def case(
    kind: str, name: str, result: str, what: str, with_: str = "", algorithms: Sequence[type[MetaLearner]] = BOTH
) -> Callable[[Check], Check]:
    """Register a check, which gets the class of the learner."""

    def register(check: Check) -> Check:
        CASES.append(Case(kind, name, with_, result, what, check, algorithms))
        return check

    return register


EPOCH, TASKS = 4, 4  # meta-iterations per epoch, tasks per meta-batch


def sines(**options: Any) -> Sinusoid:
    """Two meta-batches of test tasks, one of validation tasks."""
    sizes = {"shots": 5, "queries": 5, "test_queries": 10, "meta_batch_size": TASKS, "epoch_length": EPOCH}
    return Sinusoid(**{**sizes, "val_tasks": 4, "test_tasks": 8, **options})


@cache
def meta_batch(iteration: int, tasks: int = TASKS) -> TaskBatch:
    """The meta-batch that training meets at an iteration."""
    return sines().task_set("train").batch(range(iteration * tasks, (iteration + 1) * tasks))


class WithoutNumbers(Sinusoid):
    """Sine waves of which meta-batches 2, 3 and 4 are NaN."""

    def task_set(self, split: Any) -> TaskSet:
        tasks = super().task_set(split)
        drawn = tasks.batch

        def batch(numbers: Sequence[int]) -> TaskBatch:
            parts = drawn(numbers)
            bad = split == "train" and 2 * TASKS <= min(numbers) < 5 * TASKS
            return TaskBatch(*(torch.full_like(part, torch.nan) if bad else part for part in parts))

        tasks.batch = batch  # type: ignore[method-assign]
        return tasks


def bad_sines() -> Sinusoid:
    return WithoutNumbers(shots=5, queries=5, test_queries=10, meta_batch_size=TASKS, epoch_length=EPOCH, val_tasks=4)


def learner_of(algorithm: type[MetaLearner], **options: Any) -> MetaLearner:
    torch.manual_seed(0)
    return algorithm(network=MLP(hidden=[8]), **{"inner_steps": 2, **options})


def quiet(*used: L.Callback, **options: Any) -> L.Trainer:
    """A Trainer of two epochs without sanity check, with these callbacks."""
    checkpoints = any(isinstance(callback, callbacks.Checkpoint) for callback in used)
    defaults = {"max_epochs": 2, "num_sanity_val_steps": 0, "enable_checkpointing": checkpoints, "devices": 1}
    return trainer(**{"callbacks": [*used], **defaults, **options})


def fitted(algorithm: type[MetaLearner], *used: L.Callback, of: Any = None, **options: Any) -> MetaLearner:
    """A learner after two epochs with these callbacks and Trainer options; ``of`` has the learner's."""
    learner = learner_of(algorithm, **(of or {}))
    quiet(*used, **options).fit(learner, sines())
    return learner


@cache
def plain(algorithm: type[MetaLearner]) -> dict[str, Tensor]:
    """θ after two epochs without anything else."""
    return state(fitted(algorithm))


def kept(folder: str, **options: Any) -> Checkpoints:
    return Checkpoints(folder, **{"monitor": "val/mse", "mode": "min", **options})


def state(learner: MetaLearner) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in learner.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(v, b[n], rtol=1e-6, atol=1e-8) for n, v in a.items())


class History(L.Callback):
    """Notes θ, loss, tasks and options of the optimizer's groups of each step, and θ at each validation."""

    def __init__(self) -> None:
        self.theta: list[dict[str, Tensor]] = []
        self.losses: list[float] = []
        self.batches: list[Tensor] = []
        self.rates: list[list[float]] = []  # at the start of the step, of each group
        self.validated: list[dict[str, Tensor]] = []
        self.validations: list[int] = []  # steps before each

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0].clone())
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.theta.append(state(pl_module))
        self.losses.append(outputs["loss"].item())

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.validated.append(state(pl_module))
        self.validations.append(trainer.global_step)

    def meets(self, *iterations: int, tasks: int = TASKS) -> bool:
        """Whether the meta-batches were those of these iterations."""
        expected = [meta_batch(iteration, tasks).support_x for iteration in iterations]
        same = (torch.equal(a, b) for a, b in zip(self.batches, expected, strict=False))
        return len(self.batches) == len(expected) and all(same)
