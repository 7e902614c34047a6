"""Which checkpoints are kept, and which are refused."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from meta_lightning.checks import InputError, require


class Checkpoints(ModelCheckpoint):
    """Keeps the best checkpoint of the validations, and the last one: also when training is interrupted.

    Args:
        dirpath: Folder of the checkpoints. Default: ``checkpoints`` in the logger's folder.
        filename: Name of the best one.
        monitor: The value that decides which is best.
        mode: Whether the best is the greatest or the least.
        save_top_k: How many of the best to keep; -1 for every one, 0 for none.
        save_last: Whether to keep the last one, as ``last.ckpt``.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str | None = "best",
        monitor: str | None = "val/accuracy",
        mode: Literal["min", "max"] = "max",
        save_top_k: int = 1,
        save_last: bool = True,
    ) -> None:
        super().__init__(
            dirpath,
            filename,
            monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=save_last,
            enable_version_counter=save_top_k not in (0, 1),
        )

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse to monitor what validation does not give, before training rather than an epoch later."""
        values = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        require(
            self.monitor in values or not str(self.monitor).startswith("val/"),
            f"checkpoint.monitor must be a value of the validation, one of {', '.join(values)}, got {self.monitor}; "
            "for regression give --checkpoint.monitor val/mse --checkpoint.mode min",
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the best and, where validation does not end an epoch, the last."""
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self.keep_last(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the best and the last, whether or not it is the best."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self.keep_last(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep where training ended."""
        super().on_train_end(trainer, pl_module)
        self.keep_last(trainer)

    def keep_last(self, trainer: L.Trainer) -> None:
        """Save ``last.ckpt`` unless it is of this step already: ModelCheckpoint does so after a best one only."""
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the last checkpoint when training is interrupted; an error leaves the last good one as it is."""
        interrupted = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        if interrupted and trainer.state.fn == TrainerFn.FITTING and self.save_last and self.dirpath:
            path = Path(self.dirpath, self.CHECKPOINT_NAME_LAST + self.FILE_EXTENSION)
            trainer.save_checkpoint(path)
            rank_zero_info(f"Interrupted after {trainer.global_step} meta-iterations; go on with --ckpt_path {path}")


def read_checkpoint(path: str | Path, argument: str) -> dict[str, Any]:
    """What a checkpoint holds, its tensors mapped from the file.

    Args:
        path: The file.
        argument: What the user gave the path as, for the message.

    Raises:
        InputError: If there is no such file, or it is no checkpoint.
    """
    require(Path(path).is_file(), f"{argument} must name a checkpoint, got {path}, which is no file")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
        raise InputError(f"{argument} must name a checkpoint, got {path}, which does not read: {error}") from None
    return checkpoint


def load_network(network: nn.Module, path: str | Path) -> None:
    """Give a network the weights of a checkpoint's network, whatever algorithm learnt them.

    Raises:
        InputError: If there is no such checkpoint, or its network is another; saying where they differ.
    """
    state = read_checkpoint(path, "init_from").get("state_dict", {})
    prefix = "network."
    weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    differing = differences(network.state_dict(), weights)
    require(not differing, f"init_from must be of the network in use, they differ in {first_few(differing)}")
    network.load_state_dict(weights)


def differences(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> list[str]:
    """Where two states differ in names and shapes: the names, each with what was expected and what came."""
    a, b = ({name: tuple(value.shape) for name, value in state.items()} for state in (expected, got))
    return [
        f"{name}: expected {a.get(name)}, got {b.get(name)}" for name in sorted(a | b) if a.get(name) != b.get(name)
    ]


def first_few(differences: list[str]) -> str:
    """Three of them, and how many more there are."""
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return ", ".join(differences[:3]) + more


def network_description(hparams: Mapping[str, Any]) -> dict[str, Any] | None:
    """The network in plain words, as a configuration gave it; of one made in Python the hyperparameters have none."""
    description = hparams.get("network")
    return dict(description) if isinstance(description, Mapping) else None


def verify_checkpoint(checkpoint: Mapping[str, Any], algorithm: str, state: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of another algorithm or network.

    Args:
        checkpoint: The checkpoint.
        algorithm: Name of the algorithm in use.
        state: State of the learner in use.

    Raises:
        InputError: Saying which of the two, what was expected and what came.
    """
    came = checkpoint.get("algorithm", "unknown origin")
    require(came == algorithm, f"the checkpoint must be of {algorithm}, the algorithm in use, got one of {came}")
    differing = differences(state, checkpoint["state_dict"])
    for prefix, argument in (("moments.", "inner_optimizer"), ("inner_rates.", "learn_inner_lr")):
        other = bool(differing) and all(name.startswith(prefix) for name in differing)
        require(not other, f"the checkpoint must be of the {argument} in use, got one of another")
    require(not differing, f"the checkpoint must be of the network in use, they differ in {first_few(differing)}")
