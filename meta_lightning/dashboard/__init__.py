"""Figures, norms, speed and hyperparameters for TensorBoard, Weights & Biases and MLflow."""

from meta_lightning.dashboard.callback import Dashboard as Dashboard
