"""One construction for every module class of torch.nn, or the reason why there is none."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from reference import SAMPLES, T
from torch import Tensor, nn

from meta_lightning import TaskBatch

CLASSES = sorted(name for name, found in vars(nn).items() if isinstance(found, type) and issubclass(found, nn.Module))
LOSSES = [name for name in CLASSES if "Loss" in name and name != "AdaptiveLogSoftmaxWithLoss"]
Call = Callable[[Any, Tensor], Tensor]  # of a module on a batch of samples


class Layer(NamedTuple):
    """How a class is made, and called on samples."""

    make: Callable[[], nn.Module]
    sample: Sequence[int]  # shape of one sample
    call: Call = lambda module, x: module(x)
    tokens: bool = False  # samples are integers from 0 to 4


def of(shape: Sequence[int], *names: str, args: Sequence[Any] = (), call: Call | None = None, **options: Any) -> Any:
    """Layers that are made and called alike."""

    def layer(name: str) -> Layer:
        def make() -> nn.Module:
            module: nn.Module = getattr(nn, name)(*args, **options)
            return module

        return Layer(make, shape) if call is None else Layer(make, shape, call)

    return {name: layer(name) for name in names}


def first(module: Any, x: Tensor) -> Tensor:
    output: Tensor = module(x)[0]
    return output


def with_itself(module: Any, x: Tensor) -> Tensor:
    output: Tensor = module(x, 0.5 * x + 0.1)
    return output


def unpooled(dims: int) -> Call:
    def call(module: Any, x: Tensor) -> Tensor:
        pooled, indices = getattr(nn.functional, f"max_pool{dims}d")(x, 2, return_indices=True)
        output: Tensor = module(pooled, indices)
        return output

    return call


LINE, PLANE, SPACE = (2, 6), (2, 4, 4), (2, 4, 4, 4)  # channels and positions in one, two and three dimensions
FLAT = (6,)
DIMS = ((1, LINE), (2, PLANE), (3, SPACE))
SEQUENCE = (3, 4)  # positions and features

ACTIVATIONS = """
CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6 SELU SiLU
Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink GLU Flatten
"""

LAYERS: dict[str, Layer] = {
    **of(FLAT, *ACTIVATIONS.split()),
    **of(FLAT, "Softmax", "LogSoftmax", "Softmin", args=[-1]),
    **of(FLAT, "Threshold", args=[0.1, 0.2]),
    **of(FLAT, "RReLU", args=[0.2, 0.2]),  # draws nothing
    **of(FLAT, "Dropout", "AlphaDropout", args=[0.0]),
    **of(FLAT, "Unflatten", args=[1, (2, 3)]),
    **of(FLAT, "Linear", args=[6, 4]),
    **of(FLAT, "LazyLinear", args=[4]),
    **of(FLAT, "Bilinear", args=[6, 6, 3], call=with_itself),
    **of(FLAT, "LayerNorm", "RMSNorm", args=[6]),
    **of(FLAT, "CosineSimilarity", "PairwiseDistance", call=with_itself),
    **of(FLAT, "AdaptiveLogSoftmaxWithLoss", args=[6, 5, [2, 4]], call=lambda module, x: module.log_prob(x)),
    **of(PLANE, "Softmax2d"),
    **of(PLANE, "LocalResponseNorm", "CrossMapLRN2d", args=[2]),
    **of((4, 3, 3), "GroupNorm", args=[2, 4]),
    **of((4, 2, 2), "PixelShuffle", "ChannelShuffle", args=[2]),
    **of(PLANE, "PixelUnshuffle", "Unfold", args=[2]),
    **of((8, 4), "Fold", args=[(4, 4), 2], stride=2),
    **of(PLANE, "Upsample", "UpsamplingBilinear2d", "UpsamplingNearest2d", scale_factor=2),
    **of(PLANE, "Dropout2d", "FeatureAlphaDropout", args=[0.0]),
    **of(LINE, "Dropout1d", args=[0.0]),
    **of(SPACE, "Dropout3d", args=[0.0]),
    **of(SEQUENCE, "RNN", "GRU", "LSTM", args=[4, 5], batch_first=True, call=first),
    **of(FLAT, "RNNCell", "GRUCell", args=[6, 5]),
    **of(FLAT, "LSTMCell", args=[6, 5], call=first),
    **of(SEQUENCE, "MultiheadAttention", args=[4, 2], batch_first=True, call=lambda m, x: m(x, x + 0.1, 0.5 * x)[0]),
    **of(SEQUENCE, "TransformerEncoderLayer", args=[4, 2], dim_feedforward=5, dropout=0.0, batch_first=True),
    **of(
        SEQUENCE,
        "TransformerDecoderLayer",
        args=[4, 2],
        dim_feedforward=5,
        dropout=0.0,
        batch_first=True,
        call=with_itself,
    ),
    **of(SEQUENCE, "Transformer", args=[4, 2, 1, 1, 5, 0.0], batch_first=True, call=with_itself),
    "TransformerEncoder": Layer(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=True), 1, enable_nested_tensor=False
        ),
        SEQUENCE,
    ),
    "TransformerDecoder": Layer(
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 5, 0.0, batch_first=True), 1),
        SEQUENCE,
        with_itself,
    ),
    "Embedding": Layer(lambda: nn.Embedding(5, 3), (4,), tokens=True),
    "EmbeddingBag": Layer(lambda: nn.EmbeddingBag(5, 3), (4,), tokens=True),
    "Sequential": Layer(lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh()), FLAT),
    "ModuleList": Layer(lambda: nn.ModuleList([nn.Linear(6, 4)]), FLAT, lambda m, x: m[0](x)),
    "ModuleDict": Layer(lambda: nn.ModuleDict({"a": nn.Linear(6, 4)}), FLAT, lambda m, x: m["a"](x)),
    "ParameterList": Layer(lambda: nn.ParameterList([torch.rand(6)]), FLAT, lambda m, x: m[0] * x),
    "ParameterDict": Layer(lambda: nn.ParameterDict({"a": torch.rand(6)}), FLAT, lambda m, x: m["a"] * x),
    "DataParallel": Layer(lambda: nn.DataParallel(nn.Linear(6, 4)), FLAT),
}
for dims, shape in DIMS:
    LAYERS |= of(shape, f"BatchNorm{dims}d", f"InstanceNorm{dims}d", args=[2])
    LAYERS |= of(shape, f"LazyBatchNorm{dims}d", f"LazyInstanceNorm{dims}d")
    LAYERS |= of(shape, f"Conv{dims}d", f"ConvTranspose{dims}d", args=[2, 3, 2])
    LAYERS |= of(shape, f"LazyConv{dims}d", f"LazyConvTranspose{dims}d", args=[3, 2])
    LAYERS |= of(shape, f"AvgPool{dims}d", f"MaxPool{dims}d", f"AdaptiveAvgPool{dims}d", args=[2])
    LAYERS |= of(shape, f"AdaptiveMaxPool{dims}d", args=[2])
    LAYERS |= of(shape, f"LPPool{dims}d", args=[2, 2])
    LAYERS |= of(shape, f"MaxUnpool{dims}d", args=[2], call=unpooled(dims))
    LAYERS |= of(shape, *(f"{kind}Pad{dims}d" for kind in ("Circular", "Reflection", "Replication", "Zero")), args=[1])
    LAYERS |= of(shape, f"ConstantPad{dims}d", args=[1, 0.5])

# torch has no second derivative of these: MAML refuses them
ONCE_DIFFERENTIABLE = {"Hardsigmoid", "CrossMapLRN2d", "EmbeddingBag"}

# updates running statistics in forward: MAML refuses to recompute it
KEEPS_STATISTICS = {f"LazyInstanceNorm{dims}d" for dims, _ in DIMS}

# why a class has no construction
REASONS = {
    "Module": "abstract",
    "Container": "abstract, deprecated",
    "RNNBase": "abstract: RNN, GRU and LSTM",
    "RNNCellBase": "abstract: RNNCell, GRUCell and LSTMCell",
    "SyncBatchNorm": "runs on a GPU in several processes only",
    "FractionalMaxPool2d": "draws its regions anew at every call, so there is nothing to compare with",
    "FractionalMaxPool3d": "draws its regions anew at every call, so there is nothing to compare with",
}


class Around(nn.Module):
    """A layer in a position, behind a scale that takes gradients of its input, and before a linear head."""

    def __init__(self, layer: Layer, position: str) -> None:
        super().__init__()
        self.call, self.position, self.tokens = layer.call, position, layer.tokens
        self.scale = nn.Parameter(0.5 + torch.rand(layer.sample))
        self.layer = layer.make()
        self.dropout = nn.Dropout(0.0)
        x = samples(layer, 1)
        self.call(self.layer, x)  # gives lazy layers their shape
        if position == "tied":
            self.other = layer.make()
            self.call(self.other, x)
            for name, p in list(self.layer.named_parameters()):
                owner, _, attribute = name.rpartition(".")
                setattr(self.other.get_submodule(owner), attribute, p)
        self.head = nn.Linear(self.body(x).reshape(SAMPLES, -1).shape[1], 2)

    def body(self, x: Tensor) -> Tensor:
        x = x if self.tokens else x * self.scale
        y = self.call(self.layer, self.dropout(x) if self.position == "under dropout 0" and not self.tokens else x)
        if self.position == "tied":
            y = y * self.call(self.other, x).tanh()
        if self.position == "reused":
            y = y * self.call(self.layer, x.flip(0)).tanh()
        return self.dropout(y) if self.position == "under dropout 0" else y

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).reshape(len(x), -1))
        return logits


class Called(nn.Module):
    """A layer as a module of one argument."""

    def __init__(self, layer: nn.Module, call: Call) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


def samples(layer: Layer, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    shape = SAMPLES, *layer.sample
    return torch.randint(5, shape, generator=rng) if layer.tokens else torch.randn(shape, generator=rng)


def tasks(layer: Layer) -> TaskBatch:
    def part(seed: int) -> tuple[Tensor, Tensor]:
        x = torch.stack([samples(layer, seed + task) for task in range(T)])
        return x, torch.arange(2).repeat(T, SAMPLES // 2)

    return TaskBatch(*part(1), *part(10))
