"""Every module class of torch.nn, in four positions: what a literal loop over tasks computes, or refused by name."""

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from layers import (
    CLASSES,
    KEEPS_STATISTICS,
    LAYERS,
    LOSSES,
    ONCE_DIFFERENTIABLE,
    REASONS,
    Around,
    Called,
    Layer,
    samples,
    tasks,
)
from reference import ALGORITHMS, EXACT, RATE, STEPS, WAYS, ours, update, worst
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from meta_lightning import FOMAML
from meta_lightning.checks import InputError
from meta_lightning.inner.state import equal

pytestmark = pytest.mark.usefixtures("double")

POSITIONS = ("plain", "tied", "reused", "under dropout 0")


def test_every_class_has_a_construction_or_a_reason() -> None:
    known = {*LAYERS, *REASONS, *LOSSES}
    assert not known - {*CLASSES}
    assert not {*CLASSES} - known, "add a construction to layers.py"


@pytest.mark.filterwarnings("ignore")  # of torch, on what the classes are given
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_as_in_a_loop_over_tasks(name: str) -> None:
    layer = LAYERS[name]
    wrong = {}
    for position in POSITIONS:
        torch.manual_seed(0)
        network = Around(layer, position)
        if position == "tied" and not any(True for _ in network.layer.parameters()):
            continue
        batch = tasks(layer)
        once = name in ONCE_DIFFERENTIABLE
        algorithms = [a for a in ALGORITHMS if a != "MAML" or not once]
        expected = {a: update(a, network, batch, STEPS, RATE, nn.CrossEntropyLoss()) for a in algorithms}
        for algorithm, options in WAYS:
            if algorithm == "MAML" and once:
                with pytest.raises(InputError, match=r"network .*torch says.*second derivative, FOMAML"):
                    ours(algorithm, copy.deepcopy(network), batch, **options)
                continue
            if name in KEEPS_STATISTICS and "recompute_inner_steps" in options:
                with pytest.raises(
                    InputError, match=r"recompute_inner_steps must be off.* changes layer.*running_mean"
                ):
                    ours(algorithm, copy.deepcopy(network), batch, **options)
                continue
            try:
                got = ours(algorithm, copy.deepcopy(network), batch, **options)
                error = worst(got, expected[algorithm])
            except Exception as refusal:
                error = f"{type(refusal).__name__}: {str(refusal)[:90]}"  # type: ignore[assignment]
            if not (isinstance(error, float) and error <= EXACT):
                wrong[position, algorithm, *options] = error
    assert not wrong, "\n".join(f"{place}: {error}" for place, error in wrong.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYERS)
def test_recorded_evaluation_is_the_same_to_the_bit(name: str) -> None:
    """In evaluation mode, where dropout draws nothing, statistics are kept and transformers have a fast path."""
    layer, found = LAYERS[name], []
    torch.manual_seed(0)
    network, batch = Around(layer, "plain"), tasks(layer)
    for compile_passes in ("record", False):
        learner = FOMAML(copy.deepcopy(network), inner_lr=RATE, inner_steps=STEPS, compile_passes=compile_passes).eval()
        torch.manual_seed(1)
        found.append([part for _ in range(4) for part in learner.predict_tasks(batch)])
    assert all(map(equal, *found))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if not layer.tokens])
def test_torchs_second_derivative_is_right(name: str) -> None:
    """Else the loop, which uses it too, could not decide; where there is none, MAML refuses the layer."""
    layer = LAYERS[name]
    torch.manual_seed(0)
    module, x = layer.make(), samples(layer, 1).requires_grad_()
    layer.call(module, x)  # gives lazy layers their shape
    called = Called(module, layer.call)
    params = dict(called.named_parameters())

    def function(x: Tensor, *values: Tensor) -> Any:
        return functional_call(called, dict(zip(params, values, strict=True)), (x,))

    with sdpa_kernel(SDPBackend.MATH):
        if name in ONCE_DIFFERENTIABLE:
            with pytest.raises(RuntimeError):
                torch.autograd.gradgradcheck(function, (x, *params.values()), fast_mode=True)
        else:
            assert torch.autograd.gradgradcheck(function, (x, *params.values()), fast_mode=True)


def batched(names: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    """itertools.batched, which Python 3.12 has."""
    rest = iter(names)
    while batch := tuple(islice(rest, size)):
        yield batch


def side_by_side(names: Sequence[str]) -> Layer:
    """Layers of the same samples as one: compiling takes as long for several."""
    layers = [LAYERS[name] for name in names]

    def call(modules: Any, x: Tensor) -> Tensor:
        pairs = zip(layers, modules, strict=True)
        return torch.cat([layer.call(module, x).reshape(len(x), -1) for layer, module in pairs], 1)

    return Layer(lambda: nn.ModuleList([layer.make() for layer in layers]), layers[0].sample, call)


def groups() -> list[tuple[str, ...]]:
    """All compilable classes: one by one if they have parameters, else up to eight of the same samples."""
    alone, free = [], defaultdict(list)
    for name in sorted({*LAYERS} - ONCE_DIFFERENTIABLE):
        layer = LAYERS[name]
        has_parameters = layer.tokens or any(True for _ in layer.make().parameters())
        (alone if has_parameters else free[layer.sample]).append(name)
    return [(name,) for name in alone] + [names for of_shape in free.values() for names in batched(of_shape, 8)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", groups(), ids="+".join)
def test_compiled_layers_are_as_in_a_loop_over_tasks(names: tuple[str, ...]) -> None:
    layer = LAYERS[names[0]] if len(names) == 1 else side_by_side(names)
    torch.manual_seed(0)
    network, batch = Around(layer, "plain"), tasks(layer)
    expected = update("MAML", network, batch, STEPS, RATE, nn.CrossEntropyLoss())
    assert worst(ours("MAML", copy.deepcopy(network), batch, compile_passes=True), expected) <= EXACT
