"""First-order model-agnostic meta-learning."""

from meta_lightning.algorithms.maml import MAML


class FOMAML(MAML):
    """First-order MAML (Finn, Abbeel and Levine, 2017, https://arxiv.org/abs/1703.03400, section 5.2).

    ``θ ← θ − β mean_i ∇_θ' L_query,i(θ'_i)``: MAML without second derivatives. The gradient is taken at the adapted
    parameters.

    The arguments are those of ``MAML``; ``recompute_inner_steps`` and ``first_order_steps`` have no effect.
    """

    second_order = False  # the inner gradients are constants, and ∂θ'/∂θ is the identity
