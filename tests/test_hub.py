"""Checkpoints that come with the package: how they are stripped, named, listed and used."""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import RUN, TINY, fails, printed_config
from PIL import Image

from meta_lightning import MAML, Conv4, Glyphs, hub, load_learner
from meta_lightning.cli import main
from meta_lightning.data.tasks import Array
from meta_lightning.estimator import FewShotClassifier

SHIPPED = hub.FOLDER  # before a test replaces it
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SECTIONS = ("Data", "Licence", "Settings", "Accuracy", "Intended use and limits", "Command")


@pytest.fixture(scope="session")
def release() -> Iterator[ModuleType]:
    """The program that strips checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("release")


@pytest.fixture(scope="session")
def folder(checkpoint: str, release: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint, which stands for two."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "FOLDER", folder)
        for name in ("characters", "maml"):
            release.release(checkpoint, name)
    return folder


@pytest.fixture
def ready(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's checkpoints are those of the folder."""
    monkeypatch.setattr(hub, "FOLDER", folder)
    return folder


@pytest.fixture
def drawings(glyphs: Glyphs) -> tuple[Array, list[str]]:
    """Two drawings of each of seven characters.  # 14 1 28 28, uint8"""
    data = glyphs.load()
    rows = np.concatenate([np.flatnonzero(data.labels == member)[:2] for member in data.members("test")[:7]])
    return data.images[rows], [f"c{row}" for row in range(7) for _ in range(2)]


def records(*args: str) -> dict[str, float]:
    """The figures of a test on the command line."""
    main(["test", *args, "--trainer.accelerator", "cpu"])
    newest = max(Path("lightning_logs").glob("*/test.json"), key=lambda path: path.stat().st_mtime_ns)
    figures: dict[str, float] = json.loads(newest.read_text())["figures"]
    return figures


def test_what_is_released_is_small_and_has_no_state_of_training(folder: Path, checkpoint: str) -> None:
    whole = torch.load(checkpoint, weights_only=True)
    released = torch.load(folder / "characters.ckpt", weights_only=True)
    assert (folder / "characters.ckpt").stat().st_size < Path(checkpoint).stat().st_size / 2
    assert (folder / "characters.ckpt").read_bytes() == (folder / "maml.ckpt").read_bytes()
    assert not {"loops", "callbacks", "optimizer_states", "lr_schedulers", "random_states", "log_folders"} & set(
        released
    )
    for key in ("algorithm", "form", "hyper_parameters"):
        assert released[key] == whole[key]
    torch.testing.assert_close(released["state_dict"], whole["state_dict"], rtol=0, atol=0)
    data = whole["datamodule_hyper_parameters"]
    assert released["datamodule_hyper_parameters"] == {n: v for n, v in data.items() if n != "cache_dir"}
    assert data["transforms"]["mean"] == [0.2]


@pytest.mark.usefixtures("ready")
def test_answers_are_those_of_the_whole_checkpoint_to_the_bit(
    checkpoint: str, drawings: tuple[Array, list[str]]
) -> None:
    x, y = drawings
    answers = [load_learner(path).adapt(x, y, steps=3).predict_proba(x) for path in (checkpoint, "hub:characters")]
    assert torch.equal(*answers)
    classifier = FewShotClassifier("hub:characters", steps=3).fit(x, y)
    assert np.array_equal(classifier.predict_proba(x), answers[0].numpy())
    figures = [records("--ckpt_path", path) for path in (checkpoint, "hub:maml")]
    assert figures[0] == figures[1]
    assert figures[0]["test/tasks"] == 5
    assert "test/accuracy" in figures[0]


@pytest.mark.usefixtures("ready")
def test_the_command_line_takes_names_where_it_takes_paths(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(capsys, "test", "--ckpt_path", "hub:maml", "--model.test_inner_steps", "7")
    assert config["model"]["init_args"]["network"]["init_args"]["filters"] == 4
    assert config["model"]["init_args"]["test_inner_steps"] == 7
    cpu = ["--trainer.accelerator", "cpu", "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "."]
    main(["validate", "--ckpt_path=hub:maml", *cpu])
    Path("named.yaml").write_text("ckpt_path: hub:maml\n")
    main(["predict", "--config", TINY, "--config", "named.yaml", *cpu])
    (table,) = Path("lightning_logs").glob("*/predictions.csv")
    assert len(table.read_text().splitlines()) == 1 + 5 * 5 * 2
    assert "ckpt_path: hub:maml\n" in table.with_name("config.yaml").read_text()


def test_a_warm_start_takes_the_weights(ready: Path, checkpoint: str) -> None:
    args = ["fit", "--config", TINY, "--trainer.max_steps", "1", "--model.outer_lr", "1e-30"]
    main([*args, "--model.init_from", "hub:maml"])
    start = torch.load(ready / "maml.ckpt", weights_only=True)["state_dict"]
    begun = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(begun, start)
    # a resumed run keeps the name in its record
    main(
        [*args, "--model.init_from", "hub:maml", "--trainer.max_steps", "2", f"--ckpt_path={RUN}/checkpoints/last.ckpt"]
    )
    assert "init_from: hub:maml\n" in (RUN / "config.yaml").read_text()
    network = Conv4(filters=4)
    MAML(network, init_from="hub:characters")
    assert all(torch.equal(start[f"network.{name}"], p) for name, p in network.named_parameters())


@pytest.mark.usefixtures("ready")
def test_training_does_not_go_on_from_a_checkpoint_without_its_state() -> None:
    said = fails("fit", "--config", TINY, "--ckpt_path", "hub:maml")
    assert re.search(r"--ckpt_path .*hub:maml .*optimizer_states, .*--model\.init_from hub:maml$", said)
    assert not Path("lightning_logs").exists()


@pytest.mark.usefixtures("ready")
def test_unknown_names_are_refused() -> None:
    known = r".*hub:characters, hub:maml; got hub:"
    for name in ("nonesuch", "../maml", ""):
        for command in ("fit", "test"):
            assert re.search(
                rf"--ckpt_path {known}{name}$", fails(command, "--config", TINY, "--ckpt_path", f"hub:{name}")
            )
    assert re.search(rf"\binit_from {known}x$", fails("fit", "--config", TINY, "--model.init_from", "hub:x"))
    with pytest.raises(ValueError, match=rf"\bpath {known}x$"):
        load_learner("hub:x")
    with pytest.raises(ValueError, match=r"\bname .*'characters', 'maml'.* 'x'"):
        hub.card("x")
    assert re.search(r"\bname .*'characters', 'maml'.* 'x'", fails("hub", "--name", "x"))


@pytest.fixture
def pictures(drawings: tuple[Array, list[str]]) -> None:
    """my_drawings and unlabelled: a picture of each character."""
    for number, (image, name) in enumerate(zip(*drawings, strict=True)):
        path = Path("unlabelled", f"{name}.png") if number % 2 else Path("my_drawings", name, "a.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - image[0]).save(path)


@pytest.mark.usefixtures("ready", "pictures")
def test_adapt_needs_no_checkpoint_of_ones_own(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    folders = ["--support", "my_drawings", "--query", "unlabelled", "--overwrite"]
    for named in ([], ["--ckpt_path", "hub:characters"], ["--ckpt_path", checkpoint]):
        main(["adapt", *folders, *named])
        tables.append(Path("predictions.csv").read_text())
    assert len(tables[0].splitlines()) == 8
    assert tables[0] == tables[1] == tables[2]
    assert "Adapted to 7 classes from 7 pictures" in capsys.readouterr().out
    said = fails("adapt", *folders, "--ckpt_path", "hub:x")
    assert re.search(r"\bckpt_path .*hub:characters, hub:maml; got hub:x$", said)


@pytest.mark.usefixtures("pictures")
def test_a_package_without_checkpoints_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "FOLDER", tmp_path)
    assert "none; got hub:characters" in fails("adapt", "--support", "my_drawings", "--query", "unlabelled")
    main(["hub"])
    assert capsys.readouterr().out == "There are none.\n"


def test_the_list_has_the_first_line_of_each_card(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hub.names() == ["characters", "maml"]
    main(["hub"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["hub:characters", "hub:maml"]
    assert all("MAML: " in line and "#" not in line for line in lines)
    main(["hub", "--name", "maml"])
    shown = capsys.readouterr().out
    assert shown == hub.card("maml")
    assert all(f"\n## {section}\n" in shown for section in SECTIONS)
    described = yaml.safe_load(shown.partition("```yaml\n")[2].partition("```")[0])
    assert described["model"]["init_args"]["network"]["init_args"]["filters"] == 4
    assert described["data"]["init_args"]["transforms"] == {"mean": [0.2], "std": [0.5]}
    with pytest.raises(SystemExit):
        main(["hub", "--help"])
    assert "--overwrite" not in capsys.readouterr().out


def test_what_cannot_be_released(
    ready: Path, checkpoint: str, release: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in ready.iterdir()}
    whole: dict[str, Any] = torch.load(checkpoint, weights_only=True)

    def changed(key: str, **options: Any) -> str:
        torch.save(whole | {key: whole[key] | options}, tmp_path / "changed.ckpt")
        return str(tmp_path / "changed.ckpt")

    def refused(message: str, path: str, name: str = "new", **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            release.release(path, name, **options)
        assert {path: path.read_bytes() for path in ready.iterdir()} == before

    refused(r"\bname .*overwrite.*maml\.ckpt", checkpoint, "maml")
    refused(r"\bname .*'\.\./x'", checkpoint, "../x")
    refused(r"model\.outside .*/home/me/w\.pt", changed("hyper_parameters", outside="/home/me/w.pt"))
    refused(r"data\.files .*~/b", changed("datamodule_hyper_parameters", files=["a", "~/b"]))
    refused(r"\bnetwork must be given", changed("hyper_parameters", network=None))
    monkeypatch.setattr(release, "MOST", 1000)
    refused(r"checkpoint .*\b1000 .* \d+$", checkpoint)
    refused(r"checkpoint .*\b1000 .* \d+$", checkpoint, "maml", overwrite=True)


def test_a_checkpoint_of_a_later_torch_whose_optimizer_has_more_options(checkpoint: str, tmp_path: Path) -> None:
    whole: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    whole["hyper_parameters"]["optimizer"]["init_args"] |= {"later": False, "later_still": None}
    torch.save(whole, tmp_path / "later.ckpt")
    learner, x = load_learner(tmp_path / "later.ckpt"), torch.rand(3, 1, 28, 28)
    assert torch.equal(learner(x), load_learner(checkpoint)(x))
    main(["test", "--ckpt_path", str(tmp_path / "later.ckpt"), "--trainer.logger", "false"])


def test_paths_of_the_machine_are_left_out_at_any_depth(release: ModuleType, checkpoint: str) -> None:
    whole = torch.load(checkpoint, weights_only=True)
    parts = [{"class_path": "Omniglot", "init_args": {"root": "/home/me/data", "ways": 3}}]
    released = release.stripped(
        whole | {"datamodule_hyper_parameters": {"root": "a", "cache_dir": "/b", "parts": parts}}
    )
    kept = [{"class_path": "Omniglot", "init_args": {"ways": 3}}]
    assert released["datamodule_hyper_parameters"] == {"parts": kept}
    assert parts[0]["init_args"]["root"] == "/home/me/data"


def test_shipped_checkpoints_are_small_and_have_whole_cards(release: ModuleType) -> None:
    shipped = {path.stem for path in SHIPPED.glob("*.ckpt")}
    assert {path.stem for path in SHIPPED.glob("*.md")} == shipped
    for name in shipped:
        path, card = SHIPPED / f"{name}.ckpt", hub.card(name)
        assert path.stat().st_size < release.MOST
        assert "optimizer_states" not in torch.load(path, weights_only=True)
        assert load_learner(f"hub:{name}").form.image_size == 28
        assert re.findall("^## (.*)", card, re.MULTILINE) == [*SECTIONS]
        assert "TODO" not in card
        assert re.search(r"\d ± \d.*\btasks\b", card.partition("## Accuracy")[2], re.DOTALL)
        assert card.splitlines()[0].startswith("# ")
