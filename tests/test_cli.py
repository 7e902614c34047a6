"""The command line, run in process on tiny tasks."""

import csv
import json
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN, TINY, fails, printed_config
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from meta_lightning import Glyphs
from meta_lightning.algorithms import ALGORITHMS
from meta_lightning.cli import main
from meta_lightning.parser import configs_dir


def stem_of(name: str) -> str:
    """The algorithm that a configuration is named after."""
    return Path(name).stem.partition("_")[0].removesuffix("pp")  # MAML++ is MAML with options


OWN = sorted(path.relative_to(configs_dir()).as_posix() for path in configs_dir().rglob("*.yaml"))
OF_MAML = [name for name in OWN if stem_of(name) == "maml" and "/" in name]
pytestmark = pytest.mark.usefixtures("glyphs")


@pytest.mark.parametrize("algorithm", ["MAML", "FOMAML", "Reptile"])
def test_fit_validate_test_predict(algorithm: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", TINY, "--model", algorithm])
    assert {path.name for path in (RUN / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    best = str(RUN / "checkpoints/best.ckpt")
    assert torch.load(best, weights_only=True)["algorithm"] == algorithm

    events = EventAccumulator(str(RUN)).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "val/loss_before", "val/accuracy", "val/accuracy_before"} <= scalars
    assert {"val/loss_ci95", "val/accuracy_ci95", "val/accuracy_before_ci95"} <= scalars
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3]
    assert [event.step for event in events.Scalars("val/accuracy")] == [1, 3]

    capsys.readouterr()
    for command in ("validate", "test"):
        main([command, "--config", TINY, "--model", algorithm, "--ckpt_path", best])
    shown = capsys.readouterr().out
    assert all(f"test/{name}" in shown for name in ("accuracy", "accuracy_ci95", "accuracy_before", "loss", "tasks"))

    main(["predict", "--config", TINY, "--model", algorithm, "--ckpt_path", best])
    (table,) = Path("lightning_logs").glob("*/predictions.csv")
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 5 * 5 * 2
    assert [row["task"] for row in rows[::10]] == ["0", "1", "2", "3", "4"]
    assert all(sum(float(row[f"output_{n}"]) for n in range(5)) == pytest.approx(1, abs=1e-5) for row in rows)
    data = Glyphs()
    names = [data.task_set("test").class_names(task) for task in range(5)]
    assert set(names[0]) <= set(data.load().classes[data.load().members("test")])
    assert all(row["target_class"] == names[int(row["task"])][int(row["target_0"])] for row in rows)


def test_the_last_checkpoint_is_the_last_though_the_best_came_early() -> None:
    # "tasks" is the same at each validation, so that none is better than the first
    main(["fit", "--config", TINY, "--checkpoint.monitor", "val/tasks", "--trainer.max_steps", "5"])
    steps = [
        torch.load(RUN / f"checkpoints/{name}.ckpt", weights_only=True)["global_step"] for name in ("best", "last")
    ]
    assert steps == [2, 5]


def test_command_line_beats_checkpoint_and_checkpoint_beats_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", TINY, "--model.inner_lr", "0.03", "--trainer.max_steps", "2"])
    checkpoint = str(RUN / "checkpoints/last.ckpt")
    config = printed_config(capsys, "test", "--ckpt_path", checkpoint, "--model.test_inner_steps", "7")
    assert config["model"]["class_path"].endswith("MAML")
    assert config["model"]["init_args"]["inner_lr"] == 0.03
    assert config["model"]["init_args"]["test_inner_steps"] == 7
    assert config["model"]["init_args"]["network"]["init_args"]["filters"] == 4
    assert config["data"]["init_args"]["test_tasks"] == 5
    main(["test", "--ckpt_path", checkpoint, "--data.queries", "1", "--trainer.accelerator", "cpu"])


@pytest.mark.parametrize("name", OWN)
def test_own_configs_are_found_by_name_from_any_folder(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(capsys, "fit", "--config", name)
    assert config["trainer"]["max_steps"] > 0


@pytest.fixture(scope="session")
def mini_imagenet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Noise in the format of mini-ImageNet, as many images a class as its configurations train with."""
    root = tmp_path_factory.mktemp("mini_imagenet")
    images = np.random.default_rng(0).integers(0, 256, (5 * 20, 84, 84, 3), dtype=np.uint8)
    for split in ("train", "validation", "test"):
        rows = {f"{split}{c}": range(20 * c, 20 * (c + 1)) for c in range(5)}
        contents = {"image_data": images, "class_dict": rows}
        (root / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(contents))
    return str(root)


@pytest.mark.parametrize(("name", "model"), [(name, []) for name in OWN] + [(n, ["--model=FOMAML"]) for n in OF_MAML])
def test_own_configs_train(name: str, model: list[str], mini_imagenet: str) -> None:
    data = {
        # glyphs in the place of Omniglot, which has as many drawings a class
        "omniglot": ["--data=Glyphs"],
        "mini_imagenet": [f"--data.root={mini_imagenet}", "--data.train_queries=2", "--data.queries=2"],
    }.get(name.partition("/")[0], [])
    few = [f"--data.{option}=2" for option in ("meta_batch_size", "val_tasks", "test_tasks")]
    few += ["--trainer.max_steps=1", "--trainer.accelerator=cpu", "--data.epoch_length=1", "--model.test_inner_steps=2"]
    main(["fit", "--config", name, *model, *data, *few])
    record = json.loads((RUN / "fit.json").read_text())
    algorithm = "FOMAML" if model else ALGORITHMS[stem_of(name)].__name__
    assert (record["algorithm"], record["steps"]) == (algorithm, 1)
    assert record["figures"]["val/loss"] > 0


def test_a_change_of_algorithm_brings_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    reptile = printed_config(capsys, "fit", "--config", "maml.yaml", "--model", "Reptile")["model"]
    assert reptile["class_path"].endswith("Reptile")
    assert reptile["init_args"]["inner_batch_size"] is None
    assert reptile["init_args"]["network"]["init_args"]["filters"] == 32


def test_reptile_names_what_suits_it_badly_in_the_file_of_another_algorithm() -> None:
    few = ["--trainer.max_steps", "1", "--data.val_tasks", "1"]
    with pytest.warns(UserWarning, match=r"Reptile learns little") as caught:
        main(["fit", "--config", "maml.yaml", "--model", "Reptile", *few])
    (said,) = [str(w.message) for w in caught if "learns little" in str(w.message)]
    for named in (
        "data.train_shots 1 (expected at least 5)",
        "outer_lr 0.005 (expected at least 0.01)",
        "reptile.yaml",
    ):
        assert named in said
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Reptile learns little")
        main(["fit", "--config", "reptile.yaml", *few])


def test_any_optimizer_by_class_path() -> None:
    main(
        f"fit --config {TINY} --model.optimizer torch.optim.SGD --model.optimizer.momentum 0.5 "
        "--model.outer_lr 0.02 --trainer.max_steps 1".split()
    )
    (group,) = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert (group["momentum"], group["initial_lr"]) == (0.5, 0.02)


@pytest.mark.parametrize(
    "loss", ["torch.nn.functional.cross_entropy", "torch.nn.CrossEntropyLoss --model.loss.label_smoothing 0.1"]
)
def test_any_loss_by_function_or_class_path(loss: str) -> None:
    main(["fit", "--config", TINY, "--model.loss", *loss.split(), "--trainer.max_steps", "1"])
    main(["test", "--ckpt_path", str(RUN / "checkpoints/last.ckpt"), "--trainer.accelerator", "cpu"])


@pytest.mark.parametrize("data", ["Glyphs", "Sinusoid"])
def test_print_data_shows_what_a_configuration_uses(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "maml.yaml", "--data", data, "--print_data"])
    shown = capsys.readouterr().out
    expected = "test  296 classes, 5920 images, 600 tasks" if data == "Glyphs" else "test  600 tasks"
    assert expected in shown
    with Image.open("data.png") as picture:
        assert picture.size == (1800, 720)
        assert len(picture.convert("L").getcolors() or []) > 50
    assert not RUN.exists()


def test_a_range_of_ways(capsys: pytest.CaptureFixture[str]) -> None:
    ranges = ["--data.train_ways", "[3,5]", "--data.train_shots", "[1,2]"]
    main(["fit", "--config", TINY, *ranges, "--ckpt_path", "last", "--trainer.max_steps", "2"])
    checkpoint = str(RUN / "checkpoints/last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["datamodule_hyper_parameters"]["train_ways"] == [3, 5]
    config = printed_config(capsys, "test", "--ckpt_path", checkpoint)["data"]["init_args"]
    assert (config["train_ways"], config["train_shots"], config["ways"]) == ([3, 5], [1, 2], 5)
    main(["fit", "--config", TINY, *ranges, "--ckpt_path", "last", "--trainer.max_steps", "4"])
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4
    main(["test", "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu"])


def test_labels_of_the_split(capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["--data.train_labels", "split", "--model.network.ways", "2000"]
    main(["fit", "--config", TINY, "--model", "Baseline", *labels, "--trainer.max_steps", "1"])
    config = printed_config(capsys, "test", "--ckpt_path", str(RUN / "checkpoints/last.ckpt"))
    assert config["data"]["init_args"]["train_labels"] == "split"


def test_the_help_of_an_algorithm_lists_own_classes_where_there_are_many(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "MAML"])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 300
    assert "meta_lightning.Conv4" in shown
    assert "torch.nn.Bilinear" not in shown
    assert "torch.optim.AdamW" in shown  # few


FROM_FILE = ["--config", "maml.yaml"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fitt"], "there is no subcommand fitt; did you mean fit?"),
        (["comparre"], "there is no subcommand comparre; did you mean compare?"),
        (["fit"], "--model and --data are required; --config maml.yaml gives both, and in a test --ckpt_path"),
        (["fit", *FROM_FILE, "--modell", "MAML"], "there is no option --modell; did you mean --model?"),
        (["fit", *FROM_FILE, "--model", "NoSuch"], "--model must name a class, got NoSuch"),
        (["fit", *FROM_FILE, "--model", "MAMML"], "--model must name a class, got MAMML; did you mean MAML?"),
        (
            ["fit", *FROM_FILE, "--model.inner_step", "3"],
            "MAML has no option --model.inner_step; did you mean --model.inner_steps?",
        ),
        (
            ["fit", *FROM_FILE, "--model.network.filterz", "3"],
            "Conv4 has no option --model.network.filterz; did you mean --model.network.filters?",
        ),
        (["fit", *FROM_FILE, "--model.inner_lr", "abc"], "--model.inner_lr: Expected a .* Got value: abc"),
        (["fit", *FROM_FILE, "--model.optimizer", "torch.optim.Adm"], "--model.optimizer: .* has no attribute 'Adm'"),
        (["fit", *FROM_FILE, "--data", "Omniglt"], "--data must name a class, got Omniglt; did you mean Omniglot?"),
        # no option is completed from its beginning
        (["fit", *FROM_FILE, "--trainer.max_step", "5"], "no option --trainer.max_step; did you mean .*max_steps?"),
        (["adapt", "--suport", "x"], "there is no option --suport; did you mean --support?"),
    ],
)
def test_misspelt_options_are_refused(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(args)
    assert error.value.code == 2
    shown = capsys.readouterr().err
    assert re.search(message, shown)
    assert len(shown.splitlines()) <= 5
    assert re.search(r"For all options: python -m meta_lightning .*--help", shown)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data.ways", "500"], r"\bways .*\b169 .*val .* 500"),
        (["--data.train_ways", "[5,2000]"], r"\btrain_ways .*train .*\(5, 2000\)"),
        (["--data.train_ways", "[1,5]"], r"\btrain_ways .*\b2\b.*\(1, 5\)"),
        (["--data.shots", "19"], r"shots \+ queries .*\b20\b.* 19 \+ 2"),
        (["--data.ways", "7"], r"network .*\b7\b.* 5"),
        (["--model.inner_steps", "0"], r"\binner_steps .* 0"),
        (["--model.inner_lr", "0"], r"\binner_lr .*got 0\b"),
        (["--model.outer_lr", "-1"], r"\bouter_lr .* -1"),
        (["--model.gradient_clip_val", "0"], r"gradient_clip_val .*got 0\b"),
        (["--model", "Reptile", "--model.outer_lr", "1.5"], r"\bouter_lr .*\(0, 1\].* 1\.5"),
        (["--model", "Reptile", "--model.optimizer", "Adam"], r"\boptimizer .*Reptile"),
        (["--model.outer_lr_decay", "linear", "--trainer.max_steps", "-1"], r"outer_lr_decay .*max_steps"),
        (["--data", "Omniglot", "--data.root", "nowhere"], r"root .*Omniglot.*\b32460 .*--data\.download"),
        (
            ["--model.loss", "torch.nn.CrossEntropyLoss", "--model.loss.reduction", "none"],
            r"\bloss .*scalar.*\(\d+,\)",
        ),
        (["--model.network.channels", "3"], r"network .*channels 3\b.*\(1, 28, 28\)"),
        (["--data", "Sinusoid", "--model.network", "meta_lightning.MLP"], r"checkpoint\.monitor .*val/mse"),
        (["--config", "nothing.yaml"], rf"--config .*{', '.join(OWN)}.* nothing\.yaml"),
        (["--ckpt_path", "typo.ckpt"], r"--ckpt_path .*typo\.ckpt"),
        (["--ckpt_path", TINY], r"--ckpt_path .*tiny\.yaml"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(args: list[str], message: str) -> None:
    assert re.search(message, fails("fit", "--config", TINY, *args))
    assert not list(Path().rglob("*.ckpt"))


def test_a_checkpoint_of_another_algorithm_or_network_is_refused() -> None:
    main(["fit", "--config", TINY, "--trainer.max_steps", "1"])
    checkpoint = str(RUN / "checkpoints/last.ckpt")
    said = fails("test", "--config", TINY, "--model", "FOMAML", "--ckpt_path", checkpoint)
    assert re.search(r"checkpoint .*\bFOMAML\b.* MAML\b", said)
    said = fails("test", "--config", TINY, "--model.network.filters", "6", "--ckpt_path", checkpoint)
    assert re.search(r"checkpoint .*network.*\(6, 1, 3, 3\).*\(4, 1, 3, 3\)", said)


def test_the_command_line_beats_the_optimizer_of_a_resumed_checkpoint() -> None:
    main(["fit", "--config", TINY, "--trainer.max_steps", "1"])
    checkpoint = str(RUN / "checkpoints/last.ckpt")
    main(["fit", "--config", TINY, "--ckpt_path", checkpoint, "--model.outer_lr", "0.05", "--trainer.max_steps", "2"])
    (group,) = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert group["lr"] == group["initial_lr"] == 0.05


def test_predictions_of_a_regression() -> None:
    regression = ["--data", "Sinusoid", "--data.test_tasks", "3", "--model.network", "meta_lightning.MLP"]
    main(["predict", "--config", TINY, *regression])
    rows = list(csv.DictReader((RUN / "predictions.csv").open()))
    assert len(rows) == 3 * 100
    assert set(rows[0]) == {"task", "query", "target_0", "output_0"}
    assert all(float(row["target_0"]) <= 5 for row in rows)


def test_the_last_checkpoint_path_counts_however_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", TINY, "--model.inner_lr", "0.03", "--trainer.max_steps", "1"])
    checkpoint = RUN / "checkpoints/last.ckpt"
    config = printed_config(capsys, "test", "--ckpt_path", "typo.ckpt", f"--ckpt_path={checkpoint}")
    assert config["ckpt_path"] == str(checkpoint)
    assert config["model"]["init_args"]["inner_lr"] == 0.03


def test_restarting_with_last_keeps_what_the_first_start_was_given() -> None:
    main(["fit", "--config", TINY, "--model.inner_lr", "0.03", "--trainer.max_steps", "1", "--ckpt_path", "last"])
    main(["fit", "--config", TINY, "--ckpt_path=last", "--trainer.max_steps", "2"])
    record = json.loads((RUN / "fit.json").read_text())
    assert (record["steps"], record["config"]["model"]["init_args"]["inner_lr"]) == (2, 0.03)


@pytest.mark.parametrize("named", ["last", "lightning_logs/version_0/checkpoints/last.ckpt"])
def test_a_configuration_may_name_the_checkpoint(named: str) -> None:
    main(["fit", "--config", TINY, "--model.inner_lr", "0.03", "--trainer.max_steps", "1"])
    Path("again.yaml").write_text(f"ckpt_path: {named}\n")
    main(["fit", "--config", TINY, "--config", "again.yaml", "--trainer.max_steps", "2"])
    record = json.loads((RUN / "fit.json").read_text())
    assert (record["steps"], record["config"]["model"]["init_args"]["inner_lr"]) == (2, 0.03)


def test_a_first_start_with_last_keeps_its_origin() -> None:
    missing = ["--ckpt_path", "last", "--model.init_from", "nothing.ckpt"]
    assert re.search(r"init_from .*nothing\.ckpt", fails("fit", "--config", TINY, *missing))
