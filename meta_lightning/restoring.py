"""A learner from its checkpoint alone."""

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from torch import nn

from meta_lightning.algorithms import MetaLearner
from meta_lightning.checkpoints import network_description, read_checkpoint
from meta_lightning.checks import InputError, require
from meta_lightning.losses import Loss
from meta_lightning.train import ALGORITHMS


def load_learner(path: str | Path, network: nn.Module | None = None, loss: Loss | None = None) -> MetaLearner:
    """The learner of a checkpoint, whichever algorithm's it is, on the CPU and in evaluation mode.

    Args:
        path: The checkpoint.
        network: A network like the one that was trained, which takes its parameters. A checkpoint of the command line
            describes the network; one made in Python does not, and needs this.
        loss: The loss, where one was given in Python, of which a checkpoint knows nothing either.

    Raises:
        InputError: If it is no checkpoint of a learner, or ``network`` is missing or another.
    """
    checkpoint = read_checkpoint(path, "path")
    hparams = checkpoint.get("hyper_parameters", {})
    require(
        network is not None or network_description(hparams) is not None,
        f"network must be given: {path} does not describe the one that was trained, which came from Python",
    )
    given: dict[str, Any] = {"network": network, "loss": loss}
    options = {name: value for name, value in given.items() if value is not None}
    learner: MetaLearner = learner_class(checkpoint, path).load_from_checkpoint(
        path, map_location="cpu", weights_only=True, **options
    )
    return learner.eval()


def learner_class(checkpoint: dict[str, Any], path: str | Path) -> type[MetaLearner]:
    """The class of the learner that left a checkpoint.

    Raises:
        InputError: If it is none that can be found.
    """
    class_path = checkpoint.get("hyper_parameters", {}).get("_class_path")
    algorithm = str(checkpoint.get("algorithm"))
    try:
        found = resolve_name(class_path) if class_path else ALGORITHMS[algorithm.lower()]
    except (ImportError, AttributeError, KeyError):
        raise InputError(
            f"path must name a checkpoint of {', '.join(c.__name__ for c in ALGORITHMS.values())} or of a class that "
            f"can be imported, got one of {class_path or algorithm} in {path}"
        ) from None
    require(
        isinstance(found, type) and issubclass(found, MetaLearner),
        f"path must name a checkpoint of a learner, got one of {class_path} in {path}",
    )
    learner: type[MetaLearner] = found
    return learner
