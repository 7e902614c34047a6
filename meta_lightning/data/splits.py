"""Class splits: given explicitly or drawn at random."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from meta_lightning.checks import require, require_at_least
from meta_lightning.data.module import TaskDataModule, options
from meta_lightning.data.tasks import SPLITS, Split


@options
class RandomSplit(TaskDataModule):
    """A data module whose classes, or whatever else belongs to one split only, are split at random."""

    split_fractions: tuple[float, float, float] = (0.6, 0.2, 0.2)
    """Shares of the classes (of a regression: of the sets of points) that train, validate and test, drawn at random;
    (0, 0, 1) is for testing alone."""
    split_seed: int = 0
    """Seed of that draw. It is not ``seed``, so that other tasks never bring a class into another split."""

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        super().__post_init__()
        require_at_least(0, split_seed=self.split_seed)
        shares = tuple(self.split_fractions)
        require(
            len(shares) == len(SPLITS) and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6,
            f"split_fractions must be 3 shares, of train, val and test, with the sum 1, got {shares}",
        )

    def drawn_splits(self, numbers: Sequence[int]) -> dict[Split, list[int]]:
        """Random splits: of the permuted numbers the first validate, the next test, and all the others train."""
        order = np.random.default_rng(self.split_seed).permutation(np.array(numbers, dtype=np.int64)).tolist()
        val, test = (round(len(order) * fraction) for fraction in self.split_fractions[1:])
        return {
            "train": sorted(order[val + test :]),
            "val": sorted(order[:val]),
            "test": sorted(order[val : val + test]),
        }


@options
class GivenSplit(RandomSplit):
    """A data module whose classes are split as the user says, or at random."""

    splits: Mapping[Split, Sequence[int]] | None = None
    """The class numbers (of a regression: the numbers of the sets) of train, val and test; those in none are left out,
    and so may be a split that is not asked for (``fit`` validates, unless ``limit_val_batches`` is 0). Default: by
    ``split_fractions``; then the attribute holds what was drawn."""

    def __post_init__(self) -> None:
        """Take the splits as lists."""
        unknown = [name for name in self.splits or () if name not in SPLITS]
        require(not unknown, f"splits must have the keys 'train', 'val' and 'test', got {unknown}")
        if self.splits is not None:  # also what is saved: a checkpoint loaded with weights_only has no arrays
            self.splits = {split: [int(number) for number in part] for split, part in self.splits.items()}
        super().__post_init__()

    def split(self, numbers: Sequence[int], what: str) -> None:
        """Split these numbers as given, or at random; ``what`` they are is for the messages."""
        if self.splits is None:
            self.splits = self.drawn_splits(numbers)
        counts = Counter(number for part in self.splits.values() for number in part)
        missing = sorted(set(counts) - set(numbers))
        require(not missing, f"splits must hold {what}, got {missing}, which do not occur")
        repeated = sorted(number for number, count in counts.items() if count > 1)
        require(not repeated, f"splits must hold {what} once each, got {repeated} more than once")
        self.members = self.splits = {split: list(self.splits.get(split, [])) for split in SPLITS}

    def setup(self, stage: str | None = None) -> None:
        """See that every split with members can give its tasks; one without is refused when it is asked for."""
        super().setup(stage or "fit")
        for split in SPLITS:
            if self.members[split]:
                self.task_set(split)
