import multiprocessing
import os
import resource
import signal
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meta_lightning.data import cache
from meta_lightning.data.cache import LabelledImages, Part, concatenated, load_or_build


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
        assert same(load_or_build(folder, build, verify=how == "altered"), build())  # the rest is seen without reading
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(load_or_build(folder, must_not_build, verify=True), build())


def test_without_a_writable_folder_the_images_stay_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"cache_dir .*/file .*memory"):
        assert same(load_or_build(tmp_path / "file" / "cache", build), build())


def slowly(folder: Path, seconds: float) -> None:
    """Build a cache in another process, its last array long in coming."""
    write = Part.write

    def slow_write(part: Part, *arguments: Any) -> tuple[Path, int]:
        written = write(part, *arguments)
        time.sleep(seconds)
        return written

    Part.write = slow_write  # type: ignore[method-assign]
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


def test_the_whole_cache_is_read_only_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = tmp_path / "cache", []
    checksum = cache.checksum
    monkeypatch.setattr(cache, "checksum", lambda path, array: read.append(path.stem) or checksum(path, array))
    load_or_build(folder, build)
    assert read == ["images", "labels", "classes", "splits"]  # once per build
    content = bytearray((folder / "images.npy").read_bytes())
    content[-1] ^= 1
    (folder / "images.npy").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not same(load_or_build(folder, must_not_build), build())
    assert len(read) == 4
    with pytest.warns(UserWarning, match=r"corrupt \(wrong checksum of images\.npy\)"):
        assert same(load_or_build(folder, build, verify=True), build())


@pytest.mark.parametrize("how", ["whole", "part", "changed"])
def test_images_in_chunks_are_written_as_they_come(how: str, tmp_path: Path) -> None:
    data, seen = build(), []

    def chunks() -> Iterator[np.ndarray]:
        for start in range(0, 6000, 1500):
            seen.append([path.stat().st_size for path in tmp_path.glob("cache.*.part/*.npy")])
            yield data.images[start : start + 1500].transpose(0, 1, 3, 2)

    def in_chunks() -> LabelledImages:
        images = concatenated(chunks())
        assert not images.flags.writeable  # changes would not reach the file
        images = {"whole": images, "part": images[:6000], "changed": 255 - images}[how]
        return data._replace(images=images)

    loaded = load_or_build(tmp_path / "cache", in_chunks)
    expected = data.images.transpose(0, 1, 3, 2)
    assert same(loaded, data._replace(images=255 - expected if how == "changed" else expected))
    assert [size for (size,) in seen[:1]] == [0]
    assert seen[-1][0] > 3 * 1500 * 16 - 9000  # but for a buffer and the header
    np.save(tmp_path / "saved.npy", loaded.images)
    assert (tmp_path / "cache" / "images.npy").read_bytes() == (tmp_path / "saved.npy").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache.lock", "cache", "saved.npy"]


def test_chunks_take_as_little_memory_for_many_images(tmp_path: Path) -> None:
    def in_chunks() -> LabelledImages:
        images = concatenated(np.full((64, 1, 128, 128), i, dtype=np.uint8) for i in range(48))  # 50 MB
        return LabelledImages(images, np.arange(48).repeat(64), np.arange(48).astype(str), np.arange(48) % 3)

    tracemalloc.start()
    data = load_or_build(tmp_path / "cache", in_chunks)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6e6
    assert np.array_equal(data.images[:, 0, 3, 4], data.labels)


def test_chunks_without_a_cache_are_concatenated_in_memory() -> None:
    chunks = np.split(build().images, 3)
    images = concatenated(iter(chunks))
    assert np.array_equal(images, build().images)
    images[0] = 1  # it is the caller's


@pytest.mark.parametrize("in_chunks", [True, False])
def test_a_full_disk_leaves_the_images_in_memory(in_chunks: bool, tmp_path: Path) -> None:
    def large() -> LabelledImages:
        data = build()
        images = data.images.repeat(30, axis=0).reshape(6000, 30, 4, 4)
        return data._replace(images=concatenated(np.split(images, 60)) if in_chunks else images)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))  # bytes per file
    try:
        with pytest.warns(UserWarning, match=rf"cache_dir .*{tmp_path} .*File too large.* memory only"):
            data = load_or_build(tmp_path / "cache", large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert data.images.shape == (6000, 30, 4, 4)
    assert np.array_equal(data.images[:, 7], build().images[:, 0])
    assert [path.name for path in tmp_path.iterdir()] == [".cache.lock"]


def test_chunks_without_a_writable_folder_stay_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = build()
    with pytest.warns(UserWarning, match=r"cache_dir .*/file .*memory"):
        got = load_or_build(
            tmp_path / "file" / "cache", lambda: data._replace(images=concatenated(np.split(data.images, 3)))
        )
    assert same(got, data)


def test_an_error_of_the_source_is_not_taken_for_one_of_the_cache(tmp_path: Path) -> None:
    def chunks() -> Iterator[np.ndarray]:
        yield build().images
        raise OSError(5, "Input/output error", "source")

    def failing() -> LabelledImages:
        return build()._replace(images=concatenated(chunks()))

    with pytest.raises(OSError, match="source"):
        load_or_build(tmp_path / "cache", failing)
    assert [path.name for path in tmp_path.iterdir()] == [".cache.lock"]


def test_a_cache_that_is_built_meanwhile_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "cache"

    def slower() -> LabelledImages:
        load_or_build(folder, build)  # as another process would
        concatenated([build(1).images])
        raise AssertionError("went on although the cache was there")

    assert same(load_or_build(folder, slower), build())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache.lock", "cache"]


@pytest.mark.parametrize("chunks", [[0, 3], [3, 0, 2], [0], [0, 0, 1, 0]])
def test_chunks_without_images(chunks: list[int], tmp_path: Path) -> None:
    images = [np.full((n, 1, 2, 2), i, np.uint8) for i, n in enumerate(chunks)]
    total = sum(chunks)

    def build() -> LabelledImages:
        return LabelledImages(concatenated(images), np.zeros(total, np.int64), np.array(["a"]), np.array([0]))

    in_memory, cached = build(), load_or_build(tmp_path / "cache", build)
    assert np.array_equal(in_memory.images, np.concatenate(images))
    assert np.array_equal(cached.images, np.concatenate(images))
    assert load_or_build(tmp_path / "cache", pytest.fail, verify=True).images.shape == (total, 1, 2, 2)
