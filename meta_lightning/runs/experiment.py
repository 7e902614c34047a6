"""The experiment that a checkpoint belongs to: its hyperparameters beside those of a configuration."""

import json
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from pydoc import locate
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from meta_lightning.checks import InputError
from meta_lightning.runs.checkpoint_file import LAST, PREVIOUS, load, read_checkpoint

# the options that tell experiments apart: checkpoints of other classes, networks or data are not this run's
IDENTITY = r"(model|data)\.class_path|model\.init_args\.(network|inner_rule|head_start)\.(?!.*\bcache_dir$)"
IDENTITY += r"|data\.init_args\.(root|path|target)$"
PATHS = (".root", ".path")  # ends of names of options

# classes of options that are described only if they are given
DEFAULTS = {"inner_rule": "SGD", "head_start": "LearntRows"}


def newest_checkpoint(config: Namespace, subcommand: str) -> str | None:
    """The newest last or previous checkpoint of this experiment under its log folder, for ``--ckpt_path last``.

    Raises:
        InputError: If there is none for a command that needs one, or ``checkpoint.dirpath`` holds only those of others.
    """
    root, logs, pattern = log_folders(config.trainer)
    folder = config.checkpoint.dirpath
    folders = [Path(folder)] if folder else [root / "checkpoints", *logs.glob(f"{pattern}/checkpoints")]
    found = [path for folder in folders for name in (LAST, PREVIOUS) for path in folder.glob(f"{name}*.ckpt")]
    others = []
    newest = {of.parent: max(path.stat().st_mtime for path in found if path.parent == of.parent) for of in found}
    # within a folder by name, since a copy may have other times
    for path in sorted(found, key=lambda path: (newest[path.parent], path.stem.startswith(LAST)), reverse=True):
        checkpoint = load(path)
        # a corrupt one is reported when it is read
        other = differences(checkpoint, config, IDENTITY) if isinstance(checkpoint, dict) else []
        if not other:
            return str(path)
        others.append(f"{path} of another experiment, with {' and '.join(other)} in use")
    came = f"got {others[0] if others else 'none'}"
    came = f"--ckpt_path last must find a checkpoint of this experiment in {folder or logs}, {came}"
    if folder and others:
        raise InputError(f"{came}; choose another checkpoint.dirpath")
    if subcommand != "fit":
        raise InputError(came)
    (rank_zero_warn if others else rank_zero_info)(f"{came}: starting anew")
    return None


def log_folders(trainer: Namespace) -> tuple[Path, Path, str]:
    """Root of the first logger's files, folder of its runs there, and the pattern of a run's, as of ``run_folder``."""
    logger = trainer.logger[0] if isinstance(trainer.logger, list) and trainer.logger else trainer.logger
    given = isinstance(logger, Namespace)
    kind, options = (locate(logger.class_path), logger.get("init_args", {})) if given else (None, {})
    subclass = partial(issubclass, kind if isinstance(kind, type) else object)
    root = Path(trainer.default_root_dir or "")
    if subclass(MLFlowLogger):  # an experiment's folder has its number
        uri = options.get("tracking_uri") or f"file:{options.get('save_dir')}"
        root = Path(uri.removeprefix("file:")) if uri.startswith("file:") else root
        return root, root, "[0-9]*/*"
    root = Path(options.get("save_dir") or options.get("dir") or root)
    if subclass(WandbLogger):
        return root, root / (options.get("project") or os.environ.get("WANDB_PROJECT", "lightning_logs")), "*"
    return root, root / (options.get("name", "lightning_logs") or ""), "*"


def differences(checkpoint: dict[str, Any], config: Namespace, of: str = "") -> list[str]:
    """The options of model and data that differ from a checkpoint's, those whose names match the pattern ``of``."""
    before, now = dict(leaves_of(described(checkpoint))), dict(leaves_of(config.as_dict()))
    names = [name for name in before if name in now and before[name] != now[name] and re.match(of, name)]
    return [f"{name.replace('.init_args', '')} {now[name]} instead of {before[name]}" for name in sorted(names)]


def leaves_of(options: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested options by their dotted names, in one form of several equal ones."""
    if isinstance(options, dict):
        for key, value in options.items():
            yield from leaves_of(value, f"{name}.{key}".strip("."))
    elif options is None and name.endswith(tuple(DEFAULTS)):
        yield from leaves_of({"class_path": DEFAULTS[name.rpartition(".")[2]]}, name)
    elif isinstance(options, str) and name.endswith(".class_path"):
        yield name, options.rpartition(".")[2]  # modules may move
    elif isinstance(options, str) and name.endswith(PATHS):
        yield name, str(Path(options).expanduser().resolve())
    else:
        yield name, list(options) if isinstance(options, tuple) else options


def described(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Class and options of a checkpoint's model and data, as in a configuration."""
    found = {}
    for option, key in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
        hparams: dict[str, Any] = dict(checkpoint.get(key, {}))
        hparams.pop("_instantiator", None)
        if class_path := hparams.pop("_class_path", None):
            found[option] = {"class_path": class_path, "init_args": hparams}
    return found


def with_hyperparameters(args: list[str], path: str) -> list[str]:
    """The arguments of a subcommand, with the model and data of a checkpoint before them."""
    if path in ("", "null", "best", "last", "hpc") or path.startswith("registry:") or args[0].startswith("-"):
        return args
    known = described(read_checkpoint(path, "--ckpt_path"))
    defaults = [f"--{option}={json.dumps(arguments)}" for option, arguments in known.items()]
    return [*args[:1], "--weights_only=true", *defaults, *args[1:]]
