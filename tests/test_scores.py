"""Scores of tasks: what the loss leaves out, losses of probabilities, and any metric of torchmetrics."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MultilabelAccuracy,
    MultilabelAUROC,
)
from torchmetrics.functional.classification import multiclass_f1_score, multilabel_auroc

from meta_lightning import FOMAML, MAML, Reptile
from meta_lightning.checks import InputError
from meta_lightning.cli import main
from meta_lightning.runs.checkpoint_callback import Checkpoints
from meta_lightning.scores import Scores

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*configure_optimizers` returned `None`"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]


class Echo(nn.Module):
    """A network that repeats its input, plus a parameter of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.shift


def validated(learner: Any, x: Tensor, y: Tensor) -> dict[str, float]:
    """What a validation logs on tasks whose queries are their support samples."""
    fit = trainer()
    fit.validate(learner, DataLoader([(x, y, x, y)], batch_size=None), verbose=False)  # type: ignore[arg-type]
    return {name: value.item() for name, value in fit.callback_metrics.items()}


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.CrossEntropyLoss(ignore_index=0)

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.inner(predictions, targets)
        return loss


LOSSES = [
    pytest.param(None, -100, id="default"),
    pytest.param(nn.CrossEntropyLoss(), -100, id="module"),
    pytest.param(nn.CrossEntropyLoss(ignore_index=2), 2, id="module with an index"),
    pytest.param(partial(F.cross_entropy, ignore_index=0), 0, id="partial function"),
    pytest.param(Wrapped(), 0, id="module in a module"),
    pytest.param(lambda p, y: F.cross_entropy(p, y, ignore_index=0), 0, id="function"),
    pytest.param(lambda p, y: F.nll_loss(p.log_softmax(1), y, ignore_index=0), 0, id="nll_loss"),
]


@pytest.mark.parametrize(("loss", "ignored"), LOSSES)
@pytest.mark.parametrize("algorithm", [MAML, Reptile])
def test_perfect_answers_score_1_beside_ignored_labels(algorithm: Any, loss: Any, ignored: int) -> None:
    y = torch.tensor([[0, 1, 2, 1], [1, 2, 0, 2]])
    x = 9.0 * F.one_hot(y, 3)
    y[0, 2] = y[1, 2] = ignored
    assert validated(algorithm(Echo(), loss), x, y)["val/accuracy"] == 1
    x[0, 0] = x[0, 1]  # one wrong answer of the first task, which has three labels or, if 0 is ignored, two
    scored = (y != ignored).sum(1)
    right = scored - torch.tensor([int(y[0, 0] != ignored), 0])
    assert validated(algorithm(Echo(), loss), x, y)["val/accuracy"] == pytest.approx((right / scored).mean().item())


def test_pixels_that_the_loss_ignores_are_not_scored() -> None:
    y = torch.randint(0, 3, (2, 4, 5, 5))
    x = 9.0 * F.one_hot(y, 3).movedim(-1, 2)
    y[:, :, 0] = -100
    assert validated(MAML(Echo()), x, y)["val/accuracy"] == 1


def focal(predictions: Tensor, targets: Tensor) -> Tensor:
    p = torch.sigmoid(predictions)
    return -(targets * (1 - p) ** 2 * p.log() + (1 - targets) * p**2 * (1 - p).log()).mean()


@pytest.mark.parametrize(
    "loss",
    [
        nn.BCEWithLogitsLoss(),
        F.binary_cross_entropy_with_logits,
        nn.MultiLabelSoftMarginLoss(),
        nn.CrossEntropyLoss(),  # of class probabilities
        partial(F.cross_entropy, label_smoothing=0.1),
        focal,
        nn.PoissonNLLLoss(),
        nn.SoftMarginLoss(),
        lambda p, y: (F.softplus(p) - y * p).mean(),
    ],
)
def test_a_loss_of_probabilities_has_no_mse(loss: Any) -> None:
    x, y = torch.randn(2, 6, 3), (torch.rand(2, 6, 3) > 0.5).float()
    assert {*validated(MAML(Echo(), loss), x, y)} == {
        *("val/loss", "val/loss_ci95", "val/loss_before", "val/loss_before_ci95", "val/tasks")
    }


@pytest.mark.parametrize("loss", [None, nn.MSELoss(), nn.HuberLoss(), F.l1_loss, lambda a, b: (a - b).abs().mean()])
def test_a_loss_of_real_values_has_one(loss: Any) -> None:
    x, y = torch.randn(2, 6, 3), torch.rand(2, 6, 3)
    expected = (x - y).square().mean().item()
    assert validated(MAML(Echo(), loss), x, y)["val/mse"] == pytest.approx(expected, rel=1e-6)


def test_the_monitor_hint_names_what_there_is() -> None:
    x, y = torch.randn(2, 6, 3), (torch.rand(2, 6, 3) > 0.5).float()
    loader: Any = DataLoader([(x, y, x, y)], batch_size=None)  # type: ignore[arg-type]
    fit = trainer(callbacks=[Checkpoints("kept")], enable_checkpointing=True, max_steps=1)
    with pytest.raises(InputError, match=r"monitor .*got val/accuracy.*--checkpoint.monitor val/loss") as error:
        fit.fit(MAML(Echo(), nn.BCEWithLogitsLoss()), loader, loader)
    assert "mse" not in str(error.value)


@pytest.mark.parametrize("algorithm", [MAML, FOMAML, Reptile])
def test_metrics_are_computed_per_task(algorithm: Any) -> None:
    x, y = torch.randn(5, 12, 3), torch.randint(0, 3, (5, 12))
    f1 = MulticlassF1Score(3)
    logged = validated(algorithm(Echo(), metrics={"f1": f1}), x, y)
    of_tasks = torch.stack([multiclass_f1_score(*task, 3) for task in zip(x, y, strict=True)])
    assert logged["val/f1"] == pytest.approx(of_tasks.mean().item(), rel=1e-6)
    assert logged["val/f1_ci95"] == pytest.approx(1.96 * of_tasks.std().item() / 5**0.5, rel=1e-5)
    assert logged["val/f1_before"] == logged["val/f1"]
    assert "val/accuracy" in logged
    assert f1.update_count == 0  # the caller's own is left alone


def test_a_collection_of_metrics_for_a_loss_without_scores() -> None:
    x, y = torch.randn(3, 40, 2), (torch.rand(3, 40, 2) > 0.5).long()
    metrics: Any = MetricCollection({"auroc": MultilabelAUROC(2), "exact": MultilabelAccuracy(2)})
    loss = lambda p, t: F.binary_cross_entropy_with_logits(p, t.float())  # noqa: E731
    logged = validated(MAML(Echo(), loss, metrics=metrics), x, y)
    expected = torch.stack([multilabel_auroc(*task, 2) for task in zip(x, y, strict=True)]).mean()
    assert logged["val/auroc"] == pytest.approx(expected.item(), rel=1e-6)
    assert {"val/exact", "val/exact_ci95"} <= {*logged}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": MulticlassF1Score(3)}, r"metrics .* got 'loss'"),
        ({"a/b": MulticlassF1Score(3)}, r"metrics .* got 'a/b'"),
        ({"f1_ci95": MulticlassF1Score(3)}, r"metrics .* got 'f1_ci95'"),
        ({"loss_before": MulticlassF1Score(3)}, r"metrics .* got 'loss_before'"),
        ({"f1": multiclass_f1_score}, r"metrics .* got 'f1': function"),
    ],
)
def test_what_metrics_refuse(metrics: dict[str, Metric], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MAML(Echo(), metrics=metrics)


def test_a_metric_that_is_no_number_is_refused() -> None:
    x, y = torch.randn(2, 6, 3), torch.randint(0, 3, (2, 6))
    with pytest.raises(InputError, match=r"metrics .*one number per task.*3, 3.* of matrix"):
        validated(MAML(Echo(), metrics={"matrix": MulticlassConfusionMatrix(3)}), x, y)


@pytest.mark.usefixtures("glyphs")
def test_metrics_by_class_path_are_monitored_and_survive_a_resume(tmp_path: Path) -> None:
    config = tmp_path / "metrics.yaml"
    config.write_text(
        "model:\n  init_args:\n    metrics:\n      f1:\n"
        "        class_path: torchmetrics.classification.MulticlassF1Score\n"
        "        init_args: {num_classes: 5}\n"
    )
    args = ["fit", "--config", TINY, "--config", str(config), "--checkpoint.monitor", "val/f1"]
    main([*args, "--checkpoint.dirpath", "kept"])
    assert Path("kept/best.ckpt").exists()
    main([*args, "--checkpoint.dirpath", "kept", "--trainer.max_steps", "6", "--ckpt_path", "kept/last.ckpt"])
    assert torch.load("kept/last.ckpt", weights_only=True)["global_step"] == 6
    main(["test", "--ckpt_path", "kept/last.ckpt"])
    assert '"test/f1_ci95"' in next(Path().rglob("test.json")).read_text()


def test_a_loss_that_draws_random_numbers_goes_on_exactly(mlp: Any, sinusoid: Any, tmp_path: Path) -> None:
    def noisy(p: Tensor, y: Tensor) -> Tensor:
        return (p + 0.1 * torch.randn_like(p) - y).square().mean()

    def run(steps: int, path: Path | None = None) -> list[Tensor]:
        torch.manual_seed(0)
        network = type(mlp)(hidden=[8])
        options = {"limit_val_batches": 0, "log_every_n_steps": 3, "enable_checkpointing": True}
        fit = trainer(max_steps=steps, callbacks=[Checkpoints(str(tmp_path))], **options)
        fit.fit(MAML(network, noisy, inner_steps=2), sinusoid, ckpt_path=path)
        return [p.detach().clone() for p in network.parameters()]

    whole = run(8)
    run(4)
    resumed = run(8, tmp_path / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_metrics_keep_their_precision() -> None:
    x, y = torch.randn(2, 700, 3).bfloat16(), torch.randint(0, 3, (2, 700))
    (f1,) = Scores({"f1": MulticlassF1Score(3)})(F.cross_entropy, x, y)["f1"][:1]
    assert f1 == multiclass_f1_score(x[0], y[0], 3)


@pytest.mark.parametrize("metric", [MulticlassF1Score(5), MeanMetric()])
def test_a_metric_that_does_not_fit_is_named(metric: Metric) -> None:
    x, y = torch.randn(2, 6, 3), torch.randint(0, 3, (2, 6))
    with pytest.raises(InputError, match=r"metrics must take .*got \[6, 3\] and \[6\] for mine \("):
        validated(MAML(Echo(), metrics={"mine": metric}), x, y)
