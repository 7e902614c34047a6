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


def batch(samples: int = 10) -> TaskBatch:
    return classification(1, 8, 8, support=samples, query=samples)


def in_train_mode_of_the_rest(network: nn.Sequential) -> nn.Sequential:
    """What the literal loops run: frozen modules in evaluation mode."""
    reference = copy.deepcopy(network)
    for module in reference.modules():
        params = [*module.parameters()]
        if params and not any(p.requires_grad for p in params):
            module.eval()
    return reference


def counted(network: nn.Sequential, layer: nn.Module) -> list[int]:
    """Numbers of samples of each run of a layer; its place is taken by a module, since a hook is seen by copies."""
    runs: list[int] = []
    forward = layer.forward
    layer.forward = lambda x: runs.append(len(x)) or forward(x)  # type: ignore[func-returns-value,method-assign]
    return runs


def partly_frozen() -> nn.Sequential:
    body = backbone()
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh())
    network = nn.Sequential(nn.Sequential(*body[:3], block, *body[4:]), nn.Linear(4, 5))
    network[0][0].requires_grad_(False)
    network[0][1].requires_grad_(False)
    return network


NETWORKS = {"frozen": frozen_network, "partly": partly_frozen}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize(("algorithm", "loop"), [(MAML, maml_loop), (FOMAML, fomaml_loop)])
def test_meta_gradients_in_front_of_which_modules_are_frozen(algorithm: type[MAML], loop: object, make: object) -> None:
    network, tasks = make(), batch()
    learner = algorithm(network, inner_lr=0.1, inner_steps=3)
    ours = learner.meta_gradient(tasks)[0]
    assert not learner.task_network.loops_over_tasks
    assert error(ours, loop(in_train_mode_of_the_rest(network), tasks, 3)) < EXACT
