"""The form of the training samples, which samples for adaptation and prediction must have."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from meta_lightning.checks import InputError
from meta_lightning.data.pictures import prepare_image
from meta_lightning.data.tasks import Array, scale_pixels
from meta_lightning.data.transforms import ImageTransforms


@dataclass(frozen=True)
class SampleForm:
    """The form of a data set's samples; None where it is not fixed."""

    image_size: int | None = None  # height and width, in pixels
    channels: int | None = None
    ink: bool = False  # drawings with ink 1 on 0
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]
    std: list[float] | None = None

    def prepare(self, path: Path) -> Array:
        """Read an image file in this form; InputError if the samples were no images.  # C H W"""
        if self.image_size is None or self.channels is None:
            raise InputError("the learner must have been trained on images")
        return self.ink_on_ground(prepare_image(path, self.image_size, self.channels))

    def ink_on_ground(self, image: Array) -> Array:
        """Invert a drawing that is mostly light, if training had ink 1 on 0.  # C H W"""
        return 255 - image if self.ink and image.mean() > 127.5 else image

    def network_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Scale pixels, normalise, and convert floating-point samples to ``dtype``.  # S ..."""
        inputs = ImageTransforms(self.mean, self.std).normalise(scale_pixels(x))
        return inputs.to(dtype) if inputs.is_floating_point() else inputs

    def check(self, x: Tensor) -> Tensor:
        """Refuse samples of another shape.  # S ..."""
        C, size, shape = self.channels, self.image_size, list(x.shape)
        if C is not None and size is not None and shape[1:] != [C, size, size]:
            raise InputError(f"x must hold images of shape [S, {C}, {size}, {size}], as in training, got {shape}")
        return x


def form_of(hparams: Mapping[str, Any], data_class: type | None = None) -> SampleForm:
    """The form of a data module's samples, from its hyperparameters and its class."""
    with suppress(ImportError, AttributeError, KeyError):  # a user-defined class may not be importable
        data_class = resolve_name(hparams["_class_path"])
    transforms = hparams.get("transforms") or {}
    size, channels = (hparams.get(name, getattr(data_class, name, None)) for name in ("image_size", "channels"))
    return SampleForm(size, channels, getattr(data_class, "ink", False), transforms.get("mean"), transforms.get("std"))
