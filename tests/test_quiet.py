"""What a run prints: messages of libraries about which a user can do nothing are left out, ours stay."""

import logging
import subprocess
import sys
import warnings

import pytest
from conftest import TINY

from meta_lightning.quiet import LOGGED, WARNINGS, silence

NOISE = ("site-packages", "Warning:", "deprecated", "No CUDA runtime", "many workers", "weights_only", "Tip:")


@pytest.mark.usefixtures("glyphs")
def test_a_fit_and_a_test_print_nothing_of_libraries_to_be_ignored() -> None:
    python = [sys.executable, "-m", "meta_lightning"]
    fit = [*python, "fit", "--config", TINY, "--trainer.max_steps", "1", "--trainer.num_sanity_val_steps", "0"]
    for command in (fit, [*python, "test", "--ckpt_path", "lightning_logs/version_0/checkpoints/last.ckpt"]):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert not [line for line in done.stderr.splitlines() if any(noise in line for noise in NOISE)]
        if "fit" in command:
            assert "There is no best checkpoint: training ended after 1 meta-iterations" in done.stderr


def test_messages_of_libraries_are_left_out_and_others_stay(caplog: pytest.LogCaptureFixture) -> None:
    samples = (
        "`isinstance(treespec, LeafSpec)` is deprecated, use `isinstance(treespec, TreeSpec) and treespec.is_leaf()`",
        "`LightningModule.configure_optimizers` returned `None`, this fit will run with no optimizer",
        "Using ModelCheckpoint with manual optimization and every_n_train_steps=5",
        "`ModelCheckpoint(monitor='val/accuracy')` could not find the monitored key in the returned metrics: []",
        "LightningCLI's args parameter is intended to run from within Python",
        "Found 3 module(s) in eval mode at the start of training",
        "You requested to overfit but enabled train dataloader shuffling",
    )
    assert len(samples) == len(WARNINGS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        silence()
        for message in (*samples, "Reptile learns little"):
            warnings.warn(message, UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in said] == ["Reptile learns little"]
    silence()
    for name in LOGGED:
        logger = logging.getLogger(name)
        assert len([part for part in logger.filters if getattr(part, "__name__", "") == "wanted"]) == 1
        with caplog.at_level("INFO", name):
            logger.warning(
                "💡 Tip: %s" if "lightning" in name else "No CUDA runtime is found, using CUDA_HOME='%s'", "x"
            )
            logger.warning("another message")
    assert [record.getMessage() for record in caplog.records] == ["another message"] * len(LOGGED)
