"""Which parameters adapt, which learn, and at which rates: against references that share no code with the package.

The references of MAML differentiate a literal loop, or difference it; those of the others are torch.optim on copies.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import trainer
from references import (
    EXACT,
    INNER_LR,
    QUERY,
    SUPPORT,
    TASKS_FROM_A_LIST,
    WAYS,
    Params,
    Recurrent,
    T,
    classification,
    error,
    fit,
    flat,
    maml_loop,
    mlp,
    reptile_loop,
    sequences,
    smooth_conv4,
    trained,
    values_of,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader

from meta_lightning import FOMAML, MAML, MLP, SGD, MetaLearner, Reptile, Sinusoid, TaskBatch
from meta_lightning.checks import InputError

pytestmark = TASKS_FROM_A_LIST
STEPS = 3
ANIL, BOIL = ["features.*"], ["head.*"]
PASSES = pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"recompute_inner_steps": True}, id="recompute"),
        pytest.param({"tasks_per_pass": 2}, id="passes"),
    ],
)


class SmoothConv4(nn.Module):
    """Conv4 with finite differences, in the two parts that ANIL and BOIL know."""

    def __init__(self) -> None:
        super().__init__()
        *features, self.head = smooth_conv4()
        self.features = nn.Sequential(*features)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def rates_of(network: nn.Module, frozen: str) -> Params:
    """A rate a number: those of the frozen part are 0, the others are all different."""
    return {
        name: torch.zeros_like(p) if name.startswith(frozen) else INNER_LR * (0.5 + torch.rand_like(p))
        for name, p in network.named_parameters()
    }


def objective(network: nn.Module, batch: TaskBatch, theta: Params, rates: Params, first_order: bool = False) -> Tensor:
    """``mean_i L_query,i(θ'_i)`` after steps of ``θ' ← θ' − α ⊙ g``."""
    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        params = theta
        for _ in range(STEPS):
            loss = F.cross_entropy(functional_call(network, params, (support_x,)), support_y)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            grads = [g.detach() if first_order else g for g in grads]
            params = {name: p - rates[name] * g for (name, p), g in zip(params.items(), grads, strict=True)}
        losses.append(F.cross_entropy(functional_call(network, params, (query_x,)), query_y))
    return torch.stack(losses).mean()


def reference(network: nn.Module, batch: TaskBatch, rates: Params, first_order: bool) -> tuple[Params, Params]:
    """The objective's gradients by θ and by the rates."""
    theta = {name: p.detach().requires_grad_() for name, p in network.named_parameters()}
    rates = {name: rate.detach().requires_grad_() for name, rate in rates.items()}
    value = objective(network, batch, theta, rates, first_order)
    grads = torch.autograd.grad(value, [*theta.values(), *rates.values()])
    return dict(zip(theta, grads, strict=False)), dict(zip(rates, grads[len(theta) :], strict=True))


# ------------------------------------------------------------------------------------------------------------- frozen


@PASSES
@pytest.mark.parametrize("frozen", [ANIL, BOIL], ids=["anil", "boil"])
def test_maml_of_a_frozen_part_agrees_with_finite_differences(frozen: list[str], options: dict[str, Any]) -> None:
    network, batch = SmoothConv4(), classification(1, 16, 16)
    learner = MAML(network, inner_lr=INNER_LR, inner_steps=STEPS, inner_freeze=frozen, **options)
    meta_gradient, *_ = learner.meta_gradient(batch)
    assert meta_gradient.keys() == trained(network).keys()

    def value(sign: int, direction: Params) -> float:
        moved = copy.deepcopy(network)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p += sign * 3e-6 * direction[name]
        losses = []
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            fast = copy.deepcopy(moved)
            part = fast.head if frozen == ANIL else fast.features
            optimizer = torch.optim.SGD(part.parameters(), INNER_LR)
            for _ in range(STEPS):
                optimizer.zero_grad()
                F.cross_entropy(fast(support_x), support_y).backward()
                optimizer.step()
            losses.append(F.cross_entropy(fast(query_x), query_y).item())
        return sum(losses) / T

    for part in ("features", "head", ""):
        direction = {n: torch.randn_like(p) * n.startswith(part) for n, p in network.named_parameters()}
        slope = (value(1, direction) - value(-1, direction)) / 6e-6
        assert slope == pytest.approx((flat(meta_gradient) @ flat(direction)).item(), rel=1e-6, abs=0)


@pytest.mark.parametrize("learner_class", [MAML, FOMAML])
@pytest.mark.parametrize("frozen", [ANIL, BOIL], ids=["anil", "boil"])
def test_a_frozen_part_agrees_with_a_loop(learner_class: type[MAML], frozen: list[str]) -> None:
    network, batch = mlp(), classification(6)
    rates = {n: torch.full_like(r, INNER_LR) * (r != 0) for n, r in rates_of(network, frozen[0][:4]).items()}
    learner = learner_class(network, inner_lr=INNER_LR, inner_steps=STEPS, inner_freeze=frozen)
    expected, _ = reference(network, batch, rates, first_order=learner_class is FOMAML)
    assert error(learner.meta_gradient(batch)[0], expected) <= EXACT


@pytest.mark.parametrize("learner_class", [MAML, FOMAML])
def test_anil_agrees_with_learn2learn(learner_class: type[MAML]) -> None:
    algorithms = pytest.importorskip("learn2learn.algorithms")  # takes seconds to import

    network, batch = SmoothConv4(), classification(1, 16, 16)
    learner = learner_class(network, inner_lr=INNER_LR, inner_steps=STEPS, inner_freeze=ANIL)
    meta_gradient, *_ = learner.meta_gradient(batch)
    theirs = copy.deepcopy(network)
    head = algorithms.MAML(theirs.head, lr=INNER_LR, first_order=learner_class is FOMAML)
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        fast = head.clone()
        for _ in range(STEPS):
            features = theirs.features(support_x)
            fast.adapt(F.cross_entropy(fast(features.detach() if learner_class is FOMAML else features), support_y))
        (F.cross_entropy(fast(theirs.features(query_x)), query_y) / T).backward()
    assert error(meta_gradient, {name: p.grad for name, p in theirs.named_parameters()}) <= EXACT


@pytest.mark.parametrize("inner", ["sgd", "adam"])
def test_reptile_moves_what_is_adapted_only(inner: Any) -> None:
    network, batches = mlp(), [classification(6) for _ in range(3)]
    before = values_of(network)
    alone = copy.deepcopy(network)
    alone.features.requires_grad_(False)
    make = torch.optim.SGD if inner == "sgd" else lambda params, lr: torch.optim.Adam(params, lr, betas=(0.0, 0.999))
    expected = reptile_loop(alone, batches, STEPS, 0.2, lambda params: make(params, 0.01))
    learner = Reptile(network, inner_lr=0.01, inner_steps=STEPS, outer_lr=0.2, inner_optimizer=inner, inner_freeze=ANIL)
    after = fit(learner, batches)
    assert error(after, expected) <= EXACT
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("features"))


@pytest.mark.parametrize("learner_class", [MAML, FOMAML, Reptile])
@pytest.mark.parametrize("inner", [[], ["features.*"]], ids=["adapted", "frozen-in-both"])
def test_the_outer_loop_leaves_frozen_parameters(learner_class: Any, inner: list[str]) -> None:
    network, batches = mlp(), [classification(6) for _ in range(3)]
    before = values_of(network)
    learner = learner_class(network, inner_steps=2, outer_freeze=["features.*"], inner_freeze=inner)
    after = fit(learner, batches)
    assert all(torch.equal(after[name], before[name]) == name.startswith("features") for name in before)
    adapted = learner.inner_update(batches[0].support_x[0], batches[0].support_y[0])
    moved = {name for name, p in adapted.items() if not torch.equal(p, after[name])}
    assert moved == {name for name in before if not (inner and name.startswith("features"))}


def test_patterns_that_match_nothing_or_everything_are_refused() -> None:
    names = "features.1.weight, features.1.bias, head.weight, head.bias"
    with pytest.raises(ValueError, match=rf"inner_freeze .*{names}.*'body\.\*'"):
        MAML(mlp(), inner_freeze=["head.*", "body.*"])
    with pytest.raises(ValueError, match=rf"outer_freeze .*{names}.*'Head'"):
        Reptile(mlp(), outer_freeze=["Head"])
    with pytest.raises(ValueError, match=r"inner_freeze .* all\b"):
        FOMAML(mlp(), inner_freeze=["*"])


# -------------------------------------------------------------------------------------------------------- learnt rates


def with_rates(learner: MAML, rates: Params) -> MAML:
    """The learner with these rates, in the order of its own."""
    with torch.no_grad():
        for name, rate in learner.inner_rule.named_parameters():
            rate.copy_(rates[name.removeprefix("rates.").replace("/", ".")])
    return learner


def split(meta_gradient: Params) -> tuple[Params, Params]:
    """The parts of θ and of the rates, by the names of θ."""
    theta = {name: g for name, g in meta_gradient.items() if not name.startswith(".")}
    rates = {name: meta_gradient.get(".rule.rates." + name.replace(".", "/")) for name in theta}
    assert len(meta_gradient) == len(theta) + sum(g is not None for g in rates.values())
    return theta, {name: g for name, g in rates.items() if g is not None}


@PASSES
@pytest.mark.parametrize("learner_class", [MAML, FOMAML])
@pytest.mark.parametrize("frozen", [[], ANIL], ids=["all", "anil"])
def test_gradients_by_the_rates_agree_with_a_loop(
    learner_class: type[MAML], frozen: list[str], options: dict[str, Any]
) -> None:
    network, batch = SmoothConv4(), classification(1, 16, 16)
    rates = rates_of(network, "features" if frozen else "nothing")
    learner = learner_class(network, inner_steps=STEPS, learn_inner_lr=True, inner_freeze=frozen, **options)
    by_theta, by_rates = split(with_rates(learner, rates).meta_gradient(batch)[0])
    expected_theta, expected_rates = reference(network, batch, rates, first_order=learner_class is FOMAML)
    assert error(by_theta, expected_theta) <= EXACT
    assert error(by_rates, {name: expected_rates[name] for name in by_rates}) <= EXACT
    assert by_rates.keys() == {name for name in rates if not (frozen and name.startswith("features"))}


def test_gradients_by_the_rates_agree_with_finite_differences() -> None:
    network, batch = SmoothConv4(), classification(1, 16, 16)
    rates = rates_of(network, "nothing")
    learner = with_rates(MAML(network, inner_steps=STEPS, learn_inner_lr=True), rates)
    by_theta, by_rates = split(learner.meta_gradient(batch)[0])

    def value(sign: int, along_theta: Params, along_rates: Params) -> float:
        losses = []
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            fast = copy.deepcopy(network)
            with torch.no_grad():
                for name, p in fast.named_parameters():
                    p += sign * 3e-6 * along_theta[name]
            for _ in range(STEPS):
                fast.zero_grad()
                F.cross_entropy(fast(support_x), support_y).backward()
                with torch.no_grad():
                    for name, p in fast.named_parameters():
                        p -= (rates[name] + sign * 3e-6 * along_rates[name]) * p.grad
            losses.append(F.cross_entropy(fast(query_x), query_y).item())
        return sum(losses) / T

    for of_theta, of_rates in ((0, 1), (1, 0), (1, 1)):
        a, b = ({n: c * torch.randn_like(p) for n, p in rates.items()} for c in (of_theta, of_rates))
        slope = (value(1, a, b) - value(-1, a, b)) / 6e-6
        along = flat(by_theta) @ flat(a) + flat(by_rates) @ flat(b)
        assert slope == pytest.approx(along.item(), rel=1e-6, abs=0)


@pytest.mark.parametrize("learner_class", [MAML, FOMAML])
def test_gradients_by_the_rates_agree_with_learn2learn(learner_class: type[MAML]) -> None:
    algorithms = pytest.importorskip("learn2learn.algorithms")

    network, batch = mlp(), classification(6)
    learner = learner_class(network, inner_lr=INNER_LR, inner_steps=STEPS, learn_inner_lr=True)
    by_theta, by_rates = split(learner.meta_gradient(batch)[0])
    theirs = algorithms.MetaSGD(copy.deepcopy(network), lr=INNER_LR, first_order=learner_class is FOMAML)
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        fast = theirs.clone()
        for _ in range(STEPS):
            fast.adapt(F.cross_entropy(fast(support_x), support_y))
        (F.cross_entropy(fast(query_x), query_y) / T).backward()
    assert error(by_theta, {name: p.grad for name, p in theirs.module.named_parameters()}) <= EXACT
    assert error(by_rates, dict(zip(by_theta, (p.grad for p in theirs.lrs), strict=True))) <= EXACT


@pytest.mark.parametrize("learner_class", [MAML, FOMAML])
@pytest.mark.parametrize("frozen", [[], BOIL], ids=["all", "boil"])
def test_rates_are_learnt_kept_and_used(learner_class: type[MAML], frozen: list[str], tmp_path: Path) -> None:
    network, batches = mlp(), [classification(6) for _ in range(4)]
    options: dict[str, Any] = {"inner_lr": INNER_LR, "inner_steps": 2, "inner_freeze": frozen, "learn_inner_lr": True}
    learner = learner_class(network, **options, outer_lr=0.1)
    (group,) = learner.configure_optimizers().param_groups
    assert {id(p) for p in learner.parameters()} == {id(p) for p in group["params"]}
    fit_ = trainer(max_steps=4)
    fit_.fit(learner, DataLoader(batches, batch_size=None))
    rates = {
        name.removeprefix("rates.").replace("/", "."): rate.detach()
        for name, rate in learner.inner_rule.named_parameters()
    }
    assert all((rate != INNER_LR).any() for rate in rates.values())

    fit_.save_checkpoint(tmp_path / "a.ckpt")
    loaded = learner_class.load_from_checkpoint(tmp_path / "a.ckpt", network=mlp()).eval()
    fast, (x, y, query_x, _) = copy.deepcopy(network), batches[0]
    for _ in range(2):
        fast.zero_grad()
        F.cross_entropy(fast(x[0]), y[0]).backward()
        with torch.no_grad():
            for name, p in fast.named_parameters():
                p -= rates.get(name, 0) * p.grad
    adapted = loaded.inner_update(x[0], y[0])
    assert error(adapted, values_of(fast)) <= EXACT
    torch.testing.assert_close(loaded.forward_with_weights(query_x[0], adapted), fast(query_x[0]))
    with pytest.raises(ValueError, match=r"checkpoint .*inner_rule"):
        learner_class.load_from_checkpoint(tmp_path / "a.ckpt", network=mlp(), inner_rule=SGD())


def test_rates_begin_as_the_plain_inner_rate() -> None:
    network, batch = mlp(), classification(6)
    learner = MAML(network, inner_lr=INNER_LR, inner_steps=STEPS, learn_inner_lr=True)
    assert error(split(learner.meta_gradient(batch)[0])[0], maml_loop(network, batch, STEPS)) <= EXACT


# ----------------------------------------------------------------------------------------------------- no gradient


@pytest.mark.parametrize("algorithm", [MAML, FOMAML, Reptile])
def test_parameters_without_a_gradient_are_named_once(algorithm: type[MetaLearner], sinusoid: Sinusoid) -> None:
    torch.set_default_dtype(torch.float)

    class Forgotten(MLP):
        def __init__(self) -> None:
            super().__init__(hidden=[8])
            self.old_head = nn.Linear(8, 1)

    def named(network: nn.Module) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(max_steps=3, limit_val_batches=0).fit(algorithm(network=network), sinusoid)  # type: ignore[call-arg]
        return [str(w.message) for w in caught if "does not depend" in str(w.message)]

    (said,) = named(Forgotten())
    assert said.endswith(": old_head.weight, old_head.bias")
    assert not named(MLP(hidden=[8]))


def test_looking_for_them_leaves_the_random_state_alone() -> None:
    learner = MAML(nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, WAYS)))
    batch = classification(6)
    before = torch.get_rng_state()
    assert learner.without_gradient(batch) == []
    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------------------ recurrent


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_in_single_precision_have_their_second_order(kind: type[nn.RNNBase]) -> None:
    """In float32 torch takes other kernels (oneDNN's) than in the float64 of the other tests."""
    network, batch = Recurrent(), sequences()
    network.lstm = kind(3, 4, batch_first=True)
    expected = maml_loop(network, batch, STEPS)
    single = TaskBatch(*(part.float() if part.is_floating_point() else part for part in batch))
    learner = MAML(network.float(), inner_lr=INNER_LR, inner_steps=STEPS)
    with pytest.warns(UserWarning, match="Tasks run in a loop"):
        meta_gradient, *_ = learner.meta_gradient(single)
    assert error({name: g.double() for name, g in meta_gradient.items()}, expected) <= 1e-5


@pytest.mark.parametrize(("recurrent", "seen"), [(True, {False}), (False, {True})])
def test_recurrent_layers_go_without_cudnn(recurrent: bool, seen: set[bool]) -> None:
    """Whose kernels for them have no second derivative; other networks keep it."""
    enabled = set()

    class Watched(Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            enabled.add(torch.backends.cudnn.enabled)
            return super().forward(x) if recurrent else self.head(x.mean(1))

    network = Watched()
    network.head = nn.Linear(4 if recurrent else 3, WAYS)
    if not recurrent:
        del network.lstm
    learner = FOMAML(network)
    learner.task_network.loops_over_tasks = True
    learner.meta_gradient(sequences(support=SUPPORT, query=QUERY))
    learner.eval().inner_update(*(part[0] for part in sequences()[:2]))
    assert enabled == seen
    assert torch.backends.cudnn.enabled


class WritesIntoItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Parameter(torch.tensor([0.3])), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x[:, :1] = self.first
        y: Tensor = self.head(x)
        return y


@pytest.mark.usefixtures("double")
def test_a_network_may_write_into_its_input_when_tasks_loop() -> None:
    torch.manual_seed(0)
    learner = MAML(WritesIntoItsInput(), inner_lr=0.1, inner_steps=1)
    batch = TaskBatch(torch.rand(3, 5, 4), torch.rand(3, 5, 1), torch.rand(3, 6, 4), torch.rand(3, 6, 1))
    gradients = []
    for loops in (False, True):
        learner.task_network.loops_over_tasks = loops
        copies = TaskBatch(*(part.clone() for part in batch))
        gradients.append(learner.meta_gradient(copies)[0])
    for name, g in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], g)


def test_a_network_with_one_number_per_sample_is_no_classifier() -> None:
    network = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    batch = TaskBatch(
        torch.rand(3, 5, 4), torch.arange(5).repeat(3, 1), torch.rand(3, 5, 4), torch.arange(5).repeat(3, 1)
    )
    with pytest.raises(InputError, match=r"network .*at least 5, got 0"):
        MAML(network).meta_gradient(batch)
