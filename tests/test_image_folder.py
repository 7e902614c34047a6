"""The user's own pictures: layouts, formats, splits and what is wrong with them."""

import inspect
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import ExifTags, Image
from torchvision.transforms import v2

from meta_lightning.checks import InputError
from meta_lightning.data import image_folder, processes
from meta_lightning.data.image_folder import ImageFolderTasks
from meta_lightning.data.image_module import ImageTasks
from meta_lightning.data.pictures import prepare_image
from meta_lightning.data.tasks import SPLITS, Array

CALTECH = SHARED / "data" / "caltech101_84_jpeg.npz"
SMALL = {"image_size": 8, "ways": 2, "shots": 1, "queries": 2}


def make_class(folder: Path, pictures: int, colour: tuple[int, int, int] = (10, 20, 30)) -> None:
    """A class of one-coloured pictures; the blue of each is its number."""
    folder.mkdir(parents=True)
    for number in range(pictures):
        Image.new("RGB", (12, 9), (*colour[:2], number)).save(folder / f"{number}.png")


@pytest.fixture
def split_root(tmp_path: Path) -> Path:
    """``root/{train,val,test}/<class>/*``: 4, 3 and 2 classes of 4 pictures."""
    for row, (split, classes) in enumerate(zip(SPLITS, [4, 3, 2], strict=True)):
        for c in range(classes):
            make_class(tmp_path / "pictures" / split / f"{split}_{c}", 4, (row, c, 0))
    return tmp_path / "pictures"


@pytest.fixture
def flat_root(tmp_path: Path) -> Path:
    """``root/<class>/*``: 10 classes of 4 pictures."""
    for c in range(10):
        make_class(tmp_path / "flat" / f"class {c}", 4, (9, c, 0))
    return tmp_path / "flat"


def tasks(root: Path, **arguments: object) -> ImageFolderTasks:
    return ImageFolderTasks(str(root), **SMALL | arguments)  # type: ignore[arg-type]


def saved(image: Image.Image, form: str, **options: object) -> BytesIO:
    """The image as a file of this format."""
    if form == "PPM":  # before version 11 pillow reads 16 bits of it and does not write them
        return BytesIO(b"P5 %d %d 65535\n" % image.size + np.asarray(image).astype(">u2").tobytes())
    file = BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


def test_folders_that_are_split_keep_their_split_and_names(split_root: Path) -> None:
    data = tasks(split_root).load()
    for row, (split, classes) in enumerate(zip(SPLITS, [4, 3, 2], strict=True)):
        members = data.members(split)
        assert data.classes[members].tolist() == [f"{split}_{c}" for c in range(classes)]
        for c, member in enumerate(members):
            expected = np.array([[row, c, number] for number in range(4)], dtype=np.uint8)[..., None, None]
            assert np.array_equal(data.images[data.labels == member], np.broadcast_to(expected, (4, 3, 8, 8)))
    assert data.images.dtype == np.uint8
    assert data.labels.dtype == np.int64


def test_tasks_of_the_pictures_have_the_right_shapes_and_classes(split_root: Path) -> None:
    data = tasks(split_root, train_ways=3, train_queries=3)
    batch = data.task_set("train").batch([0, 5])
    assert [x.shape for x in batch] == [(2, 3, 3, 8, 8), (2, 3), (2, 9, 3, 8, 8), (2, 9)]
    for x, y in [(batch.support_x, batch.support_y), (batch.query_x, batch.query_y)]:
        levels = x if x.dtype == torch.uint8 else 255 * x
        assert torch.all(levels[:, :, 0] == 0)  # the training split's red
        green = levels[:, :, 1, 0, 0].round()
        assert len({(t, g, n) for t in range(2) for g, n in zip(green[t].tolist(), y[t].tolist(), strict=True)}) == 6
    assert tasks(split_root, channels=1).task_set("test").batch([0]).query_x.shape == (1, 4, 1, 8, 8)


def test_a_flat_folder_is_split_by_the_seed_alone(flat_root: Path) -> None:
    data = tasks(flat_root, split_fractions=(0.5, 0.3, 0.2)).load()
    members = [data.members(split) for split in SPLITS]
    assert [len(m) for m in members] == [5, 3, 2]
    assert sorted(c for m in members for c in m) == list(range(10))
    order = np.random.default_rng(0).permutation(10)
    assert [set(m) for m in members] == [set(order[5:]), set(order[:3]), set(order[3:5])]
    # the pictures, the tasks' seed and size leave it, another split_seed does not
    Image.new("RGB", (5, 5)).save(flat_root / "class 3" / "another.png")
    again = tasks(flat_root, split_fractions=(0.5, 0.3, 0.2), seed=7, shots=2, image_size=9).load()
    assert again.splits.tolist() == data.splits.tolist()
    other = tasks(flat_root, split_fractions=(0.5, 0.3, 0.2), split_seed=1).load()
    assert other.splits.tolist() != data.splits.tolist()


def test_the_default_split_gives_five_ways_of_25_classes(tmp_path: Path) -> None:
    for c in range(25):
        make_class(tmp_path / "p" / f"{c}", 2)
    data = ImageFolderTasks(str(tmp_path / "p"), image_size=8, queries=1).load()
    assert [len(data.members(split)) for split in SPLITS] == [15, 5, 5]


def test_pictures_lie_at_any_depth_and_hidden_ones_are_ignored(split_root: Path) -> None:
    folder = split_root / "train" / "train_1"
    (folder / "a" / "b").mkdir(parents=True)
    Image.new("RGB", (8, 8), (0, 1, 77)).save(folder / "a" / "b" / "deep.png")
    (folder / "a" / "loop").symlink_to(folder, target_is_directory=True)
    for hidden in [folder / ".DS_Store", split_root / ".thumbs" / "x.png", split_root / "val" / ".trash" / "x.png"]:
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_bytes(b"not a picture")
    elsewhere = split_root.parent / "elsewhere"
    make_class(elsewhere, 4)
    (split_root / "test" / "linked").symlink_to(elsewhere, target_is_directory=True)
    (split_root / "notes.txt").write_text("beside the classes: not read")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = tasks(split_root).load()
    assert data.images[data.labels == 1][:, 2, 0, 0].tolist() == [0, 1, 2, 3, 77]
    assert data.classes[data.members("test")].tolist() == ["linked", "test_0", "test_1"]
    assert len(data.images) == 4 * 10 + 1


def test_a_large_jpeg_decoded_small_looks_as_decoded_whole() -> None:
    rng = np.random.default_rng(0)
    rough = np.asarray(Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)).resize((1200, 900)))
    jpeg = saved(Image.fromarray(rough), "JPEG", quality=95)
    whole = saved(Image.open(jpeg), "PNG")
    jpeg.seek(0)
    difference = prepare_image(jpeg, 84, 3).astype(float) - prepare_image(whole, 84, 3)
    assert np.abs(difference).mean() < 1
    assert np.abs(difference).max() < 12


@pytest.mark.parametrize("size", [(168, 252), (252, 168), (42, 63), (84, 84)])
def test_fitting_is_torchvisions_resize_and_centre_crop(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = v2.Compose([v2.Resize(84), v2.CenterCrop(84)])(image)
    ours = prepare_image(saved(image, "PNG"), 84, 3)
    assert ours.shape == (3, 84, 84)
    # ours cuts before it resizes, so the outermost pixels do not see beyond the edge
    difference = (ours.transpose(1, 2, 0).astype(int) - np.asarray(expected))[3:-3, 3:-3]
    assert np.abs(difference).max() <= 1


def test_the_middle_is_kept_and_shrinking_is_anti_aliased() -> None:
    stripes = np.zeros((20, 40, 3), dtype=np.uint8)
    stripes[:, :10, 0] = stripes[:, 10:30, 1] = stripes[:, 30:, 2] = 255
    green = np.broadcast_to(np.array([0, 255, 0], dtype=np.uint8)[:, None, None], (3, 20, 20))
    assert np.array_equal(prepare_image(saved(Image.fromarray(stripes), "PNG"), 20, 3), green)
    upright = Image.fromarray(stripes.transpose(1, 0, 2))
    assert np.array_equal(prepare_image(saved(upright, "PNG"), 20, 3), green)
    board = Image.fromarray((np.indices((320, 320)).sum(0) % 2 * 255).astype(np.uint8))
    assert np.abs(prepare_image(saved(board, "PNG"), 80, 1).astype(int) - 127).max() <= 3


def grey(levels: list[float], dtype: str) -> Image.Image:
    """A picture of 4 columns of grey, two rows high and pixels doubled, so that a square of 4 shows levels 1 and 2."""
    return Image.fromarray(np.array([levels] * 2, dtype=dtype).repeat(2, 0).repeat(2, 1))


def palette(transparent: bool) -> BytesIO:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 250, 100, 50])
    return saved(image, "PNG", **{"transparency": 1} if transparent else {})


def rgb_png_16() -> BytesIO:
    """A colour PNG of 16 bits a channel, which pillow reads but does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + struct.pack(">HHH", 257 * 200, 257 * 100, 257 * 7) * 4) * 4)
    return BytesIO(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def animation() -> BytesIO:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


PLAIN: dict[str, tuple[Callable[[], BytesIO], tuple[int, int, int]]] = {
    "grey": (lambda: saved(Image.new("L", (4, 4), 99), "PNG"), (99, 99, 99)),
    "grey, one level transparent": (lambda: saved(Image.new("L", (4, 4), 9), "PNG", transparency=9), (255, 255, 255)),
    "black and white": (lambda: saved(Image.new("1", (4, 4), 1), "PNG"), (255, 255, 255)),
    "palette": (lambda: palette(transparent=False), (250, 100, 50)),
    "palette, transparent": (lambda: palette(transparent=True), (255, 255, 255)),
    "alpha": (lambda: saved(Image.new("RGBA", (4, 4), (255, 0, 0, 51)), "PNG"), (255, 204, 204)),
    "alpha, WebP": (lambda: saved(Image.new("RGBA", (4, 4), (255, 0, 0, 51)), "WEBP", lossless=True), (255, 204, 204)),
    "grey and alpha": (lambda: saved(Image.new("LA", (4, 4), (0, 51)), "PNG"), (204, 204, 204)),
    "colour, one transparent": (
        lambda: saved(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
        (255, 255, 255),
    ),
    "16-bit colour": (rgb_png_16, (200, 100, 7)),
    "BMP": (lambda: saved(Image.new("RGB", (4, 4), (5, 6, 7)), "BMP"), (5, 6, 7)),
    "CMYK TIFF": (lambda: saved(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "first of an animation": (animation, (255, 0, 0)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_every_kind_of_picture_becomes_colour(name: str) -> None:
    make, colour = PLAIN[name]
    image = prepare_image(make(), 6, 3)
    assert image.shape == (3, 6, 6)
    assert image.dtype == np.uint8
    assert np.array_equal(image, np.broadcast_to(np.array(colour)[:, None, None], (3, 6, 6)))
    luma = round(0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2])
    assert np.abs(prepare_image(make(), 6, 1).astype(int) - luma).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_jpeg_in_every_colour_space(mode: str) -> None:
    image = Image.new("RGB", (32, 32), (200, 60, 30)).convert(mode)
    expected = np.asarray(image.convert("RGB"))[0, 0]
    ours = prepare_image(saved(image, "JPEG", quality=95), 16, 3)
    assert np.abs(ours[:, 8, 8].astype(int) - expected).max() <= 3


@pytest.mark.parametrize(
    ("form", "dtype", "levels", "expected"),
    [
        ("PNG", "uint16", [0, 257 * 2, 257 * 100, 65535], (2, 100)),  # clipped, both would be 255
        ("TIFF", "uint16", [0, 257 * 2, 257 * 100, 65535], (2, 100)),
        ("PPM", "uint16", [0, 257 * 2, 257 * 100, 65535], (2, 100)),
        ("PNG", "uint16", [0, 257 * 2, 257 * 4, 0], (2, 4)),  # by 257 also where the picture is dark
        ("TIFF", "int32", [-1000, 0, 1000, 4100], (50, 100)),
        ("TIFF", "float32", [0, 0.2, 0.4, 0.5], (51, 102)),
        ("TIFF", "float32", [-100, 0, 100, 410], (50, 100)),
        ("TIFF", "float32", [0, float("nan"), 0.4, 1], (0, 102)),
    ],
)
def test_many_bits_are_scaled_not_clipped(
    form: str, dtype: str, levels: list[float], expected: tuple[int, int]
) -> None:
    image = prepare_image(saved(grey(levels, dtype), form), 4, 1)
    assert np.array_equal(image, np.broadcast_to(np.array(expected).repeat(2), (1, 4, 4)))


def stored(upright: Array, orientation: int) -> Array:
    """How a camera stores a picture whose EXIF says this orientation; from the EXIF standard's row 0 and column 0."""
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),  # row 0 is its left side, column 0 its top
        6: upright.transpose(1, 0, 2)[::-1],  # right, top
        7: upright.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
        8: upright.transpose(1, 0, 2)[:, ::-1],  # left, bottom
    }[orientation]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_exif_says(form: str, orientation: int) -> None:
    upright = np.zeros((16, 16, 3), dtype=np.uint8)
    upright[:8, :8, 0] = upright[:8, 8:, 1] = upright[8:, :8, 2] = 240
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored(upright, orientation)))
    options = {"quality": 95, "subsampling": 0} if form == "JPEG" else {}
    ours = prepare_image(saved(image, form, exif=exif, **options), 16, 3)
    assert np.abs(ours.astype(int) - upright.transpose(2, 0, 1)).max() <= (4 if form == "JPEG" else 0)


def test_malformed_exif_neither_stops_the_picture_nor_its_turn() -> None:
    # an image width in letters: ImageOps.exif_transpose cannot write it back
    entries = struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHL4s", 0x0100, 2, 4, b"abc\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + entries + bytes(4)
    halves = np.zeros((32, 32), dtype=np.uint8)
    halves[:, :16] = 255
    plain = saved(Image.fromarray(halves), "JPEG").getvalue()
    turned = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    image = prepare_image(BytesIO(turned), 32, 1)[0]
    assert image[:14].min() > 240  # the left half is on top after a quarter turn to the right
    assert image[18:].max() < 15


def test_a_picture_of_one_pixel_and_one_very_long(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "one.png")
    colour = np.broadcast_to(np.array([1, 2, 3])[:, None, None], (3, 84, 84))
    assert np.array_equal(prepare_image(str(tmp_path / "one.png"), 84, 3), colour)
    assert np.array_equal(prepare_image(saved(Image.new("RGB", (1, 3000), (1, 2, 3)), "PNG"), 84, 3), colour)


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.jpg .*image: no format"):
        prepare_image(path, 8, 3)
    with path.open("rb") as file, pytest.raises(InputError, match=r"a\.jpg .*image"):
        prepare_image(file, 8, 3)
    with pytest.raises(InputError, match=r"^the file .*image"):
        prepare_image(BytesIO(b"x"), 8, 3)
    with pytest.raises(FileNotFoundError):
        prepare_image(tmp_path / "missing.png", 8, 3)


def test_unreadable_files_are_skipped_counted_and_named(split_root: Path) -> None:
    folder = split_root / "train" / "train_0"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("not a picture")
    (folder / "truncated.jpg").write_bytes(saved(noise, "JPEG").getvalue()[:900])
    (folder / "truncated.png").write_bytes(saved(noise, "PNG").getvalue()[:900])
    (folder / "nowhere.png").symlink_to(folder / "nothing")
    with pytest.warns(UserWarning, match="left out") as caught:
        data = tasks(split_root).load()
    (message,) = [str(warning.message) for warning in caught]
    assert re.search(rf"\b5 of the 41 .*root {re.escape(str(split_root))} ", message)
    for name in ("empty.jpg", "notes.txt", "truncated.jpg", "truncated.png", "nowhere.png"):
        assert str(folder / name) in message
    assert re.search(r"truncated\.jpg [^;]*: image file is truncated", message)
    assert len(data.images) == len(data.labels) == 36
    assert data.images[data.labels == 0][:, 2, 0, 0].tolist() == [0, 1, 2, 3]
    assert data.images[data.labels == 8][:, 2, 0, 0].tolist() == [0, 1, 2, 3]

    for number in range(8):
        (folder / f"x{number}.jpg").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"^13 of the 49 .*empty\.jpg .*x4\.jpg [^;]*; .*\b3 more$"):
        tasks(split_root).load()


def test_a_folder_without_one_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p" / "a").mkdir(parents=True)
    (tmp_path / "p" / "a" / "x.jpg").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="1 of the 1 files"),
        pytest.raises(InputError, match=r"^root .*none of the 1 "),
    ):
        tasks(tmp_path / "p").load()


def test_a_disk_that_fails_is_an_error_and_nothing_is_cached(
    split_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(PermissionError, match=r"2\.png"):
        tasks(split_root, cache_dir=str(tmp_path / "cache")).load()
    assert all(path.suffix == ".lock" for path in tmp_path.glob("cache/*"))


def test_classes_with_too_few_pictures_are_named_and_left_out(
    split_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_class(split_root / "train" / "tiny", 2)
    make_class(split_root / "val" / "nothing", 0)
    data = tasks(split_root, shots=2, train_shots=1)
    with pytest.warns(UserWarning, match="left out") as caught:
        data.setup()
    (message,) = [str(warning.message) for warning in caught]
    assert "tiny (train, 2 of 3), nothing (val, 0 of 4)" in message
    loaded = data.load()
    assert len(loaded.members("train")) == 4
    assert len(loaded.members("val")) == 3
    assert "tiny" in loaded.classes  # names and images stay as cached

    # what is left out depends on shots and queries, and the cache does not
    monkeypatch.setattr(ImageFolderTasks, "build", None)
    with pytest.warns(UserWarning, match="nothing"):
        assert len(tasks(split_root, queries=1).load().members("train")) == 5
    with pytest.warns(UserWarning, match=r"tiny \(train, 2 of 4\)"):
        tasks(split_root, train_shots=(1, 2)).load()


def test_too_few_classes_say_which_split_and_what_it_has(split_root: Path, flat_root: Path) -> None:
    with pytest.raises(InputError, match=r"root .*\b3 .*\(ways\) .*\b3 .*\(shots \+ queries\) .*test .* 2 and 0\b"):
        tasks(split_root, ways=3).setup("test")
    for train_ways in (5, (2, 5)):
        with pytest.raises(InputError, match=r"root .*\b5 .*\(train_ways\) .*train .* 4 and 0\b"):
            tasks(split_root, train_ways=train_ways).setup("fit")
    tasks(split_root, train_ways=(2, 4)).setup("fit")
    make_class(split_root / "test" / "tiny", 2)
    with (
        pytest.warns(UserWarning, match="tiny"),
        pytest.raises(InputError, match=r"root .*test .* 2 and 1\b"),
    ):
        tasks(split_root, ways=3).setup("predict")
    with pytest.raises(InputError, match=r"root .*val .*split_fractions .*\b2 of the 10 .* 2 and 0\b"):
        tasks(flat_root, ways=3).setup("validate")


def test_a_split_that_is_not_asked_for_may_be_small_or_missing(split_root: Path, flat_root: Path) -> None:
    tasks(split_root, ways=3).setup("validate")  # the test split has 2
    wholly = tasks(flat_root, ways=10, split_fractions=(0.0, 0.0, 1.0))
    wholly.setup("test")
    assert sorted(wholly.load().members("test")) == list(range(10))
    with pytest.raises(InputError, match=r"root .*train .*split_fractions .*\b0 of the 10 .* 0 and 0\b"):
        wholly.setup("fit")

    shutil.rmtree(split_root / "train")
    shutil.rmtree(split_root / "val")
    only = tasks(split_root)
    only.setup("test")
    assert only.load().classes.tolist() == ["test_0", "test_1"]
    assert only.task_set("test").batch([0]).query_x.shape == (1, 4, 3, 8, 8)
    with pytest.raises(InputError, match=r"root .*train .* 0 and 0\b"):
        only.setup("fit")


def test_a_class_in_two_splits_is_named(split_root: Path) -> None:
    make_class(split_root / "test" / "train_2", 4)
    with pytest.raises(
        InputError, match=r"root .*\b1 in several: train_2\. .*split_folders merge .*split_folders train "
    ):
        tasks(split_root).load()


def test_a_root_that_is_missing_empty_or_laid_out_otherwise_is_refused(tmp_path: Path) -> None:
    layout = r"^root .*root/\{train,val,test\}/<class>/\* .*root/<class>/\*.*/p "
    root = tmp_path / "p"
    with pytest.raises(FileNotFoundError, match=layout + "is not a folder"):
        tasks(root).load()
    root.mkdir()
    Image.new("RGB", (8, 8)).save(root / "beside.png")
    with pytest.raises(FileNotFoundError, match=layout + r".*\b0 class"):
        tasks(root).load()
    (root / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match=layout + r".*\b1 class"):
        tasks(root).load()
    for split in ("train", "valid", "test"):
        make_class(root / split / f"{split}_0", 2)
    with (
        pytest.warns(UserWarning, match=r"root .*/p .*train and test\b.*: cat, valid"),
        pytest.raises(InputError, match=r"root .*\b2 .*val .* 0 and 0\b"),
    ):
        tasks(root, queries=1).task_set("val")


def test_folders_beside_the_splits_are_named_and_not_read(split_root: Path) -> None:
    make_class(split_root / "unlabelled", 4)
    with pytest.warns(UserWarning, match=r"root .*train and val and test\b.*: unlabelled"):
        data = tasks(split_root).load()
    assert len(data.classes) == 9


def test_the_options_are_those_of_image_tasks_and_its_own() -> None:
    own, shared = (inspect.signature(c).parameters for c in (ImageFolderTasks, ImageTasks))
    assert {name: p for name, p in own.items() if name in shared} == dict(shared)
    assert own.keys() - shared.keys() == {
        "root",
        "image_size",
        "channels",
        "split_folders",
        "split_fractions",
        "split_seed",
    }
    assert [name for name, p in own.items() if p.kind is not p.KEYWORD_ONLY] == ["root"]


def test_arguments_outside_their_range_are_named() -> None:
    for arguments, message in [
        ({"image_size": 0}, r"image_size .* 0"),
        ({"channels": 2}, r"channels .*1 or 3\b.* 2"),
        ({"split_fractions": (0.5, 0.5, 0.5)}, r"split_fractions .*\(0\.5, 0\.5, 0\.5\)"),
        ({"split_fractions": (0.5, 0.6, -0.1)}, r"split_fractions .*\(0\.5, 0\.6, -0\.1\)"),
        ({"split_fractions": (0.5, 0.5)}, r"split_fractions .*\(0\.5, 0\.5\)"),
        ({"split_seed": -1}, r"split_seed .* -1"),
        ({"shots": 0}, r"\bshots .* 0"),
    ]:
        with pytest.raises(InputError, match=message):
            tasks(Path("p"), **arguments)


def test_the_cache_is_used_until_a_picture_changes(split_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(**arguments: object) -> str:
        return tasks(split_root, **arguments).cache_name

    first = name()
    assert len(tasks(split_root).load().images) == 36
    with monkeypatch.context() as patch:
        patch.setattr(ImageFolderTasks, "build", None)
        assert len(tasks(split_root, shots=2, seed=3).load().images) == 36
    assert name() == name(shots=2, queries=1, seed=3, split_seed=4) == first
    assert len({first, name(image_size=9), name(channels=1), tasks(split_root.parent).cache_name}) == 4

    folder = split_root / "val" / "val_0"
    Image.new("RGB", (8, 8), (1, 0, 88)).save(folder / "new.png")
    added = tasks(split_root).load()
    assert added.images[added.labels == 4][:, 2, 0, 0].tolist() == [0, 1, 2, 3, 88]

    def change() -> None:
        content = (folder / "0.png").stat()
        Image.new("RGB", (12, 9), (1, 0, 0)).save(folder / "0.png")  # as it was, but later
        os.utime(folder / "0.png", ns=(content.st_atime_ns, content.st_mtime_ns + 1))

    for alter in (change, lambda: (folder / "0.png").rename(folder / "zero.png"), (folder / "1.png").unlink):
        alter()
        built = []
        with monkeypatch.context() as patch:
            build = ImageFolderTasks.build
            patch.setattr(ImageFolderTasks, "build", lambda self: built.append(1) or build(self))  # noqa: B023
            tasks(split_root).load()
            tasks(split_root).load()
        assert built == [1]

    shutil.rmtree(split_root)
    assert len(tasks(split_root).load().images) == 36  # with one more and one less, from the cache
    assert len(tasks(split_root).load().members("val")) == 3


def test_real_photographs_in_folders(tmp_path: Path) -> None:
    if not CALTECH.exists():
        pytest.skip(f"needs the photographs of Caltech-101, which are not at {CALTECH}")
    root = tmp_path / "caltech"
    script = SHARED / "tools" / "unpack_caltech.py"
    subprocess.run([sys.executable, str(script), str(root), "folders"], check=True, stdout=subprocess.DEVNULL)
    data = ImageFolderTasks(str(root), queries=10, meta_batch_size=4)
    loaded = data.load()
    assert [len(loaded.members(split)) for split in SPLITS] == [64, 16, 20]
    paths = [path for split in SPLITS for path in sorted((root / split).glob("*/*.jpg"))]
    assert len(loaded.images) == len(paths) == 8677 - 435  # Faces_easy stays out
    for row in range(0, len(paths), 500):  # 84×84 as they are: nothing is resampled
        photograph = np.asarray(Image.open(paths[row]).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(loaded.images[row], photograph)
        assert loaded.classes[loaded.labels[row]] == paths[row].parent.name
    batch = data.task_set("test").batch(range(4))
    assert batch.support_x.shape == (4, 5, 3, 84, 84)
    assert batch.query_x.shape == (4, 50, 3, 84, 84)
    assert 0.3 < batch.query_x.float().mean() / (255 if batch.query_x.dtype == torch.uint8 else 1) < 0.7


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not fork")
def test_processes_read_what_one_process_reads(
    flat_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for c in range(0, 10, 3):
        (flat_root / f"class {c}" / "broken.png").write_bytes(b"")
        noise = np.random.default_rng(c).integers(0, 256, (20, 17, 3), dtype=np.uint8)
        Image.fromarray(noise).save(flat_root / f"class {c}" / "a.jpg")

    def load(name: str) -> str:
        with pytest.warns(UserWarning, match="left out") as caught:
            tasks(flat_root, cache_dir=str(tmp_path / name)).load()
        return str(caught[0].message)

    alone = load("alone")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(processes, "ALONE", -1)
    assert load("processes") == alone
    assert re.match(r"4 of the 48 .*class 0/broken\.png", alone)
    for path in (tmp_path / "alone").glob("*/*"):
        assert path.read_bytes() == (tmp_path / "processes" / path.parent.name / path.name).read_bytes()

    prepare = image_folder.prepare_image

    def failing(path: Path, image_size: int, channels: int) -> Array:
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied", str(path))
        return prepare(path, image_size, channels)

    monkeypatch.setattr(image_folder, "prepare_image", failing)
    with pytest.raises(PermissionError, match=r"^\[Errno 13\] Permission denied: .*class 0/2\.png'$"):
        tasks(flat_root, cache_dir=str(tmp_path / "none")).load()


@pytest.fixture
def shared_root(tmp_path: Path) -> Path:
    """``root/{train,val,test}/<class>/*`` with the same 10 classes each, of 4, 3 and 2 pictures."""
    for (row, split), c in itertools.product(enumerate(SPLITS), range(10)):
        make_class(tmp_path / "shared" / split / f"class {c}", 4 - row, (row, c, 0))
    make_class(tmp_path / "shared" / "train" / "only here", 4, (0, 10, 0))
    return tmp_path / "shared"


def test_classes_of_several_folders_are_merged_and_split(shared_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fractions = {"split_fractions": (0.4, 0.3, 0.3), "split_folders": "merge"}
    data = tasks(shared_root, **fractions).load()
    assert data.classes.tolist() == [f"class {c}" for c in range(10)] + ["only here"]
    order = np.random.default_rng(0).permutation(11)
    assert [set(data.members(split)) for split in SPLITS] == [set(order[6:]), set(order[:3]), set(order[3:6])]
    assert np.array_equal(data.images[:, 1, 0, 0], data.labels)  # green is the class
    assert np.bincount(data.labels).tolist() == [9] * 10 + [4]
    assert {*data.images[data.labels == 3][:, 0, 0, 0].tolist()} == {0, 1, 2}  # of all folders
    batch = tasks(shared_root, **fractions, queries=8).task_set("test").batch([0])
    assert batch.query_x.shape == (1, 16, 3, 8, 8)

    monkeypatch.setattr(ImageFolderTasks, "build", None)  # one cache serves them all
    for split, pictures in (("train", 4), ("val", 3), ("test", 2)):
        alone = tasks(shared_root, split_folders=split, queries=1).load()
        members = sorted(c for part in SPLITS for c in alone.members(part))
        names = [f"class {c}" for c in range(10)] + ["only here"] * (split == "train")
        assert alone.classes[members].tolist() == names
        pixels = alone.images[np.isin(alone.labels, members)]
        assert {*pixels[:, 0, 0, 0].tolist()} == {SPLITS.index(split)}
        assert len(pixels) == pictures * len(names)
        sizes = [len(alone.members(part)) for part in SPLITS]
        assert sizes == [len(names) - 4, 2, 2]

    shutil.rmtree(shared_root)
    assert len(tasks(shared_root, split_folders="val").load().images) == 94
    with pytest.raises(InputError, match=r"root .*/shared .*\b10 in several: class 0, .*split_folders merge"):
        tasks(shared_root).load()


def test_a_way_to_use_folders_that_does_not_apply_is_refused(
    flat_root: Path, split_root: Path, shared_root: Path
) -> None:
    for how in ("merge", "train"):
        with pytest.raises(InputError, match=rf"^split_folders .*'keep' .*'{how}', but root .*/flat has no train"):
            tasks(flat_root, split_folders=how).load()
    shutil.rmtree(split_root / "val")
    with pytest.raises(InputError, match=r"^split_folders .*'val', but root .*/pictures has train, test$"):
        tasks(split_root, split_folders="val").load()
    with pytest.raises(InputError, match=r"^split_folders .*'keep', 'merge', 'train', 'val', 'test', got 'all'"):
        tasks(split_root, split_folders="all")
    message = r"^root .*/shared .*\b10 in several: class 0, .*class 4, …\. .*split_folders merge .*split_folders train "
    with pytest.raises(InputError, match=message):
        tasks(shared_root).load()
    # merging classes that are in one folder each keeps them
    assert len(tasks(split_root, split_folders="merge").load().classes) == 6


@pytest.mark.parametrize("named", [["train"], ["test"], ["val", "test"], ["train", "val", "test"]])
def test_a_class_may_have_the_name_of_a_split(named: list[str], flat_root: Path) -> None:
    for name in named:
        make_class(flat_root / name, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = tasks(flat_root).load()
    assert data.classes.tolist() == sorted([*(f"class {c}" for c in range(10)), *named])
    assert sum(len(data.members(split)) for split in SPLITS) == 10 + len(named)


def test_folders_that_are_no_split_are_named_beside_one_that_is(split_root: Path) -> None:
    shutil.rmtree(split_root / "val")
    make_class(split_root / "val", 4)  # pictures without class folders
    with pytest.warns(UserWarning, match=r"^root .* is split into train and test; ignoring: val\.$"):
        data = tasks(split_root).load()
    assert len(data.classes) == 6

    for split in ("train", "test"):
        make_class(split_root / "other" / split, 4)
    with pytest.raises(FileNotFoundError, match=r"^root .*/other has only test, train, with 0 class folders"):
        tasks(split_root / "other").load()


def test_classes_too_few_for_the_fractions_say_which_would_do(tmp_path: Path) -> None:
    for c in range(19):
        make_class(tmp_path / "p" / f"{c:02}", 3)
    options = {"ways": 5, "queries": 1, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(InputError, match=r"root .*\b5 .*val .*\b4 of the 19 .* 4 and 0\b") as caught:
        tasks(tmp_path / "p", **options).setup("fit")
    advice = re.search(r'--data\.split_fractions "(\[.*\])" would do$', str(caught.value))
    assert advice is not None
    assert advice[1] == "[0.4, 0.3, 0.3]"
    tasks(tmp_path / "p", **options, split_fractions=json.loads(advice[1])).setup("fit")

    # pictures count too: of the 6 classes that "00" is drawn into, 5 remain
    (tmp_path / "p" / "00" / "0.png").unlink()
    with (
        pytest.warns(UserWarning, match=r"00 \("),
        pytest.raises(InputError, match=r"three splits need 57 .*\"\[.*\]\" would do for 5 ways$"),
    ):
        tasks(tmp_path / "p", **options | {"ways": 19}, shots=2).setup("fit")


def test_too_few_images_are_not_said_to_be_too_few_classes(tmp_path: Path) -> None:
    for label in range(15):
        for number in range(5):
            path = tmp_path / f"class{label}/{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("L", (8, 8), 10 * label + number).save(path)
    data = ImageFolderTasks(str(tmp_path), ways=2, shots=4, queries=2, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        InputError, match=r"2 classes \(ways\) of 6 images .*got 0 and 3 .*; fewer shots or queries would do$"
    ):
        data.task_set("test")


def test_a_link_to_the_root_is_no_class(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / label / "0.png")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert ImageFolderTasks(str(tmp_path)).listing[0] == ["a", "b"]
