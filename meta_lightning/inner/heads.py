"""Head starts: the rows with which the head, the last linear layer of a network, starts a task."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from meta_lightning.checks import require, require_positive
from meta_lightning.inner.described import Described
from meta_lightning.inner.params import HEAD, Params, tree_leaves, without_prefix
from meta_lightning.inner.samples import Samples, class_numbers, length, values_of

PADDING = -1  # class number of padding in ``rows``, of no class
Features = Callable[[], Tensor]  # returns the inputs of the head for the support set: T S D


class HeadStart(Described):
    """The rows with which the head, the last linear layer of a network, starts a task.

    A custom one extends ``ComputedRows``. Constructor arguments must be plain values and kept as attributes of the same
    name, so that a checkpoint can describe the start.

    Args:
        layer: Name of the head in the network. Default: the linear layer that the network registers last.

    Raises:
        InputError: In the learner, if the network has no such layer, or the layer is not a plain one.
    """

    argument = "head_start"
    computed: ClassVar[bool] = False  # whether rows are computed; else they are the network's, in θ

    def __init__(self, layer: str | None = None) -> None:
        super().__init__()
        self.layer = layer

    def find(self, network: nn.Module) -> None:
        """Find the head in the network; called once, by the learner."""

    def replaced(self, params: Iterable[tuple[str, Tensor]]) -> Params:
        """Those of the network's parameters in whose place rows are computed."""
        return {}

    def classes(self, y: Samples, ignored: int, ways: int | None = None) -> Tensor:
        """Samples per class, if the start wants to know; for ``ways`` see ``ComputedRows``.  # T S ... -> T N"""
        return torch.zeros(length(y), 0, device=tree_leaves(y)[0].device)


class LearntRows(HeadStart):
    """The network's own rows, which are part of θ, as in the papers of MAML and Reptile.

    Their number is the greatest number of classes in training.
    """


class ComputedRows(HeadStart, ABC):
    """Rows that are computed for each task, as many as it has classes: tasks may have any number of classes.

    The network's own rows are not trained. A custom start implements ``rows``; parameters created in ``prepare`` are
    part of θ and meta-learnt.
    """

    computed = True
    must_be_learnt: ClassVar[bool] = False  # whether its parameters are of no use before training
    equal: ClassVar[bool] = False  # whether all rows are equal, so that they have to be adapted

    def find(self, network: nn.Module) -> None:
        """Find the head, and create the start's parameters."""
        own = {name for name, p in network.named_parameters() if p.requires_grad}
        linear = {name: part for name, part in network.named_modules() if isinstance(part, nn.Linear)}
        heads = {path: layer for path, layer in linear.items() if is_plain(layer) and {*names_of(path, layer)} <= own}
        self.path: str = next(reversed(linear), "") if self.layer is None else self.layer
        expected = f"layer of head_start {type(self).__name__} must be a linear layer with a plain, trainable weight of"
        came = f"among {', '.join(map(repr, heads))}; got {self.path!r}" if heads else "of which the network has none"
        require(self.path in heads, f"{expected} its own, {came}")
        self.names, self.outputs = names_of(self.path, heads[self.path]), heads[self.path].out_features
        self.prepare(heads[self.path])

    def prepare(self, head: nn.Linear) -> None:
        """Create the start's parameters; called once."""

    def replaced(self, params: Iterable[tuple[str, Tensor]]) -> Params:
        """Those of the network's parameters in whose place rows are computed."""
        return {name: p for name, p in params if name in self.names}

    def classes(self, y: Samples, ignored: int, ways: int | None = None) -> Tensor:
        """Samples per class; where targets are not one class number per sample, zeros per output.  # T S ... -> T N

        ``ways`` is the number of classes where the targets may not be read, which waits for the device.
        """
        may_read = ways is None
        ways, y = ways_of(y, ignored) if ways is None else ways, class_numbers(y, ignored)
        if not ways:
            return torch.zeros(length(y), self.outputs, dtype=torch.int64, device=tree_leaves(y)[0].device)
        counts: Tensor = (y[..., None] == torch.arange(ways, device=y.device)).sum(1)
        absent = (counts == 0).sum(1).max().item() if may_read else 0
        require(
            not absent, f"support_y must hold each of the {ways} classes in every task, got a task without {absent}"
        )
        return counts

    def start(self, theta: Params, features: Features, y: Samples, classes: Tensor) -> Params:
        """θ'_0 of every task: θ with the rows of its head; for the arguments see ``rows``.  # T ..."""
        weight, bias = self.rows(features, class_numbers(y, PADDING), classes, without_prefix(theta, HEAD))
        # inner steps differentiate by the views, which holds the rows fixed where they depend on θ as well
        views = {name: p.view_as(p) for name, p in theta.items()}
        rows = zip(self.names, (weight, bias), strict=False)
        return views | {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in rows}

    @abstractmethod
    def rows(self, features: Features, y: Samples, classes: Tensor, own: Params) -> tuple[Tensor, Tensor]:
        """Compute the weight and the bias of every task's head; a head without bias ignores the latter.

        Args:
            features: Returns the inputs of the head for the support set.  # T S D
            y: Targets of the support set; of padding a negative class number.  # T S ...
            classes: Samples per class; where targets are not one class number per sample, zeros per output.  # T N
            own: The start's parameters by name, expanded to the tasks.  # T ...

        Returns:
            Weight and bias.  # T N D, T N
        """


class ZeroRows(ComputedRows):
    """Rows of zeros (Kao et al., 2022, https://arxiv.org/abs/2106.15367).

    The first inner step moves the head alone.
    """

    equal = True

    def prepare(self, head: nn.Linear) -> None:
        """Create a row, which moves with the learner."""
        self.register_buffer("row", torch.zeros_like(head.weight[0]), persistent=False)

    def rows(self, features: Features, y: Samples, classes: Tensor, own: Params) -> tuple[Tensor, Tensor]:
        """Return zeros."""
        row = self.get_buffer("row")
        return row.expand(*classes.shape, len(row)), row.new_zeros(classes.shape)


class OneVector(ComputedRows):
    """One learnt vector as every row (Ye and Chao, 2022, https://arxiv.org/abs/2106.16245): no order of labels counts.

    The first inner step moves the head alone.
    """

    must_be_learnt = equal = True

    def prepare(self, head: nn.Linear) -> None:
        """Start the vector at the first row of the network's head."""
        self.vector = nn.Parameter(head.weight[0].detach().clone())

    def rows(self, features: Features, y: Samples, classes: Tensor, own: Params) -> tuple[Tensor, Tensor]:
        """Repeat the vector."""
        vector = own["vector"]  # T D
        return vector[:, None].expand(*classes.shape, vector.shape[1]), vector.new_zeros(classes.shape)


class Prototypes(ComputedRows):
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

    def rows(self, features: Features, y: Samples, classes: Tensor, own: Params) -> tuple[Tensor, Tensor]:
        """Compute the rows."""
        z, scale = features(), own["learnt_scale"]  # T S D, T
        numbers = isinstance(y, Tensor) and not y.is_floating_point()
        of_samples = numbers and z.ndim == 3 and y.shape == z.shape[:2]
        of_type = f"{list(y.shape[1:])} of type {y.dtype}" if isinstance(y, Tensor) else type(values_of(y)).__name__
        shapes = f"features {list(z.shape[1:])} and targets {of_type}"
        require(of_samples, f"head_start Prototypes needs one class number and one vector per sample, got {shapes}")
        with torch.autocast(z.device.type, enabled=False):
            is_in = y[:, None] == torch.arange(classes.shape[1], device=y.device)[:, None]  # T N S
            means = (is_in.to(scale.dtype) @ z.to(scale.dtype)) / classes[..., None]  # T N D
            return 2 * scale[:, None, None] * means, -scale[:, None] * means.square().sum(2)


def require_no_meta_gradient(head: ComputedRows, algorithm: str) -> None:
    """Raise InputError for a start whose parameters have to be learnt, which some algorithms cannot."""
    came = f"got {type(head).__name__}"
    require(not head.must_be_learnt, f"head_start must need no meta-gradient, which {algorithm} does not have, {came}")


def ways_of(y: Samples, ignored: int) -> int:
    """Number of classes of tasks with one class number per sample; else 0.  # T S ..."""
    y = class_numbers(y, ignored)
    if not isinstance(y, Tensor) or y.ndim != 2 or y.is_floating_point():
        return 0
    return int(torch.where(y == ignored, -1, y).max()) + 1


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer has a weight and perhaps a bias, and no parametrisation of these."""
    return [name for name, _ in layer.named_parameters()] in (["weight"], ["weight", "bias"])


def names_of(path: str, layer: nn.Module) -> list[str]:
    """The names in the network of a layer's parameters."""
    return [name for name, _ in layer.named_parameters(path)]
