"""Base classes of the data modules: dataclasses, whose fields are the options, declared and documented once."""

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from traceback import walk_stack
from typing import Any, ClassVar, TypeVar, dataclass_transform, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from meta_lightning.checks import InputError, NamedOptions, from_command_line, plain, require_at_least, require_choice
from meta_lightning.data.form import SampleForm, form_of
from meta_lightning.data.loading import MetaBatches, MetaIterations, TaskLoader
from meta_lightning.data.tasks import Count, FewShotTasks, LabelSpace, ReadSamples, Split, TaskSet, least_and_most
from meta_lightning.inner.params import tree_leaves, tree_map
from meta_lightning.inner.samples import Samples

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
def options(cls: type[T]) -> type[T]:
    """Class decorator: a dataclass whose fields are keyword-only options, compared and hashed by identity."""
    return dataclass(eq=False, repr=False, kw_only=True)(cls)


def constructor_arguments(instance: object) -> dict[str, Any]:
    """Arguments of the user-defined constructors that are now constructing an instance; dataclasses have fields."""
    found: dict[str, Any] = {}
    for frame, _ in walk_stack(inspect.currentframe()):
        code = frame.f_code
        if code.co_name == "__init__" and code.co_filename != "<string>" and frame.f_locals.get("self") is instance:
            names, _, _, values = inspect.getargvalues(frame)
            found |= {name: values[name] for name in names[1:]}
    return found


@options
class TaskDataModule(NamedOptions, L.LightningDataModule, ABC):
    """Meta-batches of tasks; a user-defined data set implements ``task_set``.

    Training tasks are an endless stream, of which an epoch takes ``epoch_length`` meta-batches. Validation and test use
    the first ``val_tasks`` and ``test_tasks`` tasks of their splits. Task i of a split is a function of (seed, split,
    i), and of ``meta_batch_size`` where a range is drawn from: it does not depend on the number of workers or
    processes, or on the step from which training resumes.

    Raises:
        InputError: If an option is outside its range.
    """

    data_arguments: ClassVar[tuple[str, ...]] = ()  # options that hold data, which checkpoints leave out

    meta_batch_size: int = 16
    """Tasks per meta-batch, over all processes (B)."""
    epoch_length: int = 500
    """Meta-iterations per epoch."""
    val_tasks: int = 200
    """Number of validation tasks."""
    test_tasks: int = 600
    """Number of test tasks, which ``predict`` uses as well."""
    seed: int = 0
    """Seed of the tasks. The split of the classes does not depend on it."""
    num_workers: int = 0
    """Worker processes that load data; with 0 the training process loads it."""

    def __post_init__(self) -> None:
        """Save the options for checkpoints and check their ranges."""
        super().__init__()
        # configurations describe data by class paths, in plain values
        left_out = () if from_command_line() else self.data_arguments
        self.save_hyperparameters(ignore=left_out, logger=False)
        saved = {**self.hparams, **({} if from_command_line() else constructor_arguments(self))}
        self.hparams.update({name: plain(v) for name, v in saved.items() if name not in left_out})
        for name in ("meta_batch_size", "epoch_length", "val_tasks", "test_tasks"):
            require_at_least(1, **{name: getattr(self, name)})
        require_at_least(0, seed=self.seed, num_workers=self.num_workers)

    @abstractmethod
    def task_set(self, split: Split) -> TaskSet:
        """The tasks of a split."""

    def sample_form(self) -> SampleForm:
        """The form of the samples, for adaptation and prediction."""
        return form_of(self.hparams, type(self))

    def place(self, samples: Samples | ReadSamples) -> Samples | ReadSamples:
        """Move samples to the training GPU if they fit into a quarter of its free memory and no workers load them."""
        if isinstance(samples, ReadSamples):
            return samples
        at, size = tree_leaves(samples)[0].device, sum(tensor.nbytes for tensor in tree_leaves(samples))
        if at.type != "cpu" and self.num_workers:
            raise InputError(f"num_workers must be 0 for samples on {at}, got {self.num_workers}")
        device = self.trainer.strategy.root_device if self.trainer else at
        if device.type != "cuda" or at.type == "cuda" or self.num_workers:
            return samples
        free = torch.cuda.mem_get_info(device)[0]
        if size < free / 4:
            return tree_map(lambda t: t.to(device), samples)
        sizes = f"({size / 1e9:.1f} GB) stay in CPU memory: {device} has {free / 1e9:.1f} GB free"
        rank_zero_info(f"The samples {sizes}. Set num_workers above 0 to gather batches while training runs.")
        return samples

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch; one that is there already is left alone, where Lightning would take it apart."""
        if all(isinstance(part, Tensor) and part.device == device for part in tree_leaves(batch)):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def train_dataloader(self) -> TaskLoader:
        """One epoch of the stream of training tasks, from the trainer's current meta-iteration."""
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0  # repeats the first tasks
        return self.task_loader("train", self.epoch_length * self.meta_batch_size if overfit else None)

    def val_dataloader(self) -> TaskLoader:
        """The validation tasks."""
        return self.task_loader("val", self.val_tasks)

    def test_dataloader(self) -> TaskLoader:
        """The test tasks."""
        return self.task_loader("test", self.test_tasks)

    def predict_dataloader(self) -> TaskLoader:
        """The test tasks, whose queries are predicted."""
        return self.test_dataloader()

    def task_loader(self, split: Split, num_tasks: int | None) -> TaskLoader:
        """Meta-batches of the first ``num_tasks`` tasks, or of the endless stream."""
        shard = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        batches = MetaBatches(self.task_set(split), self.meta_batch_size, num_tasks, *shard)
        length = self.epoch_length if num_tasks is None else len(batches)
        return TaskLoader(
            batches,
            batch_size=None,
            sampler=MetaIterations(batches, length, self.meta_iteration if num_tasks is None else int),
            num_workers=self.num_workers,
            pin_memory=self.num_workers > 0 and torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # leaves the global generator to the network, so that resuming is exact
        )

    def meta_iteration(self) -> int:
        """The number of the next meta-iteration of training."""
        if not self.trainer:
            return 0
        started: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total  # one that failed counts as started only
        processed: int = started.processed
        return processed


@options
class FewShotDataModule(TaskDataModule):
    """Tasks of K support and Q query samples, per class or, for regression, per task."""

    shots: int = 1
    """Support samples (K), per class or, for regression, per task."""
    queries: int = 15
    """Query samples (Q), per class or, for regression, per task."""
    train_shots: Count | None = None
    """Support samples in training: a number, or a range (min, max) to draw from per meta-batch. Default: ``shots``."""
    train_queries: int | None = None
    """Query samples in training. Default: ``queries``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, shots=self.shots, queries=self.queries, train_queries=self.sizes("train")[1])
        least_and_most(self.sizes("train")[0], "train_shots")

    def sizes(self, split: Split) -> tuple[Count, int]:
        """Support and query samples of the tasks of a split."""
        if split != "train":
            return self.shots, self.queries
        shots = self.shots if self.train_shots is None else self.train_shots
        return shots, self.queries if self.train_queries is None else self.train_queries

    def draws(self, split: Split) -> dict[str, Any]:
        """The arguments of ``DrawnTasks``."""
        shots, queries = self.sizes(split)
        return {"shots": shots, "queries": queries, "seed": self.seed, "split": split, "block": self.meta_batch_size}


@options
class ClassificationTasks(FewShotDataModule):
    """N-way K-shot classification tasks over samples in one tensor."""

    ways: int = 5
    """Classes per task (N)."""
    train_ways: Count | None = None
    """Classes per task in training: a number, or a range (min, max) to draw from per meta-batch. Default: ``ways``."""
    train_labels: LabelSpace = "task"
    """Labels of the training tasks: ``"task"``, the numbers 0 … N-1 of a task's own classes; ``"split"``, the numbers
    0, 1, … of all classes of the training split, in its order, which plain training of a classifier needs. Tasks of the
    other splits number their own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(2, ways=self.ways)
        least_and_most(self.ways_of("train"), "train_ways", 2)
        require_choice(get_args(LabelSpace), train_labels=self.train_labels)
        self.placed: Samples | ReadSamples | None = None
        self.task_sets: dict[Split, FewShotTasks] = {}

    def setup(self, stage: str | None = None) -> None:
        """Release the samples and tasks, so that a GPU has room for them when they are made again."""
        self.placed, self.task_sets = None, {}

    def ways_of(self, split: Split) -> Count:
        """Classes per task of a split."""
        return self.train_ways if split == "train" and self.train_ways is not None else self.ways

    def most_ways(self, split: Split) -> int:
        """The maximum of ``ways_of`` a split."""
        return least_and_most(self.ways_of(split), self.ways_argument(split))[1]

    def ways_argument(self, split: Split) -> str:
        """The option that ``ways_of`` a split is from, for messages."""
        return "train_ways" if split == "train" and self.train_ways is not None else "ways"

    def draws(self, split: Split) -> dict[str, Any]:
        """The arguments of ``FewShotTasks`` that do not describe the data."""
        ways = {"ways": self.ways_of(split), "ways_argument": self.ways_argument(split)}
        return super().draws(split) | ways | {"label_space": self.train_labels if split == "train" else "task"}

    def few_shot_tasks(self, split: Split, samples: Samples | ReadSamples, **described: Any) -> FewShotTasks:
        """``FewShotTasks`` of a split, over samples that all splits share; made once."""
        if self.placed is None:
            self.placed = self.place(samples)
        if split not in self.task_sets:
            self.task_sets[split] = FewShotTasks(self.placed, **described, **self.draws(split))
        return self.task_sets[split]
