"""How the rows of a table become samples, and predictions become values of its target again."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from meta_lightning.checks import InputError, nearest, require, require_choice, require_installed

Frame = Any  # a DataFrame; pandas ships no types
Column = Any  # a Series
Kind = Literal["auto", "classification", "regression"]
Missing = Literal["median", "mean", "most_frequent"]
Unknown = Literal["error", "zeros"]
READERS = {".csv": "read_csv", ".parquet": "read_parquet"}
SHOWN = 5  # values in a message
ZEROS: dict[str, Any] = {"handle_unknown": "ignore", "sparse_output": False}  # of OneHotEncoder


@dataclass(frozen=True)
class TableForm:
    """What the training tables fix: the columns, how they become numbers, and the classes or the scale of the target.

    ``TableForm.fit`` makes it, and checkpoints and saved predictors hold it as plain data: of a learner or a
    ``Predictor`` it is ``TableForm(**learner.form.table)``. Tables are DataFrames of pandas. Columns are found by their
    names, and others are ignored.
    """

    target: str
    fills: dict[str, Any]  # what replaces missing values of each column of the samples
    means: dict[str, float]  # of each column of numbers, and of a real target
    scales: dict[str, float]  # standard deviations
    ordinal: dict[str, list[str]]  # values of each column of ordered categories, in order
    onehot: dict[str, list[str]]  # values of each other column of categories
    unknown: Unknown  # what other values of these are
    classes: list[str] | None  # None for regression
    read: dict[str, Any]  # options of pandas.read_csv

    @classmethod
    def fit(
        cls,
        tables: Mapping[str, Frame],
        target: str,
        kind: Kind = "auto",
        features: Sequence[str] | None = None,
        categories: Sequence[str] = (),
        ordinal: Mapping[str, Sequence[Any]] | None = None,
        missing: Missing = "median",
        unknown: Unknown = "error",
        read: Mapping[str, Any] | None = None,
    ) -> "TableForm":
        """Fit the preprocessing to tables by name; for the other arguments see ``TableTasks``.

        Raises:
            InputError: If an option has an unknown value, a table lacks a column, or a column holds neither numbers nor
                names.
        """
        require_choice(get_args(Kind), kind=kind)
        require_choice(get_args(Missing), missing=missing)
        require_choice(get_args(Unknown), unknown=unknown)
        sequences = {"features": features, "categories": categories}
        for name, value in (
            sequences | {f"ordinal {column}": order for column, order in (ordinal or {}).items()}
        ).items():
            require(not isinstance(value, str), f"{name} must be a sequence, got the text {value!r}")
        require_installed("TableForm", "tables", "pandas", "sklearn")
        from sklearn.impute import SimpleImputer
        from sklearn.preprocessing import OneHotEncoder, StandardScaler

        tables = {name: labelled(table, target, name) for name, table in tables.items()}
        orders = {column: [str(value) for value in values] for column, values in (ordinal or {}).items()}
        found = [*dict.fromkeys(c for table in tables.values() for c in table.columns if c != target)]
        columns = found if features is None else [*dict.fromkeys(features)]
        require(bool(columns) and target not in columns, f"features must name columns beside target, got {columns}")
        for name, table in tables.items():
            for argument, named in (("features", columns), ("categories", categories), ("ordinal", orders)):
                require_columns(table, named, argument, name)
        if ignored := [c for c in dict.fromkeys((*categories, *orders)) if c not in columns]:
            rank_zero_warn(f"categories and ordinal must name features, got {listed(ignored)}, which are ignored")
        names = [c for c in columns if c in categories or c in orders or not holds_numbers(tables, c)]
        numbers = [c for c in columns if c not in names]
        rows = joined(values_of(table, numbers, names, name) for name, table in tables.items())
        fills: dict[str, Any] = {}
        for part, strategy in ((numbers, missing), (names, "most_frequent")):
            if part:
                imputer = SimpleImputer(strategy=strategy, keep_empty_features=True).fit(rows[part])
                fills |= dict(zip(part, imputer.statistics_.tolist(), strict=True))
        rows = rows.fillna(fills)
        free = [c for c in names if c not in orders]
        values = OneHotEncoder().fit(rows[free]).categories_ if free else []
        onehot = {c: of_column.tolist() for c, of_column in zip(free, values, strict=True)}
        scaled, classes = rows[numbers], None
        if kind == "regression" or (kind == "auto" and holds_real_numbers(tables, target)):
            y = joined(as_numbers(table[target], "target", name) for name, table in tables.items())
            scaled = scaled.assign(**{target: y})
        else:
            classes = sorted({*joined(as_names(table[target]) for table in tables.values())})
            require(len(classes) >= 2, f"target must hold at least 2 classes, got {listed(classes)}")
        means, scales = {}, {}
        if len(scaled.columns):
            scaler = StandardScaler().fit(scaled)
            means, scales = (
                dict(zip(scaled.columns, of_columns.tolist(), strict=True))
                for of_columns in (scaler.mean_, scaler.scale_)
            )
        ordered = {c: orders[c] for c in names if c in orders}
        return cls(target, fills, means, scales, ordered, onehot, unknown, classes, dict(read or {}))

    def table(self, path: Path, argument: str) -> Frame:
        """Read a file as those of training were read."""
        return read_table(path, self.read, argument)

    def inputs(self, table: Frame, name: str = "the table") -> Tensor:
        """The samples of a table's rows: numbers, then ordered categories, then the others.  # M F

        Raises:
            InputError: If a column is missing, or holds what is no number or none of the categories of training.
        """
        require_installed("TableForm", "tables", "pandas", "sklearn")
        from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder

        names = [*self.ordinal, *self.onehot]
        numbers = [column for column in self.fills if column not in names]
        require_columns(table, [*self.fills], "features", name)
        require(len(table) > 0, f"a table must have at least 1 row, got none in {name}")
        rows = values_of(table, numbers, names, name).fillna(self.fills)
        scale = [(rows[column] - self.means[column]) / self.scales[column] for column in numbers]
        parts = [np.stack(scale, 1)] if scale else []
        for column, known in (self.ordinal | self.onehot).items():
            if column in self.ordinal or self.unknown == "error":
                require_known(rows[column], known, f"{column} must hold categories of training", name)
        encoders = (
            (self.ordinal, OrdinalEncoder(categories=[*self.ordinal.values()])),
            (self.onehot, OneHotEncoder(categories=[*self.onehot.values()], **ZEROS)),
        )
        parts += [encoder.fit_transform(rows[[*values]]) for values, encoder in encoders if values]
        return torch.tensor(np.concatenate(parts, 1), dtype=torch.get_default_dtype())

    def encode(
        self, table: Frame, name: str = "the table", every_class: bool = True
    ) -> tuple[Tensor, Tensor | list[str]]:
        """Samples and targets, as ``MetaLearner.adapt`` takes them, of the rows that have a target.

        Args:
            table: The table, with the target's column.
            name: What messages call it.
            every_class: Whether it must hold each class, which stands for one output of a network.

        Returns:
            The samples, and the names of their classes or, for regression, the scaled targets.  # M F, M or M 1

        Raises:
            InputError: As ``inputs``, or if targets are no numbers or none of the classes of training.
        """
        table = labelled(table, self.target, name)
        x = self.inputs(table, name)
        if self.classes is None:
            y = (as_numbers(table[self.target], "target", name) - self.means[self.target]) / self.scales[self.target]
            return x, torch.tensor(y.to_numpy()[:, None], dtype=x.dtype)
        classes = as_names(table[self.target])
        whole = all(each.lstrip("-").isdigit() for each in self.classes)
        hint = " (whole numbers; kind regression takes them as numbers)" if whole else ""
        require_known(classes, self.classes, f"target must hold classes of training{hint}", name)
        absent = sorted({*self.classes} - {*classes})
        came = f"got none of {listed(absent)} in {name}"
        require(not (every_class and absent), f"target must hold every class{hint}, {came}")
        return x, classes.tolist()

    @property
    def answers(self) -> list[str]:
        """The columns of ``decode``."""
        return [f"predicted_{self.target}", *([] if self.classes is None else ["probability"])]

    def decode(self, outputs: Tensor, class_names: Sequence[str] | None = None) -> Frame:
        """Predictions in the table's own terms: the column ``predicted_<target>`` and, of classes, ``probability``.

        Args:
            outputs: What a ``Predictor`` makes of the samples: logits, or scaled values.  # M N or M 1
            class_names: The predictor's classes. Default: those of training.
        """
        import pandas

        if self.classes is None:
            values = self.in_units(outputs).numpy(force=True)[:, 0]
            return pandas.DataFrame(dict(zip(self.answers, [values], strict=True)))
        probabilities, numbers = (part.numpy(force=True) for part in outputs.softmax(1).max(1))
        names = np.array(self.classes if class_names is None else class_names)
        return pandas.DataFrame(dict(zip(self.answers, [names[numbers], probabilities], strict=True)))

    def in_units(self, values: Tensor) -> Tensor:
        """Scaled values of a real target, in its own units."""
        return values.double() * self.scales[self.target] + self.means[self.target]

    def errors(self, answers: Frame, table: Frame, name: str = "the table") -> list[Any]:
        """Of the rows that have a target: absolute errors or, of classes, whether the answer is right."""
        rows = table[self.target].notna().to_numpy()
        answer, truth = answers.loc[rows, self.answers[0]].to_numpy(), table.loc[rows, self.target]
        if self.classes is None:
            return [*np.abs(answer - as_numbers(truth, "target", name).to_numpy())]
        return [*(answer == as_names(truth).to_numpy())]


def is_table(path: Path) -> bool:
    """Whether a file is a table by its name."""
    return path.suffix.lower() in READERS and not path.name.startswith(".")


def read_table(path: Path, options: Mapping[str, Any], argument: str) -> Frame:
    """Read a CSV or Parquet file; ``options`` are those of ``pandas.read_csv``."""
    expected = f"{argument} must name a table, {' or '.join(READERS)}, got {path}"
    require(is_table(path) and path.is_file(), f"{expected}, which is no such file")
    csv = path.suffix.lower() == ".csv"
    require_installed(f"{argument} {path}", "tables", "pandas", *(() if csv else ("pyarrow",)))
    import pandas

    try:
        table = getattr(pandas, READERS[path.suffix.lower()])(path, **(options if csv else {}))
    except (ValueError, TypeError) as error:  # TypeError: an option that pandas does not have
        raise InputError(f"{expected}, which pandas cannot read: {error}") from None
    require(len(table) > 0, f"{expected}, which has no rows")
    return table.rename(columns=str)


def listed(values: Sequence[Any]) -> str:
    """Values in a message."""
    return ", ".join(map(repr, values[:SHOWN])) + ", …" * (len(values) > SHOWN)


def require_columns(table: Frame, columns: Collection[str], argument: str, name: str) -> None:
    """Refuse a table without exactly one of each of these columns."""
    if unnamed := [column for column in columns if not isinstance(column, str)]:
        hint = "table.rename(columns=str) makes it so"
        raise InputError(f"{argument} must name columns by text, got {listed(unnamed)} in {name}; {hint}")
    if repeated := [column for column in columns if [*table.columns].count(column) > 1]:
        raise InputError(f"{argument} must be once in every table, got several columns {listed(repeated)} in {name}")
    if missing := [column for column in columns if column not in table.columns]:
        near = nearest(missing[0], table.columns)
        hint = f"the nearest to {missing[0]!r} is {near!r}" if near else f"it has {listed([*table.columns])}"
        raise InputError(f"{argument} must be in every table, got no column {listed(missing)} in {name}; {hint}")


def require_known(column: Column, known: Sequence[str], expected: str, name: str) -> None:
    """Refuse names that are none of the known ones."""
    if unknown := sorted({*column} - {*known}):
        raise InputError(f"{expected}, {listed(known)}, got {listed(unknown)} in {name}")


def labelled(table: Frame, target: str, name: str) -> Frame:
    """The rows that have a target."""
    require_columns(table, [target], "target", name)
    rows = table[table[target].notna()]
    require(len(rows) > 0, f"target must have a value in some row, got none of {target!r} in {name}")
    return rows


def joined(parts: Iterable[Any]) -> Any:
    """Frames or columns of one form, below each other."""
    import pandas

    return pandas.concat([*parts], ignore_index=True)


def values_of(table: Frame, numbers: Sequence[str], names: Sequence[str], name: str) -> Frame:
    """These columns as floating point and as text, with NaN for missing values."""
    columns = {c: as_numbers(table[c], c, name) for c in numbers} | {c: as_names(table[c]) for c in names}
    return table[[]].assign(**columns)


def as_names(column: Column) -> Column:
    """Values as text; whole numbers look alike whether pandas read integers or, beside missing ones, floats."""

    def text(value: Any) -> str:
        return str(int(value)) if isinstance(value, float | np.floating) and value.is_integer() else str(value)

    there = column.notna()
    return column.astype(object).where(there, 0).map(text).where(there, np.nan)


def as_numbers(column: Column, what: str, name: str) -> Column:
    """Values as floating point; InputError for others, and for infinity."""
    import pandas

    numbers = pandas.to_numeric(column, errors="coerce")
    for kind in (column.dtype, numbers.dtype):
        times_or_complex = f"{what} must hold numbers or names, got {kind} in {name}; features leaves it out"
        require(kind.kind not in "mMc", times_or_complex)
    numbers = numbers.astype(float)
    wrong = column[(numbers.isna() & column.notna()) | np.isinf(numbers)].tolist()
    require(not wrong, f"{what} must hold finite numbers, got {listed(wrong)} in {name}")
    return numbers


def holds_numbers(tables: Mapping[str, Frame], column: str) -> bool:
    """Whether a column is of numbers, though a few values may be none, which ``as_numbers`` then refuses."""
    import pandas
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    columns = [table[column].dropna() for table in tables.values()]
    columns = [values for values in columns if len(values)]
    if any(c.dtype.kind in "mM" or (is_numeric_dtype(c) and not is_bool_dtype(c)) for c in columns):
        return True
    texts = [value for values in columns for value in values if isinstance(value, str)]
    # in a column that holds "12", "15" and "broken" the last is a mistake; numbers alone are text on purpose
    numbers = pandas.to_numeric(pandas.Series(texts, dtype=object), errors="coerce").notna().sum()
    return not columns or len(texts) / 2 < numbers < len(texts)


def holds_real_numbers(tables: Mapping[str, Frame], column: str) -> bool:
    """Whether a column is of numbers that are not all whole."""
    if not holds_numbers(tables, column):
        return False
    values = joined(as_numbers(table[column], "target", name) for name, table in tables.items())
    return bool((values % 1 != 0).any())
