"""ResNet-12, against learn2learn's, which is Lee et al.'s code, and MAML on it against a literal loop."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from meta_lightning import MAML, TaskBatch
from meta_lightning.networks import ResNet12

TADAM, METAOPTNET = (64, 128, 256, 512), (64, 160, 320, 640)


def tiny(drop: float = 0.0) -> ResNet12:
    return ResNet12(ways=3, filters=[2, 3, 4, 5], drop=drop).double()


def tiny_tasks() -> TaskBatch:
    return TaskBatch(
        torch.randn(2, 6, 3, 16, 16).double(),
        torch.arange(3).repeat(2, 2),
        torch.randn(2, 9, 3, 16, 16).double(),
        torch.arange(3).repeat(2, 3),
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("filters", "millions"), [(TADAM, 8.0), (METAOPTNET, 12.4)])
def test_it_has_the_published_sizes(filters: tuple[int, ...], millions: float) -> None:
    count = sum(p.numel() for p in ResNet12(filters=filters).parameters())
    # three 3×3 kernels and one of 1×1 a block, four batch norms, and the head; no biases
    blocks = [9 * (a * b + 2 * b * b) + a * b + 4 * 2 * b for a, b in pairwise([3, *filters])]
    assert count == sum(blocks) + 5 * filters[-1] + 5
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_images_of_any_size_from_16_pixels() -> None:
    network = ResNet12(filters=[4, 6, 8, 10])
    for size, side in ((84, 5), (32, 2), (16, 1)):
        images = torch.rand(2, 3, size, size)
        assert network(images).shape == (2, 5)
        assert network.features[:-2](images).shape == (2, 10, side, side)
    assert ResNet12(ways=7, channels=1, filters=[4, 4, 4, 4])(torch.rand(2, 1, 28, 30)).shape == (2, 7)


def test_it_computes_what_the_authors_network_does() -> None:
    models = pytest.importorskip("learn2learn.vision.models")  # takes seconds to import
    reference = models.ResNet12(output_size=5, hidden_size=512, wider=False, dropblock_dropout=0.0).train()
    network = ResNet12()
    modules = {"head": "classifier"}
    for block in range(4):
        ours, theirs = f"features.{block}", f"features.layer{block + 1}.0"
        names = ("conv1", "bn1", None, "conv2", "bn2", None, "conv3", "bn3")  # None: leaky ReLU
        modules |= {f"{ours}.residual.{i}": f"{theirs}.{name}" for i, name in enumerate(names) if name}
        modules |= {f"{ours}.shortcut.{i}": f"{theirs}.downsample.{i}" for i in (0, 1)}
    for ours, theirs in modules.items():
        network.get_submodule(ours).load_state_dict(reference.get_submodule(theirs).state_dict(), strict=False)

    x, y = torch.randn(4, 3, 84, 84), torch.arange(4)
    logits, expected = network(x), reference(x)
    assert torch.allclose(logits, expected, atol=1e-5)
    F.cross_entropy(logits, y).backward()
    F.cross_entropy(expected, y).backward()
    compared = 0
    for ours, theirs in modules.items():
        for name, p in network.get_submodule(ours).named_parameters():
            assert torch.allclose(p.grad, reference.get_submodule(theirs).get_parameter(name).grad, atol=1e-5)
            compared += 1
    assert compared == len([*network.parameters()]) == len([*reference.parameters()])


def test_weights_start_as_the_authors() -> None:
    block = ResNet12().features[3]
    for convolution, fan_out in ((block.residual[0], 9 * 512), (block.shortcut[0], 512)):
        assert convolution.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)


@pytest.mark.parametrize("steps", [1, 3])
def test_mamls_meta_gradient_agrees_with_a_loop_over_the_tasks(steps: int) -> None:
    network, batch = tiny(), tiny_tasks()
    learner = MAML(network, inner_lr=0.1, inner_steps=steps)
    meta_gradient, *_ = learner.meta_gradient(batch)
    assert not learner.task_network.loops_over_tasks  # vmap takes it

    theta = dict(network.named_parameters())
    grads = torch.autograd.grad(maml_objective(network, theta, batch, steps), [*theta.values()])
    expected = dict(zip(theta, grads, strict=True))
    assert meta_gradient.keys() == theta.keys()
    scale = max(g.abs().max() for g in expected.values())
    assert max((meta_gradient[name] - g).abs().max() for name, g in expected.items()) <= 1e-9 * scale


def maml_objective(network: nn.Module, theta: dict[str, Tensor], batch: TaskBatch, steps: int) -> Tensor:
    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        params = theta
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(network, params, (support_x,)), support_y)
            grads = torch.autograd.grad(loss, [*params.values()], create_graph=True)
            params = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads, strict=True)}
        losses.append(F.cross_entropy(functional_call(network, params, (query_x,)), query_y))
    return torch.stack(losses).mean()


def test_it_drops_in_training_only() -> None:
    network, batch = tiny(drop=0.5), tiny_tasks()
    learner = MAML(network, inner_steps=2)
    assert all(g.isfinite().all() for g in learner.meta_gradient(batch)[0].values())
    assert not learner.task_network.loops_over_tasks
    x = batch.support_x[0]
    assert not torch.equal(network(x), network(x))
    assert torch.equal(network.eval()(x), network(x))


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"filters .*\b4 .*\[64, 128\]"):
        ResNet12(filters=[64, 128])
    with pytest.raises(ValueError, match=r"filters .*\b4 .*\[4, 4, 0, 4\]"):
        ResNet12(filters=[4, 4, 0, 4])
    with pytest.raises(ValueError, match=r"channels .* 0"):
        ResNet12(channels=0)
    with pytest.raises(ValueError, match=r"\bdrop .* 1\.0"):
        ResNet12(drop=1.0)
    with pytest.raises(ValueError, match=r"images .*16×16\b.*\(15, 20\)"):
        tiny()(torch.rand(1, 3, 15, 20).double())
