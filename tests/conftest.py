"""What the tests share."""

import logging
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor

from meta_lightning import MLP, Glyphs, Sinusoid
from meta_lightning.cli import main
from meta_lightning.data.tasks import has_learn2learn

TINY = str(Path(__file__).parent / "tiny.yaml")
RUN = Path("lightning_logs/version_0")
SHARED = Path(__file__).parents[2] / "shared"


def pytest_report_header() -> str:
    """What supplies the tasks."""
    return f"tasks by learn2learn {version('learn2learn')}" if has_learn2learn() else "tasks without learn2learn"


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own, so that they neither use nor leave anything in the user's."""
    base = tmp_path_factory.getbasetemp()
    # all processes of pytest-xdist share it
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    home.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def glyphs(cache_home: Path) -> Glyphs:
    """The embedded data set, drawn once."""
    data = Glyphs()
    data.prepare_data()
    return data


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test in a folder of its own, without Lightning's greetings."""
    monkeypatch.chdir(tmp_path)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@pytest.fixture
def double() -> Iterator[None]:
    """Float64 by default, on one thread."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.double)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small: on a busy machine threads mostly wait for each other
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float)


@pytest.fixture
def sinusoid() -> Sinusoid:
    """A few quick regression tasks."""
    return Sinusoid(shots=5, queries=5, test_queries=10, meta_batch_size=4, epoch_length=10, val_tasks=8, test_tasks=10)


@pytest.fixture
def mlp() -> MLP:
    """A small regression network."""
    return MLP(hidden=[8])


def trainer(**options: Any) -> L.Trainer:
    """A Trainer that keeps still and leaves nothing behind unless told otherwise."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return L.Trainer(**defaults | options)


@pytest.fixture(scope="session")
def checkpoint(glyphs: Glyphs, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of the command line, barely trained, on normalised glyphs."""
    folder = tmp_path_factory.mktemp("checkpoint")
    options = f"--trainer.default_root_dir {folder} --checkpoint.dirpath {folder} --trainer.max_steps 1"
    main(f"fit --config {TINY} {options} --data.transforms.mean [0.2] --data.transforms.std [0.5]".split())
    return str(folder / "last.ckpt")


def fails(*args: str) -> str:
    """The sentence with which a command line is refused."""
    with pytest.raises(SystemExit) as error:
        main(list(args))
    said = str(error.value.code)
    assert said.startswith("error: ")
    assert "\n" not in said
    return said


def printed_config(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """What --print_config prints."""
    with pytest.raises(SystemExit):
        main([*args, "--print_config"])
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


class Seen(L.Callback):
    """Notes the support set of every training batch."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0])
