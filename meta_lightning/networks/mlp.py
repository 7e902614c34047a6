"""A multilayer perceptron."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from meta_lightning.checks import InputError


class MLP(nn.Module):
    """Linear layers with ReLU between them; the defaults are the sinusoid network of Finn et al. (2017).

    Input ``S …``, output ``S out_features``.

    Args:
        in_features: Input features per sample; samples of several dimensions are flattened.
        hidden: Units of each hidden layer.
        out_features: Outputs: the number of classes, or the dimensions of a regression target.
    """

    def __init__(self, in_features: int = 1, hidden: Sequence[int] = (40, 40), out_features: int = 1) -> None:
        super().__init__()
        sizes = [in_features, *hidden]
        layers = [layer for sides in pairwise(sizes) for layer in (nn.Linear(*sides), nn.ReLU())]
        self.features = nn.Sequential(nn.Flatten(), *layers)
        self.head = nn.Linear(sizes[-1], out_features)
        self.in_features = in_features

    def forward(self, x: Tensor) -> Tensor:
        """Outputs for samples.  # S ... -> S out_features"""
        shape, size = tuple(x.shape[1:]), x.shape[1:].numel()
        if size != self.in_features:
            raise InputError(
                f"network expects in_features {self.in_features}, got samples of shape {shape}, {size} each"
            )
        outputs: Tensor = self.head(self.features(x))
        return outputs
