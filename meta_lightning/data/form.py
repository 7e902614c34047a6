"""What samples looked like in training, so that others are made alike when the learner is used."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from meta_lightning.checks import require
from meta_lightning.data.pictures import prepare_image
from meta_lightning.data.transforms import ImageTransforms
from meta_lightning.tasks import Array, scale_pixels


@dataclass(frozen=True)
class SampleForm:
    """The form of a data set's samples; None where the data do not fix it.

    Args:
        image_size: Side of its square images, in pixels.
        channels: Channels of its images.
        ink: Whether its images are drawings whose ink is 1 on a ground of 0.
        mean: Subtracted from each channel of the pixels, together with ``std``.
        std: What each channel is divided by then.
    """

    image_size: int | None = None
    channels: int | None = None
    ink: bool = False
    mean: list[float] | None = None
    std: list[float] | None = None

    def prepare(self, path: Path) -> Array:
        """Read a picture as the images of training were, see ``prepare_image``.  # C H W, uint8

        Raises:
            InputError: If the data were no images, or the file is no picture.
            OSError: If the file cannot be read.
        """
        require(
            self.image_size is not None and self.channels is not None, "the learner must have been trained on images"
        )
        assert self.image_size is not None and self.channels is not None  # noqa: PT018
        return self.ink_on_ground(prepare_image(path, self.image_size, self.channels))

    def ink_on_ground(self, image: Array) -> Array:
        """Invert a drawing that is mostly light, and so dark on light, where training had ink 1 on 0.  # C H W"""
        return 255 - image if self.ink and image.mean() > 127.5 else image

    def network_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Samples, as the data set holds them, as the network takes them: scaled and normalised.  # S ...

        Args:
            x: The samples.
            dtype: The network's, in which samples of any other floating-point one come.
        """
        inputs = ImageTransforms(self.mean, self.std).normalise(scale_pixels(x))
        return inputs.to(dtype) if inputs.is_floating_point() else inputs

    def check(self, x: Tensor) -> Tensor:
        """Refuse samples of another shape (InputError).  # S ..."""
        expected = [self.channels, self.image_size, self.image_size]
        require(
            None in expected or list(x.shape[1:]) == expected,
            f"x must hold images of shape [S, {', '.join(map(str, expected))}], as in training, got {list(x.shape)}",
        )
        return x


def form_of(hparams: Mapping[str, Any], data_class: type | None = None) -> SampleForm:
    """The form of the samples of a data module.

    Args:
        hparams: Its hyperparameters, as checkpoints hold them; ``_class_path`` in them names its class.
        data_class: Its class, where that is known otherwise.
    """
    with suppress(ImportError, AttributeError, KeyError):  # also where the class of one's own is not at hand
        data_class = resolve_name(hparams["_class_path"])
    transforms = hparams.get("transforms") or {}
    return SampleForm(
        image_size=hparams.get("image_size", getattr(data_class, "image_size", None)),
        channels=hparams.get("channels", getattr(data_class, "channels", None)),
        ink=getattr(data_class, "ink", False),
        mean=transforms.get("mean"),
        std=transforms.get("std"),
    )
