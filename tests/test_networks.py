import pytest
import torch
from torch import nn

from meta_lightning import MAML, MLP, Conv4, ResNet12
from meta_lightning.checks import InputError
from meta_lightning.networks.batch_statistics import with_batch_statistics


def test_conv4_has_the_papers_sizes() -> None:
    # Finn et al.'s code: 64 filters and stride 2 for Omniglot; 32 filters and max-pooling for mini-ImageNet, whose
    # network of 32,901 parameters is the usual one
    omniglot, imagenet = Conv4(), Conv4(channels=3, image_size=84, filters=32, downsample="max_pool")
    count = [sum(p.numel() for p in network.parameters()) for network in (omniglot, imagenet)]
    assert count == [(9 * 64 + 64) + 3 * (9 * 64 * 64 + 64) + 4 * 128 + 64 * 5 + 5, 32901]
    assert omniglot(torch.rand(7, 1, 28, 28)).shape == (7, 5)
    assert imagenet(torch.rand(7, 3, 84, 84)).shape == (7, 5)
    assert omniglot.features[:-2](torch.rand(2, 1, 28, 28)).shape == (2, 64, 2, 2)


def test_mlp_is_the_sinusoid_network() -> None:
    assert [p.shape for p in MLP().parameters()] == [(40, 1), (40,), (40, 40), (40,), (1, 40), (1,)]
    assert MLP(in_features=12, hidden=[], out_features=3)(torch.rand(4, 3, 2, 2)).shape == (4, 3)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"filters .* 0"):
        Conv4(filters=0)
    with pytest.raises(ValueError, match=r"downsample .*'stride', 'max_pool'.*'pool'"):
        Conv4(downsample="pool")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"image_size .*\b16\b.* 8"):
        Conv4(image_size=8, downsample="max_pool")


def test_samples_that_a_network_was_not_made_for_are_refused() -> None:
    pooled = Conv4(channels=3, image_size=84, filters=4, downsample="max_pool")
    message = r"network .*\b{}\b.*{}"
    with pytest.raises(InputError, match=message.format("channels 3", r"\(1, 84, 84\)")):
        pooled(torch.rand(2, 1, 84, 84))
    with pytest.raises(InputError, match=message.format("image_size 84", r"\(28, 28\)")):
        pooled(torch.rand(2, 3, 28, 28))
    with pytest.raises(InputError, match=message.format("channels 3", r"\(1, 32, 32\)")):
        ResNet12(filters=(1, 1, 1, 1))(torch.rand(2, 1, 32, 32))
    with pytest.raises(InputError, match=message.format("channels 1", r"\(28,\)")):
        Conv4(filters=4)(torch.rand(2, 28))
    with pytest.raises(InputError, match=r"network .*\bin_features 12\b.*\(3, 2\), 6\b"):
        MLP(in_features=12)(torch.rand(4, 3, 2))
    learner = MAML(pooled)
    with pytest.raises(InputError, match=r"network .*\bchannels 3\b.*\(1, 84"):  # where the tasks' images meet it
        learner.inner_update(torch.rand(5, 1, 84, 84), torch.arange(5))
    assert not learner.task_network.loops_over_tasks  # not taken for vmap's refusal


def test_images_of_any_size_serve_where_the_map_is_averaged() -> None:
    assert Conv4(filters=4)(torch.rand(2, 1, 40, 32)).shape == (2, 5)
    pooled = Conv4(channels=3, image_size=84, filters=4, downsample="max_pool")
    assert pooled(torch.rand(2, 3, 80, 95)).shape == (2, 5)


def test_the_copy_for_batch_statistics_shares_the_parameters() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    copy = with_batch_statistics(network, network.parameters())
    assert all(a is b for a, b in zip(network.parameters(), copy.parameters(), strict=True))
    assert network[1].running_mean is not None
    assert not list(copy.buffers())
