"""The task-parallel kernels against a loop over tasks by torch's own functions, to second order, in float64."""

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F

from meta_lightning.inner import kernels
from meta_lightning.inner.kernels import TasksAsChannels

Function = Callable[..., Tensor]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def conv2d(**how: Any) -> Function:
    return lambda x, w, b: F.conv2d(x, w, b, **how)


def normalise(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, w, b, training=True)


CASES: dict[str, tuple[Function, list[tuple[int, ...]]]] = {
    "padding": (conv2d(padding=1), [(2, 3, 7, 5), (4, 3, 3, 3), (4,)]),
    "stride on an odd size": (conv2d(stride=2, padding=1), [(2, 3, 7, 5), (4, 3, 3, 3), (4,)]),
    "stride, padding and dilation by axis": (
        conv2d(stride=(2, 1), padding=(2, 0), dilation=(1, 2)),
        [(2, 3, 7, 6), (4, 3, 3, 2), (4,)],
    ),
    "padding by name": (conv2d(padding="same"), [(2, 3, 7, 5), (4, 3, 3, 3), (4,)]),
    "groups": (conv2d(groups=2), [(2, 4, 5, 5), (6, 2, 3, 3), (6,)]),
    "one channel, one image": (conv2d(padding=1), [(1, 1, 5, 5), (1, 1, 3, 3), (1,)]),
    "without bias": (lambda x, w: F.conv2d(x, w), [(2, 3, 5, 5), (4, 3, 3, 3)]),
    "an image without batch dimension": (conv2d(), [(3, 5, 5), (4, 3, 3, 3), (4,)]),
    "one dimension": (lambda x, w, b: F.conv1d(x, w, b, stride=2), [(2, 3, 9), (4, 3, 3), (4,)]),
    "three dimensions": (lambda x, w, b: F.conv3d(x, w, b), [(2, 1, 3, 4, 3), (2, 1, 2, 3, 2), (2,)]),
    "batch norm": (normalise, [(4, 3, 3, 2), (3,), (3,)]),
    "batch norm of vectors": (normalise, [(5, 3), (3,), (3,)]),
    "batch norm without scale and shift": (lambda x: F.batch_norm(x, None, None, training=True), [(4, 3, 3, 2)]),
    "max-pooling": (lambda x: F.max_pool2d(x, 2), [(2, 3, 5, 7)]),
    "max-pooling by axis": (lambda x: F.max_pool2d(x, (3, 2), (2, 1), 1, ceil_mode=True), [(2, 3, 6, 5)]),
    "average pooling": (lambda x: F.avg_pool2d(x, 2, padding=1), [(2, 3, 5, 7)]),
    "adaptive average pooling": (lambda x: F.adaptive_avg_pool2d(x, 1), [(2, 3, 5, 7)]),
    "max-pooling with indices": (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], [(2, 3, 5, 7)]),
    "max-pooling of an image": (lambda x: F.max_pool2d(x, 2), [(3, 5, 7)]),
    "average of channels last": (
        lambda x, w, b: F.adaptive_avg_pool2d(F.softplus(F.conv2d(x, w, b)), 1),
        [(2, 3, 5, 7), (4, 3, 3, 3), (4,)],
    ),
    "a block": (
        lambda x, w, b, g, s: F.max_pool2d(F.softplus(normalise(F.conv2d(x, w, b, padding=1), g, s)), 2),
        [(3, 2, 5, 5), (4, 2, 3, 3), (4,), (4,), (4,)],
    ),
}


def together(function: Function, tensors: list[Tensor]) -> Tensor:
    with TasksAsChannels():
        return vmap(function)(*tensors)


def one_by_one(function: Function, tensors: list[Tensor]) -> Tensor:
    return torch.stack([function(*parts) for parts in zip(*tensors, strict=True)])


def to_second_order(run: Any, function: Function, tensors: list[Tensor]) -> list[Tensor]:
    """Values, gradients of their weighted squares, and those gradients' product with a vector, differentiated again."""
    torch.manual_seed(1)
    values = run(function, tensors)
    grads = torch.autograd.grad(
        (values.square() * torch.randn(values.shape, dtype=values.dtype)).sum(), tensors, create_graph=True
    )
    along = sum((g * torch.randn(g.shape, dtype=g.dtype)).sum() for g in grads)
    return [values, *grads, *torch.autograd.grad(along, tensors)]


@pytest.mark.filterwarnings("error")  # vmap's of an operation that it does one task after another
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_values_and_both_derivatives_are_a_loop_s(case: str, tasks: int) -> None:
    function, shapes = CASES[case]
    torch.manual_seed(0)
    tensors = [draw(tasks, *shape) for shape in shapes]
    ours = to_second_order(together, function, tensors)
    for value, expected in zip(ours, to_second_order(one_by_one, function, tensors), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ["stride on an odd size", "groups", "batch norm", "one dimension"])
def test_derivatives_agree_with_finite_differences(case: str) -> None:
    function, shapes = CASES[case]
    torch.manual_seed(0)
    tensors = [draw(2, *shape) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *parts: together(function, list(parts)), tensors)
    assert torch.autograd.gradgradcheck(lambda *parts: together(function, list(parts)), tensors)


def test_a_scale_of_zero_keeps_its_second_derivative() -> None:
    torch.manual_seed(0)
    tensors = [draw(2, 4, 3, 2, 2), torch.zeros(2, 3, dtype=torch.float64, requires_grad=True), draw(2, 3)]
    ours = to_second_order(together, normalise, tensors)
    for value, expected in zip(ours, to_second_order(one_by_one, normalise, tensors), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shared", ["samples", "parameters", "both"])
def test_what_all_tasks_share_has_the_sum_of_their_gradients(shared: str) -> None:
    torch.manual_seed(0)
    x = draw(2, 3, 5, 5) if shared != "parameters" else draw(3, 2, 3, 5, 5)
    params = [draw(4, 3, 3, 3), draw(4)] if shared != "samples" else [draw(3, 4, 3, 3, 3), draw(3, 4)]
    in_dims = (0 if x.ndim == 5 else None, *(0 if params[1].ndim == 2 else None for _ in params))
    scale = draw(3)

    def network(x: Tensor, w: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return scale * F.max_pool2d(F.conv2d(x, w, b), 2).sum()

    def ours(*_: Any) -> Tensor:
        with TasksAsChannels():
            return vmap(network, in_dims=(*in_dims, 0))(x, *params, scale)

    def loop(*_: Any) -> Tensor:
        def part(t: Tensor, dim: int | None, task: int) -> Tensor:
            return t if dim is None else t[task]

        parts = ([part(t, d, task) for t, d in zip((x, *params), in_dims, strict=True)] for task in range(3))
        return torch.stack([network(*p, s) for p, s in zip(parts, scale, strict=True)])

    tensors = [x, *params, scale]
    for value, expected in zip(
        to_second_order(ours, network, tensors), to_second_order(loop, network, tensors), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def test_running_statistics_and_single_values_are_left_to_torch() -> None:
    norm = nn.BatchNorm2d(3).eval()
    x = torch.randn(2, 4, 3, 5, 5)
    with TasksAsChannels():
        assert torch.equal(vmap(norm)(x), torch.stack([norm(part) for part in x]))
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            vmap(lambda x: F.batch_norm(x, None, None, training=True))(torch.randn(2, 1, 3))


def test_inside_other_transforms_torch_serves() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 4, 2, 6, 6), torch.randn(2, 4, 2, 3, 3)
    with TasksAsChannels():
        nested = vmap(lambda x, w: vmap(lambda x: F.conv2d(x, w))(x))(x, w)
        slopes = grad(lambda w: vmap(F.conv2d)(x[:, 0], w).square().sum())(w)
    expected = torch.stack(
        [torch.stack([F.conv2d(part, weight) for part in parts]) for parts, weight in zip(x, w, strict=True)]
    )
    torch.testing.assert_close(nested, expected)
    weights = w.clone().requires_grad_()
    (reference,) = torch.autograd.grad(vmap(F.conv2d)(x[:, 0], weights).square().sum(), weights)
    torch.testing.assert_close(slopes, reference)


def test_autocast_convolves_in_bfloat16_and_gives_float32_gradients() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 2, 6, 6), torch.randn(2, 4, 2, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with TasksAsChannels():
            y = vmap(F.conv2d)(x, w)
        expected = torch.stack([F.conv2d(*parts) for parts in zip(x, w, strict=True)])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    (grad,) = torch.autograd.grad(y.float().square().sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), w)
    assert grad.dtype == second.dtype == torch.float32


WITHOUT_PRIVATE_NAMES = """
import warnings
import lightning
import torch.fx.experimental.proxy_tensor  # torch itself has imported the names by now
from torch._C import _functorch
from torch._functorch import pyfunctorch

for module, names in ((_functorch, {c_names}), (pyfunctorch, {names})):
    for name in names:
        delattr(module, name)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from meta_lightning import MAML
    from references import INNER_LR, classification, error, maml_loop, smooth_conv4
said = [str(w.message) for w in caught if "own rules for vmap" in str(w.message)]
assert len(said) == 1 and "{first}" in said[0], said
torch.set_default_dtype(torch.double)
torch.manual_seed(0)
network, batch = smooth_conv4(), classification(1, 16, 16)
learner = MAML(network, inner_lr=INNER_LR, inner_steps=2)
assert not learner.task_network.loops_over_tasks
print(error(learner.meta_gradient(batch)[0], maml_loop(network, batch, 2)))
"""


def test_without_the_private_names_torchs_own_rules_give_the_same_gradient() -> None:
    tree = ast.parse(Path(kernels.__file__).read_text())
    imports = {n.module: [a.name for a in n.names] for n in tree.body if isinstance(n, ast.ImportFrom)}
    c_names, names = imports["torch._C._functorch"], imports["torch._functorch.pyfunctorch"]
    script = WITHOUT_PRIVATE_NAMES.format(c_names=c_names, names=names, first=c_names[0])
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.splitlines()[-1]) < 1e-9
