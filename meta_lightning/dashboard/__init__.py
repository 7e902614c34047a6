"""Figures, norms, speed and hyperparameters for TensorBoard."""

from meta_lightning.dashboard.callback import Dashboard as Dashboard
