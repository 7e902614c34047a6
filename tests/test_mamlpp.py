"""The parts of MAML++, alone and together, against literal loops over tasks and finite differences, in float64."""

from typing import Any

import pytest
import torch
from conftest import TINY
from references import EXACT, INNER_LR, TASKS_FROM_A_LIST, Params, error, trained
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from meta_lightning import FOMAML, IMAML, LSLR, MAML, Prototypes, Reptile, TaskBatch, load_learner
from meta_lightning.checks import InputError
from meta_lightning.cli import main

pytestmark = TASKS_FROM_A_LIST
STEPS, D, WAYS = 3, 8, 4
RATES = ".rule.rates."


class Network(nn.Module):
    """A smooth body, batch norm included, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, D), nn.BatchNorm1d(D, track_running_stats=False), nn.Tanh())
        self.head = nn.Linear(D, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


def tasks(count: int = 3, shots: int = 2, queries: int = 3) -> TaskBatch:
    def part(samples: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(WAYS).repeat_interleave(samples).repeat(count, 1)
        return torch.randn(count, WAYS * samples, 6), y

    return TaskBatch(*part(shots), *part(queries))


def prepared(algorithm: type[MAML] = MAML, **options: Any) -> tuple[Network, MAML]:
    """A learner whose rates, if it has any, are no two the same."""
    network = Network()
    learner = algorithm(network, inner_lr=INNER_LR, inner_steps=STEPS, **options)
    with torch.no_grad():
        for rates in learner.inner_rule.parameters():
            rates.copy_(torch.rand_like(rates) * 0.3)
    return network, learner


def rates_of(learner: MAML) -> Params:
    """The rates of each parameter tensor."""
    return {n.removeprefix("rates.").replace("/", "."): p for n, p in learner.inner_rule.named_parameters()}


def prototypes(network: Network, theta: Params, scale: Tensor, x: Tensor, y: Tensor) -> Params:
    """A head from the class means of the features."""
    body = {n.removeprefix("body."): p for n, p in theta.items() if n.startswith("body.")}
    features: Tensor = functional_call(network.body, body, (x,))
    centres = torch.stack([features[y == k].mean(0) for k in range(WAYS)])
    return {"head.weight": 2 * scale * centres, "head.bias": -scale * (centres**2).sum(1)}


def query_losses(
    network: Network, theta: Params, rates: Params, batch: TaskBatch, follow: bool = True, scale: Tensor | None = None
) -> Tensor:
    """The query losses of a loop over tasks after each step; without ``follow`` the inner gradients are constants."""
    losses = []
    for x, y, query_x, query_y in zip(*batch, strict=True):
        params = theta if scale is None else theta | prototypes(network, theta, scale, x, y)
        for k in range(STEPS):
            # a point of its own, so that the head is not differentiated by the body
            held = {n: (p if follow else p.detach()) + torch.zeros_like(p).requires_grad_() for n, p in params.items()}
            loss = F.cross_entropy(functional_call(network, held, (x,)), y)
            grads = torch.autograd.grad(loss, list(held.values()), create_graph=follow)
            rate = {n: rates[n][min(k, len(rates[n]) - 1)] if n in rates else INNER_LR for n in params}
            params = {n: p - rate[n] * g for (n, p), g in zip(params.items(), grads, strict=True)}
            losses.append(F.cross_entropy(functional_call(network, params, (query_x,)), query_y))
    return torch.stack(losses).view(-1, STEPS)


def gradient(loss: Tensor, theta: Params, rates: Params) -> Params:
    """The gradient by θ and the rates, named as a learner names it."""
    named = theta | {RATES + n.replace(".", "/"): p for n, p in rates.items()}
    grads = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    return dict(zip(named, grads, strict=True))


# --------------------------------------------------------------------------------------------------------------- LSLR


@pytest.mark.parametrize("steps", [1, STEPS - 1, STEPS, STEPS + 2])
@pytest.mark.parametrize("options", [{}, {"recompute_inner_steps": True}, {"tasks_per_pass": 1}], ids=str)
@pytest.mark.parametrize("algorithm", [MAML, FOMAML])
def test_learnt_rates_agree_with_a_loop(algorithm: type[MAML], options: dict[str, Any], steps: int) -> None:
    network, learner = prepared(algorithm, inner_rule=LSLR(steps), **options)
    batch, theta, rates = tasks(), trained(network), rates_of(learner)
    meta_gradient, losses, _ = learner.meta_gradient(batch)
    of_tasks = query_losses(network, theta, rates, batch, follow=algorithm is MAML)[:, -1]
    expected = gradient(of_tasks.mean(), theta, rates)
    assert losses.tolist() == pytest.approx(of_tasks.tolist(), abs=EXACT)
    assert error(meta_gradient, expected) <= EXACT
    unused = [g[STEPS:] for name, g in meta_gradient.items() if name.startswith(RATES)]
    assert not torch.cat(unused).any()


def test_rates_start_at_inner_lr_one_per_tensor_and_step() -> None:
    learner = MAML(Network(), inner_lr=INNER_LR, inner_rule=LSLR(7), inner_freeze=["body.1.*"])
    rates = rates_of(learner)
    assert {*rates} == {name for name in trained(Network()) if not name.startswith("body.1.")}
    assert {tuple(rate.shape) for rate in rates.values()} == {(7,)}
    assert {float(rate.unique()) for rate in rates.values()} == {INNER_LR}


def test_learnt_rates_compile() -> None:
    network, learner = prepared(inner_rule=LSLR(STEPS - 1), compile_passes="auto")
    batch = tasks()
    meta_gradient, *_ = learner.meta_gradient(batch)
    loss = query_losses(network, trained(network), rates_of(learner), batch)[:, -1].mean()
    assert len(learner.passes.compiled.passes) == 1
    assert error(meta_gradient, gradient(loss, trained(network), rates_of(learner))) <= EXACT


def test_a_head_of_any_number_of_rows_shares_its_rates() -> None:
    _, learner = prepared(inner_rule=LSLR(), head_start=Prototypes())
    x, y = torch.randn(14, 6), torch.arange(7).repeat(2)
    assert learner.eval().adapt(x, y, steps=8)(x).shape == (14, 7)


@pytest.mark.usefixtures("glyphs")
def test_learnt_rates_from_the_command_line() -> None:
    torch.set_default_dtype(torch.float)
    main(["fit", "--config", TINY, "--model.inner_rule", "LSLR", "--model.inner_rule.steps", "2"])
    rule = load_learner("lightning_logs/version_0/checkpoints/last.ckpt").inner_rule
    assert isinstance(rule, LSLR)
    assert {rate.numel() for rate in rule.parameters()} == {2}
    assert (rule.get_parameter("rates.head/weight") != 0.01).all()  # they were learnt


@pytest.mark.parametrize("algorithm", [Reptile, IMAML])
def test_algorithms_without_a_gradient_by_the_rates_refuse_them(algorithm: Any) -> None:
    with pytest.raises(InputError, match=r"inner_rule .*got \['rates\."):
        algorithm(Network(), inner_rule=LSLR())


def test_steps_have_a_range() -> None:
    with pytest.raises(InputError, match=r"steps .* 0"):
        LSLR(steps=0)
