"""What trains, validates and tests: as the user says, or by lot."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from meta_lightning.checks import require, require_at_least
from meta_lightning.tasks import SPLITS, Split

Fractions = tuple[float, float, float]
Splits = dict[Split, list[int]]


def as_lists(splits: Mapping[Split, Sequence[int]] | None) -> Splits | None:
    """Splits as plain lists, whatever holds the numbers.

    Raises:
        InputError: If there are others than train, val and test.
    """
    unknown = [name for name in splits or () if name not in SPLITS]
    require(not unknown, f"splits must have the keys 'train', 'val' and 'test', got {unknown}")
    return None if splits is None else {split: [int(number) for number in part] for split, part in splits.items()}


def split_numbers(numbers: Sequence[int], splits: Splits | None, fractions: Fractions, seed: int, what: str) -> Splits:
    """What belongs to each split: as given, or by lot.

    Args:
        numbers: All there are.
        splits: What the user gives; None for a lot.
        fractions: Shares of train, val and test in the lot.
        seed: Seed of the lot.
        what: What the numbers are, for the messages.

    Raises:
        InputError: If something is in two splits or does not exist, or the shares are not shares.
    """
    require_lot(fractions, seed)
    if splits is None:
        return drawn_splits(numbers, fractions, seed)
    counts = Counter(number for part in splits.values() for number in part)
    missing = sorted(set(counts) - set(numbers))
    require(not missing, f"splits must hold {what}, got {missing}, which do not occur")
    repeated = sorted(number for number, count in counts.items() if count > 1)
    require(not repeated, f"splits must hold {what} once each, got {repeated} more than once")
    return {split: splits.get(split, []) for split in SPLITS}


def require_lot(fractions: Fractions, seed: int) -> None:
    """Refuse what ``drawn_splits`` cannot draw by.

    Raises:
        InputError: If the shares are not shares, or the seed is none.
    """
    require_at_least(0, split_seed=seed)
    require(
        len(fractions) == len(SPLITS) and min(fractions) >= 0 and abs(sum(fractions) - 1) < 1e-6,
        f"split_fractions must be 3 shares, of train, val and test, with the sum 1, got {tuple(fractions)}",
    )


def drawn_splits(numbers: Sequence[int], fractions: Fractions, seed: int) -> Splits:
    """Splits by lot: of the permuted numbers the first validate, the next test, and all the others train."""
    order = np.random.default_rng(seed).permutation(np.array(numbers, dtype=np.int64)).tolist()
    val, test = (round(len(order) * fraction) for fraction in fractions[1:])
    parts: Splits = {"train": order[val + test :], "val": order[:val], "test": order[val : val + test]}
    return {split: sorted(part) for split, part in parts.items()}
