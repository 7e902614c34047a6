"""Trains on two gloo processes of which the second meets tasks that are not finite: ddp_guard_script.py ALGORITHM."""

import copy
import sys
from typing import Any

import lightning as L
import torch

import meta_lightning
from meta_lightning import MLP, Sinusoid


class Spoil(L.Callback):
    """Spoils the second rank's batches 2 and 3, and notes θ before and after them."""

    def __init__(self) -> None:
        self.noted: dict[int, Any] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.noted[trainer.global_step] = copy.deepcopy(pl_module.state_dict())
        if trainer.global_rank == 1 and trainer.global_step in (2, 3):
            batch.support_y.fill_(float("nan"))


if __name__ == "__main__":
    (algorithm,) = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = {} if algorithm == "Reptile" else {"learn_inner_lr": True}
    learner = getattr(meta_lightning, algorithm)(
        MLP(hidden=[8]), inner_steps=2, outer_freeze=["features.1.*"], **options
    )
    spoil = Spoil()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=6,
        limit_val_batches=0,
        callbacks=[spoil],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(learner, Sinusoid(meta_batch_size=4, epoch_length=6))
    noted = {"before_skipped": spoil.noted[2], "after_skipped": spoil.noted[4], "after": learner.state_dict()}
    torch.save({"skipped": learner.outer_update.skipped, **noted}, f"{trainer.global_rank}.pt")
