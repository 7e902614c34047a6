"""What the tests share."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from meta_lightning import MLP, Glyphs, Sinusoid
from meta_lightning.cli import main

TINY = Path(__file__).parent / "tiny.yaml"
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own, so that they neither use nor leave anything in the user's."""
    home = tmp_path_factory.mktemp("cache")
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
