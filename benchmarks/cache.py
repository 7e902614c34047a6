"""Images per second and peak memory of building the cache of an image folder, on one core and on two.

    python benchmarks/cache.py ROOT [--images 6000] [--repeats 3] [--old CHECKOUT]

ROOT gets the folders of pictures: random photographs of twice the size that is packed, as JPEG and as PNG. What was
measured: results/data.md. Each build runs in a process of its own, whose cores are set and which reports its memory: by
how much its own pages grow, a worker's own pages, and the high-water mark, with all that was imported. The variants
take turns, so that another load on the machine meets all of them; the best of the repeats is printed, and its ratio to
the plain loop on one core. The seconds of CPU tell what no load changes: with cores to itself, a build takes about as
long as the busiest process.

    loop       one process
    processes  as ``ImageFolderTasks.build`` does where it has two cores
    threads    ``--old CHECKOUT``: the package of another commit, ccce34a for the pool of threads
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 20
BUILD = """
import json, os, resource, sys, threading, time, warnings
from pathlib import Path
os.sched_setaffinity(0, {int(core) for core in sys.argv[3].split(",")})
import logging
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
from meta_lightning import ImageFolderTasks

def private(pid):
    try:  # pages of its own: a forked process shares the others
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

peaks, running = {"parent": 0.0, "workers": 0.0}, True
def watch():
    while running:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        peaks["workers"] = max([peaks["workers"], *map(private, children)])
        peaks["parent"] = max(peaks["parent"], status("RssAnon"))
        time.sleep(0.05)

data = ImageFolderTasks(sys.argv[1], image_size=int(sys.argv[2]), cache_dir=sys.argv[4], ways=2, queries=1)
if sys.argv[5] == "loop":
    from meta_lightning.data import processes
    processes.worker_processes = lambda: 0
before = status("RssAnon")
watcher = threading.Thread(target=watch)
watcher.start()
start, used = time.perf_counter(), os.times()
images = data.load().images
seconds, now = time.perf_counter() - start, os.times()
running = False
watcher.join()
print(json.dumps({"rate": len(images) / seconds, "parent": peaks["parent"] - before, "workers": peaks["workers"],
                  "high": status("VmHWM"), "theirs": 1000 / len(images) * (now.children_user + now.children_system),
                  "own": 1000 / len(images) * (now.user + now.system - used.user - used.system)}))
"""


def make_folder(root: Path, form: str, size: int, images: int) -> Path:
    """Smooth random photographs of twice the size, in folders of classes."""
    folder = root / f"{form}-{size}-{images}"
    rng = np.random.default_rng(0)
    for number in range(0 if folder.exists() else images):
        small = rng.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
        path = folder / f"class {number % CLASSES:02}" / f"{number:05}.{form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((2 * size, 2 * size), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def build(folder: Path, size: int, cores: str, variant: str, old: Path | None) -> dict[str, float]:
    """Build the cache in a process of its own."""
    package = old if variant == "threads" and old else Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as cache:
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            BUILD,
            str(folder.absolute()),
            str(size),
            cores,
            cache,
            variant,
        ]
        shown = subprocess.run(command, cwd=package, env=environment, check=True, capture_output=True, text=True).stdout
    figures: dict[str, float] = json.loads(shown.splitlines()[-1])
    return figures


def compare(root: Path, images: int, repeats: int, old: Path | None) -> None:
    """Print a row per folder of pictures."""
    cores = sorted(os.sched_getaffinity(0))
    one, two = str(cores[0]), ",".join(map(str, cores[:2]))
    variants = [("loop", one), ("processes", two)]
    variants += [("threads", one), ("threads", two)] if old else []
    for form in ("jpeg", "png"):
        for size in (28, 64, 84):
            folder = make_folder(root, form, size, images)
            best: dict[tuple[str, str], dict[str, float]] = {}
            for _ in range(repeats):
                for variant in variants:
                    figures = build(folder, size, variant[1], variant[0], old)
                    best[variant] = max(best.get(variant, figures), figures, key=lambda figures: figures["rate"])
            for (variant, on), figures in best.items():
                ratio = figures["rate"] / best["loop", one]["rate"]
                print(
                    f"{form:4} {size} px  {variant:9} {on.count(',') + 1} core(s)  {figures['rate']:6.0f} images/s  "
                    f"{ratio:4.2f} x   CPU s per 1000: parent {figures['own']:.2f}, workers {figures['theirs']:.2f}   "
                    f"MB: parent +{figures['parent']:.0f}, worker {figures['workers']:.0f}, "
                    f"high-water {figures['high']:.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder for the pictures, which are kept")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--old", type=Path, help="checkout of ccce34a, or another commit")
    arguments = parser.parse_args()
    compare(arguments.root, arguments.images, arguments.repeats, arguments.old)
