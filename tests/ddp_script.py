"""Trains and tests an algorithm on so many gloo processes: ddp_script.py ALGORITHM DEVICES OUT."""

import sys

import lightning as L
import torch

import meta_lightning
from meta_lightning import MLP, Sinusoid

if __name__ == "__main__":
    algorithm, devices, out = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = {"inner_optimizer": "adam", "inner_lr": 0.001} if algorithm == "Reptile" else {}
    learner = getattr(meta_lightning, algorithm)(MLP(hidden=[8]), inner_steps=3, outer_lr_decay="linear", **options)
    # 10 validation tasks a batch of 4 leave the ranks unequal shares
    data = Sinusoid(meta_batch_size=4, epoch_length=5, val_tasks=9, test_tasks=11)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(devices),
        strategy="ddp" if devices == "2" else "auto",
        precision="64-true",
        max_steps=12,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(learner, data)
    figures = trainer.test(learner, data, verbose=False)[0]
    if trainer.is_global_zero:
        state = {name: value.cpu() for name, value in learner.state_dict().items()}
        torch.save(state | {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}, out)
