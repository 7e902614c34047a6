"""What samples looked like in training, so that others are made alike when the learner is used."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from meta_lightning.checks import InputError, require
from meta_lightning.data.pictures import prepare_image
from meta_lightning.data.tasks import Array, scale_pixels
from meta_lightning.data.transforms import ImageTransforms


@dataclass(frozen=True)
class SampleForm:
    """The form of a data set's samples; None where the data do not fix it."""

    image_size: int | None = None  # side of its square images, in pixels
    channels: int | None = None  # of its images
    ink: bool = False  # whether its images are drawings whose ink is 1 on a ground of 0
    mean: list[float] | None = None  # subtracted from each channel of the pixels, together with ``std``
    std: list[float] | None = None  # what each channel is divided by then

    def prepare(self, path: Path) -> Array:
        """Read a picture as the images of training were, see ``prepare_image``; InputError without such.  # C H W"""
        if self.image_size is None or self.channels is None:
            raise InputError("the learner must have been trained on images")
        return self.ink_on_ground(prepare_image(path, self.image_size, self.channels))

    def ink_on_ground(self, image: Array) -> Array:
        """Invert a drawing that is mostly light, and so dark on light, where training had ink 1 on 0.  # C H W"""
        return 255 - image if self.ink and image.mean() > 127.5 else image

    def network_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Samples as the data set holds them, scaled, normalised and in the network's ``dtype``.  # S ..."""
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
    """The form of the samples of a data module."""
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
