"""Frozen modules: their statistics and modes, and what runs once per sample."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import trainer
from references import EXACT, TASKS_FROM_A_LIST, adapted_mean, classification, error, fomaml_loop, maml_loop
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from meta_lightning import (
    FOMAML,
    MAML,
    Baseline,
    Predictor,
    Prototypes,
    Reptile,
    TaskBatch,
    TensorTasks,
    load_learner,
    pad_tasks,
    train_maml,
)
from meta_lightning.checks import InputError

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


class Counted(nn.Conv2d):
    """A convolution that counts the samples that all of them, copies included, run on."""

    samples = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.samples += len(x)
        return super().forward(x)


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


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_reptile_behind_frozen_modules(make: Callable[[], nn.Sequential]) -> None:
    network, tasks = make(), batch()
    learner = Reptile(network, inner_lr=0.1, inner_steps=3)
    mean = learner.in_passes(learner.adapt_pass, learner.support(*tasks[:2], 3))[0]
    assert error(mean, adapted_mean(in_train_mode_of_the_rest(network), tasks, 3)) < EXACT


def test_the_patterns_of_both_loops_freeze_too() -> None:
    network, x = nn.Sequential(backbone(), nn.Linear(4, 5)), torch.randn(7, 1, 8, 8)
    learner = MAML(network, inner_freeze=["0.*"], outer_freeze=["0.*"])
    torch.testing.assert_close(learner(x), copy.deepcopy(network).eval()(x), rtol=0, atol=0)
    assert error(learner.meta_gradient(tasks := batch())[0], MAML(frozen(network)).meta_gradient(tasks)[0]) < EXACT


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_evaluation_keeps_features(make: Callable[[], nn.Sequential]) -> None:
    """In Lightning's inference mode, of more batches than the cache had room for at first."""
    one_each = [TaskBatch(*(part[[i % len(part)]] for part in batch())) for i in range(6)]
    loader = DataLoader(one_each, batch_size=None)  # type: ignore[arg-type]
    learner = MAML(make(), inner_lr=0.1, inner_steps=1)
    (scores,) = trainer(precision="64-true").test(learner, loader)
    assert len(learner.task_network.cache.rows) > len(one_each)
    alone = MAML(learner.network, inner_lr=0.1, inner_steps=1).eval()
    losses = [alone.query_scores(alone.answers(tasks)[-1], tasks.query_y)["loss"] for tasks in one_each]
    assert scores["test/loss"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-6)


def frozen(network: nn.Sequential) -> nn.Sequential:
    network[0].requires_grad_(False)
    return network


def counting_network() -> nn.Sequential:
    network = frozen_network()
    body = network[0]
    assert isinstance(body, nn.Sequential)
    body[0] = Counted(1, 4, 3).requires_grad_(False)
    return network


@pytest.mark.parametrize("algorithm", [MAML, FOMAML])
def test_frozen_modules_run_once_per_sample(algorithm: type[MAML]) -> None:
    learner, tasks = algorithm(counting_network(), inner_steps=4, compile_passes=False), batch()
    learner.meta_gradient(tasks)
    Counted.samples = 0
    learner.meta_gradient(tasks)
    assert Counted.samples == 0
    learner.meta_gradient(tasks._replace(support_x=tasks.support_x + 1))
    assert Counted.samples == 32  # 30 in chunks of 8


def test_features_of_other_weights_are_forgotten() -> None:
    network, tasks = frozen_network(), batch()
    learner = FOMAML(network, inner_steps=2)
    before = learner.meta_gradient(tasks)[0]
    with torch.no_grad():
        network[0][0].weight[0, 0, 0, 0] += 0.5
    after = learner.meta_gradient(tasks)[0]
    assert error(after, before) > 1e-3
    assert error(after, FOMAML(network, inner_steps=2).meta_gradient(tasks)[0]) < EXACT


@pytest.mark.parametrize("change", [lambda w: w.flip(0), lambda w: -w])
def test_features_of_permuted_and_of_negated_weights_are_forgotten(change: Callable[[Tensor], Tensor]) -> None:
    network, tasks = frozen_network(), batch()
    learner = FOMAML(network, inner_steps=2)
    before = learner.meta_gradient(tasks)[0]
    for value in (network[0][0].weight, network[0][0].bias):
        value.data.copy_(change(value.data))
    after = learner.meta_gradient(tasks)[0]
    assert error(after, before) > 1e-3
    assert error(after, FOMAML(network, inner_steps=2).meta_gradient(tasks)[0]) < EXACT


class Scaled(nn.Module):
    """Has a mean that no state dict holds, and a plain number."""

    mean: Tensor

    def __init__(self, mean: float, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("mean", torch.tensor(mean), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x - self.mean)


@pytest.mark.parametrize(("mean", "scale"), [(1.0, 2.0), (0.0, 3.0)])
@pytest.mark.parametrize("container", [nn.Sequential, lambda *parts: Folder(*parts)])
def test_features_depend_on_all_that_modules_compute_with(
    container: Callable[..., nn.Sequential], mean: float, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    body, head, tasks = frozen_network()[0], nn.Linear(4, 5), batch()
    learner = FOMAML(container(Scaled(0.0, 2.0), body, head))
    learner.meta_gradient(tasks)
    other = nn.Sequential(Scaled(mean, scale), body, head)
    expected = FOMAML(other).meta_gradient(tasks)[0]
    assert error(FOMAML(container(*other)).meta_gradient(tasks)[0], expected) < EXACT
    learner.network[0].scale = scale
    learner.network[0].mean.fill_(mean)
    assert error(learner.meta_gradient(tasks)[0], expected) < EXACT


def test_frozen_modules_may_write_into_their_input() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sub_(1.0).mul_(2.0)

    network, tasks = frozen_network(), batch()
    expected = FOMAML(nn.Sequential(Scaled(1.0, 2.0), *network)).meta_gradient(tasks)[0]
    before = tasks.support_x.clone()
    assert error(FOMAML(nn.Sequential(InPlace(), *network)).meta_gradient(tasks)[0], expected) < EXACT
    assert torch.equal(tasks.support_x, before)


class Folder(nn.Sequential):
    cache_dir = "features"


def test_features_are_kept_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network, tasks = Folder(*counting_network()), batch()
    expected = FOMAML(network).meta_gradient(tasks)[0]
    FOMAML(network).task_network.examine(tasks.support_x, tasks.support_y)
    again = FOMAML(network)
    again.task_network.examine(tasks.support_x, tasks.support_y)
    Counted.samples = 0
    torch.testing.assert_close(again.meta_gradient(tasks)[0], expected, rtol=0, atol=0)
    assert Counted.samples < 30  # of the examination
    for path in Path("features").iterdir():
        with path.open("ab") as file:
            file.write(b"half a key")  # of a process that was killed
    other = batch()
    torch.testing.assert_close(
        FOMAML(network).meta_gradient(other)[0], FOMAML(nn.Sequential(*network)).meta_gradient(other)[0], rtol=0, atol=0
    )
    with torch.no_grad():
        network[0][0].weight.mul_(2)
    with pytest.warns(UserWarning, match=r"cache_dir features has features of other weights"):
        FOMAML(network).meta_gradient(tasks)
    assert len([*Path("features").glob("*.keys")]) == len([*Path("features").glob("*.values")]) == 2


@pytest.mark.parametrize("contents", [None, b"", bytes(40)])
def test_features_in_a_folder_that_lacks_values_are_computed_again(
    contents: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network, tasks = Folder(*frozen_network()), batch()
    expected = FOMAML(network).meta_gradient(tasks)[0]
    (path,) = Path("features").glob("*.values")
    held = path.read_bytes()
    path.unlink() if contents is None else path.write_bytes(contents)
    with pytest.warns(UserWarning, match=r"cache_dir features has features .*no longer make"):
        again = FOMAML(network).meta_gradient(tasks)[0]
    assert error(again, expected) < EXACT
    assert path.read_bytes() == held


def test_processes_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network, (first, second, third) = Folder(*counting_network()), (batch() for _ in range(3))
    expected = [FOMAML(nn.Sequential(*network)).meta_gradient(tasks)[0] for tasks in (first, second, third)]
    one, other = (FOMAML(network, compile_passes=False) for _ in range(2))
    for learner, tasks, gradient in zip((one, other, one), (first, second, third), expected, strict=True):
        assert error(learner.meta_gradient(tasks)[0], gradient) < EXACT
    Counted.samples = 0
    for tasks, gradient in zip((first, second, third), expected, strict=True):
        assert error(one.meta_gradient(tasks)[0], gradient) < EXACT
    assert Counted.samples == 0  # also of those that the other wrote
    for path in Path("features").iterdir():
        path.unlink()
    FOMAML(network).meta_gradient(second)  # has new files, of other rows
    with pytest.warns(UserWarning, match=r"cache_dir must be writable, got features \(another process has replaced"):
        one.meta_gradient(batch())
    for tasks, gradient in zip((first, second, third), expected, strict=True):
        assert error(one.meta_gradient(tasks)[0], gradient) < EXACT


def test_samples_that_another_learner_has_kept_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network = frozen_network()
    learners = [FOMAML(Folder(*copy.deepcopy(network))) for _ in range(2)]
    for tasks in (
        batch(),
        batch(),
        batch(),
    ):  # of the second and third the second learner has no features, but the files do
        expected = FOMAML(copy.deepcopy(network)).meta_gradient(tasks)[0]
        for learner in learners:
            assert error(learner.meta_gradient(tasks)[0], expected) < EXACT


def test_features_in_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    network, batches = frozen_network(), [batch() for _ in range(3)]
    row = network[0](batches[0].support_x[0, :1]).nbytes
    monkeypatch.setattr("meta_lightning.inner.feature_cache.MOST_BYTES", 100 * row)
    learner = FOMAML(network)
    for tasks in batches * 2:
        expected = FOMAML(nn.Sequential(*network)).meta_gradient(tasks)[0]
        assert error(learner.meta_gradient(tasks)[0], expected) < EXACT
        assert len(learner.task_network.cache.rows) <= 160


@pytest.mark.parametrize("kind", [nn.Sequential, lambda *parts: Folder(*parts)])
def test_features_of_samples_that_are_served_are_not_kept(
    kind: Callable[..., nn.Sequential], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = batch()
    learner = FOMAML(kind(*frozen_network()))
    predictor = learner.adapt(tasks.support_x[0], tasks.support_y[0])
    predictor(tasks.query_x[0])
    learner.eval().inner_update(tasks.support_x[0], tasks.support_y[0])
    assert not learner.task_network.cache.rows
    assert not [*tmp_path.iterdir()]
    trained = train_maml(kind(*frozen_network()), [tasks])[1]
    count = len(trained.task_network.cache.rows)
    assert count == 60
    trained.adapt(tasks.support_x[0] + 1, tasks.support_y[0])
    assert len(trained.task_network.cache.rows) == count
    trained.trainer.validate(trained, DataLoader([batch()], batch_size=None), verbose=False)
    assert len(trained.task_network.cache.rows) == 2 * count


def test_the_weights_are_compared_once_per_meta_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, tasks, calls = FOMAML(frozen_network()), batch(), []
    learner.meta_gradient(tasks)
    cache = learner.task_network.cache
    select = cache.select
    monkeypatch.setattr(cache, "select", lambda *args: (calls.append(1), select(*args)))
    learner.meta_gradient(tasks)
    learner.predict_tasks(tasks)
    assert len(calls) == 2


def test_features_in_a_folder_of_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Code(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs()

    monkeypatch.chdir(tmp_path)
    network, tasks = [Code(), *frozen_network()], batch()
    FOMAML(Folder(*network)).meta_gradient(tasks)
    monkeypatch.setattr(Code, "forward", lambda self, x: x.tanh())
    expected = FOMAML(nn.Sequential(*network)).meta_gradient(tasks)[0]
    with pytest.warns(UserWarning, match=r"cache_dir features .*no longer make"):
        assert error(FOMAML(Folder(*network)).meta_gradient(tasks)[0], expected) < EXACT
    assert error(FOMAML(Folder(*network)).meta_gradient(tasks)[0], expected) < EXACT


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("features").write_text("")
    with pytest.warns(UserWarning, match="cache_dir must be writable, got features"):
        FOMAML(Folder(*frozen_network())).meta_gradient(batch())


def test_features_of_samples_that_never_come_twice_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meta_lightning.inner.feature_cache.PATIENCE", 100)
    learner = FOMAML(frozen_network())
    for _ in range(2):
        learner.meta_gradient(batch())
    with pytest.warns(UserWarning, match=r"no longer kept.*transforms"):
        learner.meta_gradient(batch())
    assert not learner.task_network.cache.rows


def test_validation_does_not_hide_that_samples_of_training_never_come_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meta_lightning.inner.feature_cache.PATIENCE", 200)
    learner, same = FOMAML(frozen_network()), batch()

    def train() -> None:
        for tasks in [same, same, *(batch() for _ in range(12))]:
            learner.meta_gradient(tasks)

    with pytest.warns(UserWarning, match=r"no longer kept.*transforms"):
        train()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: nn.BatchNorm2d(4, track_running_stats=False), "mix samples"),
        (lambda: Noise(), "draw random numbers"),
        (lambda: Count(), r"change 0\.3\.count"),
    ],
)
def test_frozen_modules_that_do_not_depend_on_the_sample_alone(module: Callable[[], nn.Module], reason: str) -> None:
    body = backbone()
    network = nn.Sequential(nn.Sequential(*body[:3], module(), *body[4:]).requires_grad_(False), nn.Linear(4, 5))
    with pytest.warns(UserWarning, match=f"Frozen modules run at every inner step, since they {reason}"):
        FOMAML(network).meta_gradient(batch())


def test_frozen_modules_that_take_no_integers_are_said_to_run_at_every_inner_step() -> None:
    network, tasks = frozen_network(), batch()
    floats = tasks._replace(support_x=tasks.support_x.mul(3).round(), query_x=tasks.query_x.mul(3).round())
    integers = floats._replace(support_x=floats.support_x.long(), query_x=floats.query_x.long())
    with pytest.warns(UserWarning, match="Frozen modules run at every inner step, since they take no integers: "):
        ours = FOMAML(network).meta_gradient(integers)[0]
    assert error(ours, FOMAML(network).meta_gradient(floats)[0]) < EXACT


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Count(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x


def test_dropout_behind_frozen_modules_is_drawn_at_every_inner_step() -> None:
    network = nn.Sequential(*backbone().requires_grad_(False), nn.Dropout(0.5), nn.Linear(4, 5))
    learner = FOMAML(network)
    parts = learner.task_network.find_parts()
    assert parts is not None
    assert [name for name, _ in parts.rest.named_children()] == ["2", "3", "4", "5", "6", "7"]


def test_a_predictor_holds_body_and_head(tmp_path: Path) -> None:
    network, x, y = frozen_network(), torch.randn(10, 1, 8, 8), torch.arange(5).repeat(2)
    predictor = FOMAML(network, head_start=Prototypes(), inner_lr=0.1).adapt(x, y)
    body = copy.deepcopy(network[0]).eval()
    torch.testing.assert_close(predictor(x), predictor.network[1](body(x)), rtol=0, atol=1e-12)
    predictor.save(tmp_path / "a.safetensors")
    loaded = Predictor.load(tmp_path / "a.safetensors", frozen_network())
    torch.testing.assert_close(loaded(x), predictor(x), rtol=0, atol=0)


def test_statistics_are_in_checkpoints(tmp_path: Path) -> None:
    network, x = frozen_network(), torch.randn(7, 1, 8, 8)
    *_, learner, _ = train_maml(network, [batch()] * 2)
    learner.trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.testing.assert_close(load_learner(tmp_path / "a.ckpt", frozen_network())(x), learner(x), rtol=0, atol=0)
    # of a former version, which normalised by batch statistics
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    for name in [name for name in state if "running_" in name or "num_batches" in name]:
        del state[name]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    old = load_learner(tmp_path / "old.ckpt", frozen_network())
    network[0].train()
    network[0][3].eval()
    torch.testing.assert_close(old(x), network(x), rtol=0, atol=1e-12)


def test_a_network_without_a_parameter_to_adapt() -> None:
    network, tasks = frozen_network().requires_grad_(False), batch()
    with pytest.raises(InputError, match=r"network must have a parameter .* got none"):
        train_maml(network, [tasks])
    with pytest.raises(InputError, match=r"network must have a parameter .* got none"):
        FOMAML(network).adapt(tasks.support_x[0], tasks.support_y[0])


class Whole(nn.Module):
    """A network that is no ``nn.Sequential``, all of which runs in the passes."""

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


@pytest.mark.parametrize("compile_passes", [False, "record"])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_padded_recorded_and_evaluated_tasks_as_without_a_split(
    make: Callable[[], nn.Sequential], compile_passes: bool
) -> None:
    network = make()
    split, whole = (
        MAML(part, inner_lr=0.1, inner_steps=2, transductive=False, compile_passes=compile_passes)
        for part in (network, Whole(network))
    )
    tasks = batch()
    unequal = pad_tasks([tuple(t[i, : 10 - 3 * i] for t in tasks) for i in range(len(tasks.support_x))])
    for of_size in (tasks, unequal, tasks):
        ours, theirs = (learner.meta_gradient(of_size)[0] for learner in (split, whole))
        assert error(ours, {name.removeprefix("network."): g for name, g in theirs.items()}) < EXACT
    assert split.task_network.parts is not None
    assert whole.task_network.parts is None
    for answers, expected in zip(split.predict_tasks(tasks), whole.predict_tasks(tasks), strict=True):
        torch.testing.assert_close(answers, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("outputs", [5, 3])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_delta_loads_onto_its_base(make: Callable[[], nn.Sequential], outputs: int, tmp_path: Path) -> None:
    network, x, y = make(), torch.randn(10, 1, 8, 8), torch.arange(5).repeat(2)
    network[1] = nn.Linear(4, outputs)
    base = copy.deepcopy(network)
    predictor = FOMAML(network, inner_lr=0.1).adapt(x, y)  # of 5 classes with 3 outputs: in groups
    predictor.save(tmp_path / "whole.safetensors")
    predictor.save(tmp_path / "delta.safetensors", delta=True)
    names = [*load_file(tmp_path / "delta.safetensors")]
    assert not [name for name in names if re.match(r"network\.(networks\.\d+\.)?0\.[01]\.", name)]
    for onto in (base, predictor.network.networks[0] if outputs == 3 else predictor.network):
        loaded = Predictor.load(tmp_path / "delta.safetensors", onto)
        torch.testing.assert_close(loaded(x), predictor(x), rtol=0, atol=0)
    loaded.save(tmp_path / "again.safetensors", delta=True)
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(tmp_path / "delta.safetensors").keys()
    with torch.no_grad():
        base[0][0].weight.mul_(2)
    with pytest.raises(InputError, match=r"network must be the base of .*delta.*, of checksum .* got one of"):
        Predictor.load(tmp_path / "delta.safetensors", base)


def test_deltas_that_are_refused(tmp_path: Path) -> None:
    x, y = torch.randn(10, 4), torch.arange(5).repeat(2)
    with pytest.raises(InputError, match=r"delta must be False .*frozen parameters, got True"):
        FOMAML(nn.Linear(4, 5)).adapt(x, y).save(tmp_path / "a.safetensors", delta=True)
    assert not [*tmp_path.iterdir()]
    network = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 5))
    with pytest.raises(InputError, match=r"path of a delta must be .*a\.pt2"):
        FOMAML(network).adapt(x, y).save(tmp_path / "a.pt2", delta=True)


def test_frozen_modules_run_once_per_sample_in_plain_training() -> None:
    seen: list[int] = []

    class Body(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    body = Body(4, 6).requires_grad_(False)
    data = TensorTasks(torch.randn(40, 4), torch.arange(40) % 10, ways=2, queries=1, train_labels="split")
    learner = Baseline(nn.Sequential(body, nn.Linear(6, 6)), inner_steps=1)
    trainer(max_steps=50, limit_val_batches=0).fit(learner, data)
    assert 24 <= sum(seen) <= 100  # 6 of 10 classes train, and the network is examined; 4,800 samples are in the tasks
