"""Weights from another run, and what else the command line says of training."""

import csv
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RUN, TINY, fails, trainer

from meta_lightning import FOMAML, MAML, MLP, MetaLearner, Reptile, Sinusoid
from meta_lightning.cli import main

pytestmark = pytest.mark.usefixtures("glyphs")


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The network's part of a checkpoint."""
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if name.startswith("network.")}


def trained(algorithm: Any, sinusoid: Sinusoid, path: Path, **options: Any) -> MetaLearner:
    """A learner after two meta-iterations, with a checkpoint of it."""
    learner: MetaLearner = algorithm(MLP(hidden=[8]), **options)
    fit = trainer(max_steps=2, limit_val_batches=0)
    fit.fit(learner, sinusoid)
    fit.save_checkpoint(path)
    return learner


@pytest.mark.parametrize("second", [MAML, FOMAML, Reptile])
@pytest.mark.parametrize(
    ("first", "options"),
    [
        pytest.param(MAML, {"learn_inner_lr": True}, id="rates"),
        pytest.param(Reptile, {"inner_optimizer": "adam"}, id="moments"),
    ],
)
def test_the_weights_of_any_algorithm(
    first: Any, options: dict[str, Any], second: Any, sinusoid: Sinusoid, tmp_path: Path
) -> None:
    before = trained(first, sinusoid, tmp_path / "a.ckpt", **options)
    network = MLP(hidden=[8])
    learner = second(network, init_from=str(tmp_path / "a.ckpt"))
    torch.testing.assert_close(network.state_dict(), before.network.state_dict(), rtol=0, atol=0)
    fit = trainer(max_steps=2, limit_val_batches=0)
    fit.fit(learner, sinusoid)
    fit.save_checkpoint(tmp_path / "b.ckpt")
    (tmp_path / "a.ckpt").unlink()
    loaded = second.load_from_checkpoint(tmp_path / "b.ckpt", network=MLP(hidden=[8]))
    torch.testing.assert_close(loaded.state_dict(), learner.state_dict(), rtol=0, atol=0)


def test_weights_of_another_network_are_refused(sinusoid: Sinusoid, tmp_path: Path) -> None:
    trained(MAML, sinusoid, tmp_path / "a.ckpt")
    network = MLP(hidden=[8, 8])
    before = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(ValueError, match=r"init_from .*network\b.*features\.3\.bias: .*\(8,\), .*None, features\.3"):
        Reptile(network, init_from=str(tmp_path / "a.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"init_from .*head\.weight: .*\(1, 9\), .*\(1, 8\)"):
        MAML(MLP(hidden=[9]), init_from=str(tmp_path / "a.ckpt"))
    with pytest.raises(ValueError, match=r"init_from .*none\.ckpt"):
        MAML(network, init_from="none.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "empty.ckpt")
    with pytest.raises(ValueError, match=r"init_from .*features\.1\.bias: .*\(8,\), .*None, .*\b3 more"):
        MAML(network, init_from=str(tmp_path / "empty.ckpt"))


def test_reptile_first_and_maml_after_it_from_the_command_line() -> None:
    main(["fit", "--config", TINY, "--model", "Reptile", "--trainer.max_steps", "2"])
    start = Path("reptile.ckpt")
    shutil.move(RUN / "checkpoints/last.ckpt", start)
    begun = ["fit", "--config", TINY, "--model.init_from", str(start)]
    main([*begun, "--trainer.max_steps", "2", "--model.outer_lr", "1e-30"])
    second = Path("lightning_logs/version_1/checkpoints/last.ckpt")
    torch.testing.assert_close(weights(second), weights(start))
    main([*begun, "--trainer.max_steps", "4"])
    whole = weights(Path("lightning_logs/version_2/checkpoints/last.ckpt"))
    main([*begun, "--trainer.max_steps", "2"])
    halfway = shutil.copy("lightning_logs/version_3/checkpoints/last.ckpt", "halfway.ckpt")  # which begins a new run

    start.unlink()
    config = str(Path("lightning_logs/version_3/config.yaml"))  # which names the file that is gone
    main(["fit", "--config", config, "--ckpt_path", halfway, "--trainer.max_steps", "4"])
    main(["fit", "--ckpt_path", halfway, "--trainer.max_steps", "4", "--trainer.accelerator", "cpu"])
    for version in (4, 5):
        resumed = weights(Path(f"lightning_logs/version_{version}/checkpoints/last.ckpt"))
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    main(["test", "--ckpt_path", halfway, "--trainer.accelerator", "cpu"])
    assert re.search(r"init_from .*\breptile\.ckpt", fails(*begun))


def test_schedules_stopping_and_monitors_by_class_path() -> None:
    callbacks = [
        {"class_path": "EarlyStopping", "init_args": {"monitor": "val/tasks", "patience": 1, "mode": "max"}},
        {"class_path": "LearningRateMonitor", "init_args": {"logging_interval": "step"}},
    ]
    schedule = ["--model.scheduler", "torch.optim.lr_scheduler.StepLR", "--model.scheduler.step_size", "2"]
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "."]
    options = [*schedule, "--model.scheduler.gamma", "0.5", *logger, f"--trainer.callbacks={callbacks!r}"]
    main(["fit", "--config", TINY, *options, "--trainer.max_steps", "9"])
    rows = list(csv.DictReader((RUN / "metrics.csv").open()))
    # validations after steps 2 and 4: the second is no better than the first
    for name in ("train/outer_lr", "lr-Adam"):
        assert [float(row[name]) for row in rows if row[name]] == pytest.approx([0.001, 0.001, 0.0005, 0.0005])
    last = str(RUN / "checkpoints/last.ckpt")
    main(["fit", "--ckpt_path", last, "--trainer.max_steps", "5", "--trainer.accelerator", "cpu"])
    resumed = torch.load(last, weights_only=True)
    assert resumed["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(2.5e-4)
    said = fails("fit", "--config", TINY, "--model.scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau")
    assert re.search(r"scheduler .*ReduceLROnPlateau\b.* metrics", said)


@pytest.mark.parametrize("pattern", ["features.*", "head.*"])
def test_anil_and_boil_from_the_command_line(pattern: str) -> None:
    main(["fit", "--config", TINY, "--model.inner_freeze", f"[{pattern}]", "--model.learn_inner_lr", "true"])
    state = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    frozen = pattern.removesuffix(".*")
    assert {name.split("/")[0] for name in state if "rates" in name} == {
        f"inner_rule.rates.{part}" for part in ("features", "head") if part != frozen
    }
    main(["test", "--ckpt_path", str(RUN / "checkpoints/last.ckpt"), "--trainer.accelerator", "cpu"])
    said = fails("fit", "--config", TINY, "--model.inner_freeze", "[body.*]")
    assert re.search(r"inner_freeze .*features\.0\.weight, .*'body\.\*'", said)
