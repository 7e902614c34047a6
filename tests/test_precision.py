"""Precisions and strategies: those that work, and why the others do not."""

from typing import Any

import pytest
import torch
from conftest import trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import nn

import meta_lightning
from meta_lightning import Conv4, Glyphs, ImageTransforms, MetaLearner, Sinusoid
from meta_lightning.checks import require_supported
from meta_lightning.inner.loop import Adapted

WORKING = {"32-true": torch.float32, "bf16-mixed": torch.float32, "64-true": torch.float64}


@pytest.mark.usefixtures("glyphs")
@pytest.mark.parametrize("precision", WORKING)
@pytest.mark.parametrize("algorithm", ["MAML", "FOMAML", "Reptile"])
@pytest.mark.parametrize("transforms", [None, ImageTransforms([0.5], [0.5])])
def test_precision(
    algorithm: str, precision: Any, transforms: ImageTransforms | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """θ, θ' and the moments are in full precision; the maps of convolutions are in half where that was asked."""
    torch.manual_seed(0)
    options = {"inner_optimizer": "adam"} if algorithm == "Reptile" else {}
    learner: MetaLearner = getattr(meta_lightning, algorithm)(Conv4(filters=4), inner_steps=2, **options)
    adapted: list[Adapted] = []
    maps: set[torch.dtype] = set()
    inner_loop = learner.inner_loop

    def note_adapted(*args: Any, **kwargs: Any) -> Adapted:
        adapted.append(inner_loop(*args, **kwargs))
        return adapted[-1]

    monkeypatch.setattr(learner, "inner_loop", note_adapted)
    first = next(module for module in learner.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(lambda module, args, output: maps.add(output.dtype))
    before = {name: p.detach().clone() for name, p in learner.meta_parameters().items()}
    data = Glyphs(queries=2, meta_batch_size=2, epoch_length=2, val_tasks=2, test_tasks=2, transforms=transforms)
    fit = trainer(precision=precision, max_steps=2)
    fit.fit(learner, data)
    fit.test(learner, data, verbose=False)
    fit.predict(learner, data)
    full = WORKING[precision]
    assert maps == {torch.bfloat16 if precision == "bf16-mixed" else full}
    assert {p.dtype for result in adapted for p in result.params.values()} == {full}
    assert {value.dtype for value in learner.state_dict().values() if value.is_floating_point()} == {full}
    assert all(p.isfinite().all() for p in learner.meta_parameters().values())
    assert all((p != before[name]).any() for name, p in learner.meta_parameters().items())


@pytest.mark.parametrize(
    ("precision", "reason"),
    [
        ("16-mixed", "underflow"),
        ("16-true", "θ"),
        ("bf16-true", "θ"),
        ("transformer-engine", "θ"),
    ],
)
def test_half_precision_of_the_inner_loop_is_refused(precision: str, reason: str) -> None:
    with pytest.raises(
        ValueError, match=rf"trainer\.precision .*32-true, bf16-mixed, 64-true.* {precision}: .*{reason}"
    ):
        require_supported(precision, DDPStrategy())


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
@pytest.mark.parametrize("run", ["fit", "test"])
def test_it_is_refused_at_the_start(precision: Any, run: str, mlp: meta_lightning.MLP, sinusoid: Sinusoid) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.precision .*64-true.* {precision}\b"):
        getattr(trainer(precision=precision, max_steps=1), run)(meta_lightning.MAML(mlp), sinusoid)


def test_strategies_that_shard_the_network_are_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer\.strategy .* FSDPStrategy\b"):
        require_supported("32-true", FSDPStrategy())
    require_supported("32-true", DDPStrategy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_casts_as_in_a_loop(dtype: torch.dtype) -> None:
    """Not float64."""
    network, x = torch.nn.Conv2d(1, 2, 3).to(dtype), torch.rand(3, 2, 1, 5, 5, dtype=dtype)
    params = {name: p.detach().expand(3, *p.shape) for name, p in network.named_parameters()}
    learner = meta_lightning.MAML(network)
    with torch.autocast("cpu", torch.bfloat16):
        ours, alone = learner.task_network.predict(params, x), network(x[0])
    assert ours.dtype == alone.dtype
    torch.testing.assert_close(ours[0], alone)
