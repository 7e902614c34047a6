"""First-order model-agnostic meta-learning."""

from meta_lightning.algorithms.maml import MAML


class FOMAML(MAML):
    """First-order MAML (Finn, Abbeel and Levine, 2017, https://arxiv.org/abs/1703.03400, section 5.2).

    ``θ ← θ − β mean_i ∇_θ' L_query,i(θ'_i)``: MAML with the gradient taken at the adapted parameters, as if ``θ'_i``
    did not depend on θ. It needs first derivatives only.

    The arguments are MAML's; there is nothing to recompute.
    """

    second_order = False  # the inner gradients are constants, and ∂θ'/∂θ is the identity
