"""What networks do besides calling layers: as in a literal loop over tasks, or refused by name."""

import copy
import functools
import random
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reference import ALGORITHMS, EXACT, RATE, STEPS, WAYS, Params, ours, update, values, worst
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from meta_lightning import FOMAML, MAML, TaskBatch, train_maml
from meta_lightning.checks import InputError
from meta_lightning.inner.traits import Traits

pytestmark = [pytest.mark.usefixtures("double"), pytest.mark.filterwarnings("ignore")]
Network = Callable[[], nn.Module]
LOSS = nn.CrossEntropyLoss()
RECORDED: dict[str, Any] = {"compile_passes": "record"}


class Net(nn.Module):
    """Two layers, of which subclasses change the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).tanh())


def batch(tokens: bool = False, seed: int = 0) -> TaskBatch:
    rng = torch.Generator().manual_seed(seed)

    def part() -> tuple[Tensor, Tensor]:
        x = torch.randint(5, (3, 4, 6), generator=rng) if tokens else torch.randn(3, 4, 6, generator=rng)
        return x, torch.arange(2).repeat(3, 2)

    return TaskBatch(*part(), *part())


def made(network: Network) -> nn.Module:
    torch.manual_seed(0)
    return network()


def require_as_in_a_loop(
    network: nn.Module, like: nn.Module | None = None, tokens: bool = False, once: bool = False
) -> None:
    """All algorithms and ways equal the literal loop of a network that computes the same, by default itself."""
    like, tasks = network if like is None else like, batch(tokens)
    wrong = {}
    algorithms = [algorithm for algorithm in ALGORITHMS if algorithm != "MAML" or not once]
    expected = {algorithm: update(algorithm, like, tasks, STEPS, RATE, LOSS) for algorithm in algorithms}
    for algorithm, options in [*WAYS, ("FOMAML", RECORDED)]:  # recording takes seconds
        if algorithm in expected:
            error = worst(ours(algorithm, network, tasks, **options), expected[algorithm])
            if not error <= EXACT:
                wrong[algorithm, *options] = error
    assert not wrong, wrong


# ------------------------------------------------------------------------------------------ state left by forward


class Features(Net):
    """Keeps an activation, as feature extractors do."""

    def forward(self, x: Tensor) -> Any:
        self.features = self.body(x).tanh()
        return self.head(self.features)


class FeaturesInAList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        self.kept = [self.body(x).tanh()]
        return self.head(self.kept[0])


class FeaturesByAHook(Net):
    """The hook refers to the network by its closure."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.zeros(())
        self.body.register_forward_hook(lambda module, args, output: setattr(self, "features", output))

    def forward(self, x: Tensor) -> Any:
        self.body(x)
        return self.head(self.features.tanh())


@pytest.mark.parametrize("network", [Features, FeaturesInAList, FeaturesByAHook])
def test_activations_left_on_modules(network: Network) -> None:
    net = made(network)
    require_as_in_a_loop(net, like=made(Net))
    learner = MAML(net, inner_lr=RATE, inner_steps=STEPS)
    learner.meta_gradient(batch())
    copy.deepcopy(learner)
    x, y = batch().support_x[0], batch().support_y[0]
    predictor = learner.adapt(x.numpy(), y.numpy(), steps=STEPS)
    plain = FOMAML(made(Net), inner_lr=RATE, inner_steps=STEPS).adapt(x.numpy(), y.numpy(), steps=STEPS)
    torch.testing.assert_close(predictor(x), plain(x))
    net(x)  # the user's own forward, which leaves activations with a graph
    MAML(net)


class Writes(Net):
    """Writes what no output depends on, in many ways."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.n, self.size, self.cos = what, 0, None, None
        self.acts: dict[str, Any] = {}
        self.listed: list[Tensor] = []
        self.register_buffer("mask", None)
        self.register_buffer("best", torch.tensor(float("nan")))
        self.holds: list[Any] = [float("nan")]
        self.holds.append(self.holds)

    def forward(self, x: Tensor) -> Any:
        z = self.body(x).tanh()
        if self.what == "sizes":
            self.n, self.size = x.shape[0], x.shape  # type: ignore[assignment]
        elif self.what == "an activation beside a number":
            self.acts = {"z": z, "n": len(x)}
        elif self.what == "into a dict":
            self.acts["z"] = z
        elif self.what == "into a list":
            self.listed.clear()
            self.listed.append(z)
        elif self.what == "a cache":
            self.cos = torch.arange(6).cos() if self.cos is None else self.cos
            z = z * self.cos
        elif self.what == "a lazy buffer":
            if self.mask is None:
                self.mask = torch.ones(6)
            z = z * self.mask
        return self.head(z)


WRITTEN = [
    "sizes",
    "an activation beside a number",
    "into a dict",
    "into a list",
    "a cache",
    "a lazy buffer",
    "nothing",
]


@pytest.mark.parametrize("what", WRITTEN)
def test_what_no_output_depends_on_lets_tasks_run_together(what: str) -> None:
    network = made(lambda: Writes(what))
    learner = MAML(network, inner_lr=RATE, inner_steps=STEPS, recompute_inner_steps=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = learner.meta_gradient(batch())[0]
    assert not learner.task_network.loops_over_tasks
    assert worst(got, update("MAML", made(lambda: Writes(what)), batch(), STEPS, RATE, LOSS)) <= EXACT
    copy.deepcopy(learner)


class OfPixels(nn.Module):
    """Takes samples in [0, 1] only."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.embedding((x * 255).long()).mean(1))


def test_samples_stay_in_their_range() -> None:
    tasks = TaskBatch(*(part.sigmoid() if part.is_floating_point() else part for part in batch()))
    tasks.support_x[0, 0, 0] = 1.0
    ours("MAML", made(OfPixels), tasks)


@pytest.mark.parametrize("value", [1.5, np.float64(1.5), np.array(1.5), {"t": 1.5}, torch.ones(2)])
def test_values_that_callbacks_change_do_not_examine_anew(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = FOMAML(made(Net), inner_lr=RATE, inner_steps=STEPS)
    examined, of = [], Traits.of
    monkeypatch.setattr(Traits, "of", lambda *args, **options: (examined.append(1), of(*args, **options))[1])
    for step in range(3):
        new = {"t": value["t"] + step} if isinstance(value, dict) else value + step
        learner.network.temperature = new  # type: ignore[union-attr,assignment]
        learner.meta_gradient(batch())
    assert len(examined) == 1


def test_a_network_must_return_tensors() -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), 1

    with pytest.raises(
        InputError, match=r"network must return tensors, or something with logits; .*output .*got tuple"
    ):
        ours("FOMAML", made(Two), batch())


class Average(Net):
    """Normalises by a moving average, a buffer that each forward assigns or changes in place."""

    def __init__(self, kind: str = "assigned") -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("mean", torch.zeros(6))
        self.count = 0
        self.seen: list[Any] = []
        self.holds: list[Any] = []
        self.holds.append(self.holds)  # a container that holds itself
        self.holder = SimpleNamespace(count=0.0)
        self.first: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        z = self.body(x)
        if self.kind == "assigned":
            self.mean = 0.9 * self.get_buffer("mean") + 0.1 * z.detach().mean(0)
        elif self.kind == "in place":
            self.get_buffer("mean").add_(0.1)
        elif self.kind == "a number":
            self.count += 1
        elif self.kind == "a list":
            self.seen.append(1)
        elif self.kind == "an object":
            self.holder.count += 0.1
        elif self.kind == "none at first":
            self.first = z.detach().mean(0) if self.first is None else self.first
        count = self.count + len(self.seen) + self.holder.count + (0.0 if self.first is None else self.first)
        return self.head((z - self.get_buffer("mean") - 0.1 * count).tanh())


def in_turn(network: nn.Module, tasks: TaskBatch, second_order: bool) -> Params:
    """The meta-gradient of a network that all tasks use one after another, each with its own parameters."""
    theta = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    losses = []
    for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
        params = theta
        for _ in range(STEPS):
            loss = LOSS(functional_call(network, params, (support_x,)), support_y)
            grads = torch.autograd.grad(loss, [*params.values()], create_graph=second_order)
            params = {name: p - RATE * g for (name, p), g in zip(params.items(), grads, strict=True)}
        losses.append(LOSS(functional_call(network, params, (query_x,)), query_y))
    grads = torch.autograd.grad(torch.stack(losses).mean(), [*theta.values()])
    return dict(zip(theta, grads, strict=True))


@pytest.mark.parametrize("kind", ["assigned", "in place", "a number", "a list", "an object", "none at first"])
def test_state_goes_from_forward_to_forward_as_with_one_network_for_all_tasks(kind: str) -> None:
    network = made(lambda: Average(kind))
    for algorithm in ("MAML", "FOMAML"):
        for options in ({}, RECORDED):
            theirs = copy.deepcopy(network)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                got = ours(algorithm, copy.deepcopy(network), batch(), **options)
            assert worst(got, in_turn(theirs, batch(), algorithm == "MAML")) <= EXACT
            said = [str(w.message) for w in caught if "one after another" in str(w.message)]
            assert len(said) == 1
            places = {"a number": "count", "a list": "seen", "an object": "holder", "none at first": "first"}
            assert places.get(kind, "mean") in said[0]


def test_the_users_network_gets_the_state() -> None:
    network = made(Average)
    theirs = copy.deepcopy(network)
    in_turn(theirs, batch(), True)
    loader = DataLoader([batch()], batch_size=None)  # type: ignore[arg-type]
    trained, learner, _ = train_maml(network, loader, inner_lr=RATE, inner_steps=STEPS)
    assert trained is network
    for state in (network, learner.network):
        torch.testing.assert_close(state.get_buffer("mean"), theirs.get_buffer("mean"))  # type: ignore[union-attr,operator]


class CountingLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * LOSS(prediction, target)


def test_state_of_a_loss() -> None:
    loss = CountingLoss()
    with pytest.warns(UserWarning, match="one after another, since the loss changes calls"):
        ours("FOMAML", made(Net), batch(), loss=loss)
    assert loss.calls == T_TASKS * (STEPS + 1)


T_TASKS = 3


def test_recomputing_would_change_state_twice() -> None:
    with pytest.raises(InputError, match=r"recompute_inner_steps .*changes mean"):
        ours("MAML", made(Average), batch(), recompute_inner_steps=True)


def test_adapting_leaves_the_state_of_the_learner() -> None:
    learner = FOMAML(made(Average), inner_lr=RATE, inner_steps=STEPS)
    x, y = batch().support_x[0], batch().support_y[0]
    first, second = (learner.adapt(x.numpy(), y.numpy())(x) for _ in range(2))
    assert torch.equal(first, second)
    assert not learner.network.get_buffer("mean").any()  # type: ignore[union-attr,operator]


class Switched(Net):
    """Changes what it does when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.count = False, 0

    def forward(self, x: Tensor) -> Any:
        self.count += self.counts
        return self.head(self.body(x).tanh() * (1 + self.count))


def test_a_network_that_changes_is_examined_again() -> None:
    learner = FOMAML(made(Switched), inner_lr=RATE, inner_steps=STEPS)
    learner.meta_gradient(batch())
    theirs = copy.deepcopy(learner.network)
    theirs.counts = learner.network.counts = True  # type: ignore[union-attr,assignment]
    assert worst(learner.meta_gradient(batch())[0], in_turn(theirs, batch(), False)) <= EXACT  # type: ignore[arg-type]


class Random(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).tanh() * random.random())


def test_random_numbers_of_python_are_drawn_for_each_task() -> None:
    with pytest.warns(UserWarning, match="in a loop, since the network draws random numbers of Python or NumPy"):
        ours("FOMAML", made(Random), batch())


# ---------------------------------------------------------------------------------------------- what vmap hides


def with_backward_hook(kind: str) -> nn.Module:
    network = Net()
    if kind == "module":
        network.body.register_full_backward_hook(
            lambda module, inputs, outputs: tuple(0.5 * g for g in inputs if g is not None) or None
        )
        network.head.register_full_backward_hook(lambda module, inputs, outputs: (0.5 * inputs[0],))
    if kind == "before":
        network.head.register_full_backward_pre_hook(lambda module, outputs: (0.5 * outputs[0],))
    return network


class TensorHook(Net):
    def forward(self, x: Tensor) -> Any:
        z = self.body(x).tanh()
        if z.requires_grad:
            z.register_hook(lambda g: 0.5 * g)
        return self.head(z)


def test_hooks_on_tensors_are_called() -> None:
    require_as_in_a_loop(made(TensorHook))
    hooked, plain = (ours("FOMAML", made(network), batch()) for network in (TensorHook, Net))
    assert worst(hooked, plain) > 0.01


@pytest.mark.parametrize("kind", ["module", "before"])
def test_backward_hooks_are_called(kind: str) -> None:
    def hooked() -> nn.Module:
        return with_backward_hook(kind)

    with pytest.warns(UserWarning, match="in a loop, since the network has backward hooks"):
        got = ours("FOMAML", made(hooked), batch())
    assert worst(got, ours("FOMAML", made(Net), batch())) > 0.01
    require_as_in_a_loop(made(hooked))


def test_a_backward_hook_that_comes_later_is_called() -> None:
    learner = FOMAML(made(Net), inner_lr=RATE, inner_steps=STEPS)
    before = learner.meta_gradient(batch())[0]
    handle = learner.network.head.register_full_backward_hook(lambda module, inputs, outputs: (0 * inputs[0],))  # type: ignore[union-attr,operator]
    learner.meta_gradient(batch())
    assert float(learner.meta_gradient(batch())[0]["body.weight"].abs().max()) == 0
    handle.remove()
    assert worst(learner.meta_gradient(batch())[0], before) <= EXACT


def test_hooks_on_parameters_are_told_what_they_see() -> None:
    network = made(Net)
    network.get_parameter("body.weight").register_hook(lambda g: 0.5 * g)
    with pytest.warns(UserWarning, match="Hooks on parameters see the meta-gradient only: body.weight"):
        ours("FOMAML", network, batch())


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Any:
        def body(x: Tensor) -> Any:
            return self.body(x).tanh()

        return self.head(checkpoint(body, x, use_reentrant=False))


class CheckpointedLayer(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(checkpoint(self.body, x, use_reentrant=False).tanh())  # type: ignore[union-attr]


class CheckpointedFunction(Net):
    """Recomputes with a parameter, not by a module."""

    def forward(self, x: Tensor) -> Any:
        return self.head(
            checkpoint(lambda x: F.linear(x, self.body.weight, self.body.bias).tanh(), x, use_reentrant=False)
        )


class Reentrant(Net):
    def forward(self, x: Tensor) -> Any:
        x = x.requires_grad_() if x.is_leaf else x
        return self.head(checkpoint(self.body, x, use_reentrant=True).tanh())  # type: ignore[union-attr]


class Around(nn.Module):
    """A layer, checkpointed or not."""

    def __init__(self, layer: nn.Module, checkpointed: bool) -> None:
        super().__init__()
        self.layer, self.head, self.checkpointed = layer, nn.LazyLinear(2), checkpointed

    def forward(self, x: Tensor) -> Any:
        y = checkpoint(self.layer, x, use_reentrant=False) if self.checkpointed else self.layer(x)
        return self.head(y.flatten(1))


@pytest.mark.parametrize("kind", ["attention", "weight norm", "padding"])
def test_checkpointing_around_what_is_replaced(kind: str) -> None:
    def network(checkpointed: bool) -> nn.Module:
        if kind == "attention":
            encoder = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)
            net: nn.Module = Around(nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 6), encoder), checkpointed)
        elif kind == "weight norm":
            net = Around(parametrizations.weight_norm(nn.Linear(6, 6)), checkpointed)
        else:
            net = Around(nn.Embedding(5, 3, padding_idx=0), checkpointed)
        net(batch(tokens=kind == "padding").support_x[0])
        return net

    tasks = batch(tokens=kind == "padding")
    if kind != "attention":  # the replacements are not in force in backward
        with pytest.raises(InputError, match="network must be differentiable: weight_norm and embeddings with padding"):
            ours("FOMAML", made(lambda: network(True)), tasks)
        return
    for algorithm in ("MAML", "FOMAML"):
        got, plain = (ours(algorithm, made(lambda c=c: network(c)), tasks) for c in (True, False))  # type: ignore[misc]
        assert worst(got, plain) <= EXACT
    x, y = tasks.support_x[0].numpy(), tasks.support_y[0].numpy()
    FOMAML(made(lambda: network(True)), inner_lr=RATE).adapt(x, y)


@pytest.mark.parametrize("network", [Checkpointed, CheckpointedLayer, CheckpointedFunction])
def test_activation_checkpointing(network: Network) -> None:
    require_as_in_a_loop(made(network), like=made(Net))


def test_reentrant_checkpointing_is_refused() -> None:
    with pytest.raises(InputError, match=r"by torch.autograd.grad too, got .* body.weight.*use_reentrant"):
        ours("FOMAML", made(Reentrant), batch())


class Embedded(nn.Module):
    """Embeds tokens by a function or a module, with the options of either."""

    def __init__(self, functional: bool, **options: Any) -> None:
        super().__init__()
        self.functional, self.options = functional, options
        self.embedding = nn.Embedding(5, 3, **({} if functional else options))
        self.head = nn.Linear(18, 2)

    def forward(self, x: Tensor) -> Any:
        embedded = F.embedding(x, self.embedding.weight, **self.options) if self.functional else self.embedding(x)
        return self.head(embedded.flatten(1).tanh())


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"padding_idx": -1}, {"scale_grad_by_freq": True}])
def test_embeddings(functional: bool, options: dict[str, Any]) -> None:
    if functional and "scale_grad_by_freq" in options:
        options = options | {"padding_idx": 1}
    # torch has no second derivative of counts
    once = "scale_grad_by_freq" in options
    require_as_in_a_loop(made(lambda: Embedded(functional, **options)), tokens=True, once=once)


@pytest.mark.parametrize("functional", [True, False])
def test_sparse_embeddings(functional: bool) -> None:
    dense = made(lambda: Embedded(functional))
    require_as_in_a_loop(made(lambda: Embedded(functional, sparse=True)), like=dense, tokens=True)


# ------------------------------------------------------------------------------------------- second derivatives


class WeightNorm(nn.Module):
    """``parametrizations.weight_norm`` with plain operations; parameters are named alike."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.layer(x).tanh())


class ByHand(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.parametrizations = nn.ModuleDict({"weight": nn.Module()})
        given = layer.parametrizations["weight"]
        for name in ("original0", "original1"):
            setattr(self.parametrizations["weight"], name, nn.Parameter(getattr(given, name).detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        g, v = self.parametrizations["weight"].original0, self.parametrizations["weight"].original1
        return F.linear(x, g * v / v.square().sum(1, keepdim=True).sqrt(), self.bias)  # type: ignore[operator,union-attr]


def test_weight_norm_has_the_right_second_derivative() -> None:
    network = made(lambda: WeightNorm(parametrizations.weight_norm(nn.Linear(6, 6))))
    like = WeightNorm(ByHand(network.layer))
    like.head = copy.deepcopy(network.head)  # type: ignore[assignment]
    require_as_in_a_loop(network, like)


@pytest.mark.parametrize("layer", [lambda: nn.Conv1d(1, 2, 3), lambda: nn.Linear(6, 6)])
def test_the_legacy_weight_norm(layer: Network) -> None:
    """It leaves a weight on its layer that copy.deepcopy refuses; against the objective's finite difference."""

    def network() -> nn.Module:
        made = weight_norm(layer())
        rest = [nn.Tanh(), nn.Flatten()]
        return nn.Sequential(
            nn.Unflatten(1, (1, 6)) if isinstance(made, nn.Conv1d) else nn.Identity(),
            made,
            *rest,
            nn.Linear(8 if isinstance(made, nn.Conv1d) else 6, 2),
        )

    got = ours("MAML", made(network), batch())
    direction = {name: torch.randn_like(g) for name, g in got.items()}
    h, objectives = 1e-5, []
    for sign in (1, -1):
        losses = []
        for support_x, support_y, query_x, query_y in zip(*batch(), strict=True):
            fast = made(network)
            with torch.no_grad():
                for name, p in fast.named_parameters():
                    p += sign * h * direction[name]
            for _ in range(STEPS):
                loss = LOSS(fast(support_x), support_y)
                grads = torch.autograd.grad(loss, [*fast.parameters()])
                with torch.no_grad():
                    for p, g in zip(fast.parameters(), grads, strict=True):
                        p -= RATE * g
            losses.append(LOSS(fast(query_x), query_y).item())
        objectives.append(sum(losses) / len(losses))
    along = sum(float((got[name] * d).sum()) for name, d in direction.items())
    assert along == pytest.approx((objectives[0] - objectives[1]) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("parametrization", [parametrizations.orthogonal])
def test_other_parametrizations(parametrization: Callable[..., nn.Module]) -> None:
    require_as_in_a_loop(made(lambda: WeightNorm(parametrization(nn.Linear(6, 6)))))


def test_spectral_norm_updates_its_vectors_in_turn() -> None:
    network = made(lambda: WeightNorm(parametrizations.spectral_norm(nn.Linear(6, 6))))
    theirs = copy.deepcopy(network)
    with pytest.warns(UserWarning, match=r"one after another, since the network's forward changes .*_u"):
        got = ours("MAML", copy.deepcopy(network), batch())
    assert worst(got, in_turn(theirs, batch(), True)) <= EXACT


# --------------------------------------------------------------------------------- networks that cannot be copied


def pruned() -> nn.Module:
    network = Net()
    prune.l1_unstructured(network.body, "weight", 0.5)
    return network


def unpruned() -> nn.Module:
    """The same with the masks as factors."""
    network: Any = pruned()

    class Masked(nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.bias = nn.Parameter(layer.bias.detach().clone())
            self.weight_orig = nn.Parameter(layer.weight_orig.detach().clone())
            self.register_buffer("weight_mask", layer.weight_mask.clone())

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight_orig * self.get_buffer("weight_mask"), self.bias)

    masked = Net()
    masked.body, masked.head = Masked(network.body), network.head  # type: ignore[assignment]
    return masked


def test_pruned_networks() -> None:
    require_as_in_a_loop(made(pruned), like=made(unpruned))


class ByLambda(Net):
    def __init__(self) -> None:
        super().__init__()
        self.function = lambda x: self.body(x).tanh()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.function(x))


class ByDefault(Net):
    def __init__(self) -> None:
        super().__init__()
        body = self.body
        self.functions = {"first": [lambda x, body=body: body(x).tanh()]}

    def forward(self, x: Tensor) -> Any:
        return self.head(self.functions["first"][0](x))


class ByNestedFunction(Net):
    def __init__(self) -> None:
        super().__init__()

        def inner(x: Tensor) -> Any:
            return self.body(x)

        self.function = lambda x: inner(x).tanh()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.function(x))


class ByMethod(Net):
    def __init__(self) -> None:
        super().__init__()
        self.function = functools.partial(type(self).tanh, self.body.forward)

    @staticmethod
    def tanh(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return function(x).tanh()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.function(x))


class ByAWrappedForward(Net):
    """The usual way to wrap a layer's forward, which holds a bound method."""

    def __init__(self) -> None:
        super().__init__()
        before = self.body.forward
        self.body.forward = lambda x: before(x)  # type: ignore[method-assign]


class ByAKeyword(Net):
    def __init__(self) -> None:
        super().__init__()
        self.functions = (lambda x, *, bodies=[self.body]: bodies[0](x).tanh(),)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.functions[0](x))


class ByAPartial(Net):
    def __init__(self) -> None:
        super().__init__()
        self.function = functools.partial(lambda scale, x: scale * self.body(x).tanh(), 1.0)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.function(x))


class Recursive(Net):
    def __init__(self) -> None:
        super().__init__()

        def deeper(x: Tensor, depth: int) -> Any:
            return deeper(x, depth - 1) if depth else self.body(x).tanh()

        self.function = deeper

    def forward(self, x: Tensor) -> Any:
        return self.head(self.function(x, 2))


class Holder:
    pass


class ByAnObject(Net):
    def __init__(self) -> None:
        super().__init__()
        self.holder = Holder()
        self.holder.function = lambda x: self.body(x).tanh()  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Any:
        return self.head(self.holder.function(x))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "network",
    [ByLambda, ByDefault, ByNestedFunction, ByMethod, ByAWrappedForward, ByAKeyword, ByAPartial, Recursive],
)
def test_functions_that_refer_to_the_network_refer_to_the_copy(network: Network) -> None:
    require_as_in_a_loop(made(network), like=made(Net))


OUTSIDE: list[nn.Module] = []


class Outside(Net):
    """Calls a module that it finds outside of itself."""

    def __init__(self) -> None:
        super().__init__()
        OUTSIDE[:] = [self.body]

    def forward(self, x: Tensor) -> Any:
        return self.head(OUTSIDE[0](x).tanh())


@pytest.mark.parametrize("network", [Outside, ByAnObject])
def test_parameters_that_a_copy_does_not_own_are_refused(network: Network) -> None:
    net = made(network)
    with pytest.raises(InputError, match=r"network must be copyable, .*body.weight, body.bias: parameters"):
        ours("FOMAML", net, batch())
    assert all(p.grad is None for p in net.parameters())


# ------------------------------------------------------------------------------------------------------- numbers


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(InputError, match=r"network must have real parameters, got complex \['weight', 'bias'\]"):
        MAML(nn.Linear(3, 2, dtype=torch.complex128))


class Mixed(Net):
    """Single precision beside double."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6, dtype=torch.float32)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x.float()).double().tanh())


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile"])
def test_mixed_precision_of_parameters(algorithm: str) -> None:
    network = made(Mixed)
    name = {"maml": "MAML", "fomaml": "FOMAML", "reptile": "Reptile"}[algorithm]
    expected = update(name, network, batch(), STEPS, RATE, LOSS)
    assert worst(ours(name, network, batch()), expected) <= 1e-6
    before = values(network)
    loader = DataLoader([batch()], batch_size=None)  # type: ignore[arg-type]
    train_maml(network, loader, inner_lr=RATE, inner_steps=STEPS, algorithm=algorithm)
    after = values(network)
    assert after["body.weight"].dtype == torch.float32
    if algorithm == "reptile":
        for key, theta in before.items():
            torch.testing.assert_close(after[key], theta + 0.1 * (expected[key] - theta))


def test_integer_samples_are_features_of_a_network_of_floating_point() -> None:
    tokens, network = batch(tokens=True), made(Net)
    floats = tokens._replace(support_x=tokens.support_x.double(), query_x=tokens.query_x.double())
    got, expected = (ours("FOMAML", network, each) for each in (tokens, floats))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_integer_samples_are_refused_by_a_network_that_takes_no_numbers_of_theirs() -> None:
    class Picky(Net):
        def forward(self, x: Tensor) -> Any:
            if x.dtype != torch.float16:
                raise TypeError("half precision")
            return super().forward(x)

    with pytest.raises(
        InputError, match=r"x must be floating-point unless the network embeds it, got torch.int64.*half"
    ):
        ours("FOMAML", made(Picky), batch(tokens=True))


def test_a_submodule_may_be_called_inner_rates() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner_rates, self.moments = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Any:
            return self.moments(self.inner_rates(x).tanh())

    require_as_in_a_loop(made(Named))


# ---------------------------------------------------------------------------------------------------------- head


class HeadFirst(nn.Module):
    """Defines its layers in another order than it runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(8, 2), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).tanh())


class HeadLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).tanh())


def test_the_head_is_what_runs_last(tmp_path: Any) -> None:
    first, last = made(HeadFirst), made(HeadLast)
    last.load_state_dict(first.state_dict())
    x, y = torch.randn(8, 6), torch.arange(4).repeat(2)
    predictors = [FOMAML(n, inner_lr=RATE).adapt(x.numpy(), y.numpy()) for n in (first, last)]
    outputs = [predictor(x) for predictor in predictors]
    assert outputs[0].shape == (8, 4)
    torch.testing.assert_close(outputs[0], outputs[1])
    predictors[0].save(tmp_path / "wide.safetensors")
    loaded = type(predictors[0]).load(tmp_path / "wide.safetensors", network=HeadFirst())
    torch.testing.assert_close(loaded(x), outputs[0])
