"""Ensembles of the best checkpoints of a run."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meta_lightning.checks import require
from meta_lightning.inner.params import tree_map
from meta_lightning.inner.samples import Samples
from meta_lightning.runs.checkpoint_file import load, read_checkpoint

State = Mapping[str, Tensor]  # a state dict


def best_members(path: Path, number: int, accept: Callable[[dict[str, Any]], None]) -> dict[str, State]:
    """File names and states of the best checkpoints of a run, best first.

    Args:
        path: A checkpoint of the run; the others are beside it.
        number: How many to take.
        accept: Raises InputError for a checkpoint of another learner.

    Raises:
        InputError: If the run has kept fewer.
    """
    beside = [checkpoint for other in path.parent.glob("*.ckpt") if isinstance(checkpoint := load(other), dict)]
    # the newest one knows them all: an older one may name a file that was replaced since
    newest = max(beside, key=lambda checkpoint: checkpoint.get("global_step", 0), default={})
    kept = [state for state in newest.get("callbacks", {}).values() if isinstance(state, dict)]
    states = [state for state in kept if state.get("best_k_models")]
    state = next((s for s in states if path.name in map(name_of, s["best_k_models"])), states[0] if states else {})
    scores = {name_of(name): score for name, score in state.get("best_k_models", {}).items()}  # the run may have moved
    ranked = sorted(scores, key=lambda name: abs(scores[name] - state["best_model_score"]))  # whichever mode
    found = [name for name in ranked if (path.parent / name).is_file()]
    have = f"the run of {path} has {len(found)}, which --checkpoint.save_top_k sets in training"
    require(number <= len(found), f"ensemble must be at most the number of best checkpoints, got {number}: {have}")
    members = {name: read_checkpoint(path.parent / name, "--ckpt_path") for name in found[:number]}
    for checkpoint in members.values():
        accept(checkpoint)
    return {name: checkpoint["state_dict"] for name, checkpoint in members.items()}


def name_of(path: str) -> str:
    """The file's name."""
    return Path(path).name


def each_of(learner: nn.Module, members: Mapping[str, State]) -> Generator[None, None, None]:
    """Let a learner take the state of each member in turn, then its own again; without members only its own."""
    if not members:
        yield
        return
    own = {name: value.clone() for name, value in learner.state_dict().items()}
    try:
        for state in members.values():
            learner.load_state_dict(state)
            yield
    finally:
        learner.load_state_dict(own)


def mean_prediction(predictions: Sequence[Samples], real: bool) -> Samples:
    """Mean over members of real predictions, or the logarithms of mean class probabilities.  # T R ..., T R N ..."""
    if len(predictions) == 1:
        return predictions[0]
    if not isinstance(predictions[0], Tensor):
        return tree_map(lambda *of_members: torch.stack(of_members).mean(0), *predictions)
    stacked = torch.stack([*predictions])
    classes = not real and stacked.ndim > 3
    return stacked.log_softmax(3).logsumexp(0) - math.log(len(stacked)) if classes else stacked.mean(0)
