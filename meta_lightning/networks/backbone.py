"""A pretrained network in front of a linear head."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import load_file
from torch import Tensor, nn

from meta_lightning.checks import InputError, nearest, require, require_at_least, require_installed, require_matches
from meta_lightning.inner.copies import copied

DEFAULT = "default"
PICTURES = (64, 224)  # sizes in pixels of which networks take at least one
LIBRARIES = ("timm", "torchvision")
UNKNOWN = f"backbone makes no vector of a picture of {' or '.join(map(str, PICTURES))} pixels"
loads_weights: ContextVar[bool] = ContextVar("loads_weights", default=True)


@contextmanager
def without_weights() -> Iterator[None]:
    """Build backbones without their weights, which a checkpoint or a saved predictor has."""
    token = loads_weights.set(False)
    try:
        yield
    finally:
        loads_weights.reset(token)


class Backbone(nn.Sequential):
    """A pretrained network, its body, in front of a linear head: ``head(body(x))``.

    The body is frozen except for what ``unfreeze`` names: it keeps its batch-norm statistics, is in evaluation mode and
    runs once per sample. What it makes of a sample is kept and not computed again. Where the last blocks are unfrozen,
    that holds for the blocks before them, if the body is a chain of its children (as ResNets are); else all of it runs
    at every inner step. Batch norm of unfrozen blocks uses batch statistics.
    Input ``S …``, output ``S N``.

    Args:
        backbone: ``timm/NAME`` or ``torchvision/NAME``, whose classifier is removed; the class path of a module; or a
            module from samples ``S …`` to features ``S D``.
        ways: Outputs, one per class (N).
        weights: Weights of the body: ``default`` for those of the library, which it downloads or finds in its cache, or
            the path of a state dict (.safetensors, or what ``torch.save`` wrote). Default: none for a name, and those
            that it has for a module.
        unfreeze: Name patterns of parameters of the body that are trained: ``layer4.*``, or ``*lora_*`` of peft.
        features: Number of features per sample (D). Default: found by a picture of 64 or 224 pixels.
        cache_dir: Folder for files of the features of training, validation and test, which later runs read. Default: in
            memory, for one run.

    Raises:
        InputError: If an argument cannot be used, or the weights are not there.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        ways: int = 5,
        weights: str | None = None,
        unfreeze: Sequence[str] = (),
        features: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        require_at_least(1, ways=ways, features=1 if features is None else features)
        body, classifier = built(backbone, weights == DEFAULT and loads_weights.get())
        if weights is not None and weights != DEFAULT and loads_weights.get():
            load_weights(body, weights, classifier)
        names = dict(body.named_parameters())
        trained = require_matches(names, unfreeze=unfreeze)
        for name, p in names.items():
            p.requires_grad_(name in trained)
        outputs = None if features is not None and not trained else outputs_of(body)
        if trained and not isinstance(body, nn.Sequential):
            body = chain_of(body, unfreeze)
        require(outputs is not None or features is not None, f"features must be given, since {UNKNOWN}, got None")
        body.train()
        super().__init__(OrderedDict(body=body, head=nn.Linear(features or outputs or 0, ways)))
        self.cache_dir = cache_dir


def built(backbone: str | nn.Module, pretrained: bool) -> tuple[nn.Module, str]:
    """A body that returns features, and the name of the classifier that it lacks; a given module is copied."""
    if isinstance(backbone, nn.Module):
        require(not pretrained, f"weights must be a path for a module of one's own, got {DEFAULT!r}")
        return copied(backbone), ""
    library, _, name = backbone.partition("/")
    if library not in LIBRARIES:
        return built(of_class_path(backbone), pretrained)
    require_installed(f"backbone {backbone!r}", "backbones", library)
    make, names = (of_timm if library == "timm" else of_torchvision)()
    near = nearest(name, names)
    hint = "" if near is None else f"; did you mean {library}/{near}?"
    require(name in names, f"backbone must name a network of {library}, got {backbone!r}{hint}")
    try:
        return make(name, pretrained)
    except InputError:
        raise
    except Exception as error:  # whatever the library and its ways to the network raise
        if not pretrained:
            raise
        came = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        hint = "download them where there is a network, and give the path of their state dict"
        raise InputError(
            f"weights {DEFAULT!r} of {backbone} must be at hand or downloadable, got {came}; {hint}"
        ) from None


def of_class_path(path: str) -> nn.Module:
    """A module of a class that can be imported, without arguments."""
    expected = f"backbone must be {', '.join(f'{library}/NAME' for library in LIBRARIES)} or the class path of a module"
    try:
        found = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{expected}, got {path!r}: {error}") from None
    require(isinstance(found, type) and issubclass(found, nn.Module), f"{expected}, got {path!r}")
    try:
        module: nn.Module = found()
    except TypeError as error:
        raise InputError(f"{expected} without required arguments, got {path!r}: {error}") from None
    return module


Make = Callable[[str, bool], tuple[nn.Module, str]]


def of_timm() -> tuple[Make, list[str]]:
    """What builds networks of timm, and their names."""
    import timm

    def make(name: str, pretrained: bool) -> tuple[nn.Module, str]:
        body: Any = timm.create_model(name, pretrained, num_classes=0)
        return body, str(body.default_cfg.get("classifier", ""))

    return make, timm.list_models()


def of_torchvision() -> tuple[Make, list[str]]:
    """What builds networks of torchvision, and their names."""
    from torchvision import models

    def make(name: str, pretrained: bool) -> tuple[nn.Module, str]:
        body: nn.Module = models.get_model(name, weights="DEFAULT" if pretrained else None)
        classifier = next((path for path, part in reversed([*body.named_modules()]) if isinstance(part, nn.Linear)), "")
        require(bool(classifier), f"backbone must end with a linear classifier, got torchvision/{name} without")
        owner, _, leaf = classifier.rpartition(".")
        setattr(body.get_submodule(owner), leaf, nn.Identity())
        return body, classifier

    return make, models.list_models(models)


def load_weights(body: nn.Module, path: str, classifier: str) -> None:
    """Load a state dict, but for that of the classifier."""
    expected, file = f"weights must be {DEFAULT!r} or the path of a state dict, got {path}", Path(path).expanduser()
    require(file.is_file(), f"{expected}, which is not a file")
    try:
        safe = file.suffix == ".safetensors"
        state = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises what it likes for other files
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise InputError(f"{expected}, which cannot be read: {reason}") from None
    tensors = isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())
    require(tensors, f"{expected}, which holds something else")
    state = {name: value for name, value in state.items() if not classifier or not name.startswith(f"{classifier}.")}
    own, came = ({n: tuple(value.shape) for n, value in values.items()} for values in (body.state_dict(), state))
    differ = sorted(dict(own.items() ^ came.items()))
    listed = ", ".join(f"{name}: expected {own.get(name)}, got {came.get(name)}" for name in differ[:3])
    require(not differ, f"weights must be of the backbone, got {path}, which differs in {len(differ)} names: {listed}")
    body.load_state_dict(state)


def picture_of(body: nn.Module, size: int) -> Tensor:
    """Two pictures of random pixels."""
    layers = (part for part in body.modules() if isinstance(part, nn.Conv2d))
    channels = next((layer.in_channels for layer in layers), 3)
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs_of(body: nn.Module) -> int | None:
    """Number of features per picture; None if the body does not take pictures, or makes no vectors of them."""
    body.eval()
    for size in PICTURES:
        with suppress(RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError):
            features = body(picture_of(body, size))
            if isinstance(features, Tensor) and features.ndim == 2:
                return features.shape[1]
    return None


def made_of(x: Tensor, module: nn.Module, training: bool) -> Tensor:
    """The output of a copy in this mode, with the same random numbers always."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output: Tensor = copied(module).train(training)(x)
        return output


@torch.no_grad()
def chain_of(body: nn.Module, unfreeze: Sequence[str]) -> nn.Module:
    """A body as the chain of its children, perhaps flattened at the end, if that computes the same; else the body."""
    children = [*body.named_children()]
    for chain in (children, [*children, ("flatten", nn.Flatten())]):
        sequence = nn.Sequential(OrderedDict(chain))
        if sequence.state_dict().keys() != body.state_dict().keys():
            continue
        for size in PICTURES:
            with suppress(RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError):
                x = picture_of(body, size)
                # in both modes: a forward may call functions that are active in training only, such as dropout
                if all(torch.equal(made_of(x, sequence, mode), made_of(x, body, mode)) for mode in (False, True)):
                    return sequence
    rank_zero_warn(
        f"All of the backbone runs at every inner step with unfreeze {', '.join(unfreeze)}, since "
        f"{type(body).__name__} is no chain of its children"
    )
    return body
