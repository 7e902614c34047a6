"""The drawn set: distinct letters, drawn whole, seeded, and as hard for raw pixels as Omniglot."""

import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from meta_lightning.data import glyph_drawings
from meta_lightning.data.cache import LabelledImages
from meta_lightning.data.glyph_drawings import (
    ALPHABET_SPLIT,
    CANVAS,
    FITTED,
    alphabet_of,
    draw_glyphs,
    render_letters,
)
from meta_lightning.data.tasks import SPLITS


@pytest.fixture(scope="module")
def glyphs() -> LabelledImages:
    return draw_glyphs(seed=0, drawings=20)


@pytest.fixture(scope="module")
def letters() -> dict[str, Tensor]:
    return render_letters()


def test_shapes_and_types(glyphs: LabelledImages) -> None:
    classes = len(glyphs.classes)
    assert 1500 <= classes <= 1700
    assert glyphs.images.shape == (20 * classes, 1, 28, 28)
    assert glyphs.images.dtype == np.uint8
    assert glyphs.images.max() == 255
    assert np.array_equal(glyphs.labels, np.arange(classes).repeat(20))


def test_classes_are_distinct_plain_letters_in_order(glyphs: LabelledImages) -> None:
    letters = [unicodedata.lookup(name) for name in glyphs.classes]
    assert letters == sorted(set(letters))
    assert all(unicodedata.category(letter) in ("Lu", "Ll", "Lt", "Lo") for letter in letters)
    assert all(unicodedata.normalize("NFKD", letter) == letter for letter in letters)


def test_look_alikes_are_one_class(glyphs: LabelledImages) -> None:
    assert "LATIN CAPITAL LETTER A" in glyphs.classes
    assert "GREEK CAPITAL LETTER ALPHA" not in glyphs.classes
    assert "CYRILLIC CAPITAL LETTER A" not in glyphs.classes
    # One dot apart, which is what tells these letters from each other
    assert {"ARABIC LETTER TAH", "ARABIC LETTER ZAH"} <= set(glyphs.classes)


def test_undistorted_letters_are_fitted_and_differ(letters: dict[str, Tensor]) -> None:
    first = np.stack([faces[0].numpy() for faces in letters.values()])
    assert len(np.unique(first.reshape(len(first), -1), axis=0)) == len(first)
    for image in first:
        y, x = np.nonzero(image)
        # Resizing may leave a row at either end too faint to count
        assert FITTED - 2 <= max(np.ptp(y), np.ptp(x)) + 1 <= FITTED
        assert abs(y.min() + y.max() + 1 - CANVAS) <= 2
        assert abs(x.min() + x.max() + 1 - CANVAS) <= 2


def test_same_seed_same_bytes_and_global_random_state_untouched(
    glyphs: LabelledImages, letters: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert glyphs.classes.tolist() == list(letters)
    monkeypatch.setattr(glyph_drawings, "render_letters", lambda: letters)
    state = torch.get_rng_state()
    first, again, other = (draw_glyphs(seed, drawings=2).images for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(first, again)
    assert (first != other).any((1, 2, 3)).mean() > 0.99
    assert (first[::2] != first[1::2]).any((1, 2, 3)).mean() > 0.99


def test_split_covers_every_alphabet_once(glyphs: LabelledImages) -> None:
    alphabets = [alphabet_of(name) for name in glyphs.classes]
    assert set(alphabets) == set(ALPHABET_SPLIT)
    assert all(name.startswith(alphabet + " ") for name, alphabet in zip(glyphs.classes, alphabets, strict=True))
    assert [SPLITS[split] for split in glyphs.splits] == [ALPHABET_SPLIT[alphabet] for alphabet in alphabets]
    sizes = {split: len(glyphs.members(split)) for split in SPLITS}
    assert sum(sizes.values()) == len(glyphs.classes)
    assert 1050 <= sizes["train"] <= 1200
    assert sizes["val"] >= 100
    assert sizes["test"] >= 250
    assert all(count >= 3 for count in Counter(ALPHABET_SPLIT.values()).values())


def test_each_drawing_has_ink_and_none_is_cut_off(glyphs: LabelledImages) -> None:
    images = glyphs.images / 255
    ink = images.sum((1, 2, 3))
    assert ink.min() > 5
    assert ink.max() < 0.75 * 28 * 28
    frame = images.copy()
    frame[..., 1:-1, 1:-1] = 0
    assert frame.max() == 0


def test_raw_pixels_fail_as_often_as_on_omniglot(glyphs: LabelledImages) -> None:
    """Nearest support image, 5-way 1-shot, 2,000 tasks of 5 queries; Omniglot gives 47.6 %."""
    pixels = glyphs.images.reshape(-1, 20, 28, 28) / 255
    chance = np.random.default_rng(0)
    for candidates in (glyphs.members("test"), list(range(len(glyphs.classes)))):
        scores = []
        for _ in range(2000):
            ways = chance.choice(candidates, 5, replace=False)
            support, query = chance.permuted(np.tile(np.arange(20), (5, 1)), axis=1)[:, :2].T
            difference = pixels[ways, query][:, None] - pixels[ways, support]  # [N, N, H, W]
            scores.append(((difference**2).sum((2, 3)).argmin(1) == np.arange(5)).mean())
        assert 0.43 <= np.mean(scores) <= 0.52


def test_drawings_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"drawings .* 0"):
        draw_glyphs(drawings=0)
