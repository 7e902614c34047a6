"""Checkpoint files: read, held against a learner, and written whole."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from pkgutil import resolve_name
from typing import Any

import torch
from lightning import LightningModule
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.types import _PATH
from torch import Tensor, nn

from meta_lightning.checks import InputError, require

LAST, PREVIOUS = "last", "previous"

# what fit cannot go on without
STATE = ("loops", "callbacks", "optimizer_states", "lr_schedulers")


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and keeps the last but one, as ``previous.ckpt``.

    Lightning's own writes to the folder of temporary files, from where the checkpoint is copied if that is another file
    system, and does not wait for the disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Write beside the file, and take its place when everything is on the disk."""
        if not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        part = path.with_suffix(".part")
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
            part.unlink(missing_ok=True)
            said = f"{error.strerror}, while writing a checkpoint; those written before are whole"
            raise OSError(error.errno, said, str(path)) from None


def read_checkpoint(path: str | Path, argument: str, resume: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, its tensors mapped from the file."""
    path = Path(path)
    require(path.is_file(), f"{argument} must name a checkpoint, got {path}, which is no file")
    checkpoint = load(path)
    if isinstance(checkpoint, str):
        others = sorted(path.parent.glob("*.ckpt"), key=lambda other: (other.stem == PREVIOUS, other.stat().st_mtime))
        whole = next((other for other in reversed(others) if other != path and isinstance(load(other), dict)), None)
        offered = f"; the one before it that does is {whole}" if whole else ""
        raise InputError(f"{argument} must name a checkpoint, got {path}, which does not read: {checkpoint}{offered}")
    missing = [key for key in ("state_dict", *(STATE if resume else ())) if key not in checkpoint]
    version = checkpoint.get("pytorch-lightning_version", "of an unknown version")
    require(
        not missing,
        f"{argument} must name a checkpoint with {'all that training goes on from' if resume else 'parameters'}, got "
        f"{path} without {', '.join(missing)}, written by Lightning {version}",
    )
    return checkpoint


def load(path: Path) -> dict[str, Any] | str:
    """What a checkpoint holds, or why it does not read."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return checkpoint if isinstance(checkpoint, dict) else f"it holds a {type(checkpoint).__name__}"


def load_network(network: nn.Module, path: str | Path) -> None:
    """Give a network the weights of a checkpoint's network, whatever algorithm learnt them."""
    state = read_checkpoint(path, "init_from")["state_dict"]
    weights = {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}
    differing = differences(network.state_dict(), weights)
    require(not differing, f"init_from must be of the network in use, they differ in {first_few(differing)}")
    network.load_state_dict(weights)


def differences(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> list[str]:
    """Where two states differ in names and shapes: the names, each with what was expected and what came."""
    a, b = ({name: tuple(value.shape) for name, value in state.items()} for state in (expected, got))
    return [f"{name}: expected {a.get(name)}, got {b.get(name)}" for name in sorted(dict(a.items() ^ b.items()))]


def first_few(differences: list[str]) -> str:
    """Three of them, and how many more there are."""
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return ", ".join(differences[:3]) + more


def network_description(hparams: Mapping[str, Any]) -> dict[str, Any] | None:
    """The network in plain words, as a configuration gave it; of one made in Python the hyperparameters have none."""
    description = hparams.get("network")
    return dict(description) if isinstance(description, Mapping) else None


def verify_checkpoint(checkpoint: Mapping[str, Any], algorithm: str, state: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of another algorithm or network."""
    came = checkpoint.get("algorithm", "unknown origin")
    require(came == algorithm, f"the checkpoint must be of {algorithm}, the algorithm in use, got one of {came}")
    differing = differences(state, checkpoint["state_dict"])
    other_rule = bool(differing) and all(name.startswith("inner_rule.") for name in differing)
    require(not other_rule, f"the checkpoint must be of the inner_rule in use, they differ in {first_few(differing)}")
    require(not differing, f"the checkpoint must be of the network in use, they differ in {first_few(differing)}")


def renamed(state: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """A state with prefixes of its names replaced."""
    now = {}
    for name, value in state.items():
        was = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        now[prefixes.get(was, "") + name.removeprefix(was)] = value
    return now


def restore(path: str | Path, **objects: Any) -> Any:
    """The learner of a checkpoint, on the CPU and in evaluation mode."""
    checkpoint = read_checkpoint(path, "path")
    hparams = checkpoint.get("hyper_parameters", {})
    given = {name: value for name, value in objects.items() if value is not None}
    require(
        "network" in given or network_description(hparams) is not None,
        f"network must be given: {path} does not describe the one that was trained, which came from Python",
    )
    class_path = hparams.get("_class_path", f"meta_lightning.{checkpoint.get('algorithm')}")
    try:
        found = resolve_name(class_path)
    except (ImportError, AttributeError, ValueError):
        found = None
    require(
        isinstance(found, type) and issubclass(found, LightningModule) and hasattr(found, "adapt"),
        f"path must name a checkpoint of a learner whose class can be imported, got one of {class_path} in {path}",
    )
    return found.load_from_checkpoint(path, map_location="cpu", weights_only=True, **given).eval()
