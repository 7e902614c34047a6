"""Compiled passes: the same training to rounding, whatever changes in between."""

import copy
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from conftest import trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from meta_lightning import FOMAML, IMAML, MAML, Adam, MetaLearner, Prototypes, Reptile, Sinusoid, TaskBatch
from meta_lightning.checks import InputError
from meta_lightning.inner import compiling
from meta_lightning.inner.passes import Compile

ALGORITHMS: list[tuple[type[MetaLearner], dict[str, Any]]] = [
    (MAML, {"learn_inner_lr": True}),
    (Reptile, {"inner_optimizer": "adam", "inner_batch_size": 2, "inner_lr": 0.01}),
]
REFUSAL = "A pass (runs as it is|is recorded), since"


def batches(*shape: int) -> DataLoader[TaskBatch]:
    rng = torch.Generator().manual_seed(0)

    def batch() -> TaskBatch:
        x, y = torch.rand(3, 8, *shape, generator=rng), torch.randint(2, (3, 8), generator=rng)
        return TaskBatch(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:])

    return DataLoader([batch() for _ in range(3)], batch_size=None)  # type: ignore[arg-type]


def train(
    algorithm: type[MetaLearner],
    network: nn.Module,
    data: DataLoader[TaskBatch],
    **options: Any,
) -> MetaLearner:
    learner = algorithm(copy.deepcopy(network), **{"inner_lr": 0.1, "inner_steps": 2} | options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", REFUSAL)
        trainer(max_steps=3, limit_val_batches=0, precision="64-true").fit(learner, data)
    return learner


def compiled(learner: MetaLearner) -> int:
    return len(learner.passes.compiled.passes)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs as they are traced: what they read, and when they are made anew, does not depend on their kernels."""
    through = torch.compile
    monkeypatch.setattr(torch, "compile", lambda graph, **_: through(graph, backend="aot_eager"))


@pytest.mark.parametrize(("algorithm", "options"), ALGORITHMS)
def test_training_is_the_same(algorithm: type[MetaLearner], options: dict[str, Any], network: nn.Module) -> None:
    """θ, learnt rates and the moments of Reptile's Adam move from step to step: the graph has to read them anew."""
    expected = train(algorithm, network, batches(6), **options)
    ours = train(algorithm, network, batches(6), **options, compile_passes=True)
    assert compiled(ours) == 1
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("algorithm", "options"), [*ALGORITHMS, (IMAML, {})])
def test_recorded_training_is_the_same_to_the_bit(
    algorithm: type[MetaLearner], options: dict[str, Any], network: nn.Module
) -> None:
    """And dropout draws the same masks."""
    network = nn.Sequential(network, nn.Dropout(0.5))
    torch.manual_seed(3)
    expected = train(algorithm, network, batches(6), **options)
    torch.manual_seed(3)
    ours = train(algorithm, network, batches(6), **options, compile_passes="record")
    assert compiled(ours) == 1
    for name, value in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.usefixtures("unfused")
def test_each_shape_is_compiled_once(network: nn.Module) -> None:
    options = {"inner_freeze": ["0.*"], "tasks_per_pass": 2}
    expected = train(FOMAML, network, batches(6), **options)
    ours = train(FOMAML, network, batches(6), **options, compile_passes=True)
    assert compiled(ours) == 2  # of two tasks, and of the third alone
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-9, atol=1e-11)


def test_pictures_in_both_precisions() -> None:
    """Convolution, batch norm and pooling at second order; and with the casts of mixed precision in the graph."""
    torch.manual_seed(0)
    block = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*block, nn.Flatten(), nn.Linear(36, 2))
    batch = next(iter(batches(1, 8, 8)))

    def gradient(compile_passes: bool, bf16: bool) -> Tensor:
        learner = MAML(network, inner_lr=0.1, inner_steps=1, compile_passes=compile_passes)
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            warnings.filterwarnings("error", REFUSAL)
            grads = learner.meta_gradient(batch)[0]
        return torch.cat([g.flatten() for g in grads.values()])

    exact = gradient(compile_passes=False, bf16=False)

    def error(compile_passes: bool, bf16: bool) -> float:
        # of the whole: the gradient of a bias before batch norm is nothing but rounding
        return float((gradient(compile_passes, bf16) - exact).norm() / exact.norm())

    assert error(compile_passes=True, bf16=False) < 1e-5
    # fused kernels round less often than the operations one by one, and still round
    assert 1e-4 < error(compile_passes=True, bf16=True) < 1.5 * error(compile_passes=False, bf16=True)


def half_the_rate(learner: MetaLearner) -> None:
    learner.inner_lr /= 2


def freeze(learner: MetaLearner) -> None:
    learner.inner_frozen = {"0.weight"}


def no_dropout(learner: MetaLearner) -> None:
    for module in learner.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def another_layer(learner: MetaLearner) -> None:
    torch.manual_seed(1)
    learner.network[3] = nn.Linear(4, 2)  # type: ignore[operator]


def another_loss(learner: MetaLearner) -> None:
    learner.loss = lambda predictions, targets: predictions.square().mean()


def a_hook(learner: MetaLearner) -> None:
    learner.network.register_forward_hook(lambda module, args, output: 2 * output)  # type: ignore[operator]


@pytest.mark.usefixtures("unfused")
@pytest.mark.parametrize("change", [half_the_rate, freeze, no_dropout, another_layer, another_loss, a_hook])
def test_what_changes_after_compiling_is_seen(change: Callable[[MetaLearner], None]) -> None:
    def learner(**options: Any) -> FOMAML:
        torch.manual_seed(0)
        dropped = nn.Dropout(1.0 if change is no_dropout else 0.0)  # all or nothing, so that there is nothing to draw
        network = nn.Sequential(nn.Linear(6, 4, bias=False), dropped, nn.Tanh(), nn.Linear(4, 2))
        return FOMAML(network, inner_lr=0.1, inner_steps=1, **options)

    ours, expected = learner(compile_passes=True), learner()
    batch = next(iter(batches(6)))
    ours.meta_gradient(batch)
    for changed in (ours, expected):
        change(changed)
    theirs = expected.meta_gradient(batch)[0]
    for name, value in ours.meta_gradient(batch)[0].items():
        torch.testing.assert_close(value, theirs[name])
    assert compiled(ours) == 2


@pytest.mark.usefixtures("unfused")
def test_moments_that_moving_to_a_device_replaced_are_seen(network: nn.Module) -> None:
    """nn.Module.to puts other tensors in the place of buffers."""
    learner = Reptile(network, inner_lr=0.1, inner_steps=2, inner_optimizer="adam", compile_passes=True)
    batch = next(iter(batches(6)))
    support = learner.support(batch.support_x, batch.support_y, 2)
    before, _ = learner.in_passes(learner.adapt_pass, support)
    assert isinstance(learner.inner_rule, Adam)
    second = learner.inner_rule.second
    for name, buffer in list(second.named_buffers()):
        second.register_buffer(name, torch.ones_like(buffer))
    after, expected = learner.in_passes(learner.adapt_pass, support)[0], learner.adapt_pass(support)[0]
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value)
        assert not torch.equal(before[name], value)


@pytest.mark.usefixtures("unfused")
def test_a_copy_reads_its_own_parameters(network: nn.Module) -> None:
    learner = FOMAML(network, inner_lr=0.1, inner_steps=1, compile_passes=True)
    batch = next(iter(batches(6)))
    before = learner.meta_gradient(batch)[0]
    other = copy.deepcopy(learner)
    with torch.no_grad():
        for p in other.network.parameters():
            p.mul_(2)
    expected = FOMAML(other.network, inner_lr=0.1, inner_steps=1).meta_gradient(batch)[0]
    for name, value in other.meta_gradient(batch)[0].items():
        torch.testing.assert_close(value, expected[name])
    for name, value in learner.meta_gradient(batch)[0].items():
        assert torch.equal(value, before[name])


@pytest.mark.usefixtures("unfused")
def test_there_is_an_end_to_compiling(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MOST", 1)
    learner = FOMAML(network, inner_lr=0.1, inner_steps=1, compile_passes=True)
    batch = next(iter(batches(6)))
    learner.meta_gradient(batch)
    learner.inner_lr = 0.2
    with pytest.warns(UserWarning, match=r"passes .*: 1 "):
        ours = learner.meta_gradient(batch)[0]
    for name, value in FOMAML(network, inner_lr=0.2, inner_steps=1).meta_gradient(batch)[0].items():
        assert torch.equal(ours[name], value)


def test_dropout_draws_anew_in_every_step(network: nn.Module) -> None:
    learner = FOMAML(nn.Sequential(nn.Dropout(0.5), network), inner_lr=0.1, inner_steps=1, compile_passes=True)
    batch = next(iter(batches(6)))
    first, second = (learner.meta_gradient(batch)[1] for _ in range(2))
    assert compiled(learner) == 1
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    third = learner.meta_gradient(batch)[1]
    torch.manual_seed(7)
    assert torch.equal(learner.meta_gradient(batch)[1], third)


class Branching(nn.Module):
    """Asks for the value of an activation, or of a buffer, which no graph can hold."""

    def __init__(self, network: nn.Module, by: str) -> None:
        super().__init__()
        self.network, self.by = network, by
        self.register_buffer("factor", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x)
        factor = self.get_buffer("factor")
        if self.by == "an activation":
            return y if y.sum().item() > 0 else 2 * y
        if self.by == "a buffer":
            return y if factor[0] > 0 else 2 * y
        if self.by == "a list":
            return sum(factor.tolist()) * y
        if self.by == "an array":
            return float(factor.numpy().sum()) * y
        return y * factor[factor > 0].sum()


@pytest.mark.parametrize("by", ["an activation", "a buffer", "the shape of a selection", "a list", "an array"])
@pytest.mark.parametrize("compile_passes", [True, "record"])
def test_what_reads_values_runs_as_it_is(by: str, compile_passes: Compile, network: nn.Module) -> None:
    network = Branching(network, by)
    batch = next(iter(batches(6)))
    learner = FOMAML(network, inner_lr=0.1, inner_steps=1, compile_passes=compile_passes)
    with pytest.warns(UserWarning, match=REFUSAL):
        learner.meta_gradient(batch)
    for own in (network, learner.network):
        own.get_buffer("factor").neg_()
    expected = FOMAML(network, inner_lr=0.1, inner_steps=1).meta_gradient(batch)[0]
    for name, value in learner.meta_gradient(batch)[0].items():
        assert torch.equal(value, expected[name])


def test_recomputed_steps_are_refused(network: nn.Module) -> None:
    with pytest.raises(InputError, match=r"compile_passes .*recompute_inner_steps"):
        MAML(network, compile_passes=True, recompute_inner_steps=True)
    FOMAML(network, compile_passes=True, recompute_inner_steps=True)  # recomputes nothing


class Unsteady(nn.Module):
    """Depends on what a graph would repeat: random numbers of Python, or its own count of calls."""

    count: Tensor

    def __init__(self, network: nn.Module, kind: str) -> None:
        super().__init__()
        self.network, self.kind, self.calls = network, kind, 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        factor = random.random() if self.kind == "random numbers" else 0.0
        if self.kind == "attributes":
            self.calls += 1
            factor = float(self.calls)
        y: Tensor = self.network(x)
        if self.kind == "buffers":
            self.count.add_(1.0)
            return self.count.clone() * y
        return factor * y


@pytest.mark.parametrize("kind", ["random numbers", "attributes", "buffers"])
@pytest.mark.parametrize("compile_passes", [True, "record"])
def test_what_a_graph_would_repeat_is_refused(kind: str, compile_passes: Compile, network: nn.Module) -> None:
    """And the step that shows it counts as one step."""
    batch = next(iter(batches(6)))

    def losses(**options: Any) -> list[Tensor]:
        learner = FOMAML(Unsteady(network, kind), inner_lr=0.1, inner_steps=1, **options)
        random.seed(0)
        return [learner.meta_gradient(batch)[1] for _ in range(3)]

    with pytest.warns(UserWarning, match=f"as they are: the pass .*{kind}") as caught:
        ours = losses(compile_passes=compile_passes)
    assert len([w for w in caught if "as they are" in str(w.message)]) == 1
    for one, expected in zip(ours, losses(), strict=True):
        assert torch.equal(one, expected)


class DropsAgain(nn.Module):
    """Checkpointing sets the random state back, and some draw from a generator of their own."""

    def __init__(self, network: nn.Module, how: str) -> None:
        super().__init__()
        self.network, self.how, self.generator = network, how, torch.Generator()

    def forward(self, x: Tensor) -> Any:
        if self.how == "checkpoint":
            return checkpoint(lambda x: self.network(nn.functional.dropout(x, 0.5)), x, use_reentrant=False)
        if self.how == "a seed":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                return self.network(x * torch.rand(6))
        return self.network(x * torch.rand(6, generator=self.generator))


@pytest.mark.parametrize("how", ["checkpoint", "a seed", "a generator"])
def test_what_sets_random_states_is_not_recorded(how: str, network: nn.Module) -> None:
    batch = next(iter(batches(6)))

    def losses(compile_passes: Compile) -> list[Tensor]:
        learner = FOMAML(DropsAgain(network, how), inner_lr=0.1, inner_steps=1, compile_passes=compile_passes)
        torch.manual_seed(0)
        return [learner.meta_gradient(batch)[1] for _ in range(3)]

    with pytest.warns(UserWarning, match="runs? as (it is|they are)"):
        ours = losses("record")
    if how != "a generator":  # which examining and recording have moved
        assert all(map(torch.equal, ours, losses(False)))


def test_a_loss_that_is_annealed_is_seen(network: nn.Module) -> None:
    weight, batch = [1.0], next(iter(batches(6)))
    loss = lambda predictions, targets: weight[0] * nn.functional.cross_entropy(predictions, targets)  # noqa: E731
    learner = FOMAML(network, loss=loss, inner_lr=0.1, inner_steps=1, compile_passes="record")
    before = learner.meta_gradient(batch)[1]
    weight[0] = 2.0
    expected = FOMAML(network, loss=loss, inner_lr=0.1, inner_steps=1).meta_gradient(batch)[1]
    after = learner.meta_gradient(batch)[1]
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


def test_recomputed_steps_are_not_recorded(network: nn.Module) -> None:
    learner = MAML(network, recompute_inner_steps=True, compile_passes="record")
    learner.meta_gradient(next(iter(batches(6))))
    assert compiled(learner) == 0


@pytest.fixture
def recorded_after_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """By compile_passes auto."""
    monkeypatch.setattr("meta_lightning.inner.passes.RECORD_AFTER", 2)


@pytest.mark.usefixtures("recorded_after_two")
def test_auto_records_each_kind_of_pass_after_some_of_them(network: nn.Module) -> None:
    learner, expected = (MAML(network, inner_steps=1, compile_passes=option) for option in ("auto", False))
    assert isinstance(learner, MAML)
    assert isinstance(expected, MAML)
    counts = []
    for batch in [*batches(6), *batches(6)]:
        smaller = TaskBatch(*(part[:2] for part in batch))
        for tasks in (batch, smaller):
            ours, theirs = (one.meta_gradient(tasks)[0] for one in (learner, expected))
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        counts.append(compiled(learner))
    assert counts == [0, 0, 2, 2, 2, 2]


def test_passes_whose_settings_always_change_are_not_counted_for_ever(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "SEEN", 3)
    learner, batch = MAML(network, inner_steps=1), next(iter(batches(6)))

    def annealed(steps: int) -> None:
        for step in range(steps):
            learner.inner_lr = 0.1 / (step + 1)
            learner.meta_gradient(batch)

    with pytest.warns(UserWarning, match="run as they are: they have had 3 different shapes or settings"):
        annealed(8)
    assert len(learner.passes.compiled.seen) == 4


@pytest.mark.usefixtures("recorded_after_two")
@pytest.mark.parametrize("each_step", [False, True])
@pytest.mark.parametrize("transductive", [False, True])
@pytest.mark.parametrize(("algorithm", "options"), [*ALGORITHMS, (MAML, {"head_start": Prototypes(), "inner_lr": 0.1})])
def test_evaluation_is_recorded_to_the_bit(
    algorithm: type[MetaLearner], options: dict[str, Any], transductive: bool, each_step: bool, network: nn.Module
) -> None:
    def answers(compile_passes: Compile) -> tuple[list[Tensor], int]:
        learner = algorithm(
            copy.deepcopy(network), inner_steps=2, transductive=transductive, compile_passes=compile_passes, **options
        )
        found = []
        with torch.inference_mode():
            for batch in [*batches(6), *batches(6)]:
                of_classes = batch._replace(support_y=torch.arange(4).remainder(2).expand(3, 4))
                found += [a.predictions for a in learner.eval().answers(of_classes, each_step)]
        return found, compiled(learner)

    (ours, count), (expected, none) = answers("auto"), answers(False)
    assert (count, none) == (1, 0)
    assert all(map(torch.equal, ours, expected))


@pytest.mark.usefixtures("unfused")
def test_evaluation_is_not_compiled(network: nn.Module) -> None:
    learner = MAML(network, inner_steps=1, compile_passes=True).eval()
    learner.answers(next(iter(batches(6))))
    assert compiled(learner) == 0


class Saving(L.Callback):
    """Saves a checkpoint after two meta-iterations, from which a killed process would go on."""

    def on_train_batch_end(self, trainer: L.Trainer, learner: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "at2.ckpt")


@pytest.mark.usefixtures("recorded_after_two")
def test_a_resumed_run_that_records_nothing_is_the_same(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

    def fit(ckpt_path: str | None = None) -> MAML:
        learner = MAML(copy.deepcopy(network), inner_lr=0.1, inner_steps=2)
        run = trainer(max_steps=4, limit_val_batches=0, default_root_dir=tmp_path, callbacks=[Saving()])
        run.fit(learner, datamodule=Sinusoid(meta_batch_size=3), ckpt_path=ckpt_path)
        return learner

    whole, resumed = fit(), fit(str(tmp_path / "at2.ckpt"))
    assert (compiled(whole), compiled(resumed)) == (1, 0)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_torchscript_runs_records(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss times a number too; and where it cannot, Python does, to the same bits."""
    batch, compile_script = next(iter(batches(6))), torch.jit.CompilationUnit
    ran: list[int] = []

    def halved(predictions: Tensor, y: Tensor) -> Tensor:
        return 0.5 * nn.functional.cross_entropy(predictions, y)

    def spied(source: str) -> Any:
        kernels = compile_script(source).kernels
        return SimpleNamespace(kernels=lambda *args: ran.append(1) or kernels(*args))  # type: ignore[func-returns-value]

    def refused(source: str) -> Any:
        raise RuntimeError("no such kernel")

    def gradient(script: Callable[[str], Any]) -> list[Tensor]:
        monkeypatch.setattr(torch.jit, "CompilationUnit", script)
        learner = MAML(network, halved, inner_lr=0.1, inner_steps=2, compile_passes="record")
        learner.meta_gradient(batch)
        grads = learner.meta_gradient(batch)[0]
        assert compiled(learner) == 1
        return list(grads.values())

    for ours, expected in zip(gradient(spied), gradient(refused), strict=True):
        assert torch.equal(ours, expected)
    assert len(ran) == 2  # compared, and replayed


def test_a_record_tells_equal_inputs_apart(network: nn.Module) -> None:
    """Recorded where support and query set are one tensor, replayed where they are two."""
    first, other = (next(iter(batches(6))) for _ in range(2))
    one = TaskBatch(first.support_x, first.support_y, first.support_x, first.support_y)
    learner = MAML(network, inner_lr=0.1, inner_steps=2, compile_passes="record")
    learner.meta_gradient(one)
    grads = learner.meta_gradient(other)[0]
    assert compiled(learner) == 1
    expected = MAML(network, inner_lr=0.1, inner_steps=2, compile_passes=False).meta_gradient(other)[0]
    for name, value in grads.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.filterwarnings(f"error:{REFUSAL}")
def test_constants_stay_apart_while_other_tensors_die(network: nn.Module) -> None:
    def loss(predictions: Tensor, y: Tensor) -> Tensor:
        held = [predictions + i for i in range(4)]
        weight = torch.tensor(0.1)
        for number in (1.0, 10.0, 100.0):
            held.pop()
            weight = weight + torch.tensor(number)
        return weight * nn.functional.cross_entropy(predictions, y)

    batch = next(iter(batches(6)))
    learner = MAML(network, loss, inner_lr=0.1, inner_steps=2, compile_passes="record")
    _, losses, predictions = learner.meta_gradient(batch)
    assert compiled(learner) == 1
    expected = [111.1 * nn.functional.cross_entropy(*task) for task in zip(predictions, batch.query_y, strict=True)]
    torch.testing.assert_close(losses, torch.stack(expected))


@pytest.mark.filterwarnings(f"error:{REFUSAL}")
def test_a_number_that_the_loss_counts_up_starts_anew_in_every_replay(network: nn.Module) -> None:
    def loss(predictions: Tensor, y: Tensor) -> Tensor:
        weight = torch.tensor(0.5)
        weight += 1
        return weight * nn.functional.cross_entropy(predictions, y)

    batch = next(iter(batches(6)))
    learner = MAML(network, loss, inner_lr=0.1, inner_steps=2, compile_passes="record")
    expected = MAML(network, loss, inner_lr=0.1, inner_steps=2, compile_passes=False).meta_gradient(batch)[0]
    for _ in range(3):
        for name, value in learner.meta_gradient(batch)[0].items():
            assert torch.equal(value, expected[name]), name
    assert compiled(learner) == 1


def test_without_a_compiler_passes_are_recorded(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(graph: Any, **options: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", missing)
    learner, batch = MAML(network, inner_lr=0.1, inner_steps=2, compile_passes=True), next(iter(batches(6)))
    with pytest.warns(UserWarning, match=f"{REFUSAL}.* no C\\+\\+ compiler"):
        learner.meta_gradient(batch)
    (recorded,) = learner.passes.compiled.passes.values()
    assert recorded != learner.pass_gradient
    expected = MAML(network, inner_lr=0.1, inner_steps=2, compile_passes=False).meta_gradient(batch)[0]
    for name, value in learner.meta_gradient(batch)[0].items():
        assert torch.equal(value, expected[name])


def test_another_word_is_refused(network: nn.Module) -> None:
    with pytest.raises(InputError, match=r"compile_passes must be .*'always'"):
        FOMAML(network, compile_passes="always")  # type: ignore[arg-type]
