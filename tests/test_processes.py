"""Work in as many processes as there are cores."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from meta_lightning.data import processes
from meta_lightning.data.processes import mapped

TWO = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not fork")
UNGUARDED = """
import os, sys, torch
from meta_lightning import ImageFolderTasks
from meta_lightning.data import processes

os.sched_getaffinity = lambda pid: {0, 1}
processes.ALONE = -1  # in processes from the first file
torch.rand(600, 600) @ torch.rand(600, 600)  # starts the threads of torch
data = ImageFolderTasks(sys.argv[1], image_size=8, ways=2, queries=1, cache_dir=sys.argv[2]).load()
print(len(data.images), int(data.images.sum()))
"""
SLOW = """
import os, sys, time
from pathlib import Path
import numpy as np
from meta_lightning.data import processes
from meta_lightning.data.cache import LabelledImages, concatenated, load_or_build

os.sched_getaffinity = lambda pid: {0, 1}
processes.ALONE = -1

def slow(number):
    (Path(sys.argv[1]) / f"worker{os.getpid()}").touch()
    time.sleep(0.02)
    return np.zeros((1, 1, 2, 2), np.uint8)

load_or_build(Path(sys.argv[1]) / "cache", lambda: concatenated(processes.mapped(slow, range(100_000))))
"""


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes from the first item on, as on two cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(processes, "ALONE", -1)


@TWO
@pytest.mark.parametrize("items", [0, 1, 31, 32, 33, 500])
def test_results_are_in_order_and_from_two_processes(items: int, two_cores: None) -> None:
    before = torch.get_rng_state()
    results = [*mapped(lambda i: (np.full(3, i), os.getpid()), range(items))]
    assert [array.tolist() for array, _ in results] == [[i] * 3 for i in range(items)]
    assert len({pid for _, pid in results}) == min(2, -(-items // 32))
    assert os.getpid() not in {pid for _, pid in results}
    assert torch.equal(torch.get_rng_state(), before)
    assert not multiprocessing.active_children()


def test_little_work_and_one_core_and_daemons_go_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def pids() -> set[int]:
        return {*mapped(lambda i: os.getpid(), range(1000))}

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert pids() == {os.getpid()}
    monkeypatch.setattr(processes, "ALONE", -1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1})
    assert pids() == {os.getpid()}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64))
    assert processes.worker_processes() == processes.MOST
    monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(daemon=True))
    assert pids() == {os.getpid()}


@TWO
def test_work_that_takes_long_goes_on_in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(processes, "ALONE", 0.05)
    pids = [*mapped(lambda i: time.sleep(0.01) or os.getpid(), range(100))]
    alone = pids.count(os.getpid())
    assert 1 <= alone <= 6
    assert pids[:alone] == [os.getpid()] * alone


@TWO
def test_results_that_nobody_takes_are_few(two_cores: None) -> None:
    done = multiprocessing.get_context("fork").Value("i", 0)

    def count(item: int) -> int:
        with done.get_lock():
            done.value += 1
        return item

    results = mapped(count, range(100_000), chunk=10)
    assert next(results) == 0
    time.sleep(1)
    assert done.value <= 10 * 2 * 3  # two chunks wait for each of two processes, and one is taken
    results.close()
    assert not multiprocessing.active_children()


@TWO
def test_a_script_that_does_not_ask_for_main_is_run_once(tmp_path: Path) -> None:
    for c in range(15):
        (tmp_path / "p" / f"{c}").mkdir(parents=True)
        for number in range(5):
            Image.new("L", (8, 8), c + number).save(tmp_path / "p" / f"{c}" / f"{number}.png")
    (tmp_path / "script.py").write_text(UNGUARDED)
    arguments = [sys.executable, "script.py", "p", "cache"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    shown = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    expected = 3 * 64 * sum(c + number for c in range(15) for number in range(5))
    assert shown.stdout.splitlines() == [f"75 {expected}"]


@TWO
def test_a_killed_process_takes_its_workers_along(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SLOW)
    process = subprocess.Popen([sys.executable, "script.py", "."], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while len([*tmp_path.glob("worker*")]) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(path.name.removeprefix("worker")) for path in tmp_path.glob("worker*")]
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len([*tmp_path.glob("cache.*.part")]) == 1
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/stat").exists() and alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(Path(f"/proc/{pid}/stat").exists() and alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    """Whether a process runs, and is not a zombie that nobody waits for."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def fails_late(number: int) -> int:
    time.sleep(0.01)
    if number == 150:
        raise OSError(5, "Input/output error", "picture.png")
    return number


def test_an_error_of_a_worker_is_the_error_itself() -> None:
    results = mapped(fails_late, range(300))
    assert [next(results) for _ in range(150)] == [*range(150)]
    with pytest.raises(OSError, match=r"Errno 5.*picture\.png") as error:
        next(results)
    assert error.value.filename == "picture.png"
