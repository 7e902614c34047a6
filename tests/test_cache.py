import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from meta_lightning.data.cache import LabelledImages, load_or_build


def build(seed: int = 0) -> LabelledImages:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (6000, 1, 4, 4), dtype=np.uint8)
    return LabelledImages(images, np.arange(6000) // 20, np.arange(300).astype(str), np.arange(300) % 3)


def must_not_build() -> LabelledImages:
    raise AssertionError("built although the cache was there")


def same(a: LabelledImages, b: LabelledImages) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_it_is_built_once_and_mapped(tmp_path: Path) -> None:
    first, again = load_or_build(tmp_path / "a" / "b", build), load_or_build(tmp_path / "a" / "b", must_not_build)
    assert same(first, build())
    assert same(again, build())
    assert isinstance(first.images, np.memmap)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".b.lock", "b"]


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "classes.npy", "splits.npy", "checksums.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "altered"])
def test_a_corrupt_cache_is_rebuilt_with_a_warning(name: str, how: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    load_or_build(folder, build)
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    if how == "missing":
        path.unlink()
    else:
        kept = {"empty": 0, "truncated": len(content) // 2, "altered": len(content)}[how]
        path.write_bytes(bytes(content[:kept]))
    with pytest.warns(UserWarning, match=r"cache .*/cache\b.*corrupt \(.+\)"):
        assert same(load_or_build(folder, build), build())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(load_or_build(folder, must_not_build), build())


def test_without_a_writable_folder_the_images_stay_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"cache_dir .*/file .*memory"):
        assert same(load_or_build(tmp_path / "file" / "cache", build), build())


def slowly(folder: Path, seconds: float) -> None:
    """Build a cache in another process, its last array long in coming."""
    save = np.save

    def slow_save(path: Path, array: np.ndarray) -> None:
        save(path, array)
        time.sleep(seconds)

    np.save = slow_save
    assert same(load_or_build(folder, build), build())


def test_two_processes_that_build_at_once_are_both_right(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=slowly, args=(tmp_path / "cache", 0.2)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache.lock", "cache"]
    assert same(load_or_build(tmp_path / "cache", must_not_build), build())


def test_a_build_that_is_killed_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=slowly, args=(tmp_path / "cache", 60))
    process.start()
    deadline = time.monotonic() + 30
    while not list(tmp_path.rglob("*.npy")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "cache").exists()
    assert len(list(tmp_path.glob("cache.*.part"))) == 1
    (tmp_path / "cache2.1.part").mkdir()  # of another cache, whose build may be under way
    assert same(load_or_build(tmp_path / "cache", build), build())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache.lock", "cache", "cache2.1.part"]


def test_a_cache_is_as_old_as_its_sources_and_serves_when_they_are_gone(tmp_path: Path) -> None:
    file, folder = tmp_path / "source", tmp_path / "cache"

    def sources() -> list[Path]:
        return [file] if file.exists() else []

    assert same(load_or_build(folder, build, sources), build())  # as where the build downloads
    file.write_text("one")
    assert same(load_or_build(folder, lambda: build(1), sources), build(1))
    assert same(load_or_build(folder, must_not_build, sources), build(1))
    for change in (
        lambda: file.write_text("another size"),
        lambda: os.utime(file, ns=(0, file.stat().st_mtime_ns + 1)),
    ):
        change()
        old = load_or_build(folder, must_not_build)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert same(load_or_build(folder, lambda: build(2), sources), build(2))
        assert old.images.max() == 255  # who has mapped the old one keeps it
    file.unlink()
    assert same(load_or_build(folder, must_not_build, sources), build(2))
    assert not list(tmp_path.glob("*.part"))


def test_a_build_that_fails_keeps_the_cache_that_is_there(tmp_path: Path) -> None:
    file, folder = tmp_path / "source", tmp_path / "cache"
    file.write_text("one")
    load_or_build(folder, build, lambda: [file])
    file.write_text("two, corrupt")
    with pytest.raises(AssertionError):
        load_or_build(folder, must_not_build, lambda: [file])
    assert same(load_or_build(folder, must_not_build), build())
