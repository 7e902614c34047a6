"""Inner rules: those of the package against torch.optim and finite differences, and one of a user's own."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RUN, TINY, fails, trainer
from references import (
    EXACT,
    INNER_LR,
    TASKS_FROM_A_LIST,
    WAYS,
    Params,
    T,
    adapted_copy,
    classification,
    error,
    fit,
    flat,
    maml_loop,
    trained,
)
from torch import Tensor, nn
from torch.nn import functional as F

from meta_lightning import FOMAML, MAML, SGD, Adam, InnerRule, MetaSGD, Reptile, TaskBatch, load_learner
from meta_lightning.checks import InputError
from meta_lightning.cli import main
from meta_lightning.inner.rules import in_module

pytestmark = TASKS_FROM_A_LIST
STEPS = 3


def smooth() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, WAYS))


class Momentum(InnerRule):
    """A rule of a user's own: heavy-ball momentum, its rate learnt per parameter tensor and step (as in MAML++)."""

    def __init__(self, decay: float = 0.9, most_steps: int = STEPS) -> None:
        super().__init__()
        self.decay, self.most_steps = decay, most_steps

    def prepare(self, params: Params, lr: float) -> None:
        self.rates = nn.Module()
        for name in params:
            self.rates.register_parameter(in_module(name), nn.Parameter(torch.full((self.most_steps,), lr)))

    def start(self) -> Any:
        return torch.zeros((), dtype=torch.int64), {}

    def update(self, grads: Params, state: Any, own: Params, lr: float) -> tuple[Params, Any]:
        step, velocity = state
        velocity = {name: self.decay * velocity.get(name, 0) + g for name, g in grads.items()}
        rates = {name: own[f"rates.{in_module(name)}"][:, step] for name in grads}  # T
        change = {name: -rates[name].view(-1, *[1] * (v.ndim - 1)) * v for name, v in velocity.items()}
        return change, (step + 1, velocity)


def momentum_loop(network: nn.Module, batch: TaskBatch, rates: Params) -> tuple[Params, Params]:
    """The gradients by θ and by the rates of a literal loop with momentum."""
    losses = []
    theta = trained(network)
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        params, velocity = theta, {name: torch.zeros_like(p) for name, p in theta.items()}
        for step in range(STEPS):
            loss = F.cross_entropy(torch.func.functional_call(network, params, (support_x,)), support_y)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            velocity = {name: 0.9 * velocity[name] + g for name, g in zip(params, grads, strict=True)}
            params = {name: p - rates[name][step] * velocity[name] for name, p in params.items()}
        losses.append(F.cross_entropy(torch.func.functional_call(network, params, (query_x,)), query_y))
    grads = torch.autograd.grad(torch.stack(losses).mean(), [*theta.values(), *rates.values()])
    return dict(zip(theta, grads[: len(theta)], strict=True)), dict(zip(theta, grads[len(theta) :], strict=True))


@pytest.mark.parametrize("options", [{}, {"recompute_inner_steps": True}, {"tasks_per_pass": 1}], ids=str)
def test_a_rule_of_ones_own_agrees_with_a_loop(options: dict[str, Any]) -> None:
    network, batch = smooth(), classification(6)
    learner = MAML(network, inner_lr=INNER_LR, inner_steps=STEPS, inner_rule=Momentum(), **options)
    rates = {name: torch.rand(STEPS).requires_grad_() for name in trained(network)}
    with torch.no_grad():
        for name, rate in rates.items():
            learner.inner_rule.get_parameter(f"rates.{in_module(name)}").copy_(rate)
    meta_gradient, *_ = learner.meta_gradient(batch)
    by_theta, by_rates = momentum_loop(network, batch, rates)
    assert error({n: g for n, g in meta_gradient.items() if not n.startswith(".")}, by_theta) <= EXACT
    assert error({n: meta_gradient[f".rule.rates.{in_module(n)}"] for n in by_rates}, by_rates) <= EXACT


def adam_slope(network: nn.Module, batch: TaskBatch, direction: Params) -> float:
    """Central finite difference of the mean query loss after steps of torch's Adam."""
    values = []
    for sign in (1, -1):
        losses = []
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            fast = copy.deepcopy(network)
            with torch.no_grad():
                for name, p in fast.named_parameters():
                    p += sign * 1e-6 * direction[name]
            optimizer = torch.optim.Adam(fast.parameters(), INNER_LR, (0.5, 0.9), eps=1e-2)
            for _ in range(STEPS):
                optimizer.zero_grad()
                F.cross_entropy(fast(support_x), support_y).backward()
                optimizer.step()
            losses.append(F.cross_entropy(fast(query_x), query_y).item())
        values.append(sum(losses) / T)
    return (values[0] - values[1]) / 2e-6


@pytest.mark.parametrize("recompute", [False, True])
def test_maml_differentiates_through_adam(recompute: bool) -> None:
    network, batch = smooth(), classification(6)
    rule = Adam(0.5, 0.9, eps=1e-2)
    learner = MAML(network, inner_lr=INNER_LR, inner_steps=STEPS, inner_rule=rule, recompute_inner_steps=recompute)
    meta_gradient, *_ = learner.meta_gradient(batch)
    for _ in range(3):
        direction = {name: torch.randn_like(p) for name, p in trained(network).items()}
        expected = adam_slope(network, batch, direction)
        assert (flat(meta_gradient) @ flat(direction)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("learner_class", [MAML, FOMAML])
def test_adam_is_finite_where_a_gradient_is_exactly_zero(learner_class: type[MAML]) -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, WAYS))
    with torch.no_grad():
        network[0].bias[:4] = -100  # dead units
    learner = learner_class(network, inner_lr=INNER_LR, inner_steps=2, inner_rule=Adam())
    meta_gradient, *_ = learner.meta_gradient(classification(6))
    assert all(g.isfinite().all() for g in meta_gradient.values())
    assert all((g[:4] == 0).all() for name, g in meta_gradient.items() if name.startswith("0."))


def test_fomaml_with_adam_is_a_loop_of_torchs() -> None:
    network, batch = smooth(), classification(6)
    learner = FOMAML(network, inner_lr=INNER_LR, inner_steps=STEPS, inner_rule=Adam(0.9))
    mean = {name: torch.zeros_like(p) for name, p in trained(network).items()}
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        fast = copy.deepcopy(network)
        optimizer = torch.optim.Adam(fast.parameters(), INNER_LR)
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(fast(support_x), support_y).backward()
            optimizer.step()
        fast.zero_grad()
        F.cross_entropy(fast(query_x), query_y).backward()
        for name, p in fast.named_parameters():
            mean[name] += p.grad / T
    assert error(learner.meta_gradient(batch)[0], mean) <= EXACT
    fit(learner, [batch, batch])
    assert learner.inner_rule.start().step == 0  # every task of MAML and FOMAML begins with a fresh Adam


def test_sgd_is_the_default() -> None:
    network, batch = smooth(), classification(6)
    ours, *_ = MAML(network, inner_lr=INNER_LR, inner_steps=2, inner_rule=SGD()).meta_gradient(batch)
    assert error(ours, maml_loop(network, batch, 2)) <= EXACT
    assert isinstance(MAML(network).inner_rule, SGD)


@pytest.mark.parametrize("name", ["inner_rates", "inner_rule", "moments"])
def test_a_submodule_of_any_name_is_adapted_and_trained(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(6, 8))
            self.head = nn.Linear(8, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.softplus(self.get_submodule(name)(x)))

    network, batch = Named(), classification(6)
    learner = MAML(network, inner_lr=INNER_LR, inner_steps=2, inner_rule=MetaSGD())
    meta_gradient, *_ = learner.meta_gradient(batch)
    by_theta = {n: g for n, g in meta_gradient.items() if not n.startswith(".")}
    assert error(by_theta, maml_loop(network, batch, 2)) <= EXACT
    params = learner.eval().inner_update(batch.support_x[0], batch.support_y[0])
    expected = adapted_copy(network, batch.support_x[0], batch.support_y[0], 2, F.cross_entropy)
    assert error(params, trained(expected)) <= EXACT


def test_reptile_refuses_what_it_cannot_learn() -> None:
    with pytest.raises(InputError, match=r"inner_rule .* \['rates\."):
        Reptile(smooth(), inner_rule=MetaSGD())


@pytest.mark.parametrize(
    ("options", "said"), [({"beta1": 1.0}, "beta1 .* 1.0"), ({"beta2": -1}, "beta2 .* -1"), ({"eps": 0}, "eps .* 0")]
)
def test_adams_arguments_have_a_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Adam(**options)


class Forgetful(SGD):
    """A rule that does not keep its argument under its name."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.d = decay


def test_a_rule_that_a_checkpoint_could_not_describe_is_refused() -> None:
    with pytest.raises(InputError, match=r"inner_rule .*\bdecay\b"):
        MAML(smooth(), inner_rule=Forgetful(0.5))


@pytest.mark.parametrize("given", ["adam", MetaSGD, torch.optim.Adam, {"class_path": "no.such.Rule"}], ids=str)
def test_what_is_no_rule_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match=r"inner_rule .*(adam|MetaSGD|Adam|no\.such\.Rule)"):
        MAML(smooth(), inner_rule=given)


def test_loss_and_network_may_be_replaced() -> None:
    learner, batch = MAML(nn.Linear(6, 1), inner_steps=1), classification(6)
    batch = batch._replace(support_y=batch.support_x[..., :1], query_y=batch.query_x[..., :1])
    before = learner.meta_gradient(batch)[1]
    learner.loss = nn.L1Loss()
    assert not torch.allclose(learner.meta_gradient(batch)[1], before)


def test_a_rule_is_the_learners_own() -> None:
    rule = MetaSGD()
    first, second = (MAML(smooth(), inner_lr=lr, inner_rule=rule) for lr in (0.1, 0.2))
    assert [*rule.parameters()] == []
    assert {float(p.flatten()[0]) for p in first.inner_rule.parameters()} == {0.1}
    assert {float(p.flatten()[0]) for p in second.inner_rule.parameters()} == {0.2}


@pytest.mark.parametrize(
    ("algorithm", "make"),
    [(MAML, MetaSGD), (FOMAML, Momentum), (Reptile, lambda: Adam(0.25))],
    ids=["maml", "own", "reptile"],
)
def test_a_checkpoint_made_in_python_knows_its_rule(
    algorithm: Any, make: Callable[[], InnerRule], tmp_path: Path
) -> None:
    learner = algorithm(smooth(), inner_lr=INNER_LR, inner_steps=STEPS, inner_rule=make())
    fit_ = trainer(max_steps=2)
    fit_.fit(learner, torch.utils.data.DataLoader([classification(6)] * 2, batch_size=None))  # type: ignore[arg-type]
    fit_.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_learner(tmp_path / "a.ckpt", network=smooth())
    assert type(loaded.inner_rule) is type(learner.inner_rule)
    assert loaded.inner_rule.description() == learner.inner_rule.description()
    torch.testing.assert_close(loaded.state_dict(), learner.state_dict(), rtol=0, atol=0)


@pytest.mark.usefixtures("glyphs")
def test_a_rule_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float)
    options = ["--model.inner_rule", "Adam", "--model.inner_rule.beta1", "0.5"]
    for algorithm in ("MAML", "Reptile"):
        main(["fit", "--config", TINY, "--model", algorithm, *options, "--trainer.max_steps", "1"])
    checkpoints = sorted(Path("lightning_logs").glob("*/checkpoints/last.ckpt"))
    assert len(checkpoints) == 2
    for path in checkpoints:
        rule = load_learner(path).inner_rule
        assert isinstance(rule, Adam)
        assert rule.beta1 == 0.5
    said = fails(
        "fit", "--config", TINY, "--ckpt_path", str(RUN / "checkpoints/last.ckpt"), "--model.inner_rule", "SGD"
    )
    assert "the checkpoint must be of the inner_rule in use" in said


@pytest.mark.parametrize(
    ("algorithm", "options", "rule"),
    [
        (MAML, {"learn_inner_lr": True}, "MetaSGD"),
        (FOMAML, {"learn_inner_lr": True}, "MetaSGD"),
        (Reptile, {"inner_optimizer": "adam", "inner_beta1": 0.5}, "Adam"),
    ],
)
def test_options_of_version_0_1_are_translated_with_a_sentence(algorithm: Any, options: Any, rule: str) -> None:
    with pytest.warns(FutureWarning, match=rf"{next(iter(options))} is now --model.inner_rule {rule}") as caught:
        learner = algorithm(smooth(), **options)
    assert Path(caught[0].filename).name == Path(__file__).name
    assert ("beta1 0.5, in Python inner_rule=Adam(beta1=0.5)" in str(caught[0].message)) == (rule == "Adam")
    assert type(learner.inner_rule).__name__ == rule
    assert getattr(learner.inner_rule, "beta1", 0.5) == 0.5


@pytest.mark.filterwarnings("ignore:.*is now --model.inner_rule:FutureWarning")
def test_inner_rule_beats_the_options_of_version_0_1() -> None:
    assert isinstance(MAML(smooth(), learn_inner_lr=True, inner_rule=SGD()).inner_rule, SGD)


@pytest.mark.usefixtures("double")
def test_recomputing_has_the_precision_of_the_graph() -> None:
    torch.set_default_dtype(torch.float)
    network, batch = smooth(), classification(6)
    with torch.autocast("cpu", torch.bfloat16):
        kept, recomputed = (
            MAML(network, inner_lr=INNER_LR, inner_steps=2, recompute_inner_steps=recompute).meta_gradient(batch)[0]
            for recompute in (False, True)
        )
    for name, g in kept.items():
        assert torch.equal(recomputed[name], g)
