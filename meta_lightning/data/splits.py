"""Class splits: given explicitly or drawn at random."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

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

    def drawn_splits(self, numbers: Sequence[int], fractions: Sequence[float] | None = None) -> dict[Split, list[int]]:
        """Permute the numbers: the first are for validation, the next for test and the rest for training."""
        order = np.random.default_rng(self.split_seed).permutation(np.array(numbers, dtype=np.int64)).tolist()
        val, test = (round(len(order) * fraction) for fraction in (fractions or self.split_fractions)[1:])
        parts = {"train": order[val + test :], "val": order[:val], "test": order[val : val + test]}
        return {split: sorted(parts[split]) for split in SPLITS}

    def advice(
        self, numbers: Sequence[int], needs: Mapping[Split, int], serves: Callable[[int, Split], bool] = lambda *_: True
    ) -> str:
        """For a message that a split is too small: fractions that would do, or how much less would.

        Args:
            numbers: What is split.
            needs: How many of them each split needs, as many for val as for test.
            serves: Whether a number counts in a split.
        """

        def fitting(needs: Mapping[Split, int]) -> list[float] | None:
            """In tenths if possible, else finer, and the most for training."""
            for n in (10, 100, 1000):
                for part in range(1, n // 2 + 1):
                    fractions = [(n - 2 * part) / n, part / n, part / n]
                    drawn = self.drawn_splits(numbers, fractions)
                    if all(sum(serves(number, split) for number in drawn[split]) >= needs[split] for split in SPLITS):
                        return fractions
            return None

        if fractions := fitting(needs):
            return f'--data.split_fractions "{fractions}" would do'
        needed = f"the three splits need {sum(needs.values())} together"
        for fewer in range(min(*needs.values(), len(numbers) // len(SPLITS) + 1), 1, -1):
            if fractions := fitting(dict.fromkeys(SPLITS, fewer)):
                return f'{needed}; --data.split_fractions "{fractions}" would do for {fewer} ways'
        return needed


@options
class GivenSplit(RandomSplit):
    """A data module whose classes are split explicitly or at random."""

    splits: Mapping[Split, Sequence[int | str]] | None = None
    """Classes of train, val and test, by number or by name (for regression: numbers of the sets). Those in no split are
    not used, and a split that is not used may be missing (``fit`` uses val unless ``limit_val_batches`` is 0). Default:
    a random split by ``split_fractions``. The attribute then holds the numbers."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.splits or () if name not in SPLITS]
        require(not unknown, f"splits must have the keys 'train', 'val' and 'test', got {unknown}")
        if self.splits is not None:  # before they are saved: weights_only checkpoints cannot hold arrays
            self.splits = {
                split: [str(member) if isinstance(member, str) else int(member) for member in part]
                for split, part in self.splits.items()
            }
        super().__post_init__()

    def split(self, numbers: Sequence[int], what: str, names: Mapping[str, int] | None = None) -> None:
        """Split these numbers, as given or at random; messages call them ``what``, and ``names`` maps to them."""
        self.drawn = self.splits is None
        given = self.drawn_splits(numbers) if self.splits is None else self.splits
        known: dict[int | str, int] = {number: number for number in numbers} | dict(names or {})
        counts = Counter(member for part in given.values() for member in part)
        missing = sorted(counts.keys() - known, key=str)
        require(not missing, f"splits must hold {what}, got {missing}, which do not occur")
        counts = Counter(known[member] for part in given.values() for member in part)
        repeated = sorted(number for number, count in counts.items() if count > 1)
        require(not repeated, f"splits must hold {what} once each, got {repeated} more than once")
        self.members = {split: [known[member] for member in given.get(split, ())] for split in SPLITS}
        self.splits = self.members

    def require_members(self, split: Split, needs: Mapping[Split, int], refusal: str) -> None:
        """Refuse a random split with too few members, and say what would do."""
        if self.drawn and len(self.members[split]) < needs[split]:
            numbers = sorted(number for part in self.members.values() for number in part)
            raise InputError(f"{refusal}; {self.advice(numbers, needs)}")

    def setup(self, stage: str | None = None) -> None:
        """Make the tasks of each split that has members; one without is refused when it is used."""
        super().setup(stage or "fit")
        for split in SPLITS:
            if self.members[split]:
                self.task_set(split)
