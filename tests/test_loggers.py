"""Weights & Biases and MLflow: figures by their own calls, and a folder per run. Where absent, stand-ins."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY, fails, trainer
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from PIL import Image

from meta_lightning import MAML, MLP, Dashboard, Sinusoid
from meta_lightning.cli import main

FIT = ["fit", "--config", TINY, "--data", "Sinusoid", "--model.network", "meta_lightning.MLP", "--trainer.max_steps=2"]
FIT += ["--checkpoint.monitor", "val/mse", "--checkpoint.mode", "min"]
FIGURES = ["adaptation", "answers"]


class Kept:
    """What a logger is called with."""

    def __init__(
        self, save_dir: str = ".", id: str = "a", project: str = "sines", tracking_uri: str = "sqlite:///m.db"
    ) -> None:
        self._save_dir, self._project, self._id, self._experiment = save_dir, project, id, None
        self.images: list[tuple[str, int | None]] = []
        self.metrics: dict[str, list[int | None]] = {}
        self.params: dict[str, Any] = {}

    def keep(self, key: str, image: Any, step: int | None) -> None:
        assert isinstance(image, Image.Image)
        assert image.width > 300
        self.images.append((key, step))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name in metrics:
            self.metrics.setdefault(name, []).append(step)

    def log_hyperparams(self, params: Any) -> None:
        self.params |= params

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        pass

    def finalize(self, status: str) -> None:
        pass


class Wandb(Kept, WandbLogger):
    """In the place of WandbLogger."""

    @property
    def experiment(self) -> Any:
        return self

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        (image,) = images
        self.keep(key, image, step)


class MLflow(Kept, MLFlowLogger):
    """In the place of MLFlowLogger with a database; a parameter cannot be changed."""

    save_dir = None
    name = "0"

    @property
    def run_id(self) -> str:
        return self._id

    version = run_id

    @property
    def experiment(self) -> Any:
        def log_image(
            run_id: str, image: Any, artifact_file: Any = None, key: str | None = None, step: int | None = None
        ) -> None:
            assert run_id == self.run_id
            self.keep(str(key), image, step)

        run = SimpleNamespace(data=SimpleNamespace(params=self.params))
        return SimpleNamespace(log_image=log_image, get_run=lambda run_id: run)

    def log_hyperparams(self, params: Any) -> None:
        assert all(self.params.get(name, value) == value for name, value in params.items())
        super().log_hyperparams(params)


@pytest.mark.parametrize("kind", [Wandb, MLflow])
def test_figures_norms_and_hyperparameters_reach_the_logger(kind: type[Wandb], sinusoid: Sinusoid, mlp: MLP) -> None:
    logger = kind()
    learner = MAML(mlp, inner_steps=2)
    fit = trainer(max_steps=10, logger=logger, log_every_n_steps=5, callbacks=[Dashboard()])
    fit.fit(learner, sinusoid)
    assert logger.images == [(f"val/{name}", 9) for name in FIGURES]
    assert logger.metrics["train/gradient_norm"] == logger.metrics["train/update_norm"] == [4, 9]
    assert (logger.params["algorithm"], logger.params["tasks/set"]) == ("MAML", "Sinusoid")
    assert "train/loss" in logger.metrics
    for queries in (3, 15):
        sinusoid.test_queries = sinusoid.hparams.test_queries = queries
        fit.test(learner, sinusoid, verbose=False)
    assert logger.images[2:] == 2 * [(f"test/{name}", 10) for name in FIGURES]
    assert "final/loss" not in logger.metrics  # its own columns tell validation and test apart


@pytest.mark.parametrize(("kind", "root"), [("Wandb", "sines"), ("MLflow", "0")])
def test_every_run_has_a_folder_of_its_own(kind: str, root: str) -> None:
    for run, inner_lr in (("a", 0.01), ("b", 0.02)):
        logger = ["--trainer.logger", f"test_loggers.{kind}", f"--trainer.logger.id={run}"]
        main([*FIT, *logger, f"--model.inner_lr={inner_lr}"])
    for run, inner_lr in (("a", 0.01), ("b", 0.02)):
        folder = Path(root, run)
        assert {path.name for path in folder.iterdir()} == {"checkpoints", "config.yaml", "fit.json"}
        assert json.loads((folder / "fit.json").read_text())["config"]["model"]["init_args"]["inner_lr"] == inner_lr
        assert f"inner_lr: {inner_lr}" in (folder / "config.yaml").read_text()
    assert not Path("config.yaml").exists()
    test = ["test", "--ckpt_path", f"{root}/a/checkpoints/last.ckpt", "--trainer.accelerator=cpu"]
    main([*test, "--trainer.logger", f"test_loggers.{kind}", "--trainer.logger.id=c"])
    assert {path.name for path in Path(root, "c").iterdir()} == {"config.yaml", "test.json"}


@pytest.mark.parametrize(
    ("kind", "root", "elsewhere"),
    [("Wandb", "sines", ("project", "cosines")), ("MLflow", "0", ("tracking_uri", "file:cosines"))],
)
def test_the_last_checkpoint_is_found(
    kind: str, root: str, elsewhere: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = ["--trainer.logger", f"test_loggers.{kind}"]
    for steps, run, said in ((2, "a", "starting anew"), (4, "b", f"{root}/a"), (6, "c", f"{root}/b")):
        caplog.clear()
        with caplog.at_level("INFO", "lightning.pytorch"):
            main([*FIT, *logger, f"--trainer.logger.id={run}", f"--trainer.max_steps={steps}", "--ckpt_path=last"])
        assert said in caplog.text
        assert torch.load(f"{root}/{run}/checkpoints/last.ckpt", weights_only=True)["global_step"] == steps
    name, folder = elsewhere
    test = ["test", *FIT[1:], *logger, f"--trainer.logger.{name}={folder}", "--ckpt_path=last"]
    assert "must find a checkpoint of this experiment in cosines, got none" in fails(*test)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_calls_are_those_of_the_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip(name)
    if name == "mlflow":
        pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = {"wandb": ["WandbLogger"], "mlflow": ["MLFlowLogger", "--trainer.logger.tracking_uri=sqlite:///m.db"]}
    for steps in (2, 4):
        main([*FIT, "--trainer.logger", *options[name], f"--trainer.max_steps={steps}", "--ckpt_path=last"])
        if name == "wandb":
            library.finish()  # Lightning goes on with a run of the same process
    records = [path for path in Path().rglob("fit.json") if path.with_name("config.yaml").exists()]
    assert sorted(json.loads(path.read_text())["steps"] for path in records) == [2, 4]
    if name == "wandb":
        pictures = [*Path("wandb").glob("offline-run-*/files/media/images/val/*.png")]
        assert len(pictures) == 2 * len(FIGURES)
        library.teardown()
        return
    client = importlib.import_module("mlflow.tracking").MlflowClient("sqlite:///m.db")
    runs = client.search_runs(["1"])
    assert len(runs) == 2
    for run in runs:
        assert run.data.metrics["val/mse"] > 0
        assert run.data.params["algorithm"] == "MAML"
        images = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
        assert all(any(figure in path for path in images) for figure in FIGURES), images
