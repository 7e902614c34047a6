"""Every command and every Python block of README and docs is run.

What trains is shortened to a few meta-iterations (``SHORT``). Pages that say "save this as" are followed to the letter
by test_how_to.py, and the guide's quotes of the source are compared with it by test_guide.py.
"""

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from meta_lightning import MLP, Glyphs
from meta_lightning.cli import main

TESTS = Path(__file__).parent
ROOT = TESTS.parent
FOLLOW = re.compile(r'(?:follow\("|"how_to" / ")(\w+\.md)"')
FOLLOWED = {name for path in TESTS.glob("test_*.py") for name in FOLLOW.findall(path.read_text())}
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)

CPU = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
PLAIN = [*CPU, "--dashboard.enabled=false"]  # drawing takes longer than the rest
DATA = ["--data.queries=2", "--data.val_tasks=2", "--data.epoch_length=2", "--data.meta_batch_size=2"]
SHORT = {
    "fit": [*PLAIN, "--trainer.max_steps=4", *DATA],
    "test": [*PLAIN, "--data.test_tasks=4"],
    "predict": [*CPU, "--data.test_tasks=4"],
    "compare": ["--max_steps=4", "--grid=0", "--seeds=0", "--options.all=--data.val_tasks 2 --data.test_tasks 4"],
    "adapt": [],
    "hub": [],
}
NEEDS_DATA = (
    "omniglot/",
    "MiniImagenet",
)  # a data set that is downloaded: these commands are parsed, as are those of a cluster
LAUNCHERS = ("srun", "torchrun")


class Command(NamedTuple):
    """A command of a page."""

    place: str
    words: list[str]

    @property
    def module(self) -> list[str]:
        """Arguments of ``python -m meta_lightning``; none if it is another program."""
        if self.words[0] in LAUNCHERS or self.words[:3] == ["python", "-m", "meta_lightning"]:
            return self.words[self.words.index("meta_lightning") + 1 :]
        return []

    @property
    def processes(self) -> bool:
        """Whether it starts several processes."""
        return self.words[0] in LAUNCHERS or "--trainer.devices" in self.words or self.module[:1] == ["compare"]


def commands() -> Iterator[Command]:
    """The commands of all pages that are not followed as a whole."""
    for page, text in PAGES.items():
        if Path(page).name in FOLLOWED:
            continue
        for block in BLOCK.finditer(text):
            if block[1] == "bash":
                line = text.count("\n", 0, block.start()) + 1
                for number, said in enumerate(re.sub(r"\\\n", "", block[2]).splitlines(), line + 1):
                    for command in said.split(" && "):
                        if words := shlex.split(command, comments=True):
                            yield Command(f"{page}:{number}", words)


ALL = [*commands()]


# a newcomer goes through these from top to bottom, in one folder
IN_ORDER = ("README.md", "docs/getting_started.md")


def pictures(place: Path) -> None:
    """Drawings and photographs of the reader's own."""
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c", "d", "e"):
        pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
        for folder in (f"my_drawings/{name}", "unlabelled"):
            (place / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize((40, 40)).save(place / folder / f"{name}.png")
    for number in range(32):
        folder = place / "my_photos" / f"class{number}"
        folder.mkdir(parents=True)
        for photo in range(3):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((84, 84)).save(folder / f"{photo}.png")


@pytest.fixture(scope="session")
def prepared(glyphs: Glyphs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name: pictures, a finished run and its checkpoints."""
    place = tmp_path_factory.mktemp("prepared")
    pictures(place)
    options = ["--trainer.max_steps=5", "--data.epoch_length=1", "--data.val_tasks=2", "--checkpoint.save_top_k=5"]
    before = Path.cwd()
    os.chdir(place)
    try:
        main(["fit", "--config", "maml.yaml", *PLAIN, *options])
    finally:
        os.chdir(before)
    checkpoints = place / "lightning_logs/version_0/checkpoints"
    for copy, name in (("runs/best.ckpt", "best.ckpt"), ("reptile/last.ckpt", "last.ckpt")):
        (place / copy).parent.mkdir(parents=True)
        shutil.copy(checkpoints / name, place / copy)
    shutil.copytree(place / "lightning_logs", place / "runs/sweep/hparams")
    return place


@pytest.fixture
def place(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the prepared folder, which is the current one."""
    place = tmp_path / "place"
    shutil.copytree(prepared, place)
    monkeypatch.chdir(place)
    return place


def shell(*words: str, folder: Path | None = None) -> str:
    """Run a program with this Python first in the path, and return what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path]))}
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def extras() -> set[str]:
    """The extras of the package."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return set(setup["options.extras_require"])


def run(words: Sequence[str], ends: bool = False) -> None:
    """The command line in this process; printing the configuration ends it."""
    if not ends:
        main([*words])
        return
    with pytest.raises(SystemExit) as end:
        main([*words])
    assert end.value.code in (None, 0)


def marks(command: Command) -> list[Any]:
    slow = command.processes or command.words[:2] == ["python", "benchmarks/sweep.py"]
    return [pytest.mark.slow] if slow else []


@pytest.mark.usefixtures("glyphs")
@pytest.mark.parametrize("page", IN_ORDER)
def test_the_commands_of_a_page_follow_one_another(page: str, tmp_path: Path) -> None:
    pictures(tmp_path)
    for command in ALL:
        if command.place.startswith(page) and not marks(command):
            follow(command, tmp_path)


ALONE = [c for c in ALL if marks(c) or not c.place.startswith(IN_ORDER)]


@pytest.mark.parametrize("command", [pytest.param(c, id=c.place, marks=marks(c)) for c in ALONE])
def test_a_command(command: Command, place: Path) -> None:
    follow(command, place)


def follow(command: Command, place: Path) -> None:
    """Run a command, shortened, or check what it names."""
    words, module = command.words, command.module
    if module:
        subcommand = next(word for word in module if word in SHORT)
        few = (
            ["--data.train_queries=2", "--trainer.max_steps=1", "--model.test_inner_steps=1"]
            if "ImageFolderTasks" in module
            else []
        )
        short = [*module, *SHORT[subcommand], *few]
        if any(name in word for word in module for name in NEEDS_DATA) or words[0] == "srun":
            run([*module, "--print_config"], ends=True)
        elif words[0] == "torchrun":
            shell(
                sys.executable,
                "-m",
                "torch.distributed.run",
                *words[1 : words.index("-m")],
                "-m",
                "meta_lightning",
                *short,
            )
        elif command.processes:
            shell(sys.executable, "-m", "meta_lightning", *short)
        else:
            run(short, ends=any(word.startswith("--print_") for word in module))
        return
    match words:
        case ["make", target]:
            assert ".venv" in shell("make", "-n", target, folder=ROOT)
        case ["pip", "install", "."]:
            assert (ROOT / "pyproject.toml").exists()
        case ["pip", "install", "-r", path]:
            assert (ROOT / path).exists()
        case ["pip", "install", requirement]:
            (extra,) = re.fullmatch(r"meta-lightning\[(\w+)\]", requirement).groups()  # type: ignore[union-attr]
            assert extra in extras()
        case ["python", "-m", "venv", folder]:
            shell(*words, "--without-pip")
            assert (place / folder / "bin/activate").exists()
        case ["source", ".venv/bin/activate"]:
            pass  # made by the command before it
        case ["tensorboard", "--logdir", folder]:
            assert (place / folder).is_dir()
            assert "scalars" in shell(sys.executable, "-m", "tensorboard.main", *words[1:], "--inspect")
        case ["python", "benchmarks/sweep.py", *options]:
            shell(sys.executable, str(ROOT / words[1]), *options, "--trials=1", "--steps=10", "--validations=1")
        case ["column", *_]:
            (place / words[-1]).write_text("a,b\n1,2\n")
            assert shell(*words).split() == ["a", "b", "1", "2"]
        case _:
            raise AssertionError(f"{command.place}: nothing runs {shlex.join(words)}")


def python_blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    return [block for language, block in BLOCK.findall(PAGES[page]) if language == "python"]


QUOTES = {"docs/guide.md"}  # compared with the source by test_guide.py
IN_PYTHON = [page for page in PAGES if python_blocks(page) and Path(page).name not in FOLLOWED and page not in QUOTES]


class Brief(L.Trainer):
    """A Trainer that stops after three meta-iterations and validates a little."""

    def __init__(self, **options: Any) -> None:
        brief = {"max_steps": 3, "limit_val_batches": 1, "accelerator": "cpu", "logger": False}
        quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
        super().__init__(**options | brief | quiet)


def given(page: str) -> dict[str, Any]:
    """What the blocks of a page assume."""
    if page == "docs/how_to/adapt.md":
        rng = np.random.default_rng(0)
        x = rng.integers(0, 256, (12, 1, 28, 28), dtype=np.uint8)
        return {"x": x, "y": np.arange(12) % 2, "queries": x[:3]}
    if page == "docs/coming_from.md":
        torch.manual_seed(0)
        batches = [tuple(torch.rand(4, 10, 1) for _ in range(4)) for _ in range(3)]
        ours = MLP(in_features=1, hidden=[8], out_features=1)
        theirs = MLP(in_features=1, hidden=[8], out_features=1)
        theirs.load_state_dict(ours.state_dict())
        tasks = [{"train": batch[:2], "test": batch[2:]} for batch in batches]
        loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        loss = torch.nn.functional.mse_loss
        return {"loader": loader, "ours": ours, "theirs": theirs, "loss": loss, "dataloader": tasks}
    return {}


@pytest.mark.parametrize("page", IN_PYTHON)
@pytest.mark.usefixtures("place", "glyphs")
def test_the_python_blocks_of_a_page(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "docs/coming_from.md":
        pytest.importorskip("learn2learn")
    monkeypatch.setattr(L, "Trainer", Brief)
    names = given(page)
    for block in python_blocks(page):
        exec(compile(block, page, "exec"), names)
    if page == "docs/coming_from.md":
        before = MLP(in_features=1, hidden=[8], out_features=1)
        for a, b, other in zip(*(n.parameters() for n in (names["ours"], names["theirs"], before)), strict=True):
            torch.testing.assert_close(a, b)
            assert not torch.allclose(a, other)


@pytest.mark.slow  # minutes
def test_the_readmes_lines_learn(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = python_blocks("README.md")
    exec(compile(block, "README.md", "exec"), {})
    accuracy = float(re.findall(r"tensor\((\S+)\)", capsys.readouterr().out)[-1])
    assert accuracy > 0.6  # of one task; chance is 0.2


def test_nothing_is_left_out() -> None:
    assert {Path(page).name for page in PAGES} >= FOLLOWED
    for page, text in PAGES.items():
        if re.search(r"[Ss]ave this as", text):
            assert Path(page).name in FOLLOWED, f"{page}: test_how_to.py must follow it"
    languages = set(re.findall(r"^```(\w+)$", "\n".join(PAGES.values()), re.MULTILINE))
    assert languages <= {"bash", "python", "text", "yaml"}
    assert len(ALL) > 50


def test_the_readme_is_short_and_has_the_two_commands() -> None:
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 160
    assert {"make demo", "make test"} <= {line.partition("#")[0].strip() for line in lines}
