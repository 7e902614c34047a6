"""How well queries of known class or value were answered, in a sentence with a confidence interval."""

from collections.abc import Sequence

import torch

from meta_lightning.scores import TaskMean


def accuracy(right: Sequence[bool], queries: str, support: str) -> str:
    """The accuracy on ``queries``, of the task that ``support`` is of."""
    from scipy.stats import binomtest

    correct, known = sum(right), len(right)
    low, high = binomtest(correct, known).proportion_ci(method="wilson")
    interval = f"95 % confidence interval {100 * low:.1f} to {100 * high:.1f} %, Wilson, with these support {support}"
    return f"Accuracy {100 * correct / known:.1f} %: {correct} of the {known} {queries} ({interval})."


def mean_error(errors: Sequence[float], queries: str, support: str) -> str:
    """The mean of absolute errors and the root of the mean of their squares."""
    each, mean = torch.tensor(errors, dtype=torch.double), TaskMean(sync_on_compute=False)
    mean.update(each)
    value, ci95, known = map(float, mean.compute())
    root = each.square().mean().sqrt().item()
    interval = f" ± {ci95:.2g} (95 % confidence interval, with these support {support})" if known > 1 else ""
    return f"Mean absolute error {value:.4g}{interval}, root mean squared error {root:.4g}, on {known:.0f} {queries}."
