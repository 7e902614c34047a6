"""First-order model-agnostic meta-learning."""

from torch import Tensor

from meta_lightning.algorithms.maml import MAML
from meta_lightning.inner_loop import Params, gradient, leaves, mean_over_tasks, stack
from meta_lightning.tasks import TaskBatch


class FOMAML(MAML):
    """First-order MAML (Finn, Abbeel and Levine, 2017, https://arxiv.org/abs/1703.03400, section 5.2).

    ``θ ← θ − β mean_i ∇_θ' L_query,i(θ'_i)``: MAML with the gradient taken at the adapted parameters, as if ``θ'_i``
    did not depend on θ. It needs first derivatives only.

    The arguments are MAML's.
    """

    second_order = False

    def meta_gradient(self, batch: TaskBatch) -> tuple[Params, Tensor, Tensor]:
        """``mean_i ∇_θ' L_query,i(θ'_i)``, with the query losses and predictions of the tasks.  # ..., T, T R ..."""
        theta = stack(self.meta_parameters(), len(batch.support_x))
        adapted = leaves(self.adapt_tasks(theta, batch.support_x, batch.support_y, self.inner_steps).params)
        predictions = self.forward_tasks(adapted, batch.query_x)
        losses = self.task_losses(predictions, batch.query_y)
        return mean_over_tasks(gradient(losses.sum(), adapted)), losses, predictions
