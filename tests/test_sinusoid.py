import pytest
import torch

from meta_lightning import Sinusoid


def test_a_task_is_one_sine_wave_in_the_papers_ranges() -> None:
    support_x, support_y, query_x, query_y = Sinusoid().task_set("test").batch(range(200))
    assert support_x.shape == support_y.shape == (200, 10, 1)
    assert query_x.shape == query_y.shape == (200, 100, 1)
    x, y = torch.cat([support_x, query_x], 1).double(), torch.cat([support_y, query_y], 1).double()
    assert -5 <= x.min() < -4.9
    assert 4.9 < x.max() <= 5
    # every wave is a combination of sin and cos, whose coefficients give amplitude and phase back
    basis = torch.cat([x.sin(), -x.cos()], dim=2)
    coefficients = torch.linalg.lstsq(basis, y).solution
    assert torch.allclose(basis @ coefficients, y, atol=1e-5)
    amplitude = coefficients.norm(dim=1).squeeze()
    phase = torch.atan2(coefficients[:, 1], coefficients[:, 0]).squeeze()
    assert 0.1 <= amplitude.min() < 0.3
    assert 4.8 < amplitude.max() <= 5
    assert 0 <= phase.min() < 0.1
    assert 3.04 < phase.max() <= torch.pi


def test_training_may_have_other_points_than_the_test() -> None:
    data = Sinusoid(shots=5, queries=7, test_queries=20, train_shots=10)
    assert [part.shape[1] for part in data.task_set("train").batch([0])] == [10, 10, 7, 7]
    assert [part.shape[1] for part in data.task_set("test").batch([0])] == [5, 5, 20, 20]


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"\btrain_shots .* 0"):
        Sinusoid(train_shots=0)
    with pytest.raises(ValueError, match=r"\bshots .* 0"):
        Sinusoid(shots=0)
    with pytest.raises(ValueError, match=r"\bmeta_batch_size .* 0"):
        Sinusoid(meta_batch_size=0)
