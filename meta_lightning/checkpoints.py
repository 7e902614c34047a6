"""Which checkpoints are kept, when, and which are refused."""

import shutil
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from meta_lightning.checks import InputError, require, require_at_least
from meta_lightning.resuming import (
    PREVIOUS,
    WholeFiles,
    log_folders,
    random_states,
    restart_epoch,
    set_random_states,
    settle_progress,
)

# what fit cannot go on without
STATE = ("loops", "callbacks", "optimizer_states", "lr_schedulers")


class Checkpoints(ModelCheckpoint):
    """Keeps the best checkpoint of the validations, and the last one, from which training goes on exactly.

    The last one is saved between two meta-iterations: regularly, after an epoch, at the end, and when SIGTERM or SIGINT
    (Ctrl-C; a second one does not wait) ask training to stop. It holds the random states of all processes.

    Args:
        dirpath: Folder of the checkpoints. Default: ``checkpoints`` in the logger's folder.
        filename: Name of the best one.
        monitor: The value that decides which is best.
        mode: Whether the best is the greatest or the least.
        save_top_k: How many of the best to keep; -1 for every one, 0 for none.
        save_last: Whether to keep the last one, as ``last.ckpt``, and the one before it, as ``previous.ckpt``.
        every_n_steps: Save the last one every so many meta-iterations; 0 for after epochs only.

    Raises:
        InputError: If an argument is outside its range.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str | None = "best",
        monitor: str | None = "val/accuracy",
        mode: Literal["min", "max"] = "max",
        save_top_k: int = 1,
        save_last: bool = True,
        every_n_steps: int = 500,
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
        require_at_least(0, every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self.signal: int | None = None  # what came
        self.stop = False  # what the processes agreed on, at the end of a meta-iteration
        self.random_states: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let checkpoints be written whole or not at all."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles()

    # ------------------------------------------------------------------------------------------------ when to save

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse to monitor what validation does not give, before training rather than an epoch later."""
        values = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        require(
            self.monitor in values or not str(self.monitor).startswith("val/"),
            f"checkpoint.monitor must be a value of the validation, one of {', '.join(values)}, got {self.monitor}; "
            "for regression give --checkpoint.monitor val/mse --checkpoint.mode min",
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw on as the run did that is resumed, and let signals stop training between two meta-iterations."""
        super().on_train_start(trainer, pl_module)
        restart_epoch(trainer.fit_loop.epoch_loop)
        if self.random_states is not None:
            set_random_states(self.random_states, pl_module.device)
            self.random_states = None
        self.signal, self.stop = None, False
        if threading.current_thread() is threading.main_thread():  # which alone may; Lightning puts back what was
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: Any) -> None:
        """Stop after this meta-iteration; a second Ctrl-C stops at once."""
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the random states if a checkpoint is due: the next batch is augmented before it can be saved."""
        self.stop = trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)
        if self.stop or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            self.random_states = random_states(pl_module.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save what is due of the meta-iteration before, whose values stand in the logs by now; stop if asked to."""
        if self.random_states is not None:
            self.keep_last(trainer)
            self.random_states = None
        if self.stop:
            raise SIGTERMException(128 + (self.signal or signal.SIGTERM))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the best and, where validation does not end an epoch, the last."""
        if self.random_states is not None:
            self.random_states = random_states(pl_module.device)
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self.keep_last(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the best and the last, whether or not it is the best."""
        super().on_train_epoch_end(trainer, pl_module)
        self.keep_last(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep where training ended; ModelCheckpoint does so even in a ``fast_dev_run``."""
        self.keep_last(trainer)

    def keep_last(self, trainer: L.Trainer) -> None:
        """Save ``last.ckpt`` unless it is of this step already: ModelCheckpoint does so after a best one only."""
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say where to go on; an error leaves the last good checkpoint as it is, and of a refusal no empty logs."""
        if isinstance(exception, SIGTERMException) and self.last_model_path:
            rank_zero_info(
                f"Interrupted after {trainer.global_step} meta-iterations; go on with --ckpt_path "
                f"{self.last_model_path}"
            )
        if isinstance(exception, InputError) and trainer.is_global_zero:
            for folder in (Path(logger.log_dir) for logger in trainer.loggers if logger.log_dir):
                remove_empty_logs(folder)

    # ------------------------------------------------------------------------------------------------ what is saved

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random states of all processes and the folders of the logs, and settle Lightning's progress."""
        states = [self.random_states or random_states(pl_module.device)]
        if trainer.world_size > 1:
            states *= trainer.world_size
            torch.distributed.all_gather_object(states, states[0])
        checkpoint["random_states"] = states
        checkpoint["log_folders"] = log_folders(trainer.loggers, str(self.dirpath)) if trainer.is_global_zero else []
        if trainer.state.fn == TrainerFn.FITTING:
            settle_progress(checkpoint["loops"]["fit_loop"], trainer.num_training_batches)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take this process' random states, which ``on_train_start`` sets."""
        states = checkpoint.get("random_states", [])
        if trainer.state.fn == TrainerFn.FITTING and trainer.global_rank < len(states):
            self.random_states = states[trainer.global_rank]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best scores so far, of checkpoints that are still there; they may have moved with the run."""

        def found(path: str) -> str:
            here = Path(str(self.dirpath), Path(path).name)
            return str(here) if here.is_file() else path if Path(path).is_file() else ""

        best = {found(path): score for path, score in state_dict["best_k_models"].items() if found(path)}
        paths = {key: found(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        super().load_state_dict(state_dict | paths | {"dirpath": self.dirpath, "best_k_models": best})


def remove_empty_logs(folder: Path) -> None:
    """Remove a log folder that holds no more than a run writes before it begins."""
    names = [path.name for path in folder.glob("*")]
    events = [name for name in names if name.startswith("events.out.tfevents.")]
    if len(events) <= 1 and {*names} <= {"config.yaml", "hparams.yaml", *events}:
        shutil.rmtree(folder, ignore_errors=True)


def read_checkpoint(path: str | Path, argument: str, resume: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, its tensors mapped from the file.

    Args:
        path: The file.
        argument: What the user gave the path as, for the message.
        resume: Whether training is to go on from it.

    Raises:
        InputError: If there is no such file, or it is no whole checkpoint; the message names the one before it that is.
    """
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
