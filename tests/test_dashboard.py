"""The dashboard's events, read back as TensorBoard reads them."""

import copy
import random
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from torch import nn

from meta_lightning import (
    FOMAML,
    MAML,
    MLP,
    Dashboard,
    Glyphs,
    ImageTasks,
    MetaLearner,
    MiniImagenet,
    Omniglot,
    Reptile,
    Sinusoid,
    TensorTasks,
)
from meta_lightning.cli import main
from meta_lightning.dashboard.task_records import TaskRecord, predictions_by_step
from meta_lightning.data.tasks import as_task_batch

TINY = str(Path(__file__).parent / "tiny.yaml")
ALGORITHMS = [MAML, FOMAML, Reptile]
NORMS = ["train/gradient_norm", "train/update_norm", "train/tasks_per_second"]


def read(folder: str | Path) -> EventAccumulator:
    """What TensorBoard reads in a run's folder, all of it."""
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


def steps_of(events: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in events.Scalars(tag)]


def fitted(learner: MetaLearner, data: Any, **options: Any) -> EventAccumulator:
    """Train with a dashboard, and read what it left."""
    logger = TensorBoardLogger("logs")
    options = {"callbacks": [Dashboard()], "max_steps": 10, "log_every_n_steps": 1} | options
    trainer(logger=logger, **options).fit(learner, data)
    return read(logger.log_dir)


def pictures(events: EventAccumulator, tag: str) -> list[Image.Image]:
    """The images of a tag, decoded."""
    images = [Image.open(BytesIO(event.encoded_image_string)) for event in events.Images(tag)]
    for image in images:
        image.load()
    return images


def hparams(events: EventAccumulator) -> tuple[dict[str, Any], set[str]]:
    """The row and the metrics' names that HParams shows."""
    content = events.PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    row = {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in start.hparams.items()}
    return row, {metric.name.tag for metric in experiment.metric_infos}


@pytest.mark.usefixtures("glyphs")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_fit_and_a_test_of_the_command_line(algorithm: type[MetaLearner]) -> None:
    main(["fit", "--config", TINY, "--model", algorithm.__name__])
    events = read("lightning_logs/version_0")
    assert set(events.Tags()["images"]) == {"val/adaptation", "val/answers"}
    for tag in events.Tags()["images"]:
        assert [event.step for event in events.Images(tag)] == steps_of(events, "val/accuracy") == [1, 3]
        assert all(
            image.width > 300 and len(image.convert("L").getcolors() or []) > 50 for image in pictures(events, tag)
        )
    assert all(steps_of(events, tag) == [0, 1, 2, 3] for tag in NORMS)
    assert all(event.value > 0 for tag in NORMS for event in events.Scalars(tag))
    of_val = read("lightning_logs/version_0/val-2-queries")
    row, metrics = hparams(of_val)
    assert (row["algorithm"], row["stage"], row["inner_steps"]) == (algorithm.__name__, "val-2-queries", 2)
    assert (row["tasks/ways"], row["network/init_args/filters"]) == (5, 4)
    assert not any("/_" in f"/{name}" for name in row)
    assert of_val.Scalars("final/accuracy")[0].value == events.Scalars("val/accuracy")[-1].value
    assert "hp_metric" not in events.Tags()["scalars"]
    # of two kinds under one tag TensorBoard shows one
    assert not set(events.Tags()["images"]) & set(events.Tags()["scalars"])

    main(["test", "--ckpt_path", "lightning_logs/version_0/checkpoints/last.ckpt", "--trainer.accelerator", "cpu"])
    events = read("lightning_logs/version_1")
    assert set(events.Tags()["images"]) == {"test/adaptation", "test/answers", "test/classes"}
    of_test = read("lightning_logs/version_1/test-2-queries")
    assert hparams(of_test)[0]["stage"] == "test-2-queries"
    assert hparams(of_test)[1] == metrics  # the same columns
    assert of_test.Scalars("final/loss_ci95")[0].value == events.Scalars("test/loss_ci95")[-1].value


@pytest.mark.usefixtures("glyphs")
def test_it_is_switched_off_on_the_command_line() -> None:
    main(["fit", "--config", TINY, "--dashboard.enabled", "false"])
    events = read("lightning_logs/version_0")
    assert not events.Tags()["images"]
    assert not {*NORMS} & set(events.Tags()["scalars"])
    assert not [*Path("lightning_logs/version_0").glob("*-queries")]


def test_without_tensorboard_it_does_nothing(mlp: MLP, sinusoid: Sinusoid) -> None:
    logger = CSVLogger("logs")
    fit = trainer(max_steps=10, logger=logger, log_every_n_steps=1, callbacks=[Dashboard()])
    learner = MAML(mlp)
    fit.fit(learner, sinusoid)
    fit.test(learner, sinusoid, verbose=False)
    header = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0]
    assert "train/loss" in header
    assert "norm" not in header
    trainer(max_steps=10, logger=False, callbacks=[Dashboard()]).fit(MAML(mlp), sinusoid)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_and_random_numbers_are_the_same_with_and_without(
    algorithm: type[MetaLearner], sinusoid: Sinusoid
) -> None:
    def train(callbacks: list[Any]) -> tuple[list[torch.Tensor], Any]:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        # in training dropout draws random numbers, in evaluation this noise does
        network = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.2), Noise(), nn.Linear(8, 1))
        learner = algorithm(network=network, inner_steps=2)  # type: ignore[call-arg]
        fit = trainer(max_steps=25, logger=TensorBoardLogger("logs"), log_every_n_steps=3, callbacks=callbacks)
        fit.fit(learner, sinusoid)
        state = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index] # noqa: NPY002
        return [p.detach().clone() for p in network.parameters()], state

    (with_it, state), (without, other) = train([Dashboard()]), train([])
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
    assert state == other


class Noise(nn.Module):
    """Draws random numbers whether it trains or not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.01 * torch.randn_like(x)


def test_scalars_are_read_at_the_log_interval_only(
    mlp: MLP, sinusoid: Sinusoid, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_at = []
    monkeypatch.setattr("meta_lightning.dashboard.callback.norm", lambda tensors: read_at.append(1) or torch.ones(()))
    events = fitted(MAML(mlp), sinusoid, max_steps=10, log_every_n_steps=4)
    assert steps_of(events, "train/update_norm") == steps_of(events, "train/loss") == [3, 7]
    assert len(read_at) == 4  # a gradient and an update each


@pytest.mark.parametrize("clip", [None, 1e-2])
def test_norms_are_those_of_the_gradient_before_clipping_and_of_the_step(
    clip: float | None, mlp: MLP, sinusoid: Sinusoid
) -> None:
    learner = FOMAML(mlp, optimizer=torch.optim.SGD, outer_lr=0.01, gradient_clip_val=clip)
    events = fitted(learner, sinusoid)
    for gradient, update in zip(events.Scalars(NORMS[0]), events.Scalars(NORMS[1]), strict=True):
        assert gradient.value > 1e-2
        # a step of SGD is the learning rate times the gradient as it was clipped
        assert update.value == pytest.approx(0.01 * min(gradient.value, clip or np.inf), rel=1e-3)


def test_reptiles_gradient_is_its_step_over_epsilon(mlp: MLP, sinusoid: Sinusoid) -> None:
    learner = Reptile(mlp, outer_lr=0.5, outer_lr_decay="linear")
    events = fitted(learner, sinusoid)
    norms = zip(*(events.Scalars(tag) for tag in NORMS[:2]), strict=True)
    for step, (gradient, update) in enumerate(norms):
        assert update.value == pytest.approx(0.5 * (1 - step / 10) * gradient.value, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"inner_optimizer": "adam", "inner_batch_size": 2}])
def test_each_step_of_the_curve_is_an_evaluation_with_so_many_steps(
    options: dict[str, Any], mlp: MLP, sinusoid: Sinusoid
) -> None:
    batch = sinusoid.task_set("val").batch(range(3))
    learner = Reptile(mlp, inner_lr=0.02, test_inner_steps=4, **options).eval()
    predictions = predictions_by_step(learner, batch)  # T K+1 R 1
    assert predictions.shape == (3, 5, 10, 1)
    before, _ = learner.predict_tasks(batch)
    assert torch.equal(predictions[:, 0], before)
    for steps in (1, 2, 3, 4):
        learner.test_inner_steps = steps
        _, after = learner.predict_tasks(batch)
        torch.testing.assert_close(predictions[:, steps], after)
        if options:
            continue
        task = copy.deepcopy(mlp)  # the first task, by torch's own SGD
        optimizer = torch.optim.SGD(task.parameters(), 0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(task(batch.support_x[0]), batch.support_y[0]).backward()
            optimizer.step()
        torch.testing.assert_close(predictions[0, steps], task(batch.query_x[0]))


def test_the_curve_begins_and_ends_at_what_validation_logs(glyphs: Glyphs) -> None:
    learner = MAML(nn.Sequential(nn.Flatten(), nn.Linear(784, 5)), inner_lr=0.1, test_inner_steps=3).eval()
    data = Glyphs(queries=3, val_tasks=10, meta_batch_size=4)
    record = TaskRecord("Validation", curve_tasks=10, pictured_tasks=2)
    for batch in data.val_dataloader():
        record.add_adaptation(learner, as_task_batch(batch), [[]] * len(batch[0]))
    logged = trainer().validate(learner, data, verbose=False)[0]
    assert record.seen == logged["val/tasks"] == 10
    assert len(record.pictured) == 2
    for name, curve in record.curves.items():
        statistics = [mean.compute() for mean in curve]
        assert len(statistics) == 4
        assert statistics[0].mean == pytest.approx(logged[f"val/{name}_before"])
        assert statistics[-1].mean == pytest.approx(logged[f"val/{name}"])
        assert statistics[-1].ci95 == pytest.approx(logged[f"val/{name}_ci95"])


def test_a_bounded_number_of_tasks_is_adapted_to_again(mlp: MLP, sinusoid: Sinusoid) -> None:
    record = TaskRecord("Test", curve_tasks=6, pictured_tasks=3)
    for tasks in (range(4), range(4, 8), range(8, 10)):
        record.add_adaptation(MAML(mlp).eval(), sinusoid.task_set("test").batch(tasks), [[]] * len(tasks))
    assert record.seen == 6
    assert record.curves["mse"][0].compute().tasks == 6


def test_accuracy_by_alphabet() -> None:
    record = TaskRecord("Test", 1, 1)
    targets = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]])
    answers = torch.tensor([[0, 1, 1, 1, 0, 2], [0, 0, 0, 0, 2, 2]])
    groups = [["Greek", "Greek", "Latin"], ["Greek", "Latin", "Latin"]]
    record.add_answers(nn.functional.one_hot(answers).float(), targets, groups)
    greek, latin = (record.groups[name].compute() for name in ("Greek", "Latin"))
    assert greek.tasks == latin.tasks == 2
    assert greek.mean == pytest.approx((3 / 4 + 1) / 2)
    assert latin.mean == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert greek.ci95 == pytest.approx(1.96 * np.std([3 / 4, 1], ddof=1) / 2**0.5)
    assert set(record.figures()) == {"classes"}


@pytest.mark.parametrize(
    ("data", "name", "group"),
    [
        (Glyphs(), "CANADIAN SYLLABICS PA", "Canadian Syllabics"),
        (Glyphs(), "HEBREW LETTER ALEF", "Hebrew"),
        (Omniglot(), "Ojibwe_(Canadian)/character03 90°", "Ojibwe_(Canadian)"),
        (MiniImagenet(), "n01532829", "n01532829"),
    ],
)
def test_group_of_a_class(data: ImageTasks, name: str, group: str) -> None:
    assert data.group_of(name) == group


@pytest.mark.usefixtures("glyphs")
def test_tasks_know_the_groups_of_their_classes() -> None:
    data = Glyphs()
    tasks = data.task_set("test")
    assert tasks.class_groups(3) == [data.group_of(name) for name in tasks.class_names(3)]
    x, y = torch.randn(100, 5), torch.arange(10).repeat(10)
    by_number = TensorTasks(x, y, ways=2, queries=2).task_set("train")
    assert by_number.class_groups(0) == by_number.class_names(0)


def test_what_cannot_be_pictured_is_left_out() -> None:
    x, y = torch.randn(100, 5), torch.arange(10).repeat(10)
    data = TensorTasks(x, y, ways=2, queries=2, val_tasks=4, test_tasks=4, epoch_length=5, meta_batch_size=2)
    logger = TensorBoardLogger("logs")
    fit = trainer(max_steps=5, logger=logger, callbacks=[Dashboard()])
    learner = MAML(nn.Linear(5, 2))
    fit.fit(learner, data)
    fit.test(learner, data, verbose=False)
    assert set(read(logger.log_dir).Tags()["images"]) == {"val/adaptation", "test/adaptation", "test/classes"}


def test_a_regressions_figures(mlp: MLP, sinusoid: Sinusoid) -> None:
    events = fitted(MAML(mlp), sinusoid)
    assert set(events.Tags()["images"]) == {"val/adaptation", "val/answers"}
    (folder,) = Path("logs").rglob("val-10-queries")
    assert read(folder).Scalars("final/mse")[0].value == events.Scalars("val/mse")[-1].value


def test_hparams_tells_validation_and_tests_of_one_logger_apart(mlp: MLP, sinusoid: Sinusoid) -> None:
    learner, logger = MAML(mlp), TensorBoardLogger("logs")
    fit = trainer(logger=logger, callbacks=[Dashboard()], max_steps=10)
    fit.fit(learner, sinusoid)
    expected = {"val-10-queries": fit.callback_metrics["val/mse"].item()}
    for queries in (1, 15):
        sinusoid.test_queries = queries
        (figures,) = fit.test(learner, sinusoid, verbose=False)
        expected[f"test-{queries}-queries"] = figures["test/mse"]
    folders = [path for path in Path(logger.log_dir).iterdir() if path.is_dir()]
    rows = {hparams(read(path))[0]["stage"]: read(path).Scalars("final/mse")[0].value for path in folders}
    assert rows == pytest.approx(expected)
    assert len({*rows.values()}) == 3


def test_of_many_classes_the_hardest_are_drawn() -> None:
    record = TaskRecord("Test", 1, 1)
    answers = torch.eye(100).unsqueeze(0)
    record.add_answers(answers, torch.arange(100).unsqueeze(0), [[f"class {n}" for n in range(100)]])
    figure = record.figures()["classes"]
    assert figure.axes[0].get_title(loc="left").endswith("the 60 hardest of 100")


@pytest.mark.slow
@pytest.mark.usefixtures("glyphs")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    pytest.importorskip("playwright", reason="needs playwright")
    if not any(map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome"))):
        pytest.skip("needs a Chromium")
    main(["fit", "--config", TINY])
    script = Path(__file__).parents[1] / "docs/screenshots.py"
    subprocess.run([sys.executable, str(script), "lightning_logs", str(tmp_path / "shots")], check=True, timeout=300)
    shots = {path.stem: Image.open(path).convert("RGB") for path in (tmp_path / "shots").iterdir()}
    assert set(shots) == {"scalars", "images", "hparams"}
    # the colours of the figures: the blue of curves and frames is nowhere else in TensorBoard
    assert (np.abs(np.array(shots["images"], dtype=int) - (0x2F, 0x6F, 0xB7)).max(2) < 12).sum() > 300
    assert all(len(shot.getcolors(1 << 20) or []) > 200 for shot in shots.values())
