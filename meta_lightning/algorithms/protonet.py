"""Prototypical networks."""

from typing import Any

from meta_lightning.algorithms.maml import MAML
from meta_lightning.checks import require
from meta_lightning.inner.heads import Prototypes
from meta_lightning.inner.samples import Samples


class ProtoNet(MAML):
    """Prototypical network (Snell, Swersky and Zemel, 2017, https://arxiv.org/abs/1703.05175, algorithm 1).

    ``θ ← θ − β ∇_θ mean_i L_query,i(θ)`` with the logits ``−s ‖f_θ(x) − c_k‖²``, c_k being the mean of the features f_θ
    of the support samples of class k. This is MAML whose head starts at ``Prototypes``, without inner steps. The
    features are the inputs of the network's last linear layer; the scale s, 1 in the paper, is learnt.

    The arguments are those of ``MAML``; the inner steps and their rule and rate have no effect.

    Raises:
        InputError: If an argument is outside its range, or ``head_start`` is not ``Prototypes``.
    """

    default_head_start = Prototypes

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        came = f"got {type(self.head_start).__name__}"
        require(isinstance(self.head_start, Prototypes), f"head_start of ProtoNet must be Prototypes, {came}")

    def inner_batches(
        self, x: Samples, y: Samples, steps: int, first: int | None = None
    ) -> list[tuple[Samples, Samples]]:
        """No inner steps."""
        return []
