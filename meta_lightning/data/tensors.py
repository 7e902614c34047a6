"""Classification over arrays of one's own."""

import warnings
from dataclasses import field

import numpy as np
import torch
from torch import Tensor

from meta_lightning.checks import InputError, require
from meta_lightning.data.module import ClassificationTasks, options
from meta_lightning.data.splits import GivenSplit
from meta_lightning.data.tasks import Array, FewShotTasks, Split


@options
class TensorTasks(GivenSplit, ClassificationTasks):
    """N-way K-shot classification over arrays of one's own.

    ``trainer.fit(MAML(MLP(in_features=20, out_features=5)), TensorTasks(x, y))`` is all it takes. The arrays are not
    copied where their type serves as it is, but for a copy on the GPU that trains, where that has room, and do not go
    into checkpoints.

    Raises:
        InputError: If an option is outside its range, or a split cannot give such tasks.
    """

    data_arguments = ("x", "y")

    x: Tensor | Array = field(kw_only=False)
    """Samples. Floating-point ones are used as they are, in torch's default precision; uint8 is scaled to [0, 1]; other
    integers become int64, for embeddings.  # M ..."""
    y: Tensor | Array = field(kw_only=False)
    """Class number of each sample, any integers; of names, ``np.unique(names, return_inverse=True)[1]``.  # M"""

    def __post_init__(self) -> None:
        """Take the arrays as tensors, and split the classes."""
        super().__post_init__()
        self.samples, y = samples(self.x, "x"), as_tensor(self.y, "y")
        require(
            not y.is_floating_point() and not y.is_complex(),
            f"y must hold class numbers, integers, got {y.dtype}; RegressionTasks takes floating-point targets",
        )
        require(y.ndim == 1, f"y must be one class number per sample, of shape [M], got shape {list(y.shape)}")
        self.labels = y.long().cpu()
        require(
            len(self.samples) == len(self.labels),
            f"x and y must be of one length, got {len(self.samples)} and {len(self.labels)}",
        )
        self.x, self.y = self.samples, self.labels  # whatever they were made of may go
        self.split(self.labels.unique().tolist(), "class numbers of y")

    def make_task_set(self, split: Split) -> FewShotTasks:
        """The tasks of a split, from the arrays."""
        return self.few_shot_tasks(split, self.samples, self.labels, self.members[split])


def samples(x: Tensor | Array, name: str) -> Tensor:
    """Samples as tasks hold them: of torch's default precision, uint8 or int64."""
    x = as_tensor(x, name)
    require(not x.is_complex() and x.dtype != torch.bool, f"{name} must hold real numbers, got {x.dtype}")
    if not x.is_floating_point():
        return x if x.dtype == torch.uint8 else x.long()
    x = x.to(torch.get_default_dtype())
    # the extremes are NaN or infinite if anything is; to test every value takes more memory than x
    if x.numel() and not torch.stack(x.aminmax()).isfinite().all():
        spoilt = (~x.isfinite()).nonzero()[:, 0].unique().tolist()
        raise InputError(
            f"{name} must be finite, got NaN or infinity in {len(spoilt)} of {len(x)} samples, first in number "
            f"{', '.join(map(str, spoilt[:3]))}"
        )
    return x


def as_tensor(values: Tensor | Array, name: str) -> Tensor:
    """The same values as a tensor outside of any graph, without a copy where that can be."""
    if not isinstance(values, Tensor):
        try:
            with warnings.catch_warnings():
                # an array is read-only: nothing writes into it here (https://github.com/pytorch/pytorch/pull/33615)
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                values = torch.from_numpy(np.ascontiguousarray(values))
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} must be a tensor or an array of numbers, got another: {error}") from None
    require(values.ndim > 0, f"{name} must have a dimension of samples, got a single number")
    return values.detach()
