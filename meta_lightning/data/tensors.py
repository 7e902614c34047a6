"""Classification tasks over arrays."""

import warnings
from collections.abc import Mapping
from dataclasses import field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meta_lightning.checks import InputError, require
from meta_lightning.data.form import SampleForm
from meta_lightning.data.module import ClassificationTasks, options
from meta_lightning.data.splits import GivenSplit
from meta_lightning.data.tasks import SPLITS, Array, FewShotTasks, Split
from meta_lightning.inner.samples import Samples


@options
class TensorTasks(GivenSplit, ClassificationTasks):
    """N-way K-shot classification over arrays: ``TensorTasks(x, y)``.

    The arrays are not copied unless their dtype must be converted or a GPU has room for them, and checkpoints do not
    contain them.

    Raises:
        InputError: If an option is outside its range, or a split has too few classes or samples for its tasks.
    """

    data_arguments = ("x", "y")

    x: Tensor | Array = field(kw_only=False)
    """Samples. Floating-point samples are converted to torch's default dtype, uint8 is scaled to [0, 1], and other
    integers become int64, for embeddings.  # M ..."""
    y: Tensor | Array = field(kw_only=False)
    """Class number of each sample, any integers. For names pass ``np.unique(names, return_inverse=True)[1]``.  # M"""

    def __post_init__(self) -> None:
        """Convert the arrays to tensors and split the classes."""
        super().__post_init__()
        x, y = samples(self.x, "x"), as_tensor(self.y, "y")
        if y.is_floating_point() or y.is_complex():
            raise InputError(f"y must hold integer class numbers, got {y.dtype}; RegressionTasks takes real targets")
        require(y.ndim == 1, f"y must hold one class number per sample, of shape [M], got shape {list(y.shape)}")
        require(len(x) == len(y), f"x and y must have one length, got {len(x)} and {len(y)}")
        self.x = self.samples = x  # releases the original arrays
        self.y = self.labels = y.long().cpu()
        self.split(self.labels.unique().tolist(), "class numbers of y")

    def sample_form(self) -> SampleForm:
        """Whether the samples are pixels."""
        return SampleForm(pixels=self.samples.dtype == torch.uint8)

    def task_set(self, split: Split) -> FewShotTasks:
        """The tasks of a split, from the arrays."""
        classes, needs = self.members[split], {each: self.most_ways(each) for each in SPLITS}
        most = f"at most {len(classes)} (classes of the {split} split)"
        self.require_members(split, needs, f"{self.ways_argument(split)} must be {most}, got {self.ways_of(split)}")
        return self.few_shot_tasks(split, self.samples, labels=self.labels, classes=classes)


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
            raise InputError(f"{name} must be a tensor or an array of numbers: {error}") from None
    require(values.ndim > 0, f"{name} must have a dimension of samples, got a single number")
    tensor: Tensor = values.detach()
    return tensor
