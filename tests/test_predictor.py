"""From a checkpoint to a predictor."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import TINY, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from meta_lightning import (
    FOMAML,
    MAML,
    MLP,
    Conv4,
    Glyphs,
    ImageTransforms,
    MetaLearner,
    Predictor,
    Reptile,
    Sinusoid,
    load_learner,
)
from meta_lightning.checks import InputError
from meta_lightning.cli import main


@pytest.fixture
def task(glyphs: Glyphs) -> list[Tensor]:
    """A 5-way 2-shot task, uint8: support_x, support_y, query_x, query_y."""
    data = Glyphs(shots=2, queries=3)
    return [part[0] for part in data.task_set("test").batch([0])]


@pytest.fixture
def learner() -> MAML:
    torch.manual_seed(0)
    return MAML(Conv4(filters=4), inner_lr=0.1, inner_steps=2)


# -------------------------------------------------------------------------------- load_learner


@pytest.mark.parametrize("algorithm", [MAML, FOMAML, Reptile])
def test_load_learner_finds_class_and_network(algorithm: type[MetaLearner], glyphs: Glyphs, tmp_path: Path) -> None:
    options = f"--model {algorithm.__name__} --model.test_inner_steps 3 --trainer.max_steps 1"
    main(f"fit --config {TINY} {options} --checkpoint.dirpath {tmp_path}".split())
    learner = load_learner(tmp_path / "last.ckpt")
    assert type(learner) is algorithm
    assert not learner.training
    assert learner.test_inner_steps == 3
    assert isinstance(learner.network, Conv4)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in learner.state_dict().items())
    assert (learner.form.image_size, learner.form.channels, learner.form.ink) == (28, 1, True)


@pytest.mark.parametrize("algorithm", [MAML, FOMAML, Reptile])
def test_a_network_made_in_python_has_to_be_given(algorithm: Any, mlp: MLP, sinusoid: Sinusoid, tmp_path: Path) -> None:
    fit = trainer(max_steps=1, limit_val_batches=0)
    fit.fit(algorithm(mlp, loss=nn.L1Loss()), sinusoid)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"^network .*a\.ckpt"):
        load_learner(tmp_path / "a.ckpt")
    network = MLP(hidden=[8])
    learner = load_learner(tmp_path / "a.ckpt", network, nn.L1Loss())
    assert type(learner) is algorithm
    assert isinstance(learner.loss, nn.L1Loss)
    assert torch.equal(network.head.weight, mlp.head.weight)
    with pytest.raises(ValueError, match=r"checkpoint .*network\b.*\(9,.*\(8,"):
        load_learner(tmp_path / "a.ckpt", MLP(hidden=[9]))


def test_what_load_learner_refuses(mlp: MLP, sinusoid: Sinusoid, tmp_path: Path) -> None:
    class Own(MAML):
        pass

    with pytest.raises(ValueError, match=r"path .*nothing\.ckpt"):
        load_learner("nothing.ckpt")
    fit = trainer(max_steps=1, limit_val_batches=0)
    fit.fit(Own(mlp), sinusoid)
    fit.save_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match=r"path .*\bOwn\b"):
        load_learner(tmp_path / "own.ckpt", mlp)
    content = torch.load(tmp_path / "own.ckpt", weights_only=True)
    content["hyper_parameters"]["_class_path"] = "torch.nn.Linear"
    torch.save(content, tmp_path / "linear.ckpt")
    with pytest.raises(ValueError, match=r"path .*\btorch\.nn\.Linear\b"):
        load_learner(tmp_path / "linear.ckpt", mlp)


# -------------------------------------------------------------------------------- adapt


def test_a_predictor_without_batch_norm_is_the_plain_loop() -> None:
    torch.manual_seed(0)
    network = MLP(in_features=6, hidden=[8], out_features=4)
    x, y, queries = torch.randn(12, 6), torch.arange(4).repeat(3), torch.randn(20, 6)
    predictor = MAML(network, inner_lr=0.3, test_inner_steps=3).adapt(x, y)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    expected = network(queries).detach()
    assert torch.allclose(predictor(queries), expected, atol=1e-6)
    assert torch.allclose(predictor.predict_proba(queries), expected.softmax(1), atol=1e-6)
    assert predictor.predict(queries) == [str(number) for number in expected.argmax(1).tolist()]


def test_batch_norm_holds_the_statistics_of_the_support_set(learner: MAML, task: list[Tensor]) -> None:
    support_x, support_y, query_x, _ = task
    predictor = learner.adapt(support_x, support_y)
    learner.eval()
    together = learner.forward_with_weights(support_x, learner.inner_update(support_x, support_y))
    assert torch.allclose(predictor(support_x), together, atol=1e-5)
    alone = torch.cat([predictor(query[None]) for query in query_x])
    assert torch.allclose(predictor(query_x), alone, atol=1e-5)


def test_a_predictor_has_storage_of_its_own(task: list[Tensor]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(Conv4(filters=4), nn.BatchNorm1d(5)).train()
    network[0].features[0].weight.requires_grad_(False)  # type: ignore[union-attr]
    learner = MAML(network, inner_lr=0.1)
    learner.network[0].features.eval()  # type: ignore[index,union-attr]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in learner.modules()]
    predictor = learner.adapt(*task[:2])
    assert [module.training for module in learner.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    theirs = {p.data_ptr() for p in [*learner.parameters(), *network.parameters(), *network.buffers()]}
    ours = [*predictor.parameters(), *predictor.buffers()]
    assert not theirs & {p.data_ptr() for p in ours}
    assert not any(p.requires_grad for p in ours)
    assert torch.equal(predictor.network[0].features[0].weight, before["0.features.0.weight"])  # type: ignore[index,union-attr]


def test_pixels_are_scaled_and_normalised_as_in_training(checkpoint: str, task: list[Tensor]) -> None:
    support_x, support_y, query_x, _ = task
    learner = load_learner(checkpoint)
    predictor = learner.adapt(support_x, support_y)
    assert torch.equal(predictor(query_x), predictor(query_x.float() / 255))
    support, query = ((part.float() / 255 - 0.2) / 0.5 for part in (support_x, query_x))
    by_hand = MAML(learner.network, inner_lr=0.01, test_inner_steps=2).adapt(support, support_y)
    assert torch.allclose(predictor(query_x), by_hand(query), atol=1e-5)


def test_a_learner_just_trained_knows_the_form_of_its_samples(glyphs: Glyphs) -> None:
    from meta_lightning import ImageTransforms

    data = Glyphs(val_tasks=1, meta_batch_size=1, transforms=ImageTransforms(mean=[0.3], std=[0.6]))
    learner = MAML(Conv4(filters=4))
    trainer(max_steps=1, limit_val_batches=0).fit(learner, data)
    assert (learner.form.image_size, learner.form.mean, learner.form.std) == (28, [0.3], [0.6])


def test_classes_are_named(learner: MAML, task: list[Tensor]) -> None:
    support_x, support_y, query_x, _ = task
    plain = learner.adapt(support_x, support_y)
    assert plain.class_names == ["0", "1", "2", "3", "4"]
    words = ["ant", "bee", "cat", "dog", "eel"]
    named = learner.adapt(support_x, support_y, class_names=words)
    of_names = learner.adapt(support_x, [words[number] for number in support_y.tolist()])
    other_numbers = learner.adapt(support_x.numpy(), 10 * support_y.numpy() - 3)
    assert named.class_names == of_names.class_names == words
    assert other_numbers.class_names == ["-3", "7", "17", "27", "37"]
    for predictor in (named, of_names, other_numbers):
        assert torch.equal(predictor(query_x), plain(query_x))
    assert named.predict(query_x) == [words[number] for number in plain(query_x).argmax(1).tolist()]


def test_steps(learner: MAML, task: list[Tensor]) -> None:
    support_x, support_y, query_x, _ = task
    learner.test_inner_steps = 4
    assert torch.equal(learner.adapt(support_x, support_y)(query_x), learner.adapt(support_x, support_y, 4)(query_x))
    assert not torch.equal(
        learner.adapt(support_x, support_y)(query_x), learner.adapt(support_x, support_y, 1)(query_x)
    )


def test_it_adapts_in_inference_mode(learner: MAML, task: list[Tensor]) -> None:
    expected = learner.adapt(*task[:2])(task[2])
    with torch.inference_mode():
        assert torch.equal(learner.adapt(task[0] * 1, task[1] * 1)(task[2]), expected)


def test_regression(sinusoid: Sinusoid) -> None:
    learner = MAML(MLP(hidden=[8]), inner_lr=0.02, test_inner_steps=3).eval()
    support_x, support_y, query_x, _ = (part[0] for part in sinusoid.task_set("test").batch([0]))
    expected = learner.forward_with_weights(query_x, learner.inner_update(support_x, support_y))
    for targets in (support_y, support_y[:, 0].numpy()):
        predictor = learner.adapt(support_x, targets)
        assert predictor.class_names is None
        assert torch.allclose(predictor(query_x), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"predictor .*classes\b.* regression"):
        predictor.predict(query_x)


# -------------------------------------------------------------------------------- other numbers of classes


def test_fewer_classes_take_the_first_outputs(learner: MAML, task: list[Tensor]) -> None:
    support_x, support_y, query_x, _ = task
    few = support_y < 3
    predictor = learner.adapt(support_x[few], support_y[few])
    assert predictor.class_names == ["0", "1", "2"]
    assert predictor(query_x).shape == (15, 3)
    assert torch.equal(predictor(query_x), predictor.network(query_x.float() / 255)[:, :3])


@pytest.mark.parametrize(
    "make",
    [
        lambda: MAML(nn.Sequential(nn.Linear(6, 3), nn.PReLU())),
        lambda: MAML(nn.Sequential(nn.Linear(6, 3), nn.Softmax(1), nn.Linear(3, 3).requires_grad_(False))),
        lambda: Reptile(nn.Linear(6, 3), inner_optimizer="adam"),
    ],
    ids=["not-linear", "not-trained", "of-adam"],
)
def test_any_network_takes_more_classes_than_it_has_outputs(make: Any) -> None:
    x, y = torch.randn(4, 6), torch.arange(4)
    with pytest.warns(UserWarning, match=r"10 adaptations .*\b3 outputs for 4 classes"):
        assert make().adapt(x, y).predict_proba(x).shape == (4, 4)
    assert make().adapt(x[:3], y[:3]).class_names == ["0", "1", "2"]


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.rand(4, 1, 28, 28), [0, 0, 0, 0], {}, r"\by .*\b2 .*\[0\]"),
        (torch.rand(4, 1, 28, 28), [0, 1, 2], {}, r"x and y .*\b4 .*\b3"),
        (torch.rand(2, 1, 28, 28), [[0], [1]], {}, r"\by .*\[S\].*\[2, 1\]"),
        (torch.rand(2, 3, 28, 28), [0, 1], {}, r"\bx .*\[S, 1, 28, 28\].*\[2, 3, 28, 28\]"),
        (torch.rand(2, 1, 32, 32), [0, 1], {}, r"\bx .*\[S, 1, 28, 28\].*\[2, 1, 32, 32\]"),
        (torch.full((2, 1, 28, 28), np.nan), [0, 1], {}, r"\bx .*\b2 of 2\b"),
        (torch.rand(2, 1, 28, 28), [0, 1], {"steps": 0}, r"\bsteps .* 0"),
        (torch.rand(2, 1, 28, 28), [0, 1], {"class_names": ["a"]}, r"class_names .*\b2 .*\['a'\]"),
        (torch.rand(2, 1, 28, 28), [0, 1], {"class_names": ["a", "a"]}, r"class_names .*\b2 .*\['a', 'a'\]"),
        (torch.rand(2, 1, 28, 28), [0.0, 1.0], {"class_names": ["a", "b"]}, r"class_names .*floating-point"),
    ],
)
def test_what_adapt_refuses(x: Tensor, y: Any, options: dict[str, Any], message: str, checkpoint: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_learner(checkpoint).adapt(x, y, **options)


def test_what_does_not_fit_the_network_is_refused(learner: MAML, task: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"\bx .*\[2, 3, 28, 28\]: .*channels"):
        learner.adapt(torch.rand(2, 3, 28, 28), [0, 1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\by .*floating-point\b.*\b2 classes"):
        MAML(MLP(out_features=1)).adapt(torch.rand(2, 1), torch.arange(2))
    predictor = learner.adapt(*task[:2])
    with pytest.raises(ValueError, match=r"\bx .*\[S, 1, 28, 28\].*\[1, 28, 28\]"):
        predictor.predict(task[2][0])


def test_an_adaptation_that_diverges_is_an_error(learner: MAML, task: list[Tensor]) -> None:
    learner.inner_lr = 1e30
    with pytest.raises(FloatingPointError, match=r"adaptation .*\b5 .*1e\+30"):
        learner.adapt(*task[:2], steps=5)


# -------------------------------------------------------------------------------- without the other queries


def test_queries_alone_with_the_support_set_are_the_plain_loop(learner: MAML, glyphs: Glyphs) -> None:
    batch = Glyphs(shots=1, queries=3).task_set("test").batch([0, 1, 2])
    support_x, query_x = batch.support_x.float() / 255, batch.query_x.float() / 255
    theta = {n: torch.stack([p * scale for scale in (1, 0.9, 1.1)]) for n, p in learner.meta_parameters().items()}
    predictions = learner.task_network.predict_queries(theta, support_x, query_x, transductive=False)
    for task in range(3):
        params = {name: p[task] for name, p in theta.items()}
        for number, query in enumerate(query_x[task]):
            together = torch.cat([support_x[task], query[None]])
            expected = torch.func.functional_call(learner.network, params, (together,))[-1]
            assert torch.allclose(predictions[task, number], expected, atol=1e-5)
    common = learner.task_network.predict_queries(theta, support_x, query_x, transductive=True)
    assert torch.equal(common, learner.task_network.predict(theta, query_x))
    assert not torch.allclose(common, predictions, atol=1e-2)


class Refused(nn.Module):
    """Batch norm behind data-dependent control flow, which vmap does not support."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x) if x.sum() > -1e9 else x)
        return logits


@pytest.mark.filterwarnings("ignore:Tasks run in a loop")
def test_queries_alone_through_a_network_that_vmap_refuses() -> None:
    torch.manual_seed(0)
    learner = MAML(Refused())
    support_x, query_x = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    theta = {name: p.expand(2, *p.shape) for name, p in learner.meta_parameters().items()}
    predictions = learner.task_network.predict_queries(theta, support_x, query_x, transductive=False)
    expected = [learner.network(torch.cat([support_x[1], query[None]]))[-1] for query in query_x[1]]
    assert torch.allclose(predictions[1], torch.stack(expected), atol=1e-6)


def test_the_switch_of_evaluation(glyphs: Glyphs) -> None:
    torch.manual_seed(0)
    data = Glyphs(shots=1, queries=4, test_tasks=4, meta_batch_size=2)
    network = Conv4(filters=8)
    figures = {}
    for transductive in (True, False):
        learner = MAML(network, inner_lr=0.2, test_inner_steps=3, transductive=transductive)
        (figures[transductive],) = trainer().test(learner, data, verbose=False)
    right = []
    for support_x, support_y, query_x, query_y in zip(*data.task_set("test").batch(range(4)), strict=True):
        params = learner.eval().inner_update(support_x, support_y)
        support = support_x.float() / 255
        for query, y in zip(query_x.float() / 255, query_y, strict=True):
            together = torch.cat([support, query[None]])
            right.append(torch.func.functional_call(learner.network, params, (together,))[-1].argmax() == y)
    assert figures[False]["test/accuracy"] == pytest.approx(torch.stack(right).float().mean().item())
    assert figures[True]["test/loss"] != figures[False]["test/loss"]


def test_the_switch_on_the_command_line(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for switch in ([], ["--model.transductive", "false"]):
        main(["test", "--ckpt_path", checkpoint, *switch])
        shown.append(next(line for line in capsys.readouterr().out.splitlines() if "test/loss " in line))
    assert shown[0] != shown[1]


# -------------------------------------------------------------------------------- the form of the samples


@pytest.mark.parametrize("algorithm", [MAML, Reptile])
def test_a_checkpoint_of_a_learner_made_in_python_keeps_the_form(
    algorithm: Any, glyphs: Glyphs, tmp_path: Path
) -> None:
    learner = algorithm(Conv4(filters=4), inner_steps=1)
    fit = trainer(max_steps=1, limit_val_batches=0)
    fit.fit(learner, Glyphs(queries=2, meta_batch_size=2, transforms=ImageTransforms([0.2], [0.5])))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    form = load_learner(tmp_path / "last.ckpt", network=Conv4(filters=4)).form
    assert (form.image_size, form.channels, form.ink, form.pixels) == (28, 1, True, True)
    assert (form.mean, form.std) == ([0.2], [0.5])
    assert form == learner.form
    brightness, deviation = form.look["their mean brightness"]  # type: ignore[index]
    images = glyphs.load().images / 255
    assert brightness == pytest.approx(images.mean(), abs=0.02)
    assert deviation == pytest.approx(images.mean((1, 2, 3)).std(), abs=0.02)


def test_a_loader_of_pixels_is_noticed(tmp_path: Path) -> None:
    x, y = torch.randint(0, 256, (2, 4, 1, 8, 8), dtype=torch.uint8), torch.arange(4).repeat(2, 1) % 2
    learner = MAML(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), inner_steps=1)
    fit = trainer(max_steps=1)
    fit.fit(learner, DataLoader([(x, y, x, y)], batch_size=None))  # type: ignore[arg-type]
    fit.save_checkpoint(tmp_path / "last.ckpt")
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    assert load_learner(tmp_path / "last.ckpt", network=network).form.pixels


@pytest.mark.parametrize(
    ("x", "came"),
    [
        (torch.full((4, 1, 28, 28), 200.0), r"torch\.float32 from 200 to 200"),
        (torch.full((4, 1, 28, 28), 200), r"torch\.int64 from 200 to 200"),
        (torch.full((4, 1, 28, 28), -1.0), r"torch\.float32 from -1 to -1"),
    ],
)
def test_pixels_on_another_scale_are_refused(x: Tensor, came: str, checkpoint: str, task: list[Tensor]) -> None:
    message = r"x must hold pixels, as in training: uint8, or floating point in \[0, 1\], got " + came
    learner = load_learner(checkpoint)
    with pytest.raises(InputError, match=message):
        learner.adapt(x, [0, 0, 1, 1])
    predictor = learner.adapt(task[0], task[1])
    with pytest.raises(InputError, match=message):
        predictor.predict(x)
    predictor.save("adapted.safetensors")
    with pytest.raises(InputError, match=message):
        Predictor.load("adapted.safetensors").predict_proba(x)


def test_pixels_as_floating_point_numbers_are_the_same(checkpoint: str, task: list[Tensor]) -> None:
    learner = load_learner(checkpoint)
    support_x, support_y, query_x, _ = task
    a = learner.adapt(support_x, support_y).predict_proba(query_x)
    b = learner.adapt(support_x / 255, support_y).predict_proba(query_x / 255)
    assert torch.allclose(a, b, atol=1e-5)


def test_images_unlike_those_of_training_are_said(
    checkpoint: str, task: list[Tensor], recwarn: pytest.WarningsRecorder
) -> None:
    learner = load_learner(checkpoint)
    learner.adapt(*task[:2])
    assert not [warning for warning in recwarn if "do not look like" in str(warning.message)]
    photos = torch.randint(90, 200, task[0].shape, dtype=torch.uint8)
    learner.adapt(photos, task[1])
    (said,) = [str(warning.message) for warning in recwarn if "do not look like" in str(warning.message)]
    assert said.startswith("The images of x do not look like those of training: their mean brightness is 0.57, in ")


def test_a_loss_that_is_missing_is_not_said_to_be_the_network(mlp: MLP, sinusoid: Sinusoid, tmp_path: Path) -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(1))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (self.get_buffer("weight") * (a - b).square()).mean()

    fit = trainer(max_steps=1, limit_val_batches=0)
    fit.fit(MAML(mlp, Weighted(), inner_steps=1), sinusoid)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"must be of the loss in use, but differs in loss\.weight"):
        load_learner(tmp_path / "last.ckpt", network=mlp)
    load_learner(tmp_path / "last.ckpt", network=mlp, loss=Weighted())


class Recurrent(nn.Module):
    """A classifier of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.lstm(x)[0][:, -1]))


def test_recurrent_networks_adapt_again_and_again() -> None:
    x, y = torch.randn(6, 5, 4), torch.arange(3).repeat(2)
    for seed in range(8):  # copies went wrong at random, with most seeds
        torch.manual_seed(seed)
        learner = MAML(Recurrent(), inner_lr=0.1, inner_steps=2).eval()
        predictor = learner.adapt(x, y)
        expected = learner.forward_with_weights(x, learner.inner_update(x, y))
        torch.testing.assert_close(predictor(x), expected, rtol=1e-5, atol=1e-6)


class Twice(nn.Module):
    """Batch norm that runs twice if it is shared, with its input as a keyword."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.body, self.first, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.second = self.first if shared else nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(input=3 + self.first(input=self.body(x)).tanh()))
        return logits


def test_batch_norm_that_runs_twice_has_no_statistics_for_a_predictor() -> None:
    x, y = torch.randn(6, 3), torch.arange(2).repeat(3)
    alone = MAML(Twice(shared=False), inner_steps=2)
    predictor = alone.adapt(x, y)
    expected = alone.eval().forward_with_weights(x, alone.inner_update(x, y))
    torch.testing.assert_close(predictor(x), expected)
    with pytest.raises(InputError, match=r"network must run each batch norm once.*got several runs of first"):
        MAML(Twice(shared=True), inner_steps=2).adapt(x, y)
