"""First-order model-agnostic meta-learning."""

from collections.abc import Callable

from meta_lightning.algorithms.learner import Support
from meta_lightning.algorithms.maml import MAML
from meta_lightning.inner_loop import Params, vector_jacobian


class FOMAML(MAML):
    """First-order MAML (Finn, Abbeel and Levine, 2017, https://arxiv.org/abs/1703.03400, section 5.2).

    ``θ ← θ − β mean_i ∇_θ' L_query,i(θ'_i)``: MAML with the gradient taken at the adapted parameters, as if ``θ'_i``
    did not depend on θ. It needs first derivatives only.

    The arguments are MAML's.
    """

    second_order = False

    def adapt_and_pull_back(self, theta: Params, support: Support) -> tuple[Params, Callable[[Params], Params]]:
        """θ' of every task, and ``v ↦ vᵀ ∂θ'/∂θ`` with the inner gradients as constants: the identity.

        Of learnt inner rates it is ``−v ⊙ Σ_k g_k``.
        """
        adapted = self.adapt_tasks(theta, support)
        return adapted.params, lambda v: vector_jacobian(adapted.params, theta, v)
