"""Read checkpoint files, compare them with a learner, and write them atomically."""

import io
import os
from collections.abc import Mapping
from contextlib import suppress
from inspect import signature
from pathlib import Path
from pickle import UnpicklingError
from pkgutil import resolve_name
from typing import Any
from zipfile import is_zipfile

import torch
from lightning import LightningModule
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from meta_lightning.checks import InputError, require
from meta_lightning.hub import located
from meta_lightning.inner.heads import HeadStart
from meta_lightning.inner.params import without_prefix
from meta_lightning.networks.backbone import without_weights

LAST, PREVIOUS = "last", "previous"
HPARAMS = ("hyper_parameters", "datamodule_hyper_parameters")
STATE = ("loops", "callbacks", "optimizer_states", "lr_schedulers")  # required to resume training


class WholeFiles(TorchCheckpointIO):
    """Writes local checkpoints atomically and syncs them, unlike Lightning's own; keeps the replaced ``last.ckpt``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write to a file in the same folder, and rename it once it is on disk."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        part = path.with_suffix(f".{os.getpid()}.part")
        contents = io.BytesIO()
        torch.save(checkpoint, contents)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(contents.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            if path.stem == LAST and path.exists():
                path.replace(path.with_stem(PREVIOUS))
            part.replace(path)
        except OSError as error:
            message = f"{error.strerror}, while writing a checkpoint; earlier checkpoints are intact"
            raise OSError(error.errno, message, str(path)) from None
        finally:
            part.unlink(missing_ok=True)  # also if Ctrl-C interrupts the write


def read_checkpoint(path: str | Path, argument: str, resume: bool = False) -> dict[str, Any]:
    """Contents of a checkpoint, a path or ``hub:NAME``, with tensors memory-mapped from the file."""
    named, path = path, located(path, argument)
    require(path.is_file(), f"{argument} must name a checkpoint, got {path}, which is not a file")
    checkpoint = load(path)
    if isinstance(checkpoint, str):
        others = sorted(path.parent.glob("*.ckpt"), key=lambda other: (other.stem == PREVIOUS, other.stat().st_mtime))
        intact = next((other for other in reversed(others) if other != path and isinstance(load(other), dict)), None)
        hint = f"; the last intact one is {intact}" if intact else ""
        raise InputError(f"{argument} must name a checkpoint, got {path}, which is corrupt: {checkpoint}{hint}")
    missing = [key for key in ("state_dict", *(STATE if resume else ())) if key not in checkpoint]
    content = "the state of training" if resume else "parameters"
    version = checkpoint.get("pytorch-lightning_version", "of unknown version")
    message = f"{argument} must name a checkpoint with {content}, got {named} without {', '.join(missing)}, written by"
    hint = f"; to start from its weights, use --model.init_from {named}" if "state_dict" not in missing else ""
    require(not missing, f"{message} Lightning {version}{hint}")
    return checkpoint


def load(path: Path) -> dict[str, Any] | str:
    """Contents of a checkpoint, or the reason why it cannot be read."""
    if not is_zipfile(path):  # whose errors are about torch.save
        return "it is no whole file of torch.save"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    if not isinstance(checkpoint, dict):
        return f"it holds a {type(checkpoint).__name__}"
    return checkpoint | {key: of_this_version(checkpoint[key]) for key in HPARAMS if key in checkpoint}


def of_this_version(value: Any) -> Any:
    """Descriptions of objects without what their classes do not take here, but do in a later version, if it is off."""
    if isinstance(value, list):
        return [*map(of_this_version, value)]
    if not isinstance(value, dict):
        return value
    value = {name: of_this_version(part) for name, part in value.items()}
    if is_description(value) and isinstance(value.get("init_args"), dict):
        with suppress(ImportError, AttributeError, ValueError, TypeError):  # of what is no class that can be imported
            taken = signature(resolve_name(value["class_path"])).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
                value["init_args"] = {n: part for n, part in value["init_args"].items() if n in taken or part}
    return value


def is_description(value: Any) -> bool:
    """Whether a hyperparameter describes an object by its class."""
    return isinstance(value, dict) and isinstance(value.get("class_path"), str)


def load_network(network: nn.Module, head: HeadStart, path: str | Path) -> None:
    """Load the weights of a network, and of a head start of the same kind, from a checkpoint of any algorithm."""
    checkpoint = read_checkpoint(path, "init_from")
    weights, start = (without_prefix(checkpoint["state_dict"], part) for part in ("network.", "head_start."))
    computed = head.replaced(network.named_parameters()).keys()  # rows that no task uses may differ
    weights, own = ({n: p for n, p in state.items() if n not in computed} for state in (weights, network.state_dict()))
    require_same_state(own, weights, "init_from")
    network.load_state_dict(weights, strict=False)
    if start.keys() == head.state_dict().keys():
        head.load_state_dict(start)
    if start and not head.computed:
        rank_zero_warn(
            f"The head of init_from {path} was computed for each task: its rows in the network are untrained"
        )


def require_same_state(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], argument: str) -> None:
    """Refuse a state dict whose names or shapes differ from the expected ones."""
    a, b = ({name: tuple(value.shape) for name, value in state.items()} for state in (expected, got))
    names = sorted(dict(a.items() ^ b.items()))
    # the learner's submodule that all of them belong to
    (part,) = parts if len(parts := {name.partition(".")[0] for name in names}) == 1 else ("network",)
    part = part if part in ("inner_rule", "head_start", "loss") else "network"
    listed = ", ".join(f"{name}: expected {a.get(name)}, got {b.get(name)}" for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    require(not names, f"{argument} must be of the {part} in use, but differs in {listed}{more}")


def network_description(hparams: Mapping[str, Any]) -> dict[str, Any] | None:
    """Class path and arguments of the network, or None if it was built in Python."""
    description = hparams.get("network")
    return dict(description) if isinstance(description, Mapping) else None


def verify_checkpoint(checkpoint: Mapping[str, Any], algorithm: str, state: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of another algorithm or network."""
    other = checkpoint.get("algorithm", "unknown origin")
    require(other == algorithm, f"the checkpoint must be of {algorithm}, the algorithm in use, got one of {other}")
    require_same_state(state, checkpoint["state_dict"], "the checkpoint")


def renamed(state: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """The state dict with prefixes of its names replaced."""
    for former, now in prefixes.items():
        state = {now + n.removeprefix(former) if n.startswith(former) else n: value for n, value in state.items()}
    return dict(state)


def restore(path: str | Path, argument: str = "path", **objects: Any) -> Any:
    """Load the learner of a checkpoint, on the CPU and in evaluation mode."""
    checkpoint = read_checkpoint(path, argument)
    hparams = checkpoint.get("hyper_parameters", {})
    given = {name: value for name, value in objects.items() if value is not None}
    known = "network" in given or network_description(hparams) is not None
    given_to = "network must be given, load_learner(path, network)"
    require(known, f"{given_to}: it was built in Python, and {path} does not describe it")
    class_path = hparams.get("_class_path", f"meta_lightning.{checkpoint.get('algorithm')}")
    try:
        found = resolve_name(class_path)
        importable = issubclass(found, LightningModule) and hasattr(found, "adapt")
    except (ImportError, AttributeError, ValueError, TypeError):  # TypeError: not a class
        importable = False
    expected = f"{argument} must name a checkpoint of a learner whose class can be imported"
    require(importable, f"{expected}, got one of {class_path} in {path}")
    given = {name: value for name, value in hparams.items() if is_description(value)} | given
    with without_weights():
        return found.load_from_checkpoint(located(path), map_location="cpu", weights_only=True, **given).eval()
