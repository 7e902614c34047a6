"""What TensorBoard shows of a run, beside Lightning's own values."""

from meta_lightning.dashboard.callback import Dashboard

__all__ = ["Dashboard"]
