"""Class splits: given explicitly or drawn at random."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from meta_lightning.checks import InputError, require, require_at_least
from meta_lightning.data.module import TaskDataModule, options
from meta_lightning.data.tasks import SPLITS, Split


@options
class RandomSplit(TaskDataModule):
    """A data module whose classes (for regression: sets of points) are split at random."""

    split_fractions: tuple[float, float, float] = (0.6, 0.2, 0.2)
    """Fractions of the classes (for regression: sets) drawn for train, val and test. (0, 0, 1) is for testing only."""
    split_seed: int = 0
    """Seed of the random split. It is separate from ``seed``, so that changing the tasks keeps the split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(0, split_seed=self.split_seed)
        fractions = tuple(self.split_fractions)
        if len(fractions) != len(SPLITS) or min(fractions) < 0 or not abs(sum(fractions) - 1) < 1e-6:
            raise InputError(f"split_fractions must be 3 fractions (train, val, test) that sum to 1, got {fractions}")

    def drawn_splits(self, numbers: Sequence[int]) -> dict[Split, list[int]]:
        """Permute the numbers: the first are for validation, the next for test and the rest for training."""
        order = np.random.default_rng(self.split_seed).permutation(np.array(numbers, dtype=np.int64)).tolist()
        val, test = (round(len(order) * fraction) for fraction in self.split_fractions[1:])
        parts = {"train": order[val + test :], "val": order[:val], "test": order[val : val + test]}
        return {split: sorted(parts[split]) for split in SPLITS}


@options
class GivenSplit(RandomSplit):
    """A data module whose classes are split explicitly or at random."""

    splits: Mapping[Split, Sequence[int]] | None = None
    """Class numbers (for regression: numbers of the sets) of train, val and test. Numbers in no split are not used, and
    a split that is not used may be missing (``fit`` uses val unless ``limit_val_batches`` is 0). Default: a random
    split by ``split_fractions``, which the attribute then holds."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.splits or () if name not in SPLITS]
        require(not unknown, f"splits must have the keys 'train', 'val' and 'test', got {unknown}")
        if self.splits is not None:  # before they are saved: weights_only checkpoints cannot hold arrays
            self.splits = {split: [int(number) for number in part] for split, part in self.splits.items()}
        super().__post_init__()

    def split(self, numbers: Sequence[int], what: str) -> None:
        """Split these numbers, as given or at random; messages call them ``what``."""
        if self.splits is None:
            self.splits = self.drawn_splits(numbers)
        counts = Counter(number for part in self.splits.values() for number in part)
        missing = sorted(set(counts) - set(numbers))
        require(not missing, f"splits must hold {what}, got {missing}, which do not occur")
        repeated = sorted(number for number, count in counts.items() if count > 1)
        require(not repeated, f"splits must hold {what} once each, got {repeated} more than once")
        self.members = self.splits = {split: list(self.splits.get(split, [])) for split in SPLITS}

    def setup(self, stage: str | None = None) -> None:
        """Make the tasks of each split that has members; one without is refused when it is used."""
        super().setup(stage or "fit")
        for split in SPLITS:
            if self.members[split]:
                self.task_set(split)
