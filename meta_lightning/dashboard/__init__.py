"""What TensorBoard shows of a run in addition to Lightning's scalars."""

from meta_lightning.dashboard.callback import Dashboard

__all__ = ["Dashboard"]
