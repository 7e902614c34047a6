"""The form of the training samples, which samples for adaptation and prediction must have."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meta_lightning.checks import InputError, require
from meta_lightning.data.pictures import prepare_image
from meta_lightning.data.tasks import Array, scale_pixels
from meta_lightning.data.transforms import ImageTransforms
from meta_lightning.inner.params import tree_map
from meta_lightning.inner.samples import Samples, as_floats

# standard deviations of one image: the means of 5 photographs of a class of Caltech-101 lie within 2.2 of all others,
# drawings black on white at 2.9 or more
FAR = 2.5


@dataclass(frozen=True)
class SampleForm:
    """The form of a data set's samples; None where it is not fixed."""

    image_size: int | None = None  # height and width, in pixels
    channels: int | None = None
    ink: bool = False  # drawings with ink 1 on 0
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]
    std: list[float] | None = None
    pixels: bool | None = None  # whether samples were uint8 pixels, scaled to [0, 1]; None: if ``image_size`` is known
    look: dict[str, list[float]] | None = None  # mean and standard deviation of each of ``looks`` over images
    keywords: bool | None = None  # whether samples are dicts, passed as keywords of forward; None before it is known
    table: dict[str, Any] | None = None  # of rows of tables: the fields of a ``TableForm``
    floats: bool = False  # whether integers are features, which the network takes as floating point

    @property
    def holds_pixels(self) -> bool:
        """Whether samples are pixels."""
        return self.channels is not None if self.pixels is None else self.pixels

    def prepare(self, path: Path) -> Array:
        """Read an image file in this form; InputError if the samples were no images.  # C H W"""
        if self.image_size is None or self.channels is None:
            raise InputError("the learner must have been trained on images")
        return self.ink_on_ground(prepare_image(path, self.image_size, self.channels))

    def ink_on_ground(self, image: Array) -> Array:
        """Invert a drawing that is mostly light, if training had ink 1 on 0.  # C H W"""
        return 255 - image if self.ink and image.mean() > 127.5 else image

    def network_input(self, x: Samples, dtype: torch.dtype) -> Samples:
        """Scale pixels, normalise, and convert floating-point samples to ``dtype``.  # S ..."""
        if not isinstance(x, Tensor):
            return tree_map(lambda t: self.network_input(t, dtype), x)
        inputs = self.cast(ImageTransforms(self.mean, self.std).normalise(scale_pixels(x)))
        return inputs.to(dtype) if inputs.is_floating_point() else inputs

    def cast(self, x: Samples) -> Samples:
        """Integers as floating point, where the network takes them as features.  # S ..."""
        return as_floats(x) if self.floats else x

    def check(self, x: Samples) -> Samples:
        """Refuse samples of another shape or scale.  # S ..."""
        if not isinstance(x, Tensor):
            return x
        C, size, shape = self.channels, self.image_size, list(x.shape)
        if C is not None and size is not None and shape[1:] != [C, size, size]:
            raise InputError(f"x must hold images of shape [S, {C}, {size}, {size}], as in training, got {shape}")
        if x.numel() and self.holds_pixels and x.dtype != torch.uint8:
            least, most = x.min().item(), x.max().item()
            # a resized picture may leave [0, 1] a little
            valid = x.is_floating_point() and least >= -0.5 and most <= 1.5
            expected = "x must hold pixels, as in training: uint8, or floating point in [0, 1]"
            require(valid, f"{expected}, got {x.dtype} from {least:g} to {most:g}")
        return x

    def unlike(self, x: Samples) -> str:
        """How images differ from those of training, for a warning; empty if they do not.  # S ..."""
        if self.look is None or not isinstance(x, Tensor):
            return ""
        found = {name: value.mean().item() for name, value in looks(scale_pixels(x).numpy(force=True)).items()}
        far = [
            f"{name} is {found[name]:.2f}, in training {mean:.2f} ± {std:.2f}"
            for name, (mean, std) in self.look.items()
            if abs(found[name] - mean) > FAR * std + 0.01
        ]
        return ", ".join(far)


def looks(images: Array) -> dict[str, Array]:
    """Statistics of each image in [0, 1], by what they are called in warnings.  # M C H W -> M"""
    x = images.reshape(*images.shape[:2], -1)
    return {
        "their mean brightness": x.mean((1, 2)),
        "the mean range of their colours": (x.max(1) - x.min(1)).mean(1),
        "the share of their black and white pixels": ((x < 0.05) | (x > 0.95)).mean((1, 2)),
    }


def look_of(images: Array) -> dict[str, list[float]]:
    """Mean and standard deviation of ``looks`` over images.  # M C H W, uint8"""
    return {name: [float(value.mean()), float(value.std())] for name, value in looks(images / np.float32(255)).items()}


def form_of(hparams: Mapping[str, Any], data_class: type | None = None) -> SampleForm:
    """The form of a data module's samples, from its hyperparameters and its class."""
    with suppress(ImportError, AttributeError, KeyError):  # a user-defined class may not be importable
        data_class = resolve_name(hparams["_class_path"])
    transforms = hparams.get("transforms") or {}
    size, channels = (hparams.get(name, getattr(data_class, name, None)) for name in ("image_size", "channels"))
    return SampleForm(size, channels, getattr(data_class, "ink", False), transforms.get("mean"), transforms.get("std"))
