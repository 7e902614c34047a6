"""Head starts: the rows with which the head, the last linear layer of a network, starts a task."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from meta_lightning.checks import require, require_positive
from meta_lightning.inner.described import Described
from meta_lightning.inner.params import HEAD, Params, without_prefix

Features = Callable[[], Tensor]  # the inputs of the head for the support set: T S D


class HeadStart(Described, ABC):
    """The start of the head, which is the last linear layer of a network, in each task.

    A start computes as many rows as a task has classes, so that a learner takes tasks of any number of classes; the
    rows that the network itself has are not trained. A custom start implements ``rows``. Parameters created in
    ``prepare`` are part of θ and meta-learnt. Constructor arguments are described as those of an ``InnerRule``.

    Args:
        layer: Name of the head in the network. Default: the linear layer that the network registers last.

    Raises:
        InputError: In the learner, if the network has no such layer, or the layer shares its weight with another.
    """

    argument = "head_start"
    computed: ClassVar[bool] = True  # whether rows are computed; else they are the network's, in θ
    must_be_learnt: ClassVar[bool] = False  # whether its parameters are of no use before training

    def __init__(self, layer: str | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.path, self.outputs = "", 0
        self.names: list[str] = []  # of the head's weight and, if there is one, bias

    def find(self, network: nn.Module) -> None:
        """Find the head, and create the start's parameters; called once, by the learner."""
        own = {name for name, p in network.named_parameters() if p.requires_grad}
        linear = {name: part for name, part in network.named_modules() if isinstance(part, nn.Linear)}
        heads = {path: layer for path, layer in linear.items() if {*names_of(path, layer)} <= own}
        path: str = next(reversed(linear), "") if self.layer is None else self.layer
        if path not in heads:
            expected = f"layer of head_start {type(self).__name__} must be a linear layer with trainable parameters of"
            came = f"among {', '.join(heads)}; got {path!r}" if heads else "of which the network has none"
            require(not self.computed and self.layer is None, f"{expected} its own, {came}")
            return
        self.path, self.outputs = path, heads[path].out_features
        self.names = names_of(path, heads[path])
        if self.computed:
            self.prepare(heads[path])

    def prepare(self, head: nn.Linear) -> None:
        """Create the start's parameters; called once."""

    def replaced(self, params: Iterable[tuple[str, Tensor]]) -> Params:
        """Those of the network's parameters in whose place rows are computed."""
        return {name: p for name, p in params if name in self.names and self.computed}

    def start(self, theta: Params, features: Features, y: Tensor, classes: Tensor) -> Params:
        """θ'_0 of every task: θ with the rows of its head; for the arguments see ``rows``.  # T ..."""
        weight, bias = self.rows(features, y, classes, without_prefix(theta, HEAD))
        # inner steps differentiate by the views, which holds the rows fixed where they depend on θ as well
        views = {name: p.view_as(p) for name, p in theta.items()}
        rows = zip(self.names, (weight, bias), strict=False)
        return views | {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in rows}

    @abstractmethod
    def rows(self, features: Features, y: Tensor, classes: Tensor, own: Params) -> tuple[Tensor, Tensor]:
        """Compute the weight and the bias of every task's head; a head without bias ignores the latter.

        Args:
            features: Returns the inputs of the head for the support set.  # T S D
            y: Targets of the support set.  # T S ...
            classes: Samples per class; zeros for real targets.  # T N
            own: The start's parameters by name, expanded to the tasks.  # T ...

        Returns:
            Weight and bias.  # T N D, T N
        """


class LearntRows(HeadStart):
    """The network's own rows, which are part of θ, as in the papers of MAML and Reptile.

    Their number is the greatest number of classes in training.
    """

    computed = False

    def start(self, theta: Params, features: Features, y: Tensor, classes: Tensor) -> Params:
        """Return θ."""
        return theta

    def rows(self, features: Features, y: Tensor, classes: Tensor, own: Params) -> tuple[Tensor, Tensor]:
        """Not called."""
        raise NotImplementedError


class ZeroRows(HeadStart):
    """Rows of zeros (Kao et al., 2022, https://arxiv.org/abs/2106.15367).

    The first inner step moves the head alone.
    """

    def prepare(self, head: nn.Linear) -> None:
        """Create a row, which moves with the learner."""
        self.register_buffer("row", torch.zeros_like(head.weight[0]), persistent=False)

    def rows(self, features: Features, y: Tensor, classes: Tensor, own: Params) -> tuple[Tensor, Tensor]:
        """Return zeros."""
        row = self.get_buffer("row")
        return row.expand(*classes.shape, len(row)), row.new_zeros(classes.shape)


class OneVector(HeadStart):
    """One learnt vector as every row (Ye and Chao, 2022, https://arxiv.org/abs/2106.16245): no order of labels counts.

    The first inner step moves the head alone.
    """

    must_be_learnt = True

    def prepare(self, head: nn.Linear) -> None:
        """Start the vector at the first row of the network's head."""
        self.vector = nn.Parameter(head.weight[0].detach().clone())

    def rows(self, features: Features, y: Tensor, classes: Tensor, own: Params) -> tuple[Tensor, Tensor]:
        """Repeat the vector."""
        vector = own["vector"]  # T D
        return vector[:, None].expand(*classes.shape, vector.shape[1]), vector.new_zeros(classes.shape)


class Prototypes(HeadStart):
    """Rows from the class means c_k of the features, ``w_k = 2s c_k`` and ``b_k = −s ‖c_k‖²`` with a learnt scale s.

    This is the head of Proto-MAML (Triantafillou et al., 2020, https://arxiv.org/abs/1903.03096, section 3.3). Before
    the first inner step its logits are, up to a constant, ``−s ‖f(x) − c_k‖²``, those of ProtoNet.

    Args:
        scale: Initial value of the learnt scale s.
    """

    def __init__(self, scale: float = 1.0, layer: str | None = None) -> None:
        super().__init__(layer)
        require_positive(scale=scale)
        self.scale = scale

    def prepare(self, head: nn.Linear) -> None:
        """Create the scale."""
        require(head.bias is not None, f"head_start Prototypes needs a head with a bias, got {self.path!r} without")
        self.learnt_scale = nn.Parameter(head.weight.new_tensor(self.scale))

    def rows(self, features: Features, y: Tensor, classes: Tensor, own: Params) -> tuple[Tensor, Tensor]:
        """Compute the prototypes, and the rows."""
        return prototype_rows(features(), y, classes, own["learnt_scale"])


def prototype_rows(features: Tensor, y: Tensor, classes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``2s c_k`` and ``−s ‖c_k‖²``, c_k being the class means of features.  # T S D, T S, T N, T -> T N D, T N"""
    of_samples = features.ndim == 3 and y.shape == features.shape[:2] and not y.is_floating_point()
    shapes = f"features {list(features.shape[1:])} and targets {list(y.shape[1:])} of type {y.dtype}"
    require(of_samples, f"head_start Prototypes needs one class number and one vector per sample, got {shapes}")
    with torch.autocast(features.device.type, enabled=False):
        is_in = y[:, None] == torch.arange(classes.shape[1], device=y.device)[:, None]  # T N S
        centres = (is_in.to(scale.dtype) @ features.to(scale.dtype)) / classes.clamp(min=1)[..., None]  # T N D
        return 2 * scale[:, None, None] * centres, -scale[:, None] * centres.square().sum(2)


def class_counts(y: Tensor, outputs: int) -> Tensor:
    """Samples per class; for real targets zeros for each output of the head.  # T S ... -> T N"""
    if y.is_floating_point():
        return y.new_zeros(len(y), outputs, dtype=torch.int64)
    return (y.flatten(1)[..., None] == torch.arange(ways_of(y), device=y.device)).sum(1)


def ways_of(y: Tensor) -> int:
    """Number of classes (N); 0 for real targets."""
    return 0 if y.is_floating_point() else int(y.max()) + 1


def names_of(path: str, layer: nn.Module) -> list[str]:
    """The names in the network of a layer's parameters."""
    return [name for name, _ in layer.named_parameters(path)]
