"""Head starts against literal loops over tasks and finite differences in float64, and any number of classes."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import trainer
from references import EXACT, INNER_LR, TASKS_FROM_A_LIST, Params, error, trained
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader

from meta_lightning import (
    FOMAML,
    IMAML,
    LSLR,
    MAML,
    Adam,
    Baseline,
    ComputedRows,
    HeadStart,
    LearntRows,
    MetaLearner,
    MetaSGD,
    OneVector,
    Predictor,
    ProtoNet,
    Prototypes,
    Reptile,
    TaskBatch,
    TensorTasks,
    ZeroRows,
    load_learner,
)
from meta_lightning.adaptation.partitions import PARTITIONS, partitions
from meta_lightning.checks import InputError

pytestmark = TASKS_FROM_A_LIST
STEPS, D = 3, 8
FRACTIONS = (0.6, 0.2, 0.2)
STARTS: list[HeadStart] = [ZeroRows(), OneVector(), Prototypes(0.7)]
Start = Callable[[Params, Tensor, Tensor], Params]  # θ and a support set to the head


def named(value: Any) -> str:
    return type(value).__name__ if isinstance(value, nn.Module) else getattr(value, "__name__", str(value))


class Network(nn.Module):
    """A smooth body, batch norm included, and a head of 5 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, D), nn.BatchNorm1d(D, track_running_stats=False), nn.Tanh())
        self.head = nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


def tasks(ways: int, shots: int = 2, queries: int = 3, count: int = 3) -> TaskBatch:
    def part(samples: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(ways).repeat_interleave(samples).repeat(count, 1)
        order = torch.rand(count, ways * samples).argsort(1)
        return torch.randn(count, ways * samples, 6), y.gather(1, order)

    return TaskBatch(*part(shots), *part(queries))


def body_of(network: Network, params: Params, x: Tensor) -> Tensor:
    features: Tensor = functional_call(
        network.body, {n.removeprefix("body."): p for n, p in params.items() if n.startswith("body.")}, (x,)
    )
    return features


def rows(start: HeadStart, network: Network, params: Params, own: Params, x: Tensor, y: Tensor) -> Params:
    """The papers' formulas, class by class."""
    ways = int(y.max()) + 1
    if isinstance(start, Prototypes):
        z, s = body_of(network, params, x), own["learnt_scale"]
        centres = torch.stack([z[y == k].mean(0) for k in range(ways)])
        return {"head.weight": 2 * s * centres, "head.bias": -s * (centres**2).sum(1)}
    row = own["vector"] if isinstance(start, OneVector) else torch.zeros(D)
    return {"head.weight": torch.stack([row] * ways), "head.bias": torch.zeros(ways)}


def query_loss(
    network: Network, start: HeadStart, theta: Params, own: Params, batch: TaskBatch, follow: bool, steps: int = STEPS
) -> Tensor:
    """The mean query loss of a loop over tasks; without ``follow`` the inner gradients are constants."""
    losses = []
    for x, y, query_x, query_y in zip(*batch, strict=True):
        params = theta | rows(start, network, theta, own, x, y)
        for _ in range(steps):
            held = {n: p.detach().requires_grad_() for n, p in params.items()}
            if follow:  # a point of its own, so that the head is not differentiated by the body
                held = {n: p + torch.zeros_like(p).requires_grad_() for n, p in params.items()}
            loss = F.cross_entropy(functional_call(network, held, (x,)), y)
            grads = torch.autograd.grad(loss, list(held.values()), create_graph=follow)
            params = {n: p - INNER_LR * g for (n, p), g in zip(params.items(), grads, strict=True)}
        losses.append(F.cross_entropy(functional_call(network, params, (query_x,)), query_y))
    return torch.stack(losses).mean()


def body(network: Network) -> Params:
    return {name: p for name, p in trained(network).items() if name.startswith("body.")}


def prepared(algorithm: Callable[..., MetaLearner], start: HeadStart, **options: Any) -> tuple[Network, Any]:
    network = Network()
    return network, algorithm(network, inner_lr=INNER_LR, inner_steps=STEPS, head_start=start, **options)


@pytest.mark.parametrize("ways", [2, 5, 9])
@pytest.mark.parametrize("options", [{}, {"recompute_inner_steps": True}, {"tasks_per_pass": 1}], ids=str)
@pytest.mark.parametrize("algorithm", [MAML, FOMAML])
@pytest.mark.parametrize("start", STARTS, ids=named)
def test_meta_gradients_equal_a_loops(
    start: HeadStart, algorithm: type[MAML], options: dict[str, Any], ways: int
) -> None:
    network, learner = prepared(algorithm, start, **options)
    batch = tasks(ways)
    meta_gradient, losses, _ = learner.meta_gradient(batch)
    theta, own = body(network), dict(learner.head_start.named_parameters())
    loss = query_loss(network, start, theta, own, batch, follow=algorithm is MAML)
    expected = torch.autograd.grad(loss, [*theta.values(), *own.values()])
    assert losses.mean().item() == pytest.approx(loss.item(), abs=EXACT)
    names = [*theta, *(f".head.{name}" for name in own)]
    assert {*meta_gradient} == {*names}
    assert error(meta_gradient, dict(zip(names, expected, strict=True))) <= EXACT


@pytest.mark.parametrize("start", STARTS, ids=named)
def test_meta_gradients_equal_finite_differences(start: HeadStart) -> None:
    network, learner = prepared(MAML, start)
    batch = tasks(4)
    meta_gradient, *_ = learner.meta_gradient(batch)
    theta, own = body(network), dict(learner.head_start.named_parameters())
    for _ in range(3):
        along = {n: torch.randn_like(p) for n, p in {**theta, **own}.items()}
        values = []
        for sign in (1e-5, -1e-5):
            moved = [{n: (p + sign * along[n]).detach() for n, p in params.items()} for params in (theta, own)]
            values.append(query_loss(network, start, *moved, batch, follow=False).item())
        slope = sum((meta_gradient[n] * along[n]).sum() for n in theta)
        slope += sum((meta_gradient[f".head.{n}"] * along[n]).sum() for n in own)
        assert float(slope) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("start", [ZeroRows(), Prototypes(0.7)], ids=named)
def test_reptile_moves_the_body_alone(start: HeadStart) -> None:
    network, learner = prepared(Reptile, start)
    batch = tasks(4)
    support = learner.support(batch.support_x, batch.support_y, STEPS)
    mean, _ = learner.adapt_pass(support)
    theta, own, adapted = body(network), dict(learner.head_start.named_parameters()), []
    for x, y, *_ in zip(*batch, strict=True):
        params = {n: p.detach().requires_grad_() for n, p in (theta | rows(start, network, theta, own, x, y)).items()}
        for _ in range(STEPS):
            loss = F.cross_entropy(functional_call(network, params, (x,)), y)
            grads = torch.autograd.grad(loss, list(params.values()))
            params = {n: p - INNER_LR * g for (n, p), g in zip(params.items(), grads, strict=True)}
        adapted.append(params)
    expected = {n: torch.stack([params[n].detach() for params in adapted]).mean(0) for n in theta}
    assert {*mean} == {*theta}
    assert error(mean, expected) <= EXACT


@pytest.mark.parametrize("start", STARTS, ids=named)
def test_implicit_gradients_equal_finite_differences(start: HeadStart) -> None:
    network = Network()
    options: Any = {"inner_lr": 0.05, "inner_steps": 400, "cg_steps": 40, "proximal_weight": 10.0}
    learner = IMAML(network, head_start=start, **options)
    batch = tasks(3, count=2)
    meta_gradient, *_ = learner.meta_gradient(batch)
    theta = {**body(network), **{f".head.{n}": p for n, p in learner.head_start.named_parameters()}}
    along = {n: torch.randn_like(p) for n, p in theta.items()}
    values = []
    for sign in (1e-4, -2e-4):
        with torch.no_grad():
            for name, p in theta.items():
                p += sign * along[name]
        values.append(learner.meta_gradient(batch)[1].mean().item())
    slope = sum(float((meta_gradient[n] * along[n]).sum()) for n in theta)
    assert slope == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-5)


@pytest.mark.parametrize("rule", [MetaSGD(), Adam(0.5), LSLR()], ids=named)
@pytest.mark.parametrize("start", STARTS, ids=named)
def test_rows_share_what_an_inner_rule_keeps(start: HeadStart, rule: Any) -> None:
    _, learner = prepared(MAML, start, inner_rule=rule)
    for ways in (3, 7):
        meta_gradient, *_ = learner.meta_gradient(tasks(ways))
        assert all(g.isfinite().all() for g in meta_gradient.values())
    if isinstance(rule, MetaSGD):
        assert meta_gradient[".rule.rates.head/weight"].shape == (1, D)


def test_reptile_carries_moments_of_rows_that_change_in_number() -> None:
    network = Network()
    learner = Reptile(network, inner_lr=0.01, inner_steps=2, inner_rule=Adam(), head_start=Prototypes())
    trainer(max_epochs=1).fit(learner, DataLoader([tasks(3), tasks(7), tasks(2)], batch_size=None))
    assert learner.inner_rule.start().second["head.weight"].shape == (1, D)
    assert learner.inner_rule.start().step == 6


@pytest.mark.parametrize("start", STARTS, ids=named)
def test_tasks_of_any_number_of_classes(start: HeadStart, tmp_path: Path) -> None:
    network = Network()
    learner = MAML(network, inner_lr=INNER_LR, inner_steps=2, head_start=start)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    trained_on = DataLoader([tasks(3), tasks(11), tasks(5)], batch_size=None)
    fitted = trainer(max_epochs=1)
    fitted.fit(learner, trained_on)
    assert torch.equal(network.head.weight, before["head.weight"])  # its rows have no part in training …
    optimizer = fitted.optimizers[0]
    sizes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    assert torch.Size([5, D]) not in sizes  # … and no state of the optimizer
    assert len(optimizer.state) == len(sizes)
    for ways in (2, 5, 12):
        (figures,) = trainer(max_epochs=1).test(learner, DataLoader([tasks(ways)], batch_size=None))
        assert 0 <= figures["test/accuracy"] <= 1
        predictor = learner.adapt(torch.randn(3 * ways, 6), torch.arange(ways).repeat(3))
        assert predictor.predict_proba(torch.randn(4, 6)).shape == (4, ways)
        queries = torch.randn(4, 6)
        for suffix in (".safetensors", ".pt2"):
            predictor.save(tmp_path / f"{ways}{suffix}")
        loaded = Predictor.load(tmp_path / f"{ways}.safetensors", Network())
        torch.testing.assert_close(loaded.predict_proba(queries), predictor.predict_proba(queries))


def test_a_computed_head_does_what_inner_update_does() -> None:
    _, learner = prepared(MAML, Prototypes(0.7))
    batch = tasks(4, count=1)
    learner.eval()
    params = learner.inner_update(batch.support_x[0], batch.support_y[0])
    assert params["head.weight"].shape == (4, D)
    predictions = learner.forward_with_weights(batch.query_x[0], params)
    torch.testing.assert_close(predictions, learner.predict_tasks(batch)[-1][0])


@pytest.mark.parametrize(
    ("start", "compiled"), [*((start, "record") for start in STARTS), (Prototypes(0.7), True)], ids=named
)
def test_compiled_passes_compute_the_same(start: HeadStart, compiled: Any) -> None:
    _, learner = prepared(MAML, start)
    batches = [tasks(4), tasks(6)][: 1 if compiled is True else 2]
    expected = [learner.meta_gradient(batch)[0] for batch in batches]
    learner.passes = type(learner.passes)(None, compiled)
    for batch, gradient in [*zip(batches, expected, strict=True)] * 2:
        assert error(learner.meta_gradient(batch)[0], gradient) <= EXACT
    assert len(learner.passes.compiled.passes) == len(batches)


class Renamed(nn.Module):
    """Registers a layer after the head."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 5)
        self.first = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.first(x).tanh())
        return logits.log_softmax(-1)


def test_the_head_may_be_named() -> None:
    learner = MAML(Renamed(), loss=nn.NLLLoss(), inner_steps=1, head_start=Prototypes(layer="last"))
    gradient, *_ = learner.meta_gradient(tasks(7))
    assert {*gradient} == {"first.weight", "first.bias", ".head.learnt_scale"}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.inner(x))
        return logits


@pytest.mark.parametrize(
    ("network", "start", "message"),
    [
        (Renamed, Prototypes(), r"layer .*\blast\b.*\bfirst\b"),
        (Renamed, Prototypes(layer="middle"), r"layer .*'last', 'first'.*'middle'"),
        (lambda: nn.Sequential(nn.Conv1d(6, 5, 1), nn.Flatten()), ZeroRows(), r"layer .*none"),
        (Tied, OneVector(), r"layer of head_start OneVector.*inner.*'head'"),
        (lambda: nn.Linear(6, 5, bias=False), Prototypes(), r"Prototypes .*bias"),
    ],
    ids=["not last", "no such layer", "no linear layer", "tied", "no bias"],
)
def test_heads_that_cannot_start(network: Callable[[], nn.Module], start: HeadStart, message: str) -> None:
    with pytest.raises(InputError, match=message):
        MAML(network(), inner_steps=1, head_start=start).meta_gradient(tasks(3))


def test_what_needs_a_meta_gradient_or_classes_is_refused() -> None:
    with pytest.raises(InputError, match=r"head_start .*OneVector"):
        Reptile(Network(), head_start=OneVector())
    with pytest.raises(InputError, match=r"head_start of ProtoNet .*ZeroRows"):
        ProtoNet(Network(), head_start=ZeroRows())
    with pytest.raises(InputError, match=r"head_start of Baseline .*LearntRows"):
        Baseline(Network(), head_start=LearntRows())
    with pytest.raises(InputError, match=r"scale .*-1"):
        Prototypes(-1.0)
    with pytest.raises(InputError, match=r"head_start must be .*HeadStart.*'zeros'"):
        MAML(Network(), head_start="zeros")  # type: ignore[arg-type]
    batch = TaskBatch(*(torch.randn(2, 4, size) for size in (6, 5, 6, 5)))
    with pytest.raises(InputError, match=r"Prototypes .*\[4, 5\].*float64"):
        MAML(Network(), head_start=Prototypes()).meta_gradient(batch)
    MAML(Network(), head_start=ZeroRows()).meta_gradient(batch)  # real targets have as many rows as the network


def test_protonets_classify_by_the_nearest_prototype() -> None:
    network = Network()
    learner = ProtoNet(network, inner_steps=4)
    batch = tasks(6, count=2)
    (before, after), losses = learner.predict_tasks(batch), []
    assert torch.equal(before, after)
    for (x, y, query_x, query_y), logits in zip(zip(*batch, strict=True), after, strict=True):
        centres = torch.stack([network.body(x)[y == k].mean(0) for k in range(6)])
        expected = -(torch.cdist(network.body(query_x), centres) ** 2)  # Snell et al., 2017, equation 2, with s = 1
        torch.testing.assert_close(logits.log_softmax(-1), expected.log_softmax(-1))
        losses.append(F.cross_entropy(expected, query_y))
    _, ours, _ = learner.meta_gradient(batch)
    torch.testing.assert_close(ours, torch.stack(losses).detach())


def test_a_baseline_trains_on_all_classes_and_adapts_with_a_head_of_its_own() -> None:
    network = Network()
    learner = Baseline(network, outer_lr=0.1, optimizer=torch.optim.SGD, gradient_clip_val=None, inner_steps=1)
    batch = tasks(5, count=2)
    x, y = (torch.cat([s, q], 1).flatten(0, 1) for s, q in ((batch[0], batch[2]), (batch[1], batch[3])))
    theta = trained(network)
    grads = torch.autograd.grad(F.cross_entropy(network(x), y), [*theta.values()])
    expected = {n: p.detach() - 0.1 * g for (n, p), g in zip(theta.items(), grads, strict=True)}
    trainer(max_epochs=1).fit(learner, DataLoader([batch], batch_size=None))
    assert error({n: p.detach() for n, p in network.named_parameters()}, expected) <= EXACT
    assert learner.predict_tasks(tasks(9))[-1].shape == (3, 27, 9)


def test_a_baseline_wants_labels_of_the_split() -> None:
    x, y = torch.randn(90, 6), torch.arange(15).repeat(6)
    data = TensorTasks(x, y, ways=2, queries=2, val_tasks=1)
    with pytest.raises(InputError, match=r"data\.train_labels .*'split'.*'task'"):
        trainer(max_epochs=1).fit(Baseline(Network()), data)
    split = TensorTasks(x, y, ways=2, queries=2, val_tasks=1, train_labels="split")
    with pytest.raises(InputError, match=r"data\.train_labels .*'task' to train ProtoNet.*'split'"):
        trainer(max_epochs=1).fit(ProtoNet(Network()), split)
    nine = TensorTasks(
        x, y, ways=2, train_ways=9, queries=2, val_tasks=1, train_labels="split", split_fractions=FRACTIONS
    )
    with pytest.raises(InputError, match=r"network .*\b9\b.*\b5\b"):
        trainer(max_epochs=1).fit(Baseline(Network()), nine)


def test_learnt_rows_must_serve_the_most_ways_of_a_range() -> None:
    learner = MAML(Network(), inner_steps=1)
    learner.meta_gradient(tasks(3))
    with pytest.raises(InputError, match=r"network .*at least 7.*got 5"):
        learner.meta_gradient(tasks(7))


def test_more_classes_than_rows_do_not_depend_on_how_the_loss_is_written() -> None:
    batch, network = tasks(8, count=2), Network()
    losses = None, F.cross_entropy, nn.CrossEntropyLoss(), partial(F.cross_entropy, label_smoothing=0.0)
    with pytest.warns(UserWarning, match=r"\b5 outputs for 8 classes"):
        first, *others = (MAML(network, loss, inner_lr=INNER_LR).eval().predict_tasks(batch) for loss in losses)
    assert all(torch.equal(after, first[1]) for _, after in others)


def test_counts_are_no_classes() -> None:
    """A loss of two outputs, the mean and the dispersion of a count, takes any count."""

    def negative_binomial(predictions: Tensor, counts: Tensor) -> Tensor:
        mean, dispersion = predictions.exp().unbind(1)
        total = (
            torch.lgamma(counts + dispersion)
            - torch.lgamma(dispersion)
            + dispersion * (dispersion / (dispersion + mean)).log()
        )
        return -(total + counts * (mean / (dispersion + mean)).log()).mean()

    x, counts = torch.randn(2, 6, 3), torch.tensor([[0, 7, 3, 3, 9, 1], [2, 2, 0, 5, 4, 8]])
    learner = MAML(nn.Linear(3, 2), negative_binomial, inner_lr=0.01).eval()
    assert learner.predict_tasks(TaskBatch(x, counts, x, counts))[-1].shape == (2, 6, 2)


@pytest.mark.parametrize("ways", [6, 8, 20])
def test_more_classes_than_rows_combine_groups(ways: int) -> None:
    _, learner = prepared(MAML, LearntRows())
    learner.eval()
    batch = tasks(ways, count=2)
    with pytest.warns(UserWarning, match=rf"\b5 outputs for {ways} classes"):
        before, after = learner.predict_tasks(batch)
    groups = partitions(ways, 5)
    assert before.shape == after.shape == (2, 3 * ways, ways)
    assert len(groups) == PARTITIONS * math.ceil(ways / 5)
    assert {int(c) for group in groups for c in group} == {*range(ways)}
    assert all(len({*group.tolist()}) == 5 for group in groups)
    for x, y, query_x, predictions in zip(*batch[:3], after, strict=True):
        total, times = torch.zeros(len(query_x), ways), torch.zeros(ways)
        for group in groups:  # each adapted alone
            chosen = torch.isin(y, group)
            params = learner.inner_update(x[chosen], torch.tensor([group.tolist().index(k) for k in y[chosen]]))
            total[:, group] += learner.forward_with_weights(query_x, params).log_softmax(-1)
            times[group] += 1
        torch.testing.assert_close(predictions, total / times)


def test_a_predictor_of_more_classes_than_rows_is_saved(tmp_path: Path) -> None:
    _, learner = prepared(MAML, LearntRows())
    x, y, queries = torch.randn(20, 6), torch.arange(20) % 7, torch.randn(9, 6)
    with pytest.warns(UserWarning, match=r"10 adaptations .*\b5 outputs for 7 classes.*Prototypes"):
        predictor = learner.adapt(x, y)  # classes of 2 and of 3 samples
    expected = predictor.predict_proba(queries)
    torch.testing.assert_close(expected.sum(1), torch.ones(9))
    for suffix in (".safetensors", ".pt2"):
        predictor.save(tmp_path / f"a{suffix}")
    assert torch.equal(Predictor.load(tmp_path / "a.safetensors", Network()).predict_proba(queries), expected)
    program = torch.export.load(tmp_path / "a.pt2").module()
    torch.testing.assert_close(program(queries).softmax(1), expected)


def test_a_checkpoint_describes_its_head_start(tmp_path: Path) -> None:
    fitted = trainer(max_epochs=1)
    fitted.fit(MAML(Network(), inner_steps=1, head_start=Prototypes(0.3)), DataLoader([tasks(3)], batch_size=None))
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    learner = load_learner(tmp_path / "a.ckpt", Network())
    assert isinstance(learner.head_start, Prototypes)
    assert learner.head_start.scale == 0.3
    assert learner.head_start.learnt_scale != 0.3  # after a step of Adam
    assert "network.head.weight" in learner.state_dict()


class Scaled(ComputedRows):
    """Rows of one value, an attribute that may change."""

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.value = value

    def rows(self, features: Any, y: Tensor, classes: Tensor, own: Params) -> tuple[Tensor, Tensor]:
        z = features()
        weight = self.value * torch.arange(classes.shape[1] * z.shape[2]).view(1, -1, z.shape[2]) / 100.0
        return weight.expand(len(z), -1, -1), z.new_zeros(classes.shape)


def test_a_recorded_pass_sees_a_start_that_changes() -> None:
    batch = tasks(4)
    network, learner = prepared(MAML, Scaled(), compile_passes="record")
    plain = MAML(network, inner_lr=INNER_LR, inner_steps=STEPS, head_start=Scaled())
    for value in (1.0, 5.0):
        learner.head_start.value = plain.head_start.value = value  # type: ignore[assignment]
        assert error(learner.meta_gradient(batch)[0], plain.meta_gradient(batch)[0]) <= EXACT


def test_a_start_of_ones_own_is_loaded_where_it_cannot_be_imported(tmp_path: Path) -> None:
    fitted = trainer(max_epochs=1)
    fitted.fit(MAML(Network(), inner_steps=1, head_start=Scaled(2.0)), DataLoader([tasks(3)], batch_size=None))
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["head_start"]["class_path"] = "gone.Scaled"
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"head_start .*gone\.Scaled"):
        load_learner(tmp_path / "a.ckpt", Network())
    assert load_learner(tmp_path / "a.ckpt", Network(), head_start=Scaled(2.0)).head_start.value == 2.0


def test_a_checkpoint_cannot_run_what_is_no_part_of_a_learner(tmp_path: Path) -> None:
    given: Any = {"class_path": "pathlib.Path.touch", "init_args": {"self": str(tmp_path / "made")}}
    with pytest.raises(InputError, match=r"head_start must be of the class HeadStart.*pathlib\.Path\.touch"):
        MAML(Network(), head_start=given)
    assert not [*tmp_path.iterdir()]
    for arguments, named in (({"scale": -1.0}, "scale"), ({"size": 1}, "size")):
        wrong: Any = {"class_path": "meta_lightning.Prototypes", "init_args": arguments}
        with pytest.raises(InputError, match=rf"head_start .*meta_lightning\.Prototypes .*{named}"):
            MAML(Network(), head_start=wrong)


@pytest.mark.parametrize("start", STARTS, ids=named)
def test_every_task_must_hold_every_class(start: HeadStart) -> None:
    batch = tasks(4)
    y = batch.support_y.clone()
    y[0] %= 2
    with pytest.raises(InputError, match=r"support_y .*\b4 classes\b.*without 2"):
        prepared(MAML, start)[1].meta_gradient(batch._replace(support_y=y))


def test_a_head_start_leaves_tasks_together() -> None:
    _, learner = prepared(MAML, Prototypes())
    learner.meta_gradient(tasks(4))
    assert learner.task_network.traits is not None
    assert (learner.task_network.traits.last, learner.task_network.loops_over_tasks) == ("head", False)
    assert not any(module._forward_pre_hooks for module in learner.modules())


def test_the_search_for_the_head_draws_no_random_numbers() -> None:
    network = nn.Sequential(nn.Linear(6, D), nn.Dropout(0.5), nn.Linear(D, 5))
    drawn = []
    for start in (LearntRows(), ZeroRows()):
        torch.manual_seed(0)
        MAML(network, inner_steps=1, head_start=start).meta_gradient(tasks(5))
        torch.manual_seed(0)
        learner = MAML(network, inner_steps=1, head_start=start)
        batch = tasks(5)
        learner.meta_gradient(batch)
        drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1]


def test_a_baseline_decays_what_it_trains_only() -> None:
    def decayed(params: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr, weight_decay=0.5)

    learner = Baseline(Network(), outer_lr=0.1, optimizer=decayed)
    trainer(max_epochs=1).fit(learner, DataLoader([tasks(5)], batch_size=None))
    assert learner.head_start.learnt_scale == 1.0
    for options, message in (({"head_start": OneVector()}, "OneVector"), ({"inner_rule": LSLR()}, "inner_rule")):
        with pytest.raises(InputError, match=message):
            Baseline(Network(), **options)
    batch = TaskBatch(*(torch.randn(2, 4, size) for size in (6, 5, 6, 5)))
    with pytest.raises(InputError, match=r"Baseline .*int64.*float64"):
        trainer(max_epochs=1).fit(Baseline(Network()), DataLoader([batch], batch_size=None))


def test_a_frozen_body_leaves_the_scale() -> None:
    network = Network()
    network.body.requires_grad_(False)
    learner = MAML(network, inner_steps=1, outer_lr=0.1, head_start=Prototypes())
    trainer(max_epochs=1).fit(learner, DataLoader([tasks(5)], batch_size=None))
    assert learner.head_start.learnt_scale != 1.0
    with pytest.raises(InputError, match=r"network and head_start .*got none"):
        MAML(network, head_start=ZeroRows())


@pytest.mark.parametrize("start", [ZeroRows(), OneVector()], ids=named)
def test_equal_rows_have_to_be_adapted(start: HeadStart) -> None:
    with pytest.raises(InputError, match=rf"inner_freeze .*head.*{named(start)}"):
        MAML(Network(), head_start=start, inner_freeze=["head.*"])
    MAML(Network(), head_start=Prototypes(), inner_freeze=["head.*"])
    if not isinstance(start, OneVector):
        with pytest.raises(InputError, match=r"inner_steps 1 of Reptile .*ZeroRows"):
            Reptile(Network(), inner_steps=1, head_start=start)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=named)
def test_a_parametrised_head_is_refused(norm: Callable[[nn.Module], nn.Module]) -> None:
    network = Network()
    norm(network.head)
    with pytest.raises(InputError, match=r"layer of head_start ZeroRows .*plain.*'head'"):
        MAML(network, head_start=ZeroRows())
    MAML(network, inner_steps=1).meta_gradient(tasks(5))


class Called(Network):
    """Calls its head by the name of the argument."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(input=self.body(x))
        return logits


def test_a_head_that_is_called_by_name() -> None:
    called, network = Called(), Network()
    called.load_state_dict(network.state_dict())
    batch = tasks(4)
    gradients = [MAML(n, inner_steps=1, head_start=Prototypes()).meta_gradient(batch)[0] for n in (called, network)]
    assert error(*gradients) <= EXACT


@pytest.mark.parametrize(
    ("loss", "outputs", "y"),
    [
        (nn.PoissonNLLLoss(), 0, torch.arange(8) % 4),
        (lambda p, y: F.binary_cross_entropy_with_logits(p, (y[:, None] > torch.arange(4)).double()), 4, None),
        (nn.CrossEntropyLoss(ignore_index=255), 5, torch.tensor([0, 1, 2, 255, 0, 1, 2, 3])),
    ],
    ids=["counts", "levels", "ignored"],
)
def test_integers_that_are_no_class_numbers(loss: Any, outputs: int, y: Tensor | None) -> None:
    network: nn.Module = nn.Sequential(nn.Linear(6, max(outputs, 1)), nn.Flatten(0) if not outputs else nn.Identity())
    numbers = (torch.arange(8) % 5 if y is None else y).repeat(2, 1)
    batch = TaskBatch(torch.randn(2, 8, 6), numbers, torch.randn(2, 8, 6), numbers)
    learner = MAML(network, loss=loss, inner_steps=1, inner_lr=0.01)
    learner.meta_gradient(batch)
    learner.eval()
    assert learner.predict_tasks(batch)[-1].shape == ((2, 8, outputs) if outputs else (2, 8))


def test_a_warm_start_takes_the_start_of_the_same_kind(tmp_path: Path) -> None:
    fitted = trainer(max_epochs=1)
    fitted.fit(MAML(Network(), inner_steps=2, head_start=OneVector()), DataLoader([tasks(3)], batch_size=None))
    fitted.save_checkpoint(path := tmp_path / "a.ckpt")
    vector = torch.load(path, weights_only=True)["state_dict"]["head_start.vector"]
    assert torch.equal(MAML(Network(), head_start=OneVector(), init_from=str(path)).head_start.vector, vector)
    with pytest.warns(UserWarning, match=r"init_from .*a\.ckpt .*rows .*untrained"):
        MAML(Network(), init_from=str(path))
    wide = Network()
    wide.head = nn.Linear(D, 9)  # whose rows have no part
    MAML(wide, head_start=Prototypes(), init_from=str(path))
    with pytest.raises(InputError, match=r"init_from .*head"):
        MAML(wide, init_from=str(path))


def test_a_head_of_one_row_and_a_bare_layer_adapt(tmp_path: Path) -> None:
    network = Network()
    network.head = nn.Linear(D, 1)
    x, y = torch.randn(9, 6), torch.arange(3).repeat(3)
    assert MAML(network, head_start=ZeroRows()).adapt(x, y).predict_proba(x).shape == (9, 3)
    predictor = ProtoNet(nn.Linear(6, 5)).adapt(torch.randn(14, 6), torch.arange(7).repeat(2))
    predictor.save(tmp_path / "a.safetensors")
    loaded = Predictor.load(tmp_path / "a.safetensors", nn.Linear(6, 5))
    torch.testing.assert_close(loaded.predict_proba(x), predictor.predict_proba(x))
