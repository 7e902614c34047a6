"""Implicit MAML against closed forms, the unrolled inner loop and finite differences."""

import weakref
from typing import Any

import pytest
import torch
from references import error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from meta_lightning import FOMAML, IMAML, MetaSGD, TaskBatch
from meta_lightning.algorithms.imaml import conjugate_gradients
from meta_lightning.checks import InputError
from meta_lightning.inner.params import Params

pytestmark = pytest.mark.usefixtures("double")
TASKS = 3


def batch_of(features: int) -> TaskBatch:
    """Tasks of noise: 8 support samples and 6 queries, one target each."""
    generator = torch.Generator().manual_seed(0)
    shapes = (8, features), (8, 1), (6, features), (6, 1)
    return TaskBatch(*(torch.randn(TASKS, *shape, generator=generator) for shape in shapes))


def softplus_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 6), nn.Softplus(), nn.Linear(6, 1))


def converged(network: nn.Module, params: Params, batch: TaskBatch, frozen: set[str], steps: int) -> Tensor:
    """The mean query loss after the literal inner loop, L_support + ‖θ' − θ‖² (λ = 2), with its graph to ``params``."""
    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        adapted = dict(params)
        for _ in range(steps):
            loss = mse_loss(functional_call(network, adapted, (support_x,)), support_y)
            loss = loss + sum((adapted[name] - params[name]).square().sum() for name in params)
            moved = [name for name in params if name not in frozen]
            grads = torch.autograd.grad(loss, [adapted[name] for name in moved], create_graph=True)
            adapted |= {name: adapted[name] - 0.1 * g for name, g in zip(moved, grads, strict=True)}
        losses.append(mse_loss(functional_call(network, adapted, (query_x,)), query_y))
    return torch.stack(losses).mean()


def test_linear_regression_has_the_closed_form() -> None:
    batch, network, weight = batch_of(4), nn.Linear(4, 1, bias=False), 0.7
    learner = IMAML(network, inner_lr=0.1, inner_steps=2000, proximal_weight=weight, cg_steps=4)
    meta_gradient, _, _ = learner.meta_gradient(batch)
    theta, expected = network.weight.detach()[0], torch.zeros(4)
    for x, y, query_x, query_y in zip(*batch, strict=True):
        hessian = 2 / 8 * x.T @ x
        minimum = torch.linalg.solve(hessian + weight * torch.eye(4), 2 / 8 * x.T @ y[:, 0] + weight * theta)
        by_query = 2 / 6 * query_x.T @ (query_x @ minimum - query_y[:, 0])
        expected += torch.linalg.solve(torch.eye(4) + hessian / weight, by_query) / TASKS
    torch.testing.assert_close(meta_gradient["weight"][0], expected, rtol=0, atol=1e-12)


def test_it_approaches_the_gradient_through_the_inner_steps_as_these_converge() -> None:
    batch, network = batch_of(2), softplus_network()
    errors = []
    for steps in (5, 50, 400):
        learner = IMAML(network, inner_lr=0.1, inner_steps=steps, proximal_weight=2.0, cg_steps=30)
        theta = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
        converged(network, theta, batch, set(), steps).backward()
        unrolled = {name: p.grad for name, p in theta.items() if p.grad is not None}
        errors.append(error(learner.meta_gradient(batch)[0], unrolled))
    assert errors[0] > 1e-2  # before convergence the two differ
    assert errors[1] < errors[0] / 10
    assert errors[2] < 1e-12


@pytest.mark.parametrize("freeze", [["0.*"], ["2.weight"], ["*.bias"]])
def test_frozen_parameters_get_the_derivative_of_the_minimum(freeze: list[str]) -> None:
    batch, network = batch_of(2), softplus_network()
    learner = IMAML(network, inner_lr=0.1, inner_steps=400, proximal_weight=2.0, cg_steps=30, inner_freeze=freeze)
    meta_gradient, _, _ = learner.meta_gradient(batch)
    direction = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    values = []
    for step in (1e-5, -1e-5):
        params = {n: (p.detach() + step * direction[n]).requires_grad_() for n, p in network.named_parameters()}
        values.append(converged(network, params, batch, learner.inner_frozen, 400).item())
    slope = sum((meta_gradient[name] * d).sum().item() for name, d in direction.items())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-8)


def test_without_conjugate_gradients_it_is_fomamls_gradient_at_the_same_parameters() -> None:
    batch, network = batch_of(2), softplus_network()
    implicit, _, _ = IMAML(network, inner_lr=0.1, inner_steps=1, cg_steps=0, proximal_weight=1e12).meta_gradient(batch)
    first_order, _, _ = FOMAML(network, inner_lr=0.1, inner_steps=1).meta_gradient(batch)
    assert error(implicit, first_order) < 1e-10


def test_conjugate_gradients_solve_each_task_alone_and_stop_at_negative_curvature() -> None:
    diagonals = [1.0, 3.0], [2.0, 5.0], [-1.0, -2.0], [4.0, -1.0]
    matrices = torch.stack([torch.diag(torch.tensor(d)) for d in diagonals])
    b = torch.ones(4, 2)

    def operator(v: Params) -> Params:
        return {"w": torch.einsum("tij,tj->ti", matrices, v["w"])}

    x = conjugate_gradients(operator, {"w": b}, steps=20)["w"]
    torch.testing.assert_close(x[:2], torch.tensor([[1.0, 1 / 3], [0.5, 0.2]]))
    torch.testing.assert_close(x[2], b[2])
    once = conjugate_gradients(operator, {"w": b}, steps=1)["w"]
    torch.testing.assert_close(x[3], once[3])  # the second direction has negative curvature


def test_memory_does_not_grow_with_the_inner_steps() -> None:
    batch, network = batch_of(2), softplus_network()

    def most_alive(steps: int) -> int:
        alive = most = 0

        def freed(size: int) -> None:
            nonlocal alive
            alive -= size

        class Saved:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal alive, most
                self.tensor = tensor
                alive += tensor.nbytes
                most = max(most, alive)
                weakref.finalize(self, freed, tensor.nbytes)

        def unpack(saved: Any) -> Tensor:
            tensor: Tensor = saved.tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(Saved, unpack):
            IMAML(network, inner_lr=0.1, inner_steps=steps).meta_gradient(batch)
        return most

    assert most_alive(2) == most_alive(50) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proximal_weight": 0.0}, r"proximal_weight .*got 0\.0"),
        ({"cg_steps": -1}, r"cg_steps .*got -1"),
        ({"inner_rule": MetaSGD()}, r"inner_rule .*got \['rates"),
    ],
)
def test_arguments_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        IMAML(softplus_network(), **options)
