"""The published benchmarks, on tiny files in their formats and, as mini-ImageNet's, on real photographs."""

import io
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image

from meta_lightning.checks import InputError
from meta_lightning.data.cifar_fs import CIFARFS
from meta_lightning.data.fc100 import FC100
from meta_lightning.data.learn2learn_sets import PublishedSplits
from meta_lightning.data.mini_imagenet import MiniImagenet
from meta_lightning.data.tasks import SPLITS, scale_pixels
from meta_lightning.data.tiered_imagenet import TieredImagenet

IMAGES = 5  # a class
Classes = dict[str, np.ndarray]  # images of each class, in the order of the file: 5 H W 3, uint8


def pictures(names: list[str], size: int) -> Classes:
    rng = np.random.default_rng(len(names[0]) + size + sum(map(ord, "".join(names))))
    return {name: rng.integers(0, 256, (IMAGES, size, size, 3), dtype=np.uint8) for name in names}


def dealt(classes: Classes) -> tuple[np.ndarray, list[str]]:
    """The images with the classes taking turns, and the class of each."""
    return np.concatenate([*np.stack([*classes.values()], 1)]), [*classes] * IMAGES


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def write_mini_imagenet(root: Path, split: str, classes: Classes) -> None:
    images, names = dealt(classes)
    rows = {name: [i for i, n in enumerate(names) if n == name] for name in classes}
    path = root / f"mini-imagenet-cache-{split.replace('val', 'validation')}.pkl"
    path.write_bytes(pickle.dumps({"image_data": images, "class_dict": rows}))


def write_tiered_imagenet(root: Path, split: str, classes: Classes) -> None:
    images, names = dealt(classes)
    folder = root / "tiered-imagenet"
    folder.mkdir(exist_ok=True)
    encoded = [np.frombuffer(png(image), np.uint8)[:, None] for image in images]  # as cv2.imencode leaves it
    (folder / f"{split}_images_png.pkl").write_bytes(pickle.dumps(encoded))
    numbers = np.array([[*classes].index(name) for name in names], np.int32)
    labels = {"label_specific": numbers, "label_specific_str": [*classes], "label_general": 0 * numbers}
    (folder / f"{split}_labels.pkl").write_bytes(pickle.dumps(labels))


def write_cifar_fs(root: Path, split: str, classes: Classes) -> None:
    raw = root / "cifarfs" / "cifar100"
    (raw / "splits" / "bertinetto").mkdir(parents=True, exist_ok=True)
    (raw / "splits" / "bertinetto" / f"{split}.txt").write_text("".join(f"{name}\n" for name in reversed(classes)))
    for name, images in classes.items():
        (raw / "data" / name).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            (raw / "data" / name / f"{name}_s_{i:06d}.png").write_bytes(png(image))


def write_fc100(root: Path, split: str, classes: Classes) -> None:
    images, names = dealt(classes)
    archive = {"data": images, "labels": [int(name) for name in names]}
    (root / f"FC100_{split}.pickle").write_bytes(pickle.dumps(archive, protocol=2))


WORDNET = {"train": ["n02", "n01", "n05"], "val": ["n04", "n03"], "test": ["n08", "n06", "n07"]}
NUMBERED = {"train": ["70", "1", "54"], "val": ["9", "99"], "test": ["0", "30", "4"]}
Write = Callable[[Path, str, Classes], None]
SETS: list[Any] = [
    pytest.param(MiniImagenet, write_mini_imagenet, WORDNET, 84, id="mini-imagenet"),
    pytest.param(TieredImagenet, write_tiered_imagenet, WORDNET, 84, id="tiered-imagenet"),
    pytest.param(CIFARFS, write_cifar_fs, WORDNET, 32, id="cifar-fs"),
    pytest.param(FC100, write_fc100, NUMBERED, 32, id="fc100"),
]


def write_all(root: Path, write: Write, names: dict[str, list[str]], size: int) -> dict[str, Classes]:
    root.mkdir(exist_ok=True)
    data = {split: pictures(members, size) for split, members in names.items()}
    for split, classes in data.items():
        write(root, split, classes)
    return data


def no_network(source: str, destination: str) -> None:
    raise OSError("no network")


def interrupted(source: str, destination: str) -> None:
    Path(destination).write_bytes(b"half of it")
    raise OSError("connection reset")


def error_page(source: str, destination: str) -> None:
    Path(destination).write_text("<html>404</html>")


@pytest.fixture(autouse=True)
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The downloads that were tried; each fails, as without a network."""
    sources: list[str] = []

    def note(source: str, destination: str) -> None:
        sources.append(source)
        no_network(source, destination)

    pytest.importorskip("learn2learn")
    replace_downloads(monkeypatch, note)
    return sources


def replace_downloads(monkeypatch: pytest.MonkeyPatch, download: Callable[..., None]) -> None:
    for module in ("mini_imagenet", "tiered_imagenet", "cifarfs", "fc100"):
        for function in ("download_file", "download_file_from_google_drive"):
            monkeypatch.setattr(f"learn2learn.vision.datasets.{module}.{function}", download)


def below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.mark.parametrize(("kind", "write", "names", "size"), SETS)
def test_images_classes_and_splits_are_those_of_the_files(
    kind: type[PublishedSplits],
    write: Write,
    names: dict[str, list[str]],
    size: int,
    tmp_path: Path,
    tried: list[str],
) -> None:
    root = tmp_path / "root"
    written = write_all(root, write, names, size)
    files = below(root)
    module = kind(str(root), ways=2, shots=1, queries=3)
    module.prepare_data()
    data = module.load()
    assert data.images.dtype == np.uint8
    assert data.images.shape == (8 * IMAGES, 3, size, size)
    assert data.labels.dtype == np.int64
    assert len(data.classes) == 8
    for split in SPLITS:
        assert {str(data.classes[c]) for c in data.members(split)} == {*names[split]}
        for c in data.members(split):
            ours = data.images[data.labels == c].transpose(0, 2, 3, 1)
            assert np.array_equal(ours, written[split][str(data.classes[c])])
    assert not set(module.task_set("train").classes) & set(module.task_set("test").classes)
    batch = module.task_set("train").batch([0, 1])
    assert batch.support_x.shape == (2, 2, 3, size, size)
    assert batch.query_x.shape == (2, 2 * 3, 3, size, size)
    every = torch.from_numpy(np.concatenate([*written["train"].values()])).permute(0, 3, 1, 2) / 255
    assert all((every == image).flatten(1).all(1).any() for image in scale_pixels(batch.query_x).flatten(0, 1))
    assert below(root) == files  # root is left as it was, and may be write-protected
    assert not tried
    other = write_all(root, write, {split: [*reversed(members)] for split, members in names.items()}, size)
    again = kind(str(root)).load()  # other files of the same names
    c = again.members("test")[0]
    ours = again.images[again.labels == c].transpose(0, 2, 3, 1)
    assert np.array_equal(ours, other["test"][str(again.classes[c])])
    shutil.rmtree(root)
    assert np.array_equal(kind(str(root)).load().images, again.images)  # from the cache


@pytest.mark.parametrize(("kind", "write", "names", "size"), SETS)
def test_what_is_missing_is_named_and_nothing_is_downloaded_unasked(
    kind: type[PublishedSplits],
    write: Write,
    names: dict[str, list[str]],
    size: int,
    tmp_path: Path,
    tried: list[str],
) -> None:
    root = tmp_path / "root"
    message = r"root .*{}.*{} .*/root\b.*{}\b.*--data\.download .*zenodo"
    with pytest.raises(FileNotFoundError, match=message.format(kind.title, kind.files[-1], "all of them")):
        kind(str(root)).prepare_data()
    assert not root.exists()  # learn2learn would have made it
    write_all(root, write, names, size)
    (root / kind.files[-1]).unlink()
    with pytest.raises(FileNotFoundError, match=message.format(kind.title, kind.files[-1], kind.files[-1])):
        kind(str(root)).prepare_data()
    assert not tried


@pytest.mark.parametrize(("kind", "write", "names", "size"), SETS)
@pytest.mark.parametrize(
    ("download", "reason"), [(no_network, "OSError: no network"), (interrupted, ""), (error_page, "")]
)
def test_a_download_that_fails_says_how_else_to_get_it_and_leaves_nothing(
    kind: type[PublishedSplits],
    write: Write,
    names: dict[str, list[str]],
    size: int,
    download: Callable[..., None],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "root"
    replace_downloads(monkeypatch, download)
    message = rf"{kind.title} .*/root \(.*{reason}.*\).*zenodo"
    with pytest.raises(OSError, match=message) as raised:
        kind(str(root), download=True, cache_dir=str(tmp_path / "cache")).prepare_data()
    assert raised.value.__cause__ is None  # the command line shows the cause where there is one
    assert below(root) == set()
    assert not (tmp_path / "cache").exists()

    write_all(root, write, names, size)
    (root / kind.files[-1]).unlink()
    files = below(root)
    with pytest.raises(OSError, match=message):
        kind(str(root), download=True).prepare_data()
    assert below(root) == files


@pytest.mark.parametrize(("kind", "write", "names", "size"), SETS)
def test_a_download_brings_what_is_missing_and_keeps_the_rest(
    kind: type[PublishedSplits],
    write: Write,
    names: dict[str, list[str]],
    size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, root = tmp_path / "server", tmp_path / "root"
    written = write_all(server, write, names, size)

    def serve(source: str, destination: str) -> None:
        name = source.split("/")[-1].split("?")[0]
        if name.endswith(".zip"):
            folder = server / "cifarfs" if kind is CIFARFS else server
            with zipfile.ZipFile(destination, "w") as archive:
                for path in folder.rglob("*.*"):
                    archive.write(path, path.relative_to(folder))
        elif name.startswith("tiered-imagenet-"):
            path = server / "tiered-imagenet" / name.removeprefix("tiered-imagenet-")
            Path(destination).write_bytes(path.read_bytes() if path.exists() else b"names")
        else:
            shutil.copy(server / name, destination)

    replace_downloads(monkeypatch, serve)
    data = kind(str(root), download=True, cache_dir=str(tmp_path / "cache")).load()
    c = data.members("val")[0]
    ours = data.images[data.labels == c].transpose(0, 2, 3, 1)
    assert np.array_equal(ours, written["val"][str(data.classes[c])])
    assert below(root) == below(server)
    kept, lost = (root / file for file in (kind.files[-1], kind.files[-2]))
    kept.touch()
    before = kept.stat().st_mtime_ns
    lost.unlink()
    assert len(kind(str(root), download=True, cache_dir=str(tmp_path / "again")).load().images) == 8 * IMAGES
    assert below(root) == below(server)
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize(("kind", "write", "names", "size"), SETS)
def test_a_class_in_two_splits_is_named(
    kind: type[PublishedSplits], write: Write, names: dict[str, list[str]], size: int, tmp_path: Path
) -> None:
    twice = names["train"][0]
    write_all(tmp_path, write, names | {"test": [*names["test"], twice]}, size)
    message = rf"{kind.title} .*\b1 .*: {twice} in train and test"
    with pytest.raises(InputError, match=message):
        kind(str(tmp_path)).prepare_data()


@pytest.mark.parametrize(("kind", "write", "names", "size"), [s for s in SETS if s.id != "cifar-fs"])
@pytest.mark.parametrize("spoil", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: pickle.dumps({"other": 1})])
def test_a_pickle_that_is_empty_truncated_or_another_is_named(
    kind: type[PublishedSplits],
    write: Write,
    names: dict[str, list[str]],
    size: int,
    spoil: Callable[[bytes], bytes],
    tmp_path: Path,
    tried: list[str],
) -> None:
    write_all(tmp_path, write, names, size)
    for file in kind.files[-2:]:
        whole = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(spoil(whole))
        if file.endswith("images_png.pkl") and spoil(b"") != b"":
            message = r"test_labels\.pkl .*\b1 .*test_images_png\.pkl"
        else:
            message = rf"root .*{file} .*\(\w+: .*\)"
        with pytest.raises(InputError, match=message):
            kind(str(tmp_path), download=True).prepare_data()
        (tmp_path / file).write_bytes(whole)
    assert not tried  # a file that is there is not replaced
    assert len(kind(str(tmp_path)).load().images) == 8 * IMAGES


def test_mini_imagenet_lists_every_image_once(tmp_path: Path) -> None:
    write_all(tmp_path, write_mini_imagenet, WORDNET, 84)
    path = tmp_path / "mini-imagenet-cache-validation.pkl"
    published = pickle.loads(path.read_bytes())
    for images, rows, message in (
        (9, range(8), r"8 rows, 8 .*\b9 images"),
        (4, [0, 1, 2, 2], r"4 rows, 3 .*\b4 images"),
    ):
        spoilt = {"image_data": published["image_data"][:images], "class_dict": {"n04": list(rows)}}
        path.write_bytes(pickle.dumps(spoilt))
        with pytest.raises(InputError, match=rf"class_dict .*validation\.pkl .*\b{message}"):
            MiniImagenet(str(tmp_path)).prepare_data()


def test_images_that_are_not_colour_uint8_of_one_size_are_refused(tmp_path: Path) -> None:
    write_all(tmp_path, write_fc100, NUMBERED, 32)
    path = tmp_path / "FC100_val.pickle"
    published = pickle.loads(path.read_bytes())
    for images, labels, message in (
        (published["data"] / 255, 10, r"val split of FC100 .*uint8 .*32, 32, 3\).*float64 .*\(10, 32, 32, 3\)"),
        (published["data"][..., 0], 10, r"val split of FC100 .*uint8 .*\(10, 32, 32\)"),
        (published["data"][:, :30], 10, r"val split of FC100 .*shape .*32, 32, 3\).*\(10, 30, 32, 3\)"),
        (published["data"], 9, r"val split of FC100 .*labels, 32, 32, 3\).*\(10, 32, 32, 3\) and 9 labels"),
    ):
        path.write_bytes(pickle.dumps({"data": images, "labels": published["labels"][:labels]}))
        with pytest.raises(InputError, match=message):
            FC100(str(tmp_path)).prepare_data()


def test_tiered_imagenet_names_the_image_and_the_labels_that_are_wrong(tmp_path: Path) -> None:
    write_all(tmp_path, write_tiered_imagenet, WORDNET, 84)
    path, labels_path = (tmp_path / "tiered-imagenet" / f"val_{part}.pkl" for part in ("images_png", "labels"))
    whole, labels = path.read_bytes(), pickle.loads(labels_path.read_bytes())
    for spoilt, message in (
        (b"\x89PNG", r"image 3 of .*val_images_png\.pkl .*\(UnidentifiedImageError"),
        (png(np.zeros((1, 84, 3), np.uint8)), r"shape .*\(84, 84, 3\),.*image 3 of .*\(1, 84, 3\)"),
    ):
        images = pickle.loads(whole)
        images[3] = np.frombuffer(spoilt, np.uint8)
        path.write_bytes(pickle.dumps(images))
        with pytest.raises(InputError, match=message):
            TieredImagenet(str(tmp_path)).prepare_data()
    path.write_bytes(whole)
    labels_path.write_bytes(pickle.dumps(labels | {"label_specific": labels["label_specific"] + 1}))
    with pytest.raises(InputError, match=r"val_labels\.pkl .*\b10 .*\b2 classes .*\b10 .*\b1 to 2"):
        TieredImagenet(str(tmp_path)).prepare_data()


def test_cifar_fs_needs_each_class_and_reads_each_image(tmp_path: Path) -> None:
    write_all(tmp_path, write_cifar_fs, WORDNET, 32)
    data = tmp_path / "cifarfs" / "cifar100" / "data"
    # a copy that learn2learn was stopped at: it would be taken for whole
    shutil.copytree(data / "n02", tmp_path / "cifarfs" / "processed" / "train" / "n02")
    assert len(CIFARFS(str(tmp_path)).build().classes) == 8
    spoilt = data / "n04" / "n04_s_000002.png"
    spoilt.write_bytes(spoilt.read_bytes()[:100])
    with pytest.raises(InputError, match=r"root .*data/n04/n04_s_000002\.png .*\(OSError"):
        CIFARFS(str(tmp_path)).prepare_data()
    for path in (data / "n04").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"root .*/data .*\(FileNotFoundError: .*\bn04\b"):
        CIFARFS(str(tmp_path)).prepare_data()
    (data / "n04").rmdir()
    with pytest.raises(InputError, match=r"val\.txt .*/data\b.* n04\b"):
        CIFARFS(str(tmp_path)).prepare_data()


def test_real_photographs_in_the_format_of_mini_imagenet(tmp_path: Path) -> None:
    packed = SHARED / "data" / "caltech101_84_jpeg.npz"
    if not packed.exists():
        pytest.skip(f"needs Caltech-101, which is not at {packed}")
    tool = SHARED / "tools" / "unpack_caltech.py"
    subprocess.run([sys.executable, str(tool), str(tmp_path), "mini-imagenet"], check=True, stdout=subprocess.DEVNULL)
    module = MiniImagenet(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    data = module.load()
    with np.load(packed) as archive:
        sizes = dict(zip(archive["class_names"].tolist(), np.bincount(archive["label"]).tolist(), strict=True))
        label, names, offset, blob = (archive[name] for name in ("label", "class_names", "offset", "blob"))
    assert [len(data.members(split)) for split in SPLITS] == [64, 16, 20]
    assert set(sizes) - {*data.classes.tolist()} == {"Faces_easy"}
    for c in range(0, 100, 7):
        name = str(data.classes[c])
        ours = data.images[data.labels == c]
        assert len(ours) == sizes[name]
        rows = np.flatnonzero(names[label] == name)
        for row, image in zip(rows[:3], ours[:3], strict=True):
            photograph = Image.open(io.BytesIO(blob[offset[row] : offset[row + 1]].tobytes())).convert("RGB")
            assert np.array_equal(image.transpose(1, 2, 0), np.asarray(photograph))
    batch = module.task_set("train").batch([0])
    assert batch.support_x.shape == (1, 5, 3, 84, 84)
    assert 0.2 < scale_pixels(batch.query_x).mean() < 0.8
