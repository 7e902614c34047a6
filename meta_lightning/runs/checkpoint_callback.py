"""Which checkpoints are kept, and when."""

import shutil
import signal
import threading
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from meta_lightning.checks import InputError, require, require_at_least
from meta_lightning.runs.checkpoint_file import WholeFiles
from meta_lightning.runs.resume import log_folders, random_states, set_random_states, settle_progress


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
        epoch_loop = trainer.fit_loop.epoch_loop
        if epoch_loop.batch_progress.current.ready == 0:
            epoch_loop.restarting = False  # an epoch begins here, where Lightning looks for a validation to skip
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

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Note the random states if a checkpoint is due: the next batch is augmented before it can be saved."""
        self.stop = trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)
        if self.stop or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            self.random_states = random_states(pl_module.device)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
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
            said = f"Interrupted after {trainer.global_step} meta-iterations; go on with --ckpt_path"
            rank_zero_info(f"{said} {self.last_model_path}")
        if isinstance(exception, InputError) and trainer.is_global_zero:
            for folder in (Path(logger.log_dir) for logger in trainer.loggers if logger.log_dir):
                written = {path.name for path in folder.glob("*")} - {"config.yaml", "hparams.yaml"}
                if len(written) <= 1 and all(name.startswith("events.out.tfevents.") for name in written):
                    shutil.rmtree(folder, ignore_errors=True)

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
