"""A multilayer perceptron."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from meta_lightning.checks import require


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
