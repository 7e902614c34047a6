"""Classification tasks over arrays."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meta_lightning.checks import InputError, require
from meta_lightning.data.form import SampleForm
from meta_lightning.data.module import ClassificationTasks, options
from meta_lightning.data.splits import GivenSplit
from meta_lightning.data.tasks import SPLITS, Array, FewShotTasks, ReadSamples, Split
from meta_lightning.inner.params import tree_leaves
from meta_lightning.inner.samples import Samples


@options
class LabelledTasks(GivenSplit, ClassificationTasks):
    """Base class of N-way K-shot classification over labelled samples, by ``describe_samples``."""

    def describe_samples(self, samples: Samples | ReadSamples, labels: Any, names: Sequence[str] | None = None) -> None:
        """Take the samples, and split their classes.

        Args:
            samples: The samples.
            labels: The class of each sample: integers, or names.  # M
            names: Names of the integers 0, 1, … Default: the integers.

        Raises:
            InputError: If a split is not one of these classes.
        """
        self.samples = samples
        self.class_numbers, self.class_names = numbered_classes(labels, names)
        numbers = self.class_numbers.unique().tolist()
        by_name = {name: number for number, name in self.class_names.items() if number in {*numbers}}
        self.split(numbers, "class numbers of y" if not by_name else "classes", by_name)

    def sample_form(self) -> SampleForm:
        """Whether the samples are pixels."""
        tensors = [] if isinstance(self.samples, ReadSamples) else tree_leaves(self.samples)
        return SampleForm(pixels=any(tensor.dtype == torch.uint8 for tensor in tensors))

    def task_set(self, split: Split) -> FewShotTasks:
        """The tasks of a split."""
        classes, needs = self.members[split], {each: self.most_ways(each) for each in SPLITS}
        most = f"at most {len(classes)} (classes of the {split} split)"
        self.require_members(split, needs, f"{self.ways_argument(split)} must be {most}, got {self.ways_of(split)}")
        names = [self.class_names[number] for number in classes] if self.class_names else []
        return self.few_shot_tasks(split, self.samples, labels=self.class_numbers, classes=classes, names=names)


def numbered_classes(labels: Any, names: Sequence[str] | None = None) -> tuple[Tensor, dict[int, str]]:
    """Class number of each sample, and the names of the numbers if they have any; names are numbered in order."""
    values = np.asarray(labels.numpy(force=True) if isinstance(labels, Tensor) else labels)
    require(values.ndim == 1, f"y must hold one class per sample, of shape [M], got shape {list(values.shape)}")
    if values.dtype.kind in "OUS" and all(isinstance(value, str) for value in values.tolist()):
        distinct, numbers = np.unique(values.astype(str), return_inverse=True)
        return torch.from_numpy(numbers), dict(enumerate(distinct.tolist()))
    integers = values.dtype.kind in "iub"
    hint = "; RegressionTasks takes real targets" if values.dtype.kind in "fc" else ""
    came = f"torch.{values.dtype}" if hint else str(values.dtype)
    require(integers, f"y must hold integer class numbers or names, got {came}{hint}")
    names = [*map(str, names or ())]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    require(
        not repeated, f"names of classes must differ, got {', '.join(repeated)} more than once: pass labels as numbers"
    )
    outside = sorted({*values.tolist()} - {*range(len(names))}) if names else []
    require(not outside, f"labels must be numbers of the {len(names)} named classes, got {outside}")
    return torch.from_numpy(values.astype(np.int64)), dict(enumerate(names))


@options
class TensorTasks(LabelledTasks):
    """N-way K-shot classification over arrays: ``TensorTasks(x, y)``.

    The arrays are not copied unless their dtype must be converted or a GPU has room for them, and checkpoints do not
    contain them.

    Raises:
        InputError: If an option is outside its range, or a split has too few classes or samples for its tasks.
    """

    data_arguments = ("x", "y")

    x: Any = field(kw_only=False)
    """Samples: a tensor, an array, a DataFrame of numbers, or a nest of dicts and tuples of these. Floating-point
    samples are converted to torch's default dtype, uint8 is scaled to [0, 1], and other integers become int64, which
    the network may embed.  # M ..."""
    y: Any = field(kw_only=False)
    """Class of each sample: any integers, or names.  # M"""

    def __post_init__(self) -> None:
        """Convert the arrays to tensors and split the classes."""
        super().__post_init__()
        x, y = samples(self.x, "x"), self.y
        lengths = {len(tensor) for tensor in tree_leaves(x)} | {len(y)}
        came = " and ".join(map(str, [*dict.fromkeys([*map(len, tree_leaves(x)), len(y)])]))
        require(len(lengths) == 1, f"x and y must have one length, got {came}")
        self.describe_samples(x, y)
        self.x, self.y = self.samples, self.class_numbers  # releases the original arrays


def samples(x: Samples | Array, name: str) -> Samples:
    """Convert samples, or nests of them, to torch's default dtype, uint8 or int64, and check that they are finite."""
    if isinstance(x, Mapping):
        return {key: samples(part, f"{name}[{key!r}]") for key, part in x.items()}
    if isinstance(x, tuple) and x:
        return tuple(samples(part, f"{name}[{i}]") for i, part in enumerate(x))
    x = as_tensor(x, name)
    require(not x.is_complex() and x.dtype != torch.bool, f"{name} must hold real numbers, got {x.dtype}")
    if not x.is_floating_point():
        return x if x.dtype == torch.uint8 else x.long()
    x = x.to(torch.get_default_dtype())
    # aminmax propagates NaN and infinity, and takes less memory than testing every value
    if x.numel() and not torch.stack(x.aminmax()).isfinite().all():
        bad = (~x.isfinite()).nonzero()[:, 0].unique().tolist()
        first = ", ".join(map(str, bad[:3]))
        raise InputError(f"{name} must be finite, got NaN or infinity in {len(bad)} of {len(x)} samples, first {first}")
    return x


def as_tensor(values: Any, name: str) -> Tensor:
    """A detached tensor of at least one dimension, without a copy if possible."""
    if not isinstance(values, Tensor):
        try:
            with warnings.catch_warnings():
                # a read-only array is not written to here (https://github.com/pytorch/pytorch/pull/33615)
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                values = torch.from_numpy(np.ascontiguousarray(values))
        except (TypeError, ValueError) as error:
            kinds: Any = getattr(values, "dtypes", None)  # of the columns of a DataFrame
            columns = (
                [str(column) for column, kind in kinds.items() if kind.kind not in "biufc"]
                if hasattr(kinds, "items")
                else []
            )
            named = f", got columns {', '.join(columns)}, which hold none" if columns else f": {error}"
            raise InputError(f"{name} must be a tensor or an array of numbers{named}") from None
    require(values.ndim > 0, f"{name} must have a dimension of samples, got a single number")
    tensor: Tensor = values.detach()
    return tensor
