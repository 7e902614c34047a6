"""Pictures of other origin made to look like those of training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image

from meta_lightning import (
    CIFARFS,
    FC100,
    Glyphs,
    ImageFolderTasks,
    ImageTransforms,
    MiniImagenet,
    Omniglot,
    Sinusoid,
    TaskDataModule,
    TieredImagenet,
)
from meta_lightning.data.form import SampleForm, form_of
from meta_lightning.data.omniglot import shrink


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (Glyphs(), SampleForm(28, 1, ink=True)),
        (Omniglot(), SampleForm(28, 1, ink=True)),
        (MiniImagenet(), SampleForm(84, 3)),
        (TieredImagenet(), SampleForm(84, 3)),
        (CIFARFS(), SampleForm(32, 3)),
        (FC100(), SampleForm(32, 3)),
        (ImageFolderTasks("x", image_size=64, channels=1), SampleForm(64, 1)),
        (Glyphs(transforms=ImageTransforms(mean=[0.1], std=[0.3])), SampleForm(28, 1, True, [0.1], [0.3])),
        (Sinusoid(), SampleForm()),
    ],
)
def test_the_form_of_a_data_module_and_of_its_checkpoint(data: TaskDataModule, expected: SampleForm) -> None:
    assert form_of(data.hparams, type(data)) == expected
    name = f"meta_lightning.{type(data).__name__}"
    assert form_of({**data.hparams, "_class_path": name}) == expected


def test_data_of_a_class_that_is_not_at_hand() -> None:
    hparams = {
        "_class_path": "somebodys.Photos",
        "image_size": 50,
        "channels": 3,
        "transforms": {"mean": [1], "std": [2]},
    }
    assert form_of(hparams) == SampleForm(50, 3, False, [1], [2])
    assert form_of({}) == SampleForm()


def test_ink_is_1_whether_a_drawing_is_dark_on_light_or_light_on_dark(tmp_path: Path) -> None:
    drawing = np.full((60, 60), 255, dtype=np.uint8)
    drawing[20:40, 20:40] = 0
    Image.fromarray(drawing).save(tmp_path / "dark.png")
    Image.fromarray(255 - drawing).save(tmp_path / "light.png")
    form = SampleForm(28, 1, ink=True)
    dark, light = (form.prepare(tmp_path / f"{name}.png") for name in ("dark", "light"))
    assert dark.shape == (1, 28, 28)
    assert np.array_equal(dark, light)
    assert (dark[0, 0, 0], dark[0, 14, 14]) == (0, 255)
    assert SampleForm(28, 1).prepare(tmp_path / "dark.png")[0, 14, 14] == 0


def test_network_input_is_scaled_and_normalised() -> None:
    x = torch.tensor([[[[0, 255]], [[51, 102]]]], dtype=torch.uint8)
    expected = torch.tensor([[[[-1.0, 1.0]], [[0.0, 2.0]]]])
    assert torch.allclose(SampleForm(mean=[0.5, 0.2], std=[0.5, 0.1]).network_input(x, torch.float32), expected)


def test_no_images() -> None:
    with pytest.raises(ValueError, match=r"learner .*images"):
        SampleForm().prepare(Path("x.png"))


def test_a_file_of_omniglot_is_prepared_as_omniglot_is(tmp_path: Path) -> None:
    packed = SHARED / "data" / "omniglot105_packed.npz"
    if not packed.exists():
        pytest.skip(f"needs the real Omniglot, which is not at {packed}")
    with np.load(packed) as arrays:
        ink = np.unpackbits(arrays["bits"][::400], axis=1, count=105 * 105).reshape(-1, 105, 105).astype(bool)
    paths = [tmp_path / f"{number}.png" for number in range(len(ink))]
    for path, drawing in zip(paths, ink, strict=True):
        Image.fromarray(~drawing).save(path)  # black on white, as the data set's own files
    ours = np.stack([SampleForm(28, 1, ink=True).prepare(path) for path in paths])
    difference = np.abs(ours.astype(int) - shrink(paths))
    assert difference.max() <= 2
