"""Strip a checkpoint to what adapting, testing and warm starts need, and put it into the package as hub:NAME.

    python benchmarks/release.py runs/maml/checkpoints/last.ckpt maml

It writes meta_lightning/hub/NAME.ckpt and, if there is none yet, meta_lightning/hub/NAME.md, a model card to fill in.
Parameters, hyperparameters and the form of the samples stay as they are, so that answers are the same to the bit. The
state of training goes, as do paths of this machine.
"""

import argparse
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from meta_lightning import hub
from meta_lightning.checks import require
from meta_lightning.files import require_writable, written_whole
from meta_lightning.runs.checkpoint_file import read_checkpoint, restore
from meta_lightning.runs.experiment import described, leaves_of

MOST = 1_000_000  # bytes
KEPT = ("algorithm", "form", "epoch", "global_step", "pytorch-lightning_version")
KEPT += ("hparams_name", "hyper_parameters", "datamodule_hparams_name", "datamodule_hyper_parameters")
OF_MACHINE = ("root", "cache_dir")  # options of data modules
CARD = """\
# {algorithm}: TODO, what it is for in one line

## Data
TODO

## Licence
TODO

## Settings
{settings}

## Accuracy
TODO: % ± half-width of the 95 % interval, number of tasks

## Intended use and limits
TODO

## Command
TODO
"""


def stripped(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What is released of a checkpoint."""
    released = {key: checkpoint[key] for key in KEPT if key in checkpoint}
    # clones, since a view would be saved with all of its storage
    released["state_dict"] = {name: value.clone() for name, value in checkpoint["state_dict"].items()}
    if "datamodule_hyper_parameters" in released:
        released["datamodule_hyper_parameters"] = portable(released["datamodule_hyper_parameters"])
    for name, value in leaves_of(described(released)):
        for part in value if isinstance(value, list) else [value]:
            own = isinstance(part, str) and (part.startswith("~") or Path(part).is_absolute())
            require(not own, f"{name.replace('.init_args', '')} must not be a path of this machine, got {part}")
    return released


def portable(options: Any) -> Any:
    """Options of a data module without paths of this machine, at any depth."""
    if isinstance(options, Mapping):
        return {name: portable(value) for name, value in options.items() if name not in OF_MACHINE}
    return [portable(value) for value in options] if isinstance(options, list) else options


def settings(released: Mapping[str, Any]) -> str:
    """The options of model and data that are set, as in a configuration."""

    def those_set(options: Any) -> Any:
        if not isinstance(options, Mapping):
            return options
        parts = {name: those_set(value) for name, value in options.items()}
        return {name: value for name, value in parts.items() if value is not None and value != [] and value != {}}

    options = yaml.safe_dump(those_set(described(released)), sort_keys=False)
    return f"After {released['global_step']} meta-iterations of\n\n```yaml\n{options}```"


def release(checkpoint: str | Path, name: str, overwrite: bool = False) -> Path:
    """Write the released checkpoint and, if there is none, its card; return the checkpoint's path."""
    require(name.isidentifier(), f"name must be a word, got {name!r}")
    path = hub.FOLDER / f"{name}.ckpt"
    require_writable(path, overwrite, "name")
    released, contents = stripped(read_checkpoint(checkpoint, "checkpoint")), io.BytesIO()
    torch.save(released, contents)
    size = contents.tell()
    require(size < MOST, f"checkpoint must have less than {MOST} bytes without the state of training, got {size}")
    with written_whole(path) as part:
        part.write_bytes(contents.getvalue())
        restore(part)  # refuses one whose network it does not describe
    card = path.with_suffix(".md")
    if not card.exists():
        card.write_text(CARD.format(algorithm=released["algorithm"], settings=settings(released)), encoding="utf-8")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of training by the command line, which describes its network")
    parser.add_argument("name", help="it is then hub:NAME")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint of this name")
    path = release(**vars(parser.parse_args()))
    print(f"{path}: {path.stat().st_size} bytes; its card: {path.with_suffix('.md')}")
