import numpy as np
import pytest
import torch

from meta_lightning import Glyphs
from meta_lightning.data.tasks import as_task_batch


def test_splits_have_different_classes_and_alphabets(glyphs: Glyphs) -> None:
    data = glyphs.load()
    members = [set(data.members(split)) for split in ("train", "val", "test")]
    assert sum(map(len, members)) == len(set.union(*members)) == len(data.classes)
    names = [{str(data.classes[c]) for c in classes} for classes in members]
    assert len(set.union(*names)) == len(data.classes)


def test_classes_have_20_drawings_scaled_to_0_to_1(glyphs: Glyphs) -> None:
    data = glyphs.load()
    assert np.bincount(data.labels).tolist() == [20] * len(data.classes)
    batch = glyphs.task_set("test").batch([0, 1])
    assert batch.support_x.shape == (2, 5, 1, 28, 28)
    assert batch.query_x.shape == (2, 75, 1, 28, 28)
    assert batch.query_x.dtype == torch.uint8
    scaled = as_task_batch(batch).query_x
    assert scaled.min() == 0
    assert 0.9 < scaled.max() <= 1


def test_impossible_tasks_are_refused_before_training(glyphs: Glyphs) -> None:
    with pytest.raises(ValueError, match=r"\bways .*\d+ .*val .* 500"):
        Glyphs(ways=500).setup()
    with pytest.raises(ValueError, match=r"shots \+ queries .*\b20\b.*train .* 6 \+ 15"):
        Glyphs(shots=6).setup()
    with pytest.raises(ValueError, match=r"^queries .* 0"):
        Glyphs(queries=0)
