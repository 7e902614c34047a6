"""The algorithms under a Trainer; their mathematics is in test_gradients."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from meta_lightning import FOMAML, MAML, MLP, MetaLearner, Reptile, Sinusoid, TensorTasks, train_maml

ALGORITHMS = [MAML, FOMAML, Reptile]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_steps_checkpoints_and_x_axis_count_meta_iterations(
    algorithm: type[MetaLearner], mlp: MLP, sinusoid: Sinusoid, tmp_path: Path
) -> None:
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    logger = CSVLogger(tmp_path)
    fit = trainer(max_steps=15, enable_checkpointing=True, callbacks=[checkpoints], logger=logger, log_every_n_steps=3)
    fit.fit(algorithm(network=mlp), sinusoid)  # type: ignore[call-arg]
    assert fit.global_step == 15
    assert fit.current_epoch == 2  # of 10 meta-iterations each
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=12.ckpt", "step=4.ckpt", "step=8.ckpt"]
    table = Path(logger.log_dir, "metrics.csv").read_text()
    header, *rows = (line.split(",") for line in table.splitlines())
    step, loss = header.index("step"), header.index("train/loss")
    assert [int(row[step]) for row in rows if row[loss]] == [2, 5, 8, 11, 14]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_outer_lr_decays_to_the_end_of_training(
    algorithm: type[MetaLearner], decay: Any, mlp: MLP, sinusoid: Sinusoid
) -> None:
    learner = algorithm(network=mlp, outer_lr_decay=decay)  # type: ignore[call-arg]
    trainer(max_steps=8, limit_val_batches=0).fit(learner, sinusoid)
    halfway = {"constant": 1, "linear": 0.5, "cosine": 0.5}[decay]
    assert learner.outer_update.factor(0) == 1
    assert learner.outer_update.factor(4) == pytest.approx(halfway)
    assert learner.outer_update.factor(8) == pytest.approx(1 if decay == "constant" else 0)
    if algorithm is not Reptile:
        (group,) = learner.optimizers().param_groups  # type: ignore[union-attr]
        assert group["lr"] == pytest.approx(0.001 * learner.outer_update.factor(8))


def test_reptile_has_no_optimizer(mlp: MLP, sinusoid: Sinusoid) -> None:
    learner = Reptile(mlp)
    trainer(max_steps=2, limit_val_batches=0).fit(learner, sinusoid)
    assert learner.configure_optimizers() is None  # type: ignore[func-returns-value]


def test_reptiles_persistent_moments_are_in_the_checkpoint(mlp: MLP, sinusoid: Sinusoid, tmp_path: Path) -> None:
    learner = Reptile(mlp, inner_optimizer="adam", inner_lr=0.001, inner_steps=3)
    fit = trainer(max_steps=4, limit_val_batches=0)
    fit.fit(learner, sinusoid)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Reptile.load_from_checkpoint(tmp_path / "a.ckpt", network=MLP(hidden=[8]))
    moments = loaded.inner_rule.start()
    assert moments.step == 12
    assert moments.second["head.weight"].abs().sum() > 0


def test_predictions_of_another_form_have_no_score(mlp: MLP, sinusoid: Sinusoid) -> None:
    """Two outputs, mean and log-variance, for one target: only the loss understands them."""

    def gaussian(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mean, log_variance = prediction.split(1, dim=1)
        return ((mean - target).square() / log_variance.exp() + log_variance).mean()

    learner = MAML(MLP(hidden=[8], out_features=2), loss=gaussian)
    fit = trainer(max_steps=10)
    fit.fit(learner, sinusoid)
    assert {"val/loss", "val/loss_before"} <= set(fit.callback_metrics)
    assert not any("mse" in name for name in fit.callback_metrics)


def test_segmentation(sinusoid: Sinusoid) -> None:
    """Class numbers a pixel, logits with the classes in the second place, as cross-entropy has it."""
    x, y = torch.rand(3, 2, 1, 4, 4), torch.randint(3, (3, 2, 4, 4))
    _, learner, losses = train_maml(nn.Conv2d(1, 3, 1), [(x, y, x, y)] * 2)
    assert len(losses) == 2
    (figures,) = trainer().test(learner, DataLoader([(x, y, x, y)], batch_size=None), verbose=False)
    assert 0 <= figures["test/accuracy"] <= 1


def test_a_gradient_that_is_not_finite_stops_as_well() -> None:
    """The loss of sqrt at 0 is finite, its gradient is not."""
    zeros = torch.zeros(2, 3, 1)
    learner = MAML(nn.Linear(1, 1, bias=False), lambda prediction, target: prediction.sqrt().sum(), max_skipped=0)
    with pytest.raises(FloatingPointError, match=r"gradient .*step 0\b"):
        trainer(max_steps=1).fit(learner, DataLoader([[zeros] * 4], batch_size=None))
    assert learner.meta_parameters()["weight"].isfinite().all()


def test_a_loss_without_a_reduction_is_refused(mlp: MLP, sinusoid: Sinusoid) -> None:
    with pytest.raises(ValueError, match=r"loss .*scalar.*\(5, 1\)"):
        trainer().test(MAML(mlp, loss=nn.MSELoss(reduction="none")), sinusoid)


def test_lazy_networks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"network .*\['weight', 'bias'\]"):
        MAML(nn.LazyLinear(5))


def test_reptiles_minibatches_cycle_through_the_support_set_and_reshuffle(mlp: MLP) -> None:
    learner = Reptile(mlp, inner_batch_size=4)
    x = torch.arange(10).expand(3, 10)
    batches = learner.inner_batches(x, x + 100, steps=5)
    assert [tuple(part.shape) for part in batches[0]] == [(3, 4), (3, 4)]
    drawn = torch.cat([part for part, _ in batches], dim=1)
    for task in drawn:
        assert sorted(task[:10].tolist()) == sorted(task[10:].tolist()) == list(range(10))
        assert task[:10].tolist() != task[10:].tolist()
    assert not torch.equal(drawn[0], drawn[1])
    assert all(torch.equal(part + 100, targets) for part, targets in batches)
    learner.eval()
    assert learner.inner_batches(x, x, steps=2)[0][0].shape == (3, 10)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_evaluation_is_the_plain_loop(algorithm: type[MetaLearner], mlp: MLP, sinusoid: Sinusoid) -> None:
    """val/mse before and after are those of a literal loop of SGD steps on copies of the network."""
    import copy

    learner = algorithm(network=mlp, inner_lr=0.02, test_inner_steps=3)  # type: ignore[call-arg]
    (figures,) = trainer().test(learner, sinusoid, verbose=False)
    expected: dict[str, list[float]] = {"test/mse_before": [], "test/mse": []}
    for support_x, support_y, query_x, query_y in zip(*sinusoid.task_set("test").batch(range(10)), strict=True):
        network = copy.deepcopy(mlp)
        expected["test/mse_before"].append(nn.functional.mse_loss(network(query_x), query_y).item())
        optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(network(support_x), support_y).backward()
            optimizer.step()
        expected["test/mse"].append(nn.functional.mse_loss(network(query_x), query_y).item())
    for name, values in expected.items():
        tasks = torch.tensor(values, dtype=torch.float64)
        assert figures[name] == pytest.approx(tasks.mean().item(), rel=1e-5)
        assert figures[f"{name}_ci95"] == pytest.approx(1.96 * tasks.std().item() / 10**0.5, rel=1e-5)
    assert figures["test/loss"] == pytest.approx(figures["test/mse"])
    assert figures["test/tasks"] == 10


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_loss_that_is_not_finite_stops_before_the_update(
    algorithm: type[MetaLearner], mlp: MLP, sinusoid: Sinusoid, tmp_path: Path
) -> None:
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
    learner = algorithm(network=mlp, max_skipped=0)  # type: ignore[call-arg]
    fit = trainer(max_steps=3, limit_val_batches=0, enable_checkpointing=True, callbacks=[checkpoints])
    fit.fit(learner, sinusoid)
    good = [p.detach().clone() for p in mlp.parameters()]
    learner.inner_lr = 1e30
    options: dict[str, Any] = {"enable_checkpointing": True, "callbacks": [checkpoints], "log_every_n_steps": 1}
    fit = trainer(max_steps=9, limit_val_batches=0, **options)
    with pytest.raises(FloatingPointError, match=r"loss .*\b(nan|inf)\b.*step 3\b.*inner_lr .*last\.ckpt"):
        fit.fit(learner, sinusoid, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"].values()
    for theta in (mlp.parameters(), kept):
        assert all(torch.equal(a, b) for a, b in zip(good, theta, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_lr": 0.0}, r"\binner_lr .*got 0\.0"),
        ({"inner_lr": float("nan")}, r"\binner_lr .* nan"),
        ({"outer_lr": -0.1}, r"\bouter_lr .* -0\.1"),
        ({"inner_steps": 0}, r"\binner_steps .* 0"),
        ({"inner_steps": -3}, r"\binner_steps .* -3"),
        ({"max_skipped": -1}, r"\bmax_skipped .* -1"),
        ({"test_inner_steps": 0}, r"\btest_inner_steps .* 0"),
        ({"outer_lr_decay": "step"}, r"\bouter_lr_decay .*'linear', 'cosine'.*'step'"),
    ],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_errors_name_the_argument(algorithm: Any, options: dict[str, Any], message: str, mlp: MLP) -> None:
    with pytest.raises(ValueError, match=message):
        algorithm(mlp, **options)


def test_what_reptile_refuses_and_warns_of(mlp: MLP) -> None:
    with pytest.raises(ValueError, match=r"outer_lr .*\(0, 1\].* 1\.5"):
        Reptile(mlp, outer_lr=1.5)
    with pytest.raises(ValueError, match=r"optimizer .*Reptile.*\bAdam\b"):
        Reptile(mlp, optimizer=torch.optim.Adam)
    with pytest.raises(ValueError, match=r"inner_beta1 .*\[0, 1\).* 1\b"):
        Reptile(mlp, inner_beta1=1)
    with pytest.raises(ValueError, match=r"\binner_batch_size .* 0"):
        Reptile(mlp, inner_batch_size=0)
    with pytest.warns(UserWarning, match=r"outer_lr 0\.001 .*Reptile"):
        Reptile(mlp, outer_lr=0.001)
    with pytest.warns(UserWarning, match=r"inner_steps 1 .*Reptile"):
        Reptile(mlp, inner_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Reptile(mlp, outer_lr=1.0)
        Reptile(mlp, outer_lr=0.01, inner_steps=1, inner_batch_size=2)


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile"])
@pytest.mark.parametrize("plain", [False, True])
def test_train_maml(algorithm: Any, plain: bool, mlp: MLP, sinusoid: Sinusoid) -> None:
    loader: Any = list(sinusoid.train_dataloader())
    if plain:
        loader = [tuple(batch) for batch in loader]
    before = [p.detach().clone() for p in mlp.parameters()]
    model, learner, losses = train_maml(mlp, loader, inner_lr=0.02, inner_steps=2, algorithm=algorithm)
    assert model is mlp
    assert not any(torch.equal(a, b) for a, b in zip(before, mlp.parameters(), strict=True))
    assert len(losses) == 10
    assert all(isinstance(loss, float) for loss in losses)
    assert learner.outer_lr == (0.1 if algorithm == "reptile" else 0.001)
    support_x, support_y, query_x, query_y = (part[0] for part in sinusoid.task_set("test").batch([0]))
    predictions = learner.forward_with_weights(query_x, learner.inner_update(support_x, support_y))
    assert predictions.shape == query_y.shape


def test_train_maml_refuses(mlp: MLP) -> None:
    with pytest.raises(ValueError, match=r"algorithm .*'maml', 'fomaml', 'reptile'.*'anil'"):
        train_maml(mlp, [], algorithm="anil")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"optimizer .*Reptile.*\bSGD\b"):
        train_maml(mlp, [], algorithm="reptile", optimizer_cls=torch.optim.SGD)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_double_precision_takes_pixels(algorithm: type[MetaLearner]) -> None:
    x, y = torch.randint(256, (60, 6), dtype=torch.uint8), torch.arange(60) // 6
    data = TensorTasks(x, y, ways=2, shots=2, queries=2, meta_batch_size=2, val_tasks=4)
    learner = algorithm(network=MLP(6, (4,), 2))  # type: ignore[call-arg]
    trainer(max_steps=2, limit_val_batches=1, precision="64-true").fit(learner, data)
    assert getattr(learner.task_network.traits, "outputs", None) == 2  # examined in float64
    assert {p.dtype for p in learner.meta_parameters().values()} == {torch.float64}
    assert learner.adapt(x[:4], torch.tensor([0, 0, 1, 1])).predict_proba(x[:3]).shape == (3, 2)


def test_an_optimizer_s_own_groups_are_kept(mlp: MLP, sinusoid: Sinusoid) -> None:
    def grouped(params: Any, lr: float) -> torch.optim.Optimizer:
        first, *others = params
        return torch.optim.AdamW([{"params": [first], "weight_decay": 0.5, "lr": lr / 10}, {"params": others}], lr=lr)

    learner = MAML(mlp, optimizer=grouped)
    trainer(max_steps=2, limit_val_batches=0).fit(learner, sinusoid)
    groups = learner.outer_optimizer().param_groups
    assert [(group["weight_decay"], group["lr"]) for group in groups] == [(0.5, 0.0001), (0.01, 0.001)]


def test_reptile_needs_a_parameter_that_both_loops_move(mlp: MLP) -> None:
    with pytest.raises(ValueError, match=r"inner_freeze .*outer_freeze .*Reptile"):
        Reptile(mlp, inner_freeze=["features.*"], outer_freeze=["head.*"])


def test_a_loss_with_parameters_to_learn_is_refused(mlp: MLP) -> None:
    with pytest.raises(ValueError, match=r"loss .*parameters.*\['weight'\]"):
        MAML(mlp, loss=nn.PReLU())


def test_reptile_names_the_settings_of_maml_that_suit_it_badly() -> None:
    x, y = torch.randn(90, 6), torch.arange(15).repeat(6)
    network = MLP(in_features=6, hidden=(4,), out_features=2)

    def fitted(steps: int, **options: Any) -> None:
        data = TensorTasks(x, y, ways=2, queries=1, val_tasks=1, **options)
        trainer(max_steps=1).fit(Reptile(network, inner_steps=steps), data)

    with pytest.warns(UserWarning, match=r"data\.train_shots 1 \(.*5\) and inner_steps 2 \(.*3\): reptile\.yaml"):
        fitted(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted(3, train_shots=(2, 5))
    assert not any("reptile.yaml" in str(warning.message) for warning in caught)
