"""Classification tasks over any map-style data set: torchvision's, Hugging Face's, one's own."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from meta_lightning.checks import InputError, require
from meta_lightning.data.form import SampleForm
from meta_lightning.data.module import options
from meta_lightning.data.tasks import SPLITS, ReadSamples, least_and_most
from meta_lightning.data.tensors import LabelledTasks, numbered_classes, samples
from meta_lightning.inner.params import tree_leaves, tree_map
from meta_lightning.inner.samples import Samples, collated, form_of_sample, structure_of

# of data sets: attributes with the labels of torchvision's, and columns of Hugging Face's
ATTRIBUTES = ("targets", "labels", "_labels", "y")
COLUMNS = ("label", "labels", "target", "y")
SHOWN = 5  # classes in a warning
READ = 8  # items that are read several times, to see whether they are the same each time


@options
class DatasetTasks(LabelledTasks):
    """N-way K-shot classification over a map-style data set: ``DatasetTasks(dataset)``.

    The data set has ``len`` and items by index: pairs of a sample and its label, or dicts, as the sets of torchvision
    and of Hugging Face. Samples are tensors, arrays, pictures of Pillow, numbers, or nests of dicts and tuples of
    these, all of one shape. They are read once if they fit into a quarter of the free memory and are the same each
    time, else when a task needs them, by ``num_workers`` processes. Classes with fewer samples than a task takes are
    left out.

    Raises:
        InputError: If an option is outside its range, labels or samples cannot be used, or a split has too few classes
            for its tasks.
    """

    data_arguments = ("dataset", "labels")

    dataset: Dataset = field(kw_only=False)  # type: ignore[type-arg]  # of Dataset[Any] jsonargparse makes a Dataset
    """The data set."""
    labels: str | Sequence[int | str] | None = field(default=None, kw_only=False)
    """The class of each sample, as numbers or names, or the name of the column or attribute that holds them. Default:
    the attribute ``targets`` or ``labels``, the column ``label``, or the last part of each item, for which all items
    are read once.  # M"""
    inputs: str | Sequence[str] | None = None
    """The key of an item that is the sample, or the keys of a dict of inputs. Default: all but the label; a single one
    is the sample itself."""
    in_memory: bool | None = None
    """Whether to keep all samples in memory, as they are read first. Default: if they fit into a quarter of the free
    memory, and reading the first ones again gives the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = type(self.dataset).__name__
        indexed = hasattr(self.dataset, "__len__") and hasattr(self.dataset, "__getitem__")
        require(indexed, f"dataset must have a length and items by index, got {kind}")
        several = ", ".join(map(str, self.dataset)) if isinstance(self.dataset, Mapping) else ""
        require(not several, f"dataset must be one set, such as dataset['train'], got a {kind} of {several}")
        count = len(self.dataset)  # type: ignore[arg-type]
        require(count > 0, f"dataset must have items, got none in {kind}")
        reader = ItemReader(self.dataset, self.labels if isinstance(self.labels, str) else None, self.inputs)
        labels, names = reader.labels(self.labels)
        require(len(labels) == count, f"labels must hold one per item of dataset, {count}, got {len(labels)}")
        numbers, by_number = numbered_classes(labels, names)
        rows = self.rows_of_large_classes(numbers, by_number)
        reader.rows = rows
        kept = numbers[torch.tensor(rows)]
        names = [by_number[number] for number in range(len(by_number))]
        self.describe_samples(reader.all() if self.fits(reader) else reader, kept, names)

    def rows_of_large_classes(self, numbers: Tensor, names: Mapping[int, str]) -> list[int]:
        """The items whose class has enough samples for the tasks of every split; warn about the others."""
        sizes = [self.sizes(split) for split in SPLITS]
        needed = max(least_and_most(shots, "shots")[1] + queries for shots, queries in sizes)
        counts = Counter(numbers.tolist())
        small = sorted(number for number, count in counts.items() if count < needed)
        require(
            len(small) < len(counts),
            f"shots + queries must be at most {max(counts.values())}, the samples of the largest class, got {needed}",
        )
        if small:
            listed = ", ".join(f"{names.get(number, number)} ({counts[number]})" for number in small[:SHOWN])
            more = f" and {len(small) - SHOWN} more" if len(small) > SHOWN else ""
            rank_zero_warn(f"Classes with fewer than {needed} samples, shots + queries, are left out: {listed}{more}")
        if self.splits is not None:
            left_out = {*small} | {names[number] for number in small if number in names}
            self.splits = {split: [m for m in part if m not in left_out] for split, part in self.splits.items()}
        large = counts.keys() - {*small}
        return [row for row, number in enumerate(numbers.tolist()) if number in large]

    def fits(self, reader: "ItemReader") -> bool:
        """Whether to keep all samples in memory."""
        if self.in_memory is not None:
            return self.in_memory
        rows = range(min(READ, len(reader.rows)))
        with isolate_rng():
            first, *again = (tree_leaves(reader.take(rows)) for _ in range(3))
        same = all(torch.equal(*pair) for other in again for pair in zip(first, other, strict=True))
        size = len(reader.rows) * sum(tensor.nbytes for tensor in first) // len(rows)
        if same and size < (free := free_memory()) / 4:
            return True
        why = "differ from time to time" if not same else f"take {size / 1e9:.1f} GB, with {free / 1e9:.1f} GB free"
        rank_zero_info(f"Samples are read when a task needs them, since they {why}: num_workers reads ahead")
        return False

    def sample_form(self) -> SampleForm:
        """The form of pictures, if the samples are square ones."""
        form = super().sample_form()
        x = self.samples.take([0]) if isinstance(self.samples, ReadSamples) else self.samples
        pictures = isinstance(x, Tensor) and x.dtype == torch.uint8 and x.ndim == 4 and x.shape[1] in (1, 3)
        if not pictures or x.shape[2] != x.shape[3]:
            return form
        return replace(form, pixels=True, image_size=x.shape[2], channels=x.shape[1])


def free_memory() -> int:
    """Bytes; 0 where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


class ItemReader(ReadSamples):
    """Reads samples and labels of a data set.

    Args:
        dataset: The data set.
        column: The key of the label in an item, if it is given.
        inputs: The key or keys of the sample.
    """

    def __init__(self, dataset: Any, column: str | None, inputs: str | Sequence[str] | None) -> None:
        self.dataset, self.column, self.inputs = dataset, column, inputs
        columns = getattr(dataset, "column_names", None)
        if column is None and isinstance(columns, Sequence):
            self.column = next((name for name in COLUMNS if name in columns), None)
        self.rows: Sequence[int] = range(len(dataset))  # the items that count
        self.shapes: str | None = None  # of the first sample that was read, which all must have

    def labels(self, given: str | Sequence[int | str] | None) -> tuple[Any, Sequence[str] | None]:
        """The label of each item, and the names of the label numbers if the data set has them."""
        if given is not None and not isinstance(given, str):
            return given, None
        return self.labels_in(self.dataset, given)

    def labels_in(self, dataset: Any, given: str | None) -> tuple[Any, Sequence[str] | None]:
        """``labels`` of a data set, or of what a ``Subset`` takes from it."""
        if isinstance(dataset, Subset):
            values, names = self.labels_in(dataset.dataset, given)
            return np.asarray(values)[np.asarray(dataset.indices)], names
        columns, features = getattr(dataset, "column_names", None), getattr(dataset, "features", None)
        if isinstance(columns, Sequence) and self.column in columns:
            feature = features[self.column] if isinstance(features, Mapping) else None
            return np.asarray(dataset[self.column]), getattr(feature, "names", None)
        for name in [given] if given else ATTRIBUTES:
            values = getattr(dataset, name, None)
            if isinstance(values, Tensor | np.ndarray | Sequence) and len(values) == len(dataset):
                classes: Sequence[str] = getattr(dataset, "classes", None) or ()
                values = values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)
                numbers = values.dtype.kind in "iu"
                return values, classes if numbers and len(classes) > values.max() else None
        pairs = not isinstance(dataset[0], Mapping)
        expected = f"labels must name a column or an attribute of dataset with a label per item, got {given!r}"
        require(given is None or not pairs, expected)
        items = range(len(dataset))
        read = [self.label_of(dataset[i], i) for i in tqdm(items, "Reading labels", disable=None, leave=False)]
        return read, None

    def label_of(self, item: Any, number: int) -> int | str:
        """The label in an item."""
        if isinstance(item, Mapping):
            key = self.column or next((name for name in COLUMNS if name in item), None)
            require(key in item, f"labels must name a key of the items, which have {', '.join(item)}, got {key!r}")
            label = item[key]
        else:
            pair = isinstance(item, tuple | list) and len(item) > 1
            require(pair, f"labels must be given, since items are no pairs, got {type(item).__name__} in item {number}")
            label = item[-1]
        label = label.item() if isinstance(label, Tensor | np.generic) and label.ndim == 0 else label
        if not isinstance(label, int | str):
            raise InputError(f"labels must be numbers or names, got {type(label).__name__} in item {number}")
        return label

    def items(self, numbers: Sequence[int]) -> Sequence[Any]:
        """Items of the data set, at once if it can."""
        at_once = getattr(self.dataset, "__getitems__", None)  # torch's convention
        read: Sequence[Any] = [self.dataset[number] for number in numbers] if at_once is None else at_once(numbers)
        return read

    def sample_of(self, item: Any, number: int) -> Samples:
        """The sample in an item, as tensors."""
        if isinstance(item, Mapping):
            names = [name for name in item if name != self.column and name not in COLUMNS]
            if self.inputs is not None:
                names = [self.inputs] if isinstance(self.inputs, str) else [*self.inputs]
                missing = [name for name in names if name not in item]
                require(not missing, f"inputs must be keys of the items, {', '.join(item)}, got {', '.join(missing)}")
            parts = {name: as_tensors(item[name], f"{name} of item {number}") for name in names}
            single = len(names) == 1 and (self.inputs is None or isinstance(self.inputs, str))
            return parts[names[0]] if single else parts
        if isinstance(item, tuple | list) and len(item) > 1:
            item = item[0] if len(item) == 2 else tuple(item[:-1])
        return as_tensors(item, f"item {number}")

    def take(self, rows: Sequence[int]) -> Samples:
        """The samples with these numbers.  # len(rows) ..."""
        numbers = [self.rows[row] for row in rows]
        read = [self.sample_of(item, number) for item, number in zip(self.items(numbers), numbers, strict=True)]
        for row, sample in zip(rows, read, strict=True):
            shapes = structure_of(tree_map(lambda t: t[None], sample), form_of_sample)
            self.shapes = self.shapes or shapes
            expected = "dataset must give samples of one shape and type, to which a transform may pad or resize them"
            came = f"got {shapes} in item {self.rows[row]} after {self.shapes}"
            require(shapes == self.shapes, f"{expected}, {came}")
        return samples(collated(read), "samples of dataset")

    def all(self) -> Samples:
        """All samples."""
        whole = tree_map(lambda t: t.new_empty(len(self.rows), *t.shape[1:]), self.take([0]))
        for row in tqdm(range(len(self.rows)), "Reading samples", disable=None, leave=False):
            tree_map(lambda to, t, row=row: to[row].copy_(t[0]), whole, self.take([row]))
        return whole


def as_tensors(value: Any, what: str) -> Samples:
    """A sample, or a nest, as tensors: pictures of Pillow as uint8, C H W."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        return {name: as_tensors(part, f"{name} in {what}") for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(as_tensors(part, what) for part in value)
    if isinstance(value, Image):
        pixels = np.asarray(value.convert({"P": "RGB", "1": "L"}.get(value.mode, value.mode)))
        return torch.from_numpy(np.array(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)))
    try:
        return torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        hint = "a tokenizer or a transform makes them; inputs names the keys that count"
        raise InputError(f"{what} must be numbers ({hint}), got {type(value).__name__}: {error}") from None
