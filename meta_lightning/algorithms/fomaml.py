"""First-order model-agnostic meta-learning."""

from collections.abc import Callable

from meta_lightning.algorithms.learner import Support
from meta_lightning.algorithms.maml import MAML
from meta_lightning.inner_loop import Params


class FOMAML(MAML):
    """First-order MAML (Finn, Abbeel and Levine, 2017, https://arxiv.org/abs/1703.03400, section 5.2).

    ``θ ← θ − β mean_i ∇_θ' L_query,i(θ'_i)``: MAML with the gradient taken at the adapted parameters, as if ``θ'_i``
    did not depend on θ. It needs first derivatives only.

    The arguments are MAML's.
    """

    second_order = False

    def adapt_and_pull_back(self, theta: Params, support: Support) -> tuple[Params, Callable[[Params], Params]]:
        """θ' of every task, and the identity in the place of ``v ↦ vᵀ ∂θ'/∂θ``."""
        return self.adapt_tasks(theta, support).params, lambda v: v
