"""The papers' networks, each a setting of two classes; any other ``nn.Module`` serves as well."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.func import replace_all_batch_norm_modules_
from torch.nn.parameter import is_lazy

from meta_lightning.checks import require, require_at_least, require_choice


class Conv4(nn.Module):
    """Four blocks of 3×3 convolution, batch norm and ReLU, and a linear head (Vinyals et al., 2016; Finn et al., 2017).

    Finn et al. use 64 filters and stride 2 for Omniglot, whose 2×2 map is averaged before the head, and 32 filters and
    2×2 max-pooling for mini-ImageNet, whose map is flattened. Weights start as torch starts them: after 1,000
    meta-iterations of MAML on glyphs that was 5 points ahead of the Xavier-uniform start of Finn et al.

    Args:
        ways: Outputs, one a class (N).
        channels: Channels of the images (C).
        image_size: Height and width of the images, in pixels.
        filters: Channels of each block.
        downsample: Halve the map by a stride of 2 or by 2×2 max-pooling.

    Shapes:
        Input ``S C H W``, output ``S N``.
    """

    def __init__(
        self,
        ways: int = 5,
        channels: int = 1,
        image_size: int = 28,
        filters: int = 64,
        downsample: Literal["stride", "max_pool"] = "stride",
    ) -> None:
        super().__init__()
        require_at_least(1, ways=ways, channels=channels, filters=filters)
        require_choice(("stride", "max_pool"), downsample=downsample)
        strided = downsample == "stride"
        require(strided or image_size >= 16, f"image_size must be at least 16 for four poolings, got {image_size}")
        self.channels, self.image_size, self.strided = channels, image_size, strided
        layers: list[nn.Module] = []
        for block in range(4):
            inputs = channels if block == 0 else filters
            layers += [
                nn.Conv2d(inputs, filters, 3, stride=2 if strided else 1, padding=1),
                nn.BatchNorm2d(filters, track_running_stats=False),
                nn.ReLU(),
            ]
            if not strided:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1) if strided else nn.Identity(), nn.Flatten())
        self.head = nn.Linear(filters if strided else filters * (image_size // 16) ** 2, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images.  # S C H W -> S N"""
        require_images(x, self.channels)
        require(
            self.strided or all(side // 16 == self.image_size // 16 for side in x.shape[2:]),
            f"network must be made for the images of the data: expected image_size {self.image_size}, as it has, got "
            f"{tuple(x.shape[2:])}",
        )
        logits: Tensor = self.head(self.features(x))
        return logits


def require_images(x: Tensor, channels: int) -> None:
    """Refuse images that a network was not made for, of which torch would speak in shapes of weights.

    Args:
        x: What the network was given.  # S C H W
        channels: The channels that it was made for.

    Raises:
        InputError: If these are not images of so many channels.
    """
    require(
        x.ndim == 4 and x.shape[1] == channels,
        f"network must be made for the images of the data: expected channels {channels}, as it has, got samples of "
        f"shape (C, H, W) = {tuple(x.shape[1:])}",
    )


class MLP(nn.Module):
    """Linear layers with ReLU between them; with its defaults the sinusoid network of Finn et al. (2017).

    Args:
        in_features: Numbers a sample; a sample of several dimensions is flattened.
        hidden: Units of each hidden layer.
        out_features: Outputs: classes, or the dimensions of a regression target.

    Shapes:
        Input ``S …``, output ``S out_features``.
    """

    def __init__(self, in_features: int = 1, hidden: Sequence[int] = (40, 40), out_features: int = 1) -> None:
        super().__init__()
        sizes = [in_features, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-1], out_features)
        self.in_features = in_features

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of samples.  # S ... -> S out_features"""
        came = x.shape[1:].numel()
        require(
            came == self.in_features,
            f"network must be made for the samples of the data: expected in_features {self.in_features}, got samples "
            f"of shape {tuple(x.shape[1:])}, {came} numbers each",
        )
        outputs: Tensor = self.head(self.features(x))
        return outputs


def with_batch_statistics(network: nn.Module) -> nn.Module:
    """A copy that normalises by the batch's own statistics and shares the network's parameters.

    Running statistics raise under vmap in training, and mix the tasks' statistics in evaluation. The given network
    keeps its modules as they are, and learns with the copy, since the parameters are the same objects.

    Raises:
        InputError: If the network has lazy parameters, which have no shape yet.
    """
    lazy = [name for name, p in network.named_parameters() if is_lazy(p)]
    require(not lazy, f"network must have been called once, so that its parameters have shapes, got lazy {lazy}")
    shared = {id(p): p for p in network.parameters()}
    return replace_all_batch_norm_modules_(copy.deepcopy(network, memo=dict(shared)))


def other_names(network: nn.Module) -> dict[str, str]:
    """The names of tied parameters beside their first: those that they have in other modules, to the first."""
    first: dict[int, str] = {}
    places: set[tuple[int, str]] = set()
    others = {}
    for name, p in network.named_parameters(remove_duplicate=False):
        owner, _, attribute = name.rpartition(".")
        place = (id(network.get_submodule(owner)), attribute)
        if id(p) in first and place not in places:
            others[name] = first[id(p)]
        first.setdefault(id(p), name)
        places.add(place)
    return others
