"""Messages of libraries about which a user can do nothing: the command line leaves them out."""

import logging
import re
import warnings
from collections.abc import Iterable

WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*is deprecated",  # https://github.com/Lightning-AI/pytorch-lightning/issues/21326
    r".*configure_optimizers.*returned.*None",  # Reptile has no optimizer
    r"Using ModelCheckpoint with manual optimization",  # checkpoints are meant to hold the state after a step
    r".*ModelCheckpoint\(monitor='val/.*could not find the monitored key",  # said in a sentence at the end of training
    r"LightningCLI's args parameter",  # they are the process's own
    r"Found \d+ module\(s\) in eval mode at the start",  # frozen ones
    r"You requested to overfit but enabled",  # tasks are numbered, not shuffled
)
WHEN_RESUMED = (r"Checkpoint directory .* exists and is not empty",)  # with the run's own checkpoints
LOGGED = {  # by logger
    "lightning.pytorch.utilities.rank_zero": r"💡 Tip",  # advertises a service
    "torch.utils.cpp_extension": r"No CUDA runtime is found",  # where CUDA's compiler is installed without a GPU
}


def silence() -> None:
    """Leave out the messages, in this process."""
    ignore(WARNINGS)
    for name in LOGGED:
        logging.getLogger(name).addFilter(wanted)


def ignore(messages: Iterable[str]) -> None:
    """Suppress warnings that match these patterns."""
    for message in messages:
        warnings.filterwarnings("ignore", message)


def wanted(record: logging.LogRecord) -> bool:
    """Whether a logged message is for the user."""
    return re.match(LOGGED[record.name], record.getMessage()) is None
