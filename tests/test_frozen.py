"""Frozen modules: their statistics and modes, and what runs once per sample."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from meta_lightning import MAML, FOMAML, MetaLearner, Predictor, Reptile, TaskBatch, load_learner
from references import EXACT, TASKS_FROM_A_LIST, classification, difference, error, fomaml_loop, maml_loop

pytestmark = TASKS_FROM_A_LIST


def backbone() -> nn.Sequential:
    """A body whose batch norm has seen data, and whose dropout shows whether it is in training mode."""
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Dropout(0.5), nn.AvgPool2d(4))
    for _ in range(20):
        body(3 + 2 * torch.randn(30, 1, 8, 8))
    return nn.Sequential(*body, nn.Flatten())


def frozen_network() -> nn.Sequential:
    return nn.Sequential(backbone().requires_grad_(False), nn.Linear(4, 5))


@pytest.mark.parametrize("training", [True, False])
def test_frozen_modules_keep_their_statistics_and_modes(training: bool) -> None:
    network, x = frozen_network(), torch.randn(7, 1, 8, 8)
    before = copy.deepcopy(network.state_dict())
    learner = FOMAML(network).train(training)
    expected = copy.deepcopy(network).eval()(x)
    torch.testing.assert_close(learner(x), expected, rtol=0, atol=0)
    params = {name: p for name, p in network.named_parameters() if p.requires_grad}
    torch.testing.assert_close(learner.forward_with_weights(x, params), expected, rtol=0, atol=1e-12)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
