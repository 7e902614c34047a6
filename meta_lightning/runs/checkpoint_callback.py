"""The checkpoint callback: best and last checkpoints, and exact resume."""

import os
from pathlib import Path
from typing import Any, Literal
from weakref import proxy

import lightning as L
import torch
from filelock import BaseFileLock
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from meta_lightning.checks import InputError, require, require_at_least
from meta_lightning.random_states import random_states, set_random_states
from meta_lightning.runs.checkpoint_file import LAST, WholeFiles
from meta_lightning.runs.folders import lock, release, remove_empty, remove_refused
from meta_lightning.runs.resume import settle_progress
from meta_lightning.runs.signals import Signals


class Checkpoints(ModelCheckpoint):
    """Saves the best checkpoints by a monitored value, and the last one, from which training resumes exactly.

    The last checkpoint is saved between two meta-iterations: every ``every_n_steps``, after each validation and epoch,
    at the end of training, and on SIGTERM or SIGINT (Ctrl-C), which stop training; a second Ctrl-C stops at once. It
    holds the random states of all processes.

    Args:
        dirpath: Folder of the checkpoints. Default: ``checkpoints`` in the logger's folder.
        filename: File name of the best checkpoint.
        monitor: Name of the logged value that ranks checkpoints.
        mode: Whether the smallest or the largest value is the best.
        save_top_k: Number of best checkpoints to keep; -1 keeps all, 0 none.
        save_last: Whether to keep the last checkpoint as ``last.ckpt`` and the one before it as ``previous.ckpt``.
        every_n_steps: Save the last checkpoint every n meta-iterations; 0 saves it after validations and epochs only.

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
        # without save_last: ModelCheckpoint saves the last checkpoint only together with a best one
        several = save_top_k not in (0, 1)
        super().__init__(dirpath, filename, monitor, mode=mode, save_top_k=save_top_k, enable_version_counter=several)
        require_at_least(0, every_n_steps=every_n_steps)
        self.keeps_last, self.every_n_steps = save_last, every_n_steps
        self.saved_step = 0  # of the last checkpoint
        self.random_states: dict[str, Any] | None = None  # to save, or to restore at the start of training
        self.lock: BaseFileLock | None = None  # of ``dirpath``, while training
        self.signals: Signals | None = None  # while training

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make checkpoint writes atomic, and lock ``dirpath`` against other runs."""
        super().setup(trainer, pl_module, stage)
        trial = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by setattr
        saves = stage == "fit" and not trial and (self.keeps_last or self.save_top_k != 0)
        refusal = None
        if saves and trainer.is_global_zero and self.lock is None and "://" not in str(self.dirpath):
            try:
                self.lock = lock(Path(str(self.dirpath)))
            except InputError as error:
                refusal = str(error)
        if refusal := trainer.strategy.broadcast(refusal):  # of all processes, which would wait for the first
            raise InputError(refusal)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles()

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse an unknown validation metric before training rather than an epoch later."""
        values = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        known = self.monitor in values or not str(self.monitor).startswith("val/")
        lower = "val/mse" if "val/mse" in values else "val/loss"
        hint = f"without classes use --checkpoint.monitor {lower} --checkpoint.mode min"
        require(known, f"checkpoint.monitor must be one of {', '.join(values)}, got {self.monitor}; {hint}")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the random states of a resumed run, and listen to signals."""
        super().on_train_start(trainer, pl_module)
        epoch_loop = trainer.fit_loop.epoch_loop
        if epoch_loop.batch_progress.current.ready == 0:
            epoch_loop.restarting = False  # Lightning would look for a validation to skip
        if self.random_states is not None:
            set_random_states(self.random_states, pl_module.device)
            self.random_states = None
        self.saved_step = 0
        former = self.last_model_path or self.best_model_path
        new = trainer.global_step > 0 or not former
        require(new, f"callbacks must hold new Checkpoints for a new training, got one that has saved {former}")
        self.signals = Signals(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Note the random states if a save is due: augmentation of the next batch precedes the save."""
        assert self.signals is not None
        if self.signals.ask(trainer) or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            self.random_states = random_states(pl_module.device)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the best checkpoint; the last one is due before the next meta-iteration or at the end of the epoch."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.random_states = random_states(pl_module.device)
        super().on_validation_end(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Save a checkpoint that is due, now that the previous meta-iteration is logged; stop on a signal."""
        if self.random_states is not None:
            self.keep_last(trainer)
            self.random_states = None
        if self.signals is not None and self.signals.stop:
            raise SIGTERMException(self.signals.status)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the best and the last checkpoint."""
        self.random_states = None  # hooks at the end of the epoch may have drawn more
        super().on_train_epoch_end(trainer, pl_module)
        self.keep_last(trainer)

    def keep_last(self, trainer: L.Trainer) -> None:
        """Save ``last.ckpt``, once per step and not in a ``fast_dev_run``."""
        trial = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by setattr
        if trial or not self.keeps_last or self.saved_step == trainer.global_step:
            return
        self.last_model_path = self.format_checkpoint_name({}, LAST)
        trainer.save_checkpoint(self.last_model_path, weights_only=False)
        self.saved_step = trainer.global_step
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(proxy(self))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the votes, and say that there is no best checkpoint if training ended before its first validation."""
        super().on_train_end(trainer, pl_module)
        if self.signals is not None:
            self.signals.end()
            self.signals = None
        loaders = sum(map(bool, trainer.num_val_batches))
        validates = loaders > 0 and self.save_top_k != 0 and str(self.monitor).startswith("val/")
        if validates and self.monitor not in trainer.callback_metrics and not self.best_model_path:
            kept = f"; {self.last_model_path} has the last parameters" if self.last_model_path else ""
            steps = f"{trainer.global_step} meta-iterations, before the first validation"
            rank_zero_warn(f"There is no {self.filename} checkpoint: training ended after {steps}{kept}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Release the lock."""
        super().teardown(trainer, pl_module, stage)
        release(self.lock)
        self.lock = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say how to resume after a signal, and remove the empty logs of a run that was refused."""
        release(self.lock)
        self.lock = None
        if isinstance(exception, SIGTERMException) and self.last_model_path:
            message = f"Interrupted after {trainer.global_step} meta-iterations; resume with --ckpt_path"
            rank_zero_info(f"{message} {self.last_model_path}")
        for folder in (Path(logger.log_dir) for logger in trainer.loggers if logger.log_dir and trainer.is_global_zero):
            if isinstance(exception, InputError):
                remove_refused(folder)
            remove_empty(folder)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random states of all processes and the log folders, and settle Lightning's progress."""
        states = [self.random_states or random_states(pl_module.device)]
        if trainer.world_size > 1:
            states *= trainer.world_size
            torch.distributed.all_gather_object(states, states[0])
        checkpoint["random_states"] = states
        folders = [logger.log_dir for logger in trainer.loggers] if trainer.is_global_zero else []
        checkpoint["log_folders"] = [folder and os.path.relpath(folder, str(self.dirpath)) for folder in folders]
        if trainer.state.fn == TrainerFn.FITTING:
            settle_progress(checkpoint["loops"]["fit_loop"], trainer.num_training_batches)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the random states of this process, for ``on_train_start`` to restore."""
        states = checkpoint.get("random_states", [])
        if trainer.state.fn == TrainerFn.FITTING and trainer.global_rank < len(states):
            self.random_states = states[trainer.global_rank]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the best scores of checkpoints that still exist, also if the folder of the run was moved."""

        def found(path: str) -> str:
            here = Path(str(self.dirpath), Path(path).name)
            return str(here) if here.is_file() else path if Path(path).is_file() else ""

        best = {found(path): score for path, score in state_dict["best_k_models"].items() if found(path)}
        paths = {key: found(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        super().load_state_dict(state_dict | paths | {"dirpath": self.dirpath, "best_k_models": best})
