"""Random numbers of many tasks at once against NumPy's generators."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from meta_lightning import Sinusoid
from meta_lightning.data.streams import generators, uniforms
from meta_lightning.data.tasks import SPLITS


@given(
    prefix=st.lists(st.integers(0, 2**140), min_size=1, max_size=3),
    tasks=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5),
    count=st.integers(0, 9),
)
def test_they_are_numpys_to_the_bit(prefix: list[int], tasks: list[int], count: int) -> None:
    expected = [np.random.default_rng((*prefix, task)).random(count) for task in tasks]
    np.testing.assert_array_equal(uniforms(prefix, tasks, count), np.array(expected))
    for rng, task in zip(generators(prefix, tasks), tasks, strict=True):
        again = np.random.default_rng((*prefix, task))
        assert rng.bit_generator.state == again.bit_generator.state
        assert rng.permutation(9).tolist() == again.permutation(9).tolist()


def test_waves_do_not_depend_on_the_tasks_that_are_drawn_with_them() -> None:
    data = Sinusoid(seed=3, shots=4)
    for split in SPLITS:
        waves = data.task_set(split)
        for tasks in ([0], [7, 3, 9000], range(4090, 4110), [5]):
            support_x, support_y, query_x, query_y = waves.batch(tasks)
            x, y = torch.cat([support_x, query_x], 1), torch.cat([support_y, query_y], 1)
            for of_task, expected_y, task in zip(x, y, tasks, strict=True):
                rng = np.random.default_rng((3, SPLITS.index(split), task))
                amplitude, phase = rng.uniform(0.1, 5.0), rng.uniform(0.0, math.pi)
                points = rng.uniform(-5.0, 5.0, (x.shape[1], 1))
                assert torch.equal(of_task, torch.from_numpy(points).float())
                torch.testing.assert_close(expected_y, torch.from_numpy(amplitude * np.sin(points - phase)).float())
