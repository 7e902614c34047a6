"""Tasks of more classes than a network has outputs: adaptations to groups of classes, combined."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from meta_lightning.inner.samples import Output, Samples, call

# Partitions of the classes into groups. With the checkpoint of maml.yaml, on 60 tasks of 20 glyphs, 1-shot, 1, 2, 5 and
# 10 reach 59.9, 64.4, 69.4 and 70.5 ± 1.8 %; one adaptation of a head of 20 rows at most 57.8 from prototypes, and 39.0
# from repeated rows.
PARTITIONS = 5


def partitions(classes: int, outputs: int) -> list[Tensor]:
    """Groups of as many classes as there are outputs: random partitions of all classes, the last groups filled up."""
    rng = np.random.default_rng(0)
    starts = range(0, classes, outputs)
    orders = [rng.permutation(classes) for _ in range(PARTITIONS)]
    groups = [np.take(order, range(start, start + outputs), mode="wrap") for order in orders for start in starts]
    return [torch.from_numpy(group) for group in groups]


def samples_of(group: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the samples of a group's classes, and their numbers within the group.  # N, S -> s, s"""
    positions, numbers = (y[:, None] == group.to(y.device)).nonzero(as_tuple=True)
    return positions, numbers


def shares(groups: Sequence[Tensor], classes: int) -> Tensor:
    """Share of each output of each group in the mean over the groups of its class.  # G*outputs N"""
    of_class = torch.cat([*groups])[:, None] == torch.arange(classes)
    return of_class / of_class.sum(0)


def combined(logits: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Mean log-probability of each class over the groups that it is in, by ``shares``.  # G of ... outputs -> ... N"""
    return torch.cat([of_group.log_softmax(-1) for of_group in logits], -1) @ weights


class Combined(nn.Module):
    """Networks that are adapted to groups of classes, as one: from samples to log-probabilities, up to a constant.

    Args:
        networks: The adapted networks.
        shares: Share of each network's outputs in the mean of each class, see the function.  # G*outputs N
        keywords: Whether samples are dicts, passed as keywords of the networks.
        output: Function that makes predictions of what the networks return.
    """

    def __init__(
        self, networks: Sequence[nn.Module], shares: Tensor, keywords: bool = False, output: Output | None = None
    ) -> None:
        super().__init__()
        self.networks, self.keywords, self.output = nn.ModuleList(networks), keywords, output
        self.register_buffer("shares", shares)

    def forward(self, x: Samples) -> Tensor:
        """Combine the networks' logits.  # S ... -> S N"""
        logits = [call(network, x, self.keywords, self.output) for network in self.networks]
        return combined(logits, self.get_buffer("shares"))
