"""Adapters of peft: they alone are meta-learnt and adapted."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from references import (
    EXACT,
    TASKS_FROM_A_LIST,
    adapted_copy,
    adapted_mean,
    classification,
    error,
    fomaml_loop,
    maml_loop,
    trained,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from meta_lightning import FOMAML, MAML, Backbone, Reptile, TaskBatch

peft = pytest.importorskip("peft", reason="needs peft, the extra peft")
pytestmark = [*TASKS_FROM_A_LIST, pytest.mark.filterwarnings("ignore:All of the backbone")]


class Transformer(nn.Module):
    """Two layers over the 4 parts of a sample."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x.unflatten(1, (4, 6))).mean(1))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))


def with_lora(network: nn.Module, **options: Any) -> nn.Module:
    """LoRA in some layers, with matrices that are not zero."""
    wrapped = peft.get_peft_model(network, peft.LoraConfig(r=2, lora_alpha=4, **options))
    for p in trained(wrapped).values():
        nn.init.normal_(p, std=0.3)
    return wrapped.double()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: with_lora(perceptron(), target_modules=["0", "2"], modules_to_save=["4"]),
    "transformer": lambda: with_lora(Transformer(), target_modules=["linear1", "linear2"]),
    "backbone": lambda: Backbone(with_lora(perceptron(), target_modules=["2"]), unfreeze=["*lora_*"], features=5),
}


def of_batch(network: nn.Module, algorithm: type[MAML]) -> tuple[Any, TaskBatch]:
    return algorithm(network, inner_lr=0.1, inner_steps=3), classification(24)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize(("algorithm", "loop"), [(MAML, maml_loop), (FOMAML, fomaml_loop)])
def test_meta_gradients(algorithm: type[MAML], loop: Callable[..., Any], make: Callable[[], nn.Module]) -> None:
    network = make()
    learner, batch = of_batch(network, algorithm)
    ours = learner.meta_gradient(batch)[0]
    assert all("lora_" in name or "modules_to_save" in name or name.startswith("head.") for name in ours)
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused kernels have no second derivative
        assert error(ours, loop(copy.deepcopy(network), batch, 3)) < EXACT


def test_reptile_moves_the_adapters_alone() -> None:
    network, batch = NETWORKS["linear"](), classification(24)
    learner = Reptile(network, inner_lr=0.1, inner_steps=3)
    support = learner.support(batch.support_x, batch.support_y, 3)
    mean = learner.in_passes(learner.adapt_pass, support)[0]
    assert error(mean, adapted_mean(network, batch, 3)) < EXACT


def test_a_predictor_of_adapters() -> None:
    network = NETWORKS["linear"]()
    x, y = torch.randn(10, 24), torch.arange(5).repeat(2)
    predictor = FOMAML(network, inner_lr=0.1).adapt(x, y)
    before, after = network.state_dict(), predictor.network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {*trained(network)}


@pytest.mark.parametrize("adapters_are_frozen", [False, True])
def test_adapters_inside_transformer_layers_count_in_evaluation(adapters_are_frozen: bool, tmp_path: Path) -> None:
    network = NETWORKS["transformer"]()
    if adapters_are_frozen:  # what is in front of the head runs once per sample
        network = nn.Sequential(network.requires_grad_(False), nn.Linear(5, 5))
    x, y = torch.randn(10, 24), torch.arange(5).repeat(2)
    learner = FOMAML(network, inner_lr=0.1, inner_steps=1)
    learner.meta_gradient(TaskBatch(x[None], y[None], x[None], y[None]))
    predictor = learner.eval().adapt(x, y)
    predictor.save(tmp_path / "adapted.pt2")
    program = torch.export.load(tmp_path / "adapted.pt2").module()

    def literal(network: nn.Module) -> torch.Tensor:
        """Without dropout, training mode is evaluation mode without torch's fast path."""
        return copy.deepcopy(network).train()(x)

    start = adapted_copy(network.train(), x, y, 1, F.cross_entropy)
    with torch.no_grad():
        for ours in (predictor(x), program(x)):
            assert (ours - literal(start)).abs().max() < EXACT
        assert (learner(x) - literal(network)).abs().max() < EXACT
