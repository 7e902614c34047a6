"""Omniglot, on the real drawings where they are at hand."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image

from meta_lightning import Omniglot
from meta_lightning.data.cache import fingerprint
from meta_lightning.data.omniglot import read_drawing
from meta_lightning.data.tasks import Split

PACKED = SHARED / "data" / "omniglot105_packed.npz"
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Omniglot as torchvision leaves it."""
    if not PACKED.exists():
        pytest.skip(f"needs the real Omniglot, which is not at {PACKED}")
    folder = tmp_path_factory.mktemp("omniglot")
    subprocess.run([sys.executable, str(SHARED / "tools" / "unpack_omniglot.py"), str(folder)], check=True)
    return str(folder)


@pytest.fixture(scope="module")
def omniglot(root: str) -> Omniglot:
    """The data module, read and packed once."""
    data = Omniglot(root)
    data.prepare_data()
    return data


def test_images_are_the_drawings_anti_aliased(omniglot: Omniglot) -> None:
    data = omniglot.load()
    assert data.images.shape == (4 * 32460, 1, 28, 28)
    with np.load(PACKED) as packed:
        ink = np.unpackbits(packed["bits"], axis=1, count=105 * 105).reshape(-1, 105, 105)
        mean = ink.mean((1, 2))[np.argsort(packed["label"], kind="stable")]
    ours = data.images[:32460].mean((1, 2, 3)) / 255
    assert np.corrcoef(ours, mean)[0, 1] > 0.999
    assert ours.mean() == pytest.approx(mean.mean(), rel=0.02)
    grey = (data.images > 0) & (data.images < 255)
    assert 0.05 < grey.mean() < 0.5  # neither binary nor blurred


def test_rotated_characters_are_classes_of_their_own_in_one_split(omniglot: Omniglot) -> None:
    data = omniglot.load()
    assert [len(data.members(split)) for split in SPLITS] == [4 * 1028, 4 * 172, 4 * 423]
    characters = [{c % 1623 for c in data.members(split)} for split in SPLITS]
    assert sum(map(len, characters)) == len(set.union(*characters)) == 1623
    first = data.images[data.labels == 7][0, 0]
    for turns in range(4):
        assert np.array_equal(data.images[data.labels == 7 + turns * 1623][0, 0], np.rot90(first, turns))
    assert data.classes[7 + 1623] == f"{data.classes[7].removesuffix(' 0°')} 90°"


def test_a_task_mixes_rotations(omniglot: Omniglot) -> None:
    tasks = omniglot.task_set("train")
    labels = torch.from_numpy(omniglot.load().labels)
    turns = [len((labels[tasks.rows(tasks.rng(i))] // 1623).unique()) for i in range(50)]  # type: ignore[attr-defined]
    assert np.mean(turns) > 2.5


def test_the_background_split_is_the_data_sets_own(omniglot: Omniglot, root: str) -> None:
    data = Omniglot(root, class_split="background", rotations=False).load()
    train, val, test = (data.members(split) for split in SPLITS)
    assert len(train) + len(val) == 964
    assert len(test) == 659
    alphabets = [{name.split("/")[0] for name in data.classes[members]} for members in (train, val, test)]
    assert [len(names) for names in alphabets] == [25, 5, 20]
    assert len(set.union(*alphabets)) == 50


def test_a_drawing_that_changes_is_noticed(root: str, omniglot: Omniglot) -> None:
    assert len(omniglot.sources()) == 32460
    before = fingerprint(omniglot.sources())
    path = omniglot.sources()[7]
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert fingerprint(Omniglot(root).sources()) != before
    assert Omniglot("elsewhere").sources() == []


def test_a_folder_that_is_missing_empty_or_truncated_is_refused(tmp_path: Path) -> None:
    message = r"root .*Omniglot.*\b32460 .*\b1623 .* {} drawings of {} characters\b.*--data\.download"
    with pytest.raises(FileNotFoundError, match=message.format(0, 0)):
        Omniglot(str(tmp_path)).build()
    folder = tmp_path / "omniglot-py" / "images_background" / "Greek" / "character01"
    folder.mkdir(parents=True)
    Image.new("1", (105, 105)).save(folder / "0001_01.png")
    with pytest.raises(FileNotFoundError, match=message.format(1, 1)):
        Omniglot(str(tmp_path)).build()


def test_a_download_that_fails_says_how_else_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **options: object) -> None:
        raise OSError("no network")

    pytest.importorskip("learn2learn")
    monkeypatch.setattr("torchvision.datasets.omniglot.download_and_extract_archive", no_network)
    with pytest.raises(OSError, match=r"Omniglot .*: no network\b.*omniglot-py"):
        Omniglot(str(tmp_path), download=True, cache_dir=str(tmp_path)).prepare_data()
    assert not list(tmp_path.rglob("*.npz"))


def test_an_archive_of_a_wrong_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("learn2learn")
    tried = []

    def wrong(url: str, path: Path, *args: object) -> None:
        tried.append(url)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images_background/Greek/character01/0001_01.png", "no drawing")

    (tmp_path / "omniglot-py").mkdir()
    wrong("by hand", tmp_path / "omniglot-py" / "images_background.zip")  # where torchvision looks
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", wrong)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **options: url)
    data = Omniglot(str(tmp_path), download=True, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(OSError, match=r"Omniglot .*: File not found or corrupted\b.*omniglot-py"):
        data.prepare_data()
    assert len(tried) == 2  # the one by hand was not believed
    assert not list(tmp_path.rglob("*.png"))
    assert not (tmp_path / "cache").exists()


def test_a_drawing_that_does_not_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "0001_01.png"
    path.write_bytes(b"")
    with pytest.raises(OSError, match=r"root .*0001_01\.png"):
        read_drawing(path)
