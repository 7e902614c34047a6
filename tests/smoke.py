"""The wheel by plain pip into empty environments, then one fit and one adapt: smoke.py PYTHON....

Each PYTHON gets an environment with NumPy 2, the first also one with the lowest torch that setup.cfg claims.
They take gigabytes each, in a folder for temporary files (TMPDIR), one at a time. Those that are absent are named.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
SOURCES = ("meta_lightning", "configs", "pyproject.toml", "setup.cfg", "README.md", "LICENSE")
FIT = """fit --config maml.yaml --model.network.init_args.filters 8 --model.inner_steps 2 --data.meta_batch_size 2
    --data.val_tasks 2 --trainer.max_steps 2 --trainer.val_check_interval 2 --trainer.accelerator cpu
    --checkpoint.dirpath kept"""
ADAPT = "adapt --support support --query query --ckpt_path kept/best.ckpt"


def run(command: Sequence[object], folder: Path, **environment: str) -> str:
    """Run a command in a folder, out of reach of the checkout; return what it prints."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    parts = [str(part) for part in command]
    result = subprocess.run(parts, cwd=folder, env=inherited | environment, capture_output=True, text=True)
    if result.returncode:
        sys.stderr.write(result.stdout + result.stderr)
        sys.exit(f"error: {' '.join(parts)} failed (exit status {result.returncode}); the reason stands above")
    return result.stdout


def wheel(folder: Path, *options: str) -> Path:
    """Build the wheel from a copy of the sources, which gets what setuptools leaves."""
    copied = folder / "sources"
    copied.mkdir()
    for name in SOURCES:
        copy: Any = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, copied / name)
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", *options, "-w", folder, copied], folder)
    (built,) = folder.glob("*.whl")
    return built


def check(program: Path, folder: Path, **environment: str) -> dict[str, str]:
    """Fit and adapt in an empty folder; return the versions of the record."""
    run([program, *FIT.split()], folder, **environment)
    (path,) = folder.rglob("fit.json")
    record = json.loads(path.read_text())
    assert record["commit"] is None, "it is the checkout that ran, not the wheel"
    for name, number in itertools.product("AOX", range(3)):
        picture = Image.new("L", (28, 28), 255)
        ImageDraw.Draw(picture).text((6 + number, 5 + number), name, fill=0, font_size=20)
        of_class = folder / ("query" if number == 2 else "support") / name
        of_class.mkdir(parents=True, exist_ok=True)
        picture.save(of_class / f"{number}.png")
    assert "3 queries" in run([program, *ADAPT.split()], folder, **environment)
    assert len((folder / "predictions.csv").read_text().splitlines()) == 1 + 3
    versions: dict[str, str] = record["versions"]
    return versions


def lowest(package: str) -> str:
    """The lowest version of a package that setup.cfg claims, and its patches."""
    found = re.search(rf"^    {package}>=([\d.]+)", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert found, package
    return f"{package}=={found[1]}.*"


def installed(python: str, built: Path, *pinned: str) -> str:
    """Install the wheel into an empty environment, and check it; return a line."""
    with tempfile.TemporaryDirectory(prefix="smoke-") as name:
        folder, start = Path(name), time.perf_counter()
        run([python, "-m", "venv", "env"], folder)
        env = folder / "env" / "bin"
        # no C compiler
        run([env / "python", "-m", "pip", "install", built, *pinned], folder, CC="false", CXX="false")
        seconds = time.perf_counter() - start
        run([env / "python", "-m", "pip", "check"], folder)
        packages = json.loads(run([env / "python", "-m", "pip", "list", "--format", "json"], folder))
        (folder / "run").mkdir()
        found = check(env / "meta-lightning", folder / "run", XDG_CACHE_HOME=str(folder / "cache"))
        assert found["meta-lightning"] in run([env / "meta-lightning", "--version"], folder)
        assert pinned or int(found["numpy"].partition(".")[0]) >= 2, found
        fits = f"{len(packages)} packages in {seconds:.0f} s; fit and adapt work"
        return f"{python}: {', '.join(f'{name} {version}' for name, version in found.items())}: {fits}"


def works(python: str) -> bool:
    """Whether it is a Python that makes environments; names it if not."""
    try:
        subprocess.run([python, "-c", "import ensurepip, venv"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        sys.stdout.write(f"{python}: skipped, not found or without venv\n")
        return False
    return True


def main(pythons: Sequence[str]) -> None:
    """Check each interpreter, and the lowest torch on the first."""
    found = [*filter(works, pythons)]
    if not found:
        sys.exit(f"error: none of {', '.join(pythons)} is found")
    with tempfile.TemporaryDirectory(prefix="wheel-") as folder:
        built = wheel(Path(folder))
        for python, pinned in [*((python, []) for python in found), (found[0], [lowest("torch")])]:
            sys.stdout.write(f"{installed(python, built, *pinned)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
