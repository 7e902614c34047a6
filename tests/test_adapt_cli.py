"""``adapt`` on the command line: folders of pictures in, a table and a contact sheet out."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, fails
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import binomtest

from meta_lightning import Conv4, Glyphs, Predictor, load_learner
from meta_lightning.checks import InputError
from meta_lightning.cli import main

NAMES = ["aleph", "beth", "gimel"]
FROZEN = "--model.inner_freeze [features.*] --model.outer_freeze [features.*]"


@pytest.fixture
def photos(glyphs: Glyphs, tmp_path: Path) -> Path:
    """my_photos: two dark-on-light drawings of each of three characters; queries: five more of each."""
    data = glyphs.load()
    for name, member in zip(NAMES, data.members("test"), strict=False):
        for number, row in enumerate(np.flatnonzero(data.labels == member)[:7]):
            folder = tmp_path / ("my_photos" if number < 2 else "queries") / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(255 - data.images[row, 0]).save(folder / f"{number}.png")
    return tmp_path


def adapt(checkpoint: str, *args: str) -> None:
    main(["adapt", "--ckpt_path", checkpoint, "--support", "my_photos", "--query", "queries", *args])


def refused(checkpoint: str, *args: str, command: str = "adapt") -> str:
    """The sentence with which adapt or export is refused, having written nothing."""
    before = sorted(Path().rglob("*"))
    given = ["--ckpt_path", checkpoint, "--support", "my_photos", *(["--query", "queries"] * (command == "adapt"))]
    said = fails(command, *given, *args)
    assert sorted(Path().rglob("*")) == before
    return said


@pytest.mark.usefixtures("photos")
def test_the_table_is_what_the_predictor_says(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meta_lightning.adaptation.command.AT_ONCE", 4)  # several batches
    adapt(checkpoint, "--steps", "3", "--save", "adapted.safetensors")
    assert {path.name for path in Path().iterdir()} == {
        *("my_photos", "queries", "predictions.csv", "predictions.png", "adapted.safetensors")
    }
    with Path("predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "class", "probability", "runner_up", "runner_up_probability"]
    learner = load_learner(checkpoint)
    read = {
        kind: [np.asarray(Image.open(path)) for path in sorted(Path(kind).rglob("*.png"))]
        for kind in ("my_photos", "queries")
    }
    support, queries = (255 - np.stack(images)[:, None] for images in read.values())
    predictor = learner.adapt(support, [name for name in NAMES for _ in range(2)], steps=3)
    probabilities, numbers = predictor.predict_proba(queries).sort(descending=True)
    assert [row["path"] for row in rows] == [str(path) for path in sorted(Path("queries").rglob("*.png"))]
    assert [row["class"] for row in rows] == predictor.predict(queries)
    assert [row["runner_up"] for row in rows] == [NAMES[number] for number in numbers[:, 1]]
    for column, name in enumerate(("probability", "runner_up_probability")):
        assert [float(row[name]) for row in rows] == pytest.approx(probabilities[:, column].tolist(), abs=2e-6)
    assert Predictor.load("adapted.safetensors").class_names == NAMES

    right = sum(row["class"] == Path(row["path"]).parent.name for row in rows)
    low, high = (100 * bound for bound in binomtest(right, 15).proportion_ci(method="wilson"))
    said = capsys.readouterr().out
    assert re.search(r"Adapted to 3 classes from 6 pictures in \d+\.\d\d s\.", said)
    assert re.search(r"Classified 15 pictures in \d+\.\d s: predictions.csv, drawn in predictions.png\.", said)
    assert "Saved the predictor to adapted.safetensors." in said
    assert f"Accuracy {100 * right / 15:.1f} %: {right} of the 15 queries" in said
    assert f"95 % confidence interval {low:.1f} to {high:.1f} %" in said


@pytest.mark.usefixtures("photos")
def test_queries_whose_class_is_not_known(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    for path in [*Path("queries").rglob("*.png")]:
        path.rename(Path("queries") / f"{path.parent.name}{path.name}")
    for name in NAMES:
        (Path("queries") / name).rmdir()
    adapt(checkpoint, "--out", "other.csv")
    assert "Accuracy" not in capsys.readouterr().out
    assert len(Path("other.csv").read_text().splitlines()) == 16
    with Image.open("other.png") as sheet:
        assert sheet.width > 300


@pytest.mark.usefixtures("photos")
def test_right_and_wrong_are_coloured(checkpoint: str) -> None:
    shutil.rmtree("queries")
    shutil.copytree("my_photos", "queries")  # what was adapted to, often enough, is told right
    adapt(checkpoint, "--steps", "200")
    rows = list(csv.DictReader(Path("predictions.csv").read_text().splitlines()))
    assert all(row["class"] == Path(row["path"]).parent.name for row in rows)

    def coloured(hexadecimal: str) -> int:
        colour = [int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5)]
        with Image.open("predictions.png") as sheet:
            return int((np.abs(np.asarray(sheet.convert("RGB")).astype(int) - colour).max(2) < 3).sum())

    assert coloured("#2f6fb7") > 500  # support
    assert coloured("#2e8b57") > 500  # right
    assert coloured("#c8372d") == 0  # wrong
    Path("queries/aleph").rename("queries/x")
    Path("queries/beth").rename("queries/aleph")
    Path("queries/x").rename("queries/beth")
    adapt(checkpoint, "--steps", "200", "--overwrite")
    assert coloured("#c8372d") > 500


@pytest.mark.usefixtures("photos")
def test_nothing_is_overwritten_unasked(checkpoint: str) -> None:
    for name, message in (
        ("predictions.csv", r"\bout .*overwrite.*predictions\.csv"),
        ("predictions.png", r"contact sheet .*overwrite.*predictions\.png"),
        ("a.onnx", r"\bsave .*overwrite.*a\.onnx"),
    ):
        Path(name).write_text("mine")
        assert re.search(message, refused(checkpoint, "--save", "a.onnx"))
        assert Path(name).read_text() == "mine"
        Path(name).unlink()
    Path("predictions.csv").write_text("mine")
    adapt(checkpoint, "--overwrite")
    assert Path("predictions.csv").read_text().startswith("path,class")


@pytest.mark.usefixtures("photos")
def test_nothing_is_left_half_written(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meta_lightning.adaptation.command.AT_ONCE", 4)
    answered = []

    def interrupted(self: Predictor, x: object) -> torch.Tensor:
        answered.append(x)
        if len(answered) == 3:
            raise KeyboardInterrupt
        return torch.full((4, 3), 1 / 3)

    Path("predictions.csv").write_text("the last one")
    monkeypatch.setattr(Predictor, "predict_proba", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapt(checkpoint, "--overwrite")
    assert {path.name for path in Path().iterdir()} == {"my_photos", "queries", "predictions.csv"}
    assert Path("predictions.csv").read_text() == "the last one"


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--support", "nowhere"], r"\bsupport .*\bnowhere\b"),
        (["--query", "nowhere"], r"\bquery .*\bnowhere\b"),
        (["--query", "my_photos"], r"\bquery .*support.*\bmy_photos\b"),
        (["--out", "a.txt"], r"\bout .*'\.csv'.*'\.txt'"),
        (["--out", "nowhere/a.csv"], r"\bout .*nowhere/a\.csv"),
        (["--save", "a.pkl"], r"\bsave .*'\.onnx'.*'\.pkl'"),
        (["--save", "nowhere/a.pt2"], r"\bsave .*nowhere/a\.pt2"),
        (["--save", "a.pt2", "--delta"], r"\bsave of a delta .*\.safetensors.* a\.pt2"),
        (["--save", "a.safetensors", "--delta"], r"\bdelta must be False .*frozen parameters, got True"),
        (["--delta"], r"\bdelta needs save, .*got None"),
        (["--steps", "0"], r"\bsteps .* 0"),
        (["--ckpt_path", "nothing.ckpt"], r"path .*nothing\.ckpt"),
    ],
)
def test_impossible_arguments(args: list[str], message: str, checkpoint: str) -> None:
    assert re.search(message, refused(checkpoint, *args))


@pytest.mark.usefixtures("photos")
def test_impossible_folders(checkpoint: str) -> None:
    support, queries = Path("my_photos"), Path("queries")
    (support / "daleth").mkdir()
    assert re.search(r"\bsupport .*\bdaleth$", refused(checkpoint))
    (support / "daleth/a.png").write_bytes((support / "aleph/0.png").read_bytes()[:100])
    assert re.search(r"my_photos/daleth/a\.png .*image: ", refused(checkpoint))
    for name in ("daleth", "aleph", "beth"):
        shutil.rmtree(support / name)
    assert re.search(r"\bsupport .*\b2 .*\b1 .*my_photos: gimel", refused(checkpoint))
    shutil.copytree(support / "gimel", support / "aleph")
    shutil.rmtree(queries)
    queries.mkdir()
    (queries / "empty").mkdir()
    assert re.search(r"\bquery .*\b1 .*\bqueries$", refused(checkpoint))
    (queries / "notes.txt").write_text("no picture")
    assert re.search(r"\bquery .*\b1 of the 1 .*: queries/notes\.txt", refused(checkpoint))


@pytest.mark.usefixtures("photos")
def test_queries_that_do_not_read_are_left_out_with_a_warning(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("queries/aleph/2.png").write_bytes(b"spoilt")
    with pytest.warns(UserWarning, match=r"\b1 of the 15 .*query .*: queries/aleph/2\.png"):
        adapt(checkpoint)
    assert "Classified 14 pictures" in capsys.readouterr().out
    assert len(Path("predictions.csv").read_text().splitlines()) == 15


@pytest.mark.usefixtures("photos")
def test_a_delta_loads_onto_the_network_of_the_checkpoint() -> None:
    main(f"fit --config {TINY} --trainer.max_steps 1 {FROZEN} --checkpoint.dirpath frozen".split())
    for name, options in (("whole", []), ("delta", ["--delta", "--overwrite"])):
        adapt("frozen/last.ckpt", "--save", f"{name}.safetensors", *options)
    x = torch.rand(4, 1, 28, 28)
    loaded = Predictor.load("delta.safetensors", load_learner("frozen/last.ckpt").network)
    assert torch.equal(loaded(x), Predictor.load("whole.safetensors")(x))
    whole, delta = (load_file(f"{name}.safetensors") for name in ("whole", "delta"))
    statistics = {name for name in whole if re.search(r"running_|num_batches", name)}  # of the support set
    assert delta.keys() == statistics | {"network.head.weight", "network.head.bias"}
    with pytest.raises(InputError, match=r"network must be the base of delta\.safetensors, of checksum "):
        Predictor.load("delta.safetensors", Conv4(filters=4))


@pytest.mark.usefixtures("photos")
def test_a_checkpoint_of_regression_is_refused(tmp_path: Path) -> None:
    options = "--data Sinusoid --model.network meta_lightning.MLP --checkpoint.monitor val/mse --trainer.max_steps 1"
    main(f"fit --config {TINY} {options} --checkpoint.dirpath {tmp_path / 'sine'}".split())
    for command in ("adapt", "export"):
        said = refused("sine/last.ckpt", command=command)
        assert re.search(r"\bckpt_path .*images, got sine/last\.ckpt, which was trained on other samples", said)


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--support", "nowhere"], r"\bsupport .*\bnowhere\b"),
        (["--support", "my_photos/aleph"], r"\bsupport must hold at least 2 classes, .* got 0 in my_photos/aleph$"),
        (["--support", "many"], r"support set must hold no more classes than the network has outputs.* got 6"),
        (["--out", "a.onnx"], r"the suffix of out must be one of '\.pt2', got '\.onnx'"),
        (["--out", "nowhere/a.pt2"], r"\bout .*writable folder, got nowhere/a\.pt2"),
        (["--out", "mine.pt2"], r"\bout .*overwrite.*mine\.pt2"),
        (["--steps", "0"], r"\bsteps must be at least 1, got 0"),
        (["--ckpt_path", "nothing.ckpt"], r"\bckpt_path .*nothing\.ckpt, which is not a file"),
        (["--ckpt_path", "hub:nothing"], r"\bckpt_path .*hub:maml.* got hub:nothing"),
        (
            ["--ckpt_path", "text.ckpt"],
            r"\bckpt_path .*text\.ckpt, which is corrupt: it is no whole file of torch\.save",
        ),
        (
            ["--ckpt_path", "half.ckpt"],
            r"\bckpt_path .*half\.ckpt, which is corrupt: it is no whole file of torch\.save",
        ),
        (["--ckpt_path", "noisy.ckpt"], r"must not draw random numbers.* got random numbers of torch"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*adaptations to groups of the classes")
def test_impossible_arguments_of_export(args: list[str], message: str, checkpoint: str) -> None:
    Path("mine.pt2").write_text("mine")
    Path("text.ckpt").write_text("text")
    Path("half.ckpt").write_bytes(Path(checkpoint).read_bytes()[:5000])
    for name in "abcdef":
        shutil.copytree("my_photos/beth", f"many/{name}")
    if "noisy.ckpt" in args:
        main(
            f"fit --config {TINY} --model.network {__name__}.Noisy --trainer.max_steps 1 --checkpoint.dirpath n".split()
        )
        Path("n/last.ckpt").rename("noisy.ckpt")
    assert re.search(message, refused(checkpoint, *args, command="export"))


class Noisy(Conv4):
    """A network with dropout that is active in evaluation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(super().forward(x), 0.1, training=True)


def test_help_lists_adapt(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert re.search(r"subcommands:.*\badapt Adapt a checkpoint", " ".join(capsys.readouterr().out.split()))
    with pytest.raises(SystemExit):
        main(["adapt", "--help"])
    shown = capsys.readouterr().out
    options = ("--ckpt_path", "--support", "--query", "--out", "--steps", "--save", "--delta", "--overwrite")
    assert all(option in shown for option in options)
    with pytest.raises(SystemExit) as error:
        main(["adapt", "--suport", "x"])
    assert error.value.code == 2


@pytest.mark.usefixtures("photos")
def test_queries_that_are_support_pictures_do_not_count(
    checkpoint: str, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    shutil.copy("my_photos/beth/0.png", "queries/beth/copied.png")
    Image.open("my_photos/gimel/1.png").convert("RGB").save("queries/gimel/copied.bmp")  # the same pixels
    adapt(checkpoint)
    said = [str(warning.message) for warning in recwarn if "support pictures" in str(warning.message)]
    assert said == [
        "2 of the 17 queries are among the support pictures: copied.png, copied.bmp. They do not count in the accuracy"
    ]
    assert "of the 15 queries in folders" in capsys.readouterr().out
    assert len(Path("predictions.csv").read_text().splitlines()) == 18


def test_photographs_for_a_learner_of_drawings_are_said(
    checkpoint: str, photos: Path, recwarn: pytest.WarningsRecorder
) -> None:
    adapt(checkpoint)
    assert not [warning for warning in recwarn if "do not look like" in str(warning.message)]
    rng = np.random.default_rng(0)
    for path in [*photos.rglob("*.png")]:
        if path.parent.parent.name in ("my_photos", "queries"):
            Image.fromarray(rng.integers(60, 180, (40, 40, 3), dtype=np.uint8)).save(path)
    adapt(checkpoint, "--overwrite")
    assert [warning for warning in recwarn if "do not look like those of training" in str(warning.message)]


def test_queries_in_the_folder_of_the_classes_are_refused(checkpoint: str, photos: Path) -> None:
    (photos / "queries").rename(photos / "my_photos/queries")
    said = fails("adapt", "--ckpt_path", checkpoint, "--support", "my_photos", "--query", "my_photos/queries")
    assert "query must not be in support, whose folders are classes, got my_photos/queries in my_photos" in said
