"""Samples of any structure, losses that see the task, and tasks of unequal size, against literal loops in float64."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import trainer
from references import EXACT, INNER_LR, TASKS_FROM_A_LIST, Params, error
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from meta_lightning import (
    FOMAML,
    IMAML,
    MAML,
    MLP,
    Baseline,
    MetaLearner,
    Predictor,
    ProtoNet,
    Prototypes,
    Reptile,
    TaskBatch,
    TaskLoss,
    TaskPredictor,
    load_learner,
    pad_tasks,
)
from meta_lightning.data.tasks import as_task_batch
from meta_lightning.inner.samples import Padded

pytestmark = TASKS_FROM_A_LIST
STEPS, TASKS = 3, 4
Task = tuple[Any, Any, Any, Any]
PASSES: dict[str, dict[str, Any]] = {
    "together": {},
    "in-passes": {"tasks_per_pass": 3},
    "recorded": {"compile_passes": "record"},
    "recomputed": {"recompute_inner_steps": True, "compile_passes": False},
    "compiled": {"compile_passes": True},
}

# ---------------------------------------------------------------------------------------------------------- references

Losses = Callable[[Params, Params, Any, Any], Tensor]  # θ', θ, samples and targets of one task


def literal(theta: Params, tasks: list[Task], losses: Losses, algorithm: str) -> Params:
    """The papers' loops, one task after the other; for Reptile the mean of θ'."""
    with sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
        return literal_mean(theta, tasks, losses, algorithm)


def literal_mean(theta: Params, tasks: list[Task], losses: Losses, algorithm: str) -> Params:
    theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
    means = {name: torch.zeros_like(p) for name, p in theta.items()}
    for support_x, support_y, query_x, query_y in tasks:
        params = theta
        for _ in range(STEPS):
            loss = losses(params, theta, support_x, support_y)
            grads = torch.autograd.grad(loss, [*params.values()], create_graph=True, materialize_grads=True)
            if algorithm != "MAML":
                grads = tuple(g.detach() for g in grads)
            params = {name: p - INNER_LR * g for (name, p), g in zip(params.items(), grads, strict=True)}
        if algorithm != "Reptile":
            by = torch.autograd.grad(losses(params, theta, query_x, query_y), [*theta.values()], materialize_grads=True)
            params = dict(zip(theta, by, strict=True))
        means = {name: mean + params[name].detach() / len(tasks) for name, mean in means.items()}
    return means


def ours(learner: MetaLearner, batch: TaskBatch) -> Params:
    batch = as_task_batch(batch)
    if not isinstance(learner, Reptile):
        return learner.meta_gradient(batch)[0]  # type: ignore[operator]
    support = learner.support(batch.support_x, batch.support_y, STEPS)
    mean: Params = learner.in_passes(learner.adapt_pass, support)[0]
    return mean


def of_predictions(network: nn.Module, loss: Callable[..., Tensor] = F.cross_entropy) -> Losses:
    def losses(params: Params, theta: Params, x: Any, y: Any) -> Tensor:
        args = ((), x) if isinstance(x, dict) else ((x,), {})
        return loss(functional_call(network, params, *args), y)

    return losses


def learner_of(kind: type[MetaLearner], network: nn.Module, options: dict[str, Any], **more: Any) -> MetaLearner:
    options = {name: value for name, value in options.items() if kind is not Reptile or "recompute" not in name}
    return kind(network, inner_lr=INNER_LR, inner_steps=STEPS, **options, **more).train()


def stack(tasks: list[Task]) -> TaskBatch:
    return TaskBatch(*(torch.utils.data.default_collate([task[part] for task in tasks]) for part in range(4)))


# -------------------------------------------------------------------------------------------------- networks and tasks


class Text(nn.Module):
    """A tiny transformer of tokens, with the arguments of Hugging Face's models and what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        z = self.block(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        kept = attention_mask[..., None]
        return SimpleNamespace(logits=self.head((z * kept).sum(1) / kept.sum(1)), loss=None)


def texts(samples: int) -> dict[str, Tensor]:
    lengths = torch.randint(2, 6, (samples, 1))
    return {"input_ids": torch.randint(11, (samples, 5)), "attention_mask": (torch.arange(5) < lengths).long()}


def text_tasks() -> list[Task]:
    y = torch.arange(3).repeat(2)
    return [(texts(6), y, texts(6), y) for _ in range(TASKS)]


class Wave(TaskLoss):
    """A residual ``u' − c cos(x)`` with the task's coefficient c in the samples, and a distance from θ."""

    def inputs(self, x: Any) -> Any:
        return x["x"]

    def forward(self, network: TaskPredictor, x: Any, y: Any) -> Tensor:
        def u(point: Tensor) -> Tensor:
            return network(point[None, None]).squeeze()

        residual = vmap(grad(u))(x["x"][:, 0]) - x["c"][:, 0] * x["x"][:, 0].cos()
        far = sum(((p - network.start[name]) ** 2).sum() for name, p in network.params.items())
        return residual.square().mean() + (network(x["x"]) - y).square().mean() + 0.3 * far


class WaveByAutograd(Wave):
    """The same by ``torch.autograd.grad``."""

    def forward(self, network: TaskPredictor, x: Any, y: Any) -> Tensor:
        points = x["x"].detach().requires_grad_()
        u = network(points)
        (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        far = sum(((p - network.start[name]) ** 2).sum() for name, p in network.params.items())
        return (slope - x["c"] * points.cos()).square().mean() + (network(x["x"]) - y).square().mean() + 0.3 * far


def wave_literal(network: nn.Module) -> Losses:
    def losses(params: Params, theta: Params, x: Any, y: Any) -> Tensor:
        points = x["x"].detach().requires_grad_()
        u = functional_call(network, params, (points,))
        (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        far = sum(((p - theta[name]) ** 2).sum() for name, p in params.items())
        mse = (functional_call(network, params, (x["x"],)) - y).square().mean()
        return (slope - x["c"] * points.cos()).square().mean() + mse + 0.3 * far

    return losses


def wave_tasks() -> list[Task]:
    def points(c: float) -> tuple[dict[str, Tensor], Tensor]:
        x = torch.rand(5, 1) * 4
        return {"x": x, "c": torch.full((5, 1), c)}, c * x.sin()

    return [(*points(c), *points(c)) for c in (0.5, 1.0, 1.5, 2.0)]


def smooth() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


def unequal_tasks(ways: int = 3) -> list[Task]:
    tasks: list[Task] = []
    for shots, queries in ((1, 2), (3, 1), (2, 4), (1, 1)):
        y, query_y = (torch.arange(ways).repeat(n) for n in (shots, queries))
        tasks.append((torch.randn(len(y), 6), y, torch.randn(len(query_y), 6), query_y))
    return tasks


def unequal_points() -> list[Task]:
    def points(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 6), torch.randn(n, 3)

    return [(*points(n), *points(m)) for n, m in ((2, 3), (5, 1), (1, 4), (3, 3))]


# ------------------------------------------------------------------------------------------------- gradients and loops

KINDS = pytest.mark.parametrize("kind", [MAML, FOMAML, Reptile])
# torch.compile takes minutes on two cores
HOW = pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[pytest.mark.slow] * (how == "compiled")) for how in PASSES]
)


@KINDS
@HOW
def test_dicts_are_keywords_and_equal_a_literal_loop(kind: type[MetaLearner], how: str) -> None:
    network, tasks = Text(), text_tasks()
    expected = literal(
        dict(network.named_parameters()),
        tasks,
        of_predictions(network, lambda returned, y: F.cross_entropy(returned.logits, y)),
        kind.__name__,
    )
    learner = learner_of(kind, network, PASSES[how])
    assert error(ours(learner, stack(tasks)), expected) < EXACT
    assert not learner.task_network.loops_over_tasks


@KINDS
@HOW
@pytest.mark.parametrize("loss", [Wave, WaveByAutograd])
@pytest.mark.filterwarnings("ignore:Tasks run in a loop", "ignore:.*runs? as (it is|they are)")
def test_a_loss_that_sees_the_task_equals_a_literal_loop(
    kind: type[MetaLearner], how: str, loss: type[TaskLoss]
) -> None:
    network, tasks = smooth(), wave_tasks()
    expected = literal(dict(network.named_parameters()), tasks, wave_literal(network), kind.__name__)
    learner = learner_of(kind, network, PASSES[how], loss=loss())
    assert error(ours(learner, stack(tasks)), expected) < EXACT
    assert learner.task_network.loops_over_tasks == (loss is WaveByAutograd)


@KINDS
@HOW
@pytest.mark.parametrize("real", [False, True], ids=["classes", "real"])
def test_tasks_of_unequal_size_equal_a_literal_loop(kind: type[MetaLearner], how: str, real: bool) -> None:
    network = MLP(in_features=6, hidden=(8,), out_features=3)
    tasks = unequal_points() if real else unequal_tasks()
    losses = of_predictions(network, F.mse_loss if real else F.cross_entropy)
    expected = literal(dict(network.named_parameters()), tasks, losses, kind.__name__)
    learner = learner_of(kind, network, PASSES[how])
    assert error(ours(learner, pad_tasks(tasks)), expected) < EXACT
    assert not learner.task_network.loops_over_tasks


@KINDS
def test_any_loss_leaves_padding_out(kind: type[MetaLearner]) -> None:
    network, loss = MLP(in_features=6, hidden=(8,), out_features=3), nn.SmoothL1Loss(beta=0.3)
    tasks = unequal_points()
    expected = literal(dict(network.named_parameters()), tasks, of_predictions(network, loss), kind.__name__)
    assert error(ours(learner_of(kind, network, {}, loss=loss), pad_tasks(tasks)), expected) < EXACT


@pytest.mark.filterwarnings("ignore:Tasks run in a loop")
@KINDS
@pytest.mark.parametrize("how", ["together", "in-passes", "recomputed"])
def test_with_batch_statistics_tasks_of_unequal_size_loop(
    kind: type[MetaLearner], how: str, recwarn: pytest.WarningsRecorder
) -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Tanh(), nn.Linear(8, 3))
    tasks = unequal_tasks()
    expected = literal(dict(network.named_parameters()), tasks, of_predictions(network), kind.__name__)
    learner = learner_of(kind, network, PASSES[how])
    assert error(ours(learner, pad_tasks(tasks)), expected) < EXACT
    assert any("unequal size" in str(warning.message) for warning in recwarn)
    # and those of equal size do not
    equal = stack([tasks[0]] * 2)
    expected = literal(dict(network.named_parameters()), [tasks[0]] * 2, of_predictions(network), kind.__name__)
    assert error(ours(learner, equal), expected) < EXACT
    assert not learner.task_network.loops_over_tasks


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.filterwarnings("ignore:Tasks run in a loop")
def test_prototypes_of_tasks_of_unequal_size_are_means_of_their_own_samples(batch_norm: bool) -> None:
    norm = nn.BatchNorm1d(8, track_running_stats=False) if batch_norm else nn.Identity()
    network = nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Linear(8, 3))
    tasks = unequal_tasks()
    learner = MAML(network, inner_lr=INNER_LR, inner_steps=STEPS, head_start=Prototypes())
    together = learner.meta_gradient(pad_tasks(tasks))[0]
    alone = [learner.meta_gradient(pad_tasks([task]))[0] for task in tasks]
    mean = {name: torch.stack([of_task[name] for of_task in alone]).mean(0) for name in together}
    assert error(together, mean) < EXACT


@pytest.mark.filterwarnings("ignore:Tasks run in a loop")
def test_normalisation_under_a_loss_that_sees_the_task_loops(recwarn: pytest.WarningsRecorder) -> None:
    network, tasks = nn.Sequential(nn.Linear(1, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1)), wave_tasks()
    expected = literal(dict(network.named_parameters()), tasks, wave_literal(network), "MAML")
    assert error(ours(learner_of(MAML, network, {}, loss=Wave()), stack(tasks)), expected) < EXACT
    assert any("normalisation" in str(warning.message) for warning in recwarn)


def test_integers_are_features_of_a_network_that_does_not_embed_them() -> None:
    network, y = MLP(in_features=6, hidden=(8,), out_features=3), torch.arange(3)
    x = torch.randint(9, (TASKS, 3, 6))
    batch = TaskBatch(x, y.expand(TASKS, 3), x, y.expand(TASKS, 3))
    as_real = batch._replace(support_x=x.double(), query_x=x.double())
    learner = MAML(network, inner_lr=INNER_LR, inner_steps=STEPS)
    assert error(ours(learner, batch), ours(MAML(network, inner_lr=INNER_LR, inner_steps=STEPS), as_real)) < EXACT
    predictor = learner.adapt(x[0].numpy(), y)
    assert predictor.predict(x[0]) == learner.adapt(x[0].double(), y).predict(x[0].double())


# ------------------------------------------------------------------------------------------------ fit, adapt, evaluate


class Sentences(nn.Module):
    """A network of one argument, a nest."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)

    def forward(self, x: dict[str, Any]) -> Tensor:
        ids, (weights, _) = x["ids"], x["more"]
        logits: Tensor = self.head((self.embed(ids) * weights[..., None]).sum(1))
        return logits


def nests(samples: int) -> dict[str, Any]:
    return {"ids": torch.randint(11, (samples, 5)), "more": (torch.rand(samples, 5), torch.rand(samples, 1))}


@pytest.mark.parametrize("kind", [MAML, FOMAML, Reptile, IMAML, ProtoNet])
@pytest.mark.parametrize("nest", [False, True], ids=["keywords", "nest"])
def test_any_structure_is_fitted_tested_adapted_and_saved(kind: type[MetaLearner], nest: bool, tmp_path: Any) -> None:
    samples, network = (nests, Sentences()) if nest else (texts, Text())
    y = torch.arange(3).repeat(2)
    batch = stack([(samples(6), y, samples(6), y) for _ in range(TASKS)])
    learner = kind(network, inner_lr=INNER_LR, inner_steps=2)
    fitting = trainer(max_epochs=1)
    loader: Any = DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]
    fitting.fit(learner, loader)
    (tested,) = trainer().test(learner, loader, verbose=False)
    assert tested["test/tasks"] == 2 * TASKS
    assert 0 <= tested["test/accuracy"] <= 1
    fitting.save_checkpoint(tmp_path / "any.ckpt")
    again = load_learner(tmp_path / "any.ckpt", network=Sentences() if nest else Text())
    assert again.form.keywords is not nest
    support, queries = samples(6), samples(4)
    predictor = again.adapt(support, ["a", "b", "c"] * 2)
    expected = predictor.predict_proba(queries)
    params = again.eval().inner_update(support, y)
    torch.testing.assert_close(expected, again.forward_with_weights(queries, params).softmax(1))
    predictor.save(tmp_path / "any.safetensors")
    loaded = Predictor.load(tmp_path / "any.safetensors", Sentences() if nest else Text())
    torch.testing.assert_close(loaded.predict_proba(queries), expected)
    loaded.save(tmp_path / "any.pt2")
    program = torch.export.load(tmp_path / "any.pt2").module()
    torch.testing.assert_close(program(queries).softmax(1), expected)


@pytest.mark.parametrize("kind", [MAML, FOMAML, Reptile])
def test_a_loss_that_sees_the_task_is_fitted_and_tested(kind: type[MetaLearner]) -> None:
    batch, learner = stack(wave_tasks()), learner_of(kind, smooth(), {}, loss=Wave())
    loader: Any = DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]
    trainer().test(learner_of(kind, smooth(), {}, loss=Wave()), loader, verbose=False)  # without training
    trainer(max_epochs=1).fit(learner, loader)
    (tested,) = trainer().test(learner, loader, verbose=False)
    losses = []
    theta = {name: p.detach() for name, p in learner.network.named_parameters()}
    for support_x, support_y, query_x, query_y in wave_tasks_of(batch):
        params = {name: p.requires_grad_() for name, p in theta.items()}
        of_task = wave_literal(learner.network)
        for _ in range(STEPS):
            grads = torch.autograd.grad(of_task(params, theta, support_x, support_y), [*params.values()])
            params = {n: p - INNER_LR * g for (n, p), g in zip(params.items(), grads, strict=True)}
        losses.append(of_task(params, theta, query_x, query_y).item())
    assert tested["test/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert {"test/mse", "test/loss_before"} <= tested.keys()


def wave_tasks_of(batch: TaskBatch) -> list[Task]:
    def part(value: Any, i: int) -> Any:
        return {name: t[i] for name, t in value.items()} if isinstance(value, dict) else value[i]

    return [tuple(part(value, i) for value in batch) for i in range(TASKS)]  # type: ignore[misc]


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.filterwarnings("ignore:Tasks run in a loop")
def test_scores_of_tasks_of_unequal_size_are_those_of_each_alone(batch_norm: bool) -> None:
    norm = nn.BatchNorm1d(8, track_running_stats=False) if batch_norm else nn.Identity()
    learner = MAML(nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Linear(8, 3)), inner_steps=STEPS)
    tasks = unequal_tasks()

    def tested(batches: list[TaskBatch]) -> dict[str, float]:
        loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        return dict(trainer().test(learner, loader, verbose=False)[0])

    together, alone = tested([pad_tasks(tasks)]), tested([pad_tasks([task]) for task in tasks])
    for name, value in alone.items():
        assert together[name] == pytest.approx(value, abs=1e-6), name


def test_a_function_makes_predictions_of_what_a_network_returns(tmp_path: Any) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, self.head(x)

    network, tasks = Pair(), [task for task in unequal_tasks() for _ in range(2)][:2]
    second: Callable[[Any], Tensor] = lambda returned: returned[1]  # noqa: E731
    losses = of_predictions(network, lambda returned, y: F.cross_entropy(returned[1], y))
    expected = literal(dict(network.named_parameters()), tasks, losses, "MAML")
    learner = learner_of(MAML, network, {}, output=second)
    assert error(ours(learner, stack(tasks)), expected) < EXACT
    predictor = learner.adapt(*tasks[0][:2])
    torch.testing.assert_close(predictor.predict_proba(tasks[0][2]), predictor(tasks[0][2]).softmax(1))
    predictor.save(tmp_path / "pair.safetensors")
    loaded = Predictor.load(tmp_path / "pair.safetensors", Pair(), output=second)
    torch.testing.assert_close(loaded(tasks[0][2]), predictor(tasks[0][2]))
    with pytest.raises(ValueError, match=r"loss must be given.*tuple"):
        ours(learner_of(MAML, Pair(), {}), stack(tasks))


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("query_x", {"ids": torch.zeros(2, 3, 4)}, r"query_x must have the structure of support_x, \{ids: .*, more"),
        ("query_x", torch.zeros(2, 3, 4), r"query_x must have the structure of support_x, .*got \*"),
        ("query_y", (torch.zeros(2, 3), torch.zeros(2, 3)), r"query_y must have the structure .*\*, got \(\*, \*\)"),
        (
            "support_x",
            {"ids": torch.zeros(2, 3), "more": torch.zeros(2, 4)},
            r"support_x .*one number of samples.*\[2, ",
        ),
        ("support_x", {"ids": torch.zeros(2, 3), "more": ["a"]}, r"support_x\['more'\]\[0\] must be a tensor.*str"),
    ],
)
def test_what_batches_are_refused(part: str, value: Any, message: str) -> None:
    x, y = {"ids": torch.zeros(2, 3, 4), "more": torch.zeros(2, 3)}, torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        as_task_batch(TaskBatch(x, y, x, y)._replace(**{part: value}))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([(torch.zeros(2, 3), torch.zeros(3), torch.zeros(1, 3), torch.zeros(1))], r"one length.*\[2, 3\] in task 0"),
        ([(torch.zeros(0, 3), torch.zeros(0), torch.zeros(1, 3), torch.zeros(1))], r"support_x .*none in task 0"),
        ([unequal_tasks()[0], unequal_points()[0]], r"support_y must have one form.*int64.*\[3\].*in task 1"),
        ([unequal_tasks()[0][:3]], r"tasks must hold .*got 3 parts in 0"),
    ],
)
def test_what_tasks_of_unequal_size_are_refused(tasks: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pad_tasks(tasks)


@pytest.mark.filterwarnings("ignore:Tasks run in a loop")
def test_what_does_not_go_together_is_refused() -> None:
    batch = pad_tasks(unequal_tasks())
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"inner_batch_size must be None for tasks of unequal size, got 2"):
        ours(Reptile(network, inner_steps=STEPS, inner_batch_size=2), batch)
    with pytest.raises(ValueError, match=r"transductive must be true.*unequal size.*got false"):
        MAML(network, transductive=False).eval().predict_tasks(as_task_batch(batch))
    with pytest.raises(ValueError, match=r"loss of IMAML must be of predictions.*got Wave"):
        IMAML(smooth(), loss=Wave())
    with pytest.raises(ValueError, match=r"loss of Baseline must be of predictions.*TaskLoss"):
        Baseline(smooth(), loss=Wave())
    learner = MAML(Text())
    with pytest.raises(ValueError, match=r"x must have the structure of the support set, .*got \{input_ids: \*\}"):
        learner.adapt(texts(6), torch.arange(3).repeat(2)).predict({"input_ids": torch.zeros(1, 5).long()})


def test_padding_repeats_samples_of_the_task() -> None:
    batch = pad_tasks(unequal_tasks())
    assert isinstance(batch.support_x, Padded)
    assert batch.support_x.mask.sum(1).tolist() == [3, 9, 6, 3]
    assert torch.equal(batch.support_x.values[0, 5], batch.support_x.values[0, 0])
    equal = pad_tasks([unequal_tasks()[0]] * 2)
    assert all(isinstance(part, Tensor) for part in equal)


# ------------------------------------------------------------------------------------------------- what a review found


class Centred(nn.Module):
    """A network whose samples affect each other, without any layer that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        logits: Tensor = self.head((z - z.mean(0)).tanh())
        return logits


def points(*sizes: tuple[int, int]) -> list[Task]:
    return [(torch.randn(n, 6), torch.randn(n, 3), torch.randn(m, 6), torch.randn(m, 3)) for n, m in sizes]


@KINDS
@pytest.mark.parametrize("sizes", [((5, 7), (5, 6)), ((5, 6), (7, 6)), ((1, 5), (4, 2)), ((2, 5), (4, 2))])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.filterwarnings("ignore:Tasks run in a loop")
def test_padding_affects_no_sample_whichever_part_is_padded(
    kind: type[MetaLearner], sizes: tuple[tuple[int, int], ...], norm: bool
) -> None:
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Tanh(), nn.Linear(8, 3)
    network = nn.Sequential(*layers) if norm else Centred()
    if norm and sizes[0][0] == 1:
        sizes = ((2, 5), *sizes[1:])  # one sample has no variance
    tasks = points(*sizes)
    expected = literal(dict(network.named_parameters()), tasks, of_predictions(network, F.mse_loss), kind.__name__)
    assert error(ours(learner_of(kind, network, {}), pad_tasks(tasks)), expected) < EXACT


def test_a_part_that_is_padded_alone_is_refused() -> None:
    batch = pad_tasks(points((5, 7), (5, 6)))
    assert all(isinstance(part, Padded) for part in batch)
    with pytest.raises(ValueError, match=r"all four parts Padded.*or none, got \[False, True, True, True\]"):
        as_task_batch(batch._replace(support_x=batch.support_x.values))


class Coefficients(TaskLoss):
    """Samples whose last column is a coefficient of the task."""

    def inputs(self, x: Tensor) -> Tensor:
        return x[:, :1]

    def forward(self, network: TaskPredictor, x: Tensor, y: Tensor) -> Tensor:
        return ((network(x[:, :1]) - y) * x[:, 1:]).square().mean()


@KINDS
def test_the_part_that_a_network_takes_is_of_one_task(kind: type[MetaLearner]) -> None:
    x, y = torch.rand(TASKS, 2, 2), torch.rand(TASKS, 2, 1)
    batch, learner = TaskBatch(x, y, x, y), learner_of(kind, smooth(), {}, loss=Coefficients())
    loader: Any = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    trainer(max_epochs=1).fit(learner, loader)
    trainer().test(learner, loader, verbose=False)
    predictor = learner.adapt(x[0], y[0])
    torch.testing.assert_close(
        predictor(x[1, :, :1]), learner.forward_with_weights(x[1], learner.eval().inner_update(x[0], y[0]))
    )


def test_a_loss_that_names_no_part_is_refused_before_training() -> None:
    class Whole(Coefficients):
        def inputs(self, x: Tensor) -> Tensor:
            return x

    x = torch.rand(TASKS, 3, 2)
    with pytest.raises(ValueError, match=r"network must take samples .*inputs of a TaskLoss must give the part"):
        ours(learner_of(MAML, smooth(), {}, loss=Whole()), TaskBatch(x, x[..., :1], x, x[..., :1]))


def test_a_function_of_the_output_is_not_lost(tmp_path: Any) -> None:
    def second(returned: Tensor) -> Tensor:
        return returned[:, 2:]

    learner, y = MAML(nn.Linear(4, 4), output=second, inner_steps=1), torch.arange(2)
    x = torch.rand(1, 2, 4)
    fitting = trainer(max_epochs=1)
    fitting.fit(learner, DataLoader([TaskBatch(x, y[None], x, y[None])], batch_size=None))  # type: ignore[arg-type]
    fitting.save_checkpoint(tmp_path / "output.ckpt")
    with pytest.raises(ValueError, match="output must be given"):
        load_learner(tmp_path / "output.ckpt", nn.Linear(4, 4))
    predictor = load_learner(tmp_path / "output.ckpt", nn.Linear(4, 4), output=second).adapt(x[0], y)
    predictor.save(tmp_path / "output.safetensors")
    with pytest.raises(ValueError, match="output must be given"):
        Predictor.load(tmp_path / "output.safetensors", nn.Linear(4, 4))
    learner.output = None  # is seen at once
    assert learner.forward_with_weights(x[0], learner.inner_update(x[0], y)).shape == (2, 4)
    with pytest.raises(ValueError, match=r"output must have no trainable parameters.*weight"):
        MAML(nn.Linear(4, 4), output=nn.Linear(4, 2))


def test_a_second_fit_keeps_how_samples_are_taken() -> None:
    x, y = torch.randint(9, (TASKS, 3, 6)), torch.arange(3).expand(TASKS, 3)
    learner = MAML(MLP(6, [8], 3), inner_steps=1)
    loader: Any = DataLoader([TaskBatch(x, y, x, y)], batch_size=None)  # type: ignore[arg-type]
    for _ in range(2):
        trainer(max_epochs=1).fit(learner, loader)
        assert (learner.form.floats, learner.form.keywords) == (True, False)
        assert learner(x[0]).shape == (3, 3)


def test_keywords_are_those_that_forward_needs() -> None:
    class Open(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, batch: dict[str, Tensor], **options: Any) -> Tensor:
            logits: Tensor = self.head(batch["x"])
            return logits

    x, y = torch.rand(TASKS, 3, 4), torch.arange(3).expand(TASKS, 3)
    tasks: list[Task] = [({"x": each}, y[0], {"x": each}, y[0]) for each in x]
    network = Open()
    losses = lambda p, t, x, y: F.cross_entropy(functional_call(network, p, (x,)), y)  # noqa: E731
    expected = literal(dict(network.named_parameters()), tasks, losses, "MAML")
    assert error(ours(learner_of(MAML, network, {}), stack(tasks)), expected) < EXACT


def test_padding_is_seen_where_tasks_go_one_after_another() -> None:
    """The first meta-batch has tasks of one size, and shows nothing of padding."""

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        first = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 8))  # whose forward changes buffers
        return nn.Sequential(first, nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()

    def task(support: int, query: int) -> tuple[Tensor, ...]:
        parts = ((torch.randn(n, 3).double(), torch.arange(n) % 2) for n in (support, query))
        return tuple(tensor for part in parts for tensor in part)

    equal, unequal = (pad_tasks([task(6, 4), task(6, 4)]), pad_tasks([task(4, 3), task(8, 6)]))
    results = []
    for batches in ([unequal], [equal, unequal]):
        learner = MAML(network(), inner_lr=0.5, inner_steps=2, compile_passes=False)
        state = {name: value.clone() for name, value in learner.network.state_dict().items()}
        for batch in batches:
            learner.network.load_state_dict(state)
            result = learner.meta_gradient(batch)
        results.append(result)
    (expected, losses, _), (got, their_losses, _) = results
    torch.testing.assert_close(their_losses, losses, rtol=EXACT, atol=0)
    assert error(got, expected) <= EXACT


def test_what_training_changes_is_forgotten_in_evaluation() -> None:
    network = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)))
    batch = TaskBatch(*(torch.randn(2, 4, 3), torch.arange(2).repeat(2, 2)) * 2)
    learner = MAML(network, inner_steps=1)
    learner.meta_gradient(batch)
    assert "_u" in learner.task_network.examine(batch.support_x).in_turn
    learner.eval().predict_tasks(batch)
    assert learner.task_network.examine(batch.support_x).in_turn == ""
