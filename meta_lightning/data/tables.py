"""Tasks from tables: a CSV or Parquet file per task, or one file with a column that names the task."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meta_lightning.checks import InputError, require
from meta_lightning.data.form import SampleForm
from meta_lightning.data.module import FewShotDataModule, options
from meta_lightning.data.regression import PointTasks
from meta_lightning.data.splits import GivenSplit
from meta_lightning.data.table_form import (
    READERS,
    Frame,
    Kind,
    Missing,
    TableForm,
    Unknown,
    as_names,
    is_table,
    read_table,
    require_columns,
)
from meta_lightning.data.tasks import SPLITS, Array, Split, TaskSet


@options
class TableTasks(GivenSplit, FewShotDataModule):
    """Few-shot regression or classification of the rows of tables: ``TableTasks("machines", target="power")``.

    Each task is a table, such as that of a machine, a patient or a sensor. ``path`` is one of

    * a folder of CSV or Parquet files, a task each, named after its file; they are split by ``split_fractions``;
    * a folder with folders ``train``, ``val`` and ``test`` of such files, the split;
    * one such file, in which the column ``task`` names the task of each row.

    A regression task draws ``shots`` support and ``queries`` query rows of its table without replacement, a
    classification task as many of each class, which all tables have in common. Tables may have any numbers of rows.
    Among each n consecutive tasks of a split of n tables, each table occurs once, in random order.

    pandas reads the tables, and scikit-learn fits the preprocessing to the rows of the training tasks alone: missing
    values are replaced, numbers and real targets get mean 0 and standard deviation 1, and categories become one-hot
    vectors or positions in an order. So ``mse`` is a share of the variance of the target. Checkpoints keep what was
    fitted, as plain data: tests use it, and ``adapt`` answers in the table's own terms (see ``TableForm``).

    Rows without a target are left out.

    Raises:
        InputError: If an option is outside its range, a file cannot be read, a table lacks a column or holds values
            that training does not know, a package is missing, or a split has no tasks or a task too few rows.
    """

    path: str = field(kw_only=False)
    """Folder of tables, or one table."""
    target: str
    """Column to predict."""
    task: str | None = None
    """Column that names the task of each row, if ``path`` is one table. In ``splits`` these names are text."""
    kind: Kind = "auto"
    """``"classification"``, ``"regression"``, or ``"auto"``: regression if the target holds numbers that are not all
    whole, else classification."""
    features: Sequence[str] | None = None
    """Columns to predict from. Default: all but the target and the task."""
    categories: Sequence[str] = ()
    """Columns that are categories though they hold numbers. Columns of text or truth values always are."""
    ordinal: Mapping[str, Sequence[int | str]] | None = None
    """Columns of ordered categories, each with its values in order, which become 0, 1, …. Other columns of categories
    are one-hot."""
    missing: Missing = "median"
    """What replaces missing numbers: a statistic of the column in the training tasks. Missing categories are replaced
    by the most frequent one."""
    unknown: Unknown = "error"
    """What a category that no training task has is: an error, or zeros in place of its one-hot vector."""
    read: dict[str, Any] | None = None
    """Options of ``pandas.read_csv``, such as ``{"sep": ";", "decimal": ","}``."""
    shots: int = 10
    queries: int = 10

    def __post_init__(self) -> None:
        """Read the tables, split them, and fit the preprocessing to the training tasks."""
        super().__post_init__()
        tables, given = read_tasks(Path(self.path).expanduser(), self.task, self.read or {})
        self.names, self.tables = [*tables], [*tables.values()]
        if given and self.splits is None:
            self.splits = given
        self.split(range(len(tables)), f"tasks of {self.path}", {name: n for n, name in enumerate(self.names)})
        training = {self.names[number]: self.tables[number] for number in self.members["train"]}
        names = ("target", "kind", "features", "categories", "ordinal", "missing", "unknown", "read")
        fitting = {name: getattr(self, name) for name in names}
        self.form = TableForm.fit(training, **fitting) if training else None
        self.task_sets: dict[Split, TaskSet] = {}

    def state_dict(self) -> dict[str, Any]:
        """The preprocessing, for checkpoints."""
        return {} if self.form is None else {"form": asdict(self.form)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the preprocessing of a checkpoint, whatever the training tasks are now."""
        form = TableForm(**state_dict["form"])
        require(form.target == self.target, f"target must be the checkpoint's, {form.target!r}, got {self.target!r}")
        self.form, self.task_sets = form, {}

    def sample_form(self) -> SampleForm:
        """The preprocessing, for adaptation and prediction."""
        return replace(super().sample_form(), table=asdict(self.fitted()))

    def fitted(self) -> TableForm:
        """The preprocessing, of training tasks or of a checkpoint."""
        if self.form is None:
            raise InputError("the train split must have a task to fit the preprocessing to, got 0 and no checkpoint")
        return self.form

    def setup(self, stage: str | None = None) -> None:
        """Make the tasks of each split; without training tasks the checkpoint is awaited."""
        if self.form is not None:
            super().setup(stage)

    def task_set(self, split: Split) -> TaskSet:
        """Tasks of the split's tables."""
        refusal = f"the {split} split must have at least 1 of the tasks of {self.path}, got 0"
        self.require_members(split, dict.fromkeys(SPLITS, 1), refusal)
        require(bool(self.members[split]), refusal)
        if split not in self.task_sets:
            self.task_sets[split] = self.tasks_of(split, self.fitted())
        return self.task_sets[split]

    def tasks_of(self, split: Split, form: TableForm) -> TaskSet:
        """Encode the split's tables."""
        names = [self.names[number] for number in self.members[split]]
        sets = [form.encode(self.tables[number], self.names[number]) for number in self.members[split]]
        if form.classes is None:
            tasks = PointTasks(sets, **self.draws(split))
            rows = {f"rows of {name}": len(x) for name, (x, _) in zip(names, sets, strict=True)}
        else:
            numbers = {name: number for number, name in enumerate(form.classes)}
            labelled = [(x, torch.tensor([numbers[label] for label in y])) for x, y in sets]
            tasks = RowTasks(labelled, classes=form.classes, **self.draws(split))
            counts = {name: Counter(y) for name, (_, y) in zip(names, sets, strict=True)}
            rows = {f"rows of class {c} in {n}": of_task[c] for n, of_task in counts.items() for c in form.classes}
        fewest = min(rows, key=rows.__getitem__)
        tasks.require_samples(rows[fewest], fewest)
        return tasks


@dataclass(eq=False, kw_only=True)
class RowTasks(PointTasks):
    """Numbered draws of rows from tables, as many of each class."""

    classes: Sequence[str]

    @property
    def sample_counts(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The minimum and maximum number of support rows of a task, and of its query rows."""
        N = len(self.classes)
        support, query = ((N * least, N * most) for least, most in super().sample_counts)
        return support, query

    def draw(self, rng: np.random.Generator, y: Tensor) -> Array:
        """The first row of each class, the second of each, and so on."""
        of_classes = [np.flatnonzero(y.numpy() == number) for number in range(len(self.classes))]
        drawn = [rng.choice(rows, self.drawn, replace=False) for rows in of_classes]
        rows: Array = np.stack(drawn, 1).flatten()  # (K+Q) N
        return rows

    def parts(self, tasks: Sequence[int]) -> tuple[slice, slice]:
        """The positions of the support and the query rows among those drawn."""
        N = len(self.classes)
        support, query = super().parts(tasks)
        return slice(N * support.stop), slice(N * query.start, None)

    def class_names(self, task: int) -> list[str]:
        """The names of the classes."""
        return [*self.classes]


def read_tasks(
    path: Path, task: str | None, options: Mapping[str, Any]
) -> tuple[dict[str, Frame], dict[Split, list[str]] | None]:
    """The table of each task by name, and the split if folders give one."""
    if path.is_file():
        if task is None:
            raise InputError(f"task must name a column of path, which is one table, {path}, got None")
        table = read_table(path, options, "path")
        require_columns(table, [task], "task", str(path))
        unnamed = int(table[task].isna().sum())
        require(not unnamed, f"task must name the task of every row, got none in {unnamed} rows of {path}")
        names = as_names(table[task])
        return {name: rows.drop(columns=task) for name, rows in table.groupby(names)}, None
    require(path.is_dir(), f"path must be a table or a folder of tables, got {path}, which is neither")
    require(task is None, f"task must be None for a folder, whose files are the tasks, got {task!r} for {path}")
    folders = {split: path / split for split in SPLITS if (path / split).is_dir()}
    beside = [file.name for file in tables_in(path)] if folders else []
    came = f"got {', '.join(beside[:3])}{', …' * (len(beside) > 3)} beside {', '.join(folders)} in {path}"
    require(not beside, f"path must hold tables or folders of them, {came}")
    files = {split: tables_in(folder) for split, folder in folders.items()} or {SPLITS[0]: tables_in(path)}
    counts = Counter(file.stem for of_split in files.values() for file in of_split)
    require(bool(counts), f"path must hold tables, {' or '.join(READERS)}, got none in {path}")
    repeated = [name for name, count in counts.items() if count > 1]
    require(not repeated, f"path must hold each task once, got {', '.join(repeated)} more than once in {path}")
    tables = {file.stem: read_table(file, options, "path") for of_split in files.values() for file in of_split}
    given = {split: [file.stem for file in of_split] for split, of_split in files.items()}
    return tables, given if folders else None


def tables_in(folder: Path) -> list[Path]:
    """The tables in a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if is_table(path))
