"""Convolution, batch norm and pooling of many tasks at once, under ``vmap`` and twice differentiable.

These three treat channels alike or in groups, so tasks stand side by side as channels, ``S T*C …``, and stay so from
layer to layer: a convolution with weights per task is one in groups, and a batch norm with scale and shift per task is
one of more channels. torch's own rules under vmap move the maps of a pooling there and back and scale a batch norm in
passes of their own; its second derivatives loop over the groups of a convolution and take some twenty passes for a
batch norm. What each is worth stands in ``benchmarks/results/speed.md``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import _add_batch_dim, _unwrap_batched, is_batchedtensor, peek_interpreter_stack
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


class TasksAsChannels(TorchFunctionMode):
    """While it is entered, these functions of torch give way to those of this file, whatever module calls them.

    Inside another transform of ``torch.func`` than the one ``vmap`` over tasks they stay torch's own.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the replacement, or what was called."""
        around = peek_interpreter_stack() if func in REPLACEMENTS else None
        replacement = func if around is None or around.level() > 1 else REPLACEMENTS[func]
        return replacement(*args, **(kwargs or {}))


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Any:
    """``torch.conv1d`` to ``conv3d``."""
    dims = weight.ndim - 2
    # padding by name, a single image, or weights that all tasks share: torch as it is
    if isinstance(padding, str) or input.ndim == dims + 1 or not is_batchedtensor(weight):
        return getattr(torch, f"conv{dims}d")(input, weight, bias, stride, padding, dilation, groups)
    if torch.is_autocast_enabled(input.device.type):  # here, since the backward of a Function runs without
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    how = [[n] * dims if isinstance(n, int) else list(n) for n in (stride, padding, dilation)]

    def of_tasks(tasks: int, x: Tensor, *params: Tensor | None) -> Any:
        if x.device.type == "cpu" and dims == 2:  # where groups are up to ten times faster so
            x = x.contiguous(memory_format=torch.channels_last)
        return Convolution.apply(x, *params, (*how, tasks * groups))

    return of_all_tasks(of_tasks, input, weight, bias)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """``F.batch_norm``."""
    channels = input.shape[1]
    if not training or running_mean is not None or input.numel() == channels:  # the last of which torch refuses
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    weight = input.new_ones(channels) if weight is None else weight
    bias = input.new_zeros(channels) if bias is None else bias
    return of_all_tasks(lambda tasks, *folded: BatchNorm.apply(*folded, eps), input, weight, bias)


def pooling(pool: Callable[..., Any]) -> Callable[..., Any]:
    """A pooling of torch's."""

    def of_tasks(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if input.ndim == 3 or kwargs.get("return_indices"):  # of a single image, or with indices: torch as it is
            return pool(input, *args, **kwargs)
        return of_all_tasks(lambda tasks, x: pool(x, *args, **kwargs), input)

    return of_tasks


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    torch.conv1d: convolution,
    torch.conv2d: convolution,
    torch.conv3d: convolution,
    F.batch_norm: batch_norm,
    F.max_pool2d: pooling(F.max_pool2d),
    F.avg_pool2d: pooling(F.avg_pool2d),
    F.adaptive_avg_pool2d: pooling(F.adaptive_avg_pool2d),
}


def of_all_tasks(function: Callable[..., Tensor], x: Tensor, *params: Tensor | None) -> Tensor:
    """Call a function of ``S C …`` and of parameters per channel once for all tasks of the vmap around it.

    What vmap does for a ``Function`` with a rule of its own, in a tenth of the time, which small tasks notice.
    """
    interpreter = retrieve_current_functorch_interpreter()
    assert isinstance(interpreter, VmapInterpreter)
    level, tasks = interpreter.level(), interpreter.batch_size()
    x, dim = _unwrap_batched(x, level)
    unwrapped = [(p, None) if p is None else _unwrap_batched(p, level) for p in params]
    with interpreter.lower():
        x = x.unsqueeze(1).expand(-1, tasks, *x.shape[1:]) if dim is None else x.movedim(dim, 1)
        folded = [p if p is None else by_task(p, dim, tasks) for p, dim in unwrapped]
        y = function(tasks, x.flatten(1, 2), *folded).unflatten(1, (tasks, -1))
    return _add_batch_dim(y, 1, level)


def by_task(p: Tensor, dim: int | None, tasks: int) -> Tensor:
    """The tasks' weights or biases one after another.  # T O ..., the tasks at ``dim`` -> T*O ..."""
    return (p.expand(tasks, *p.shape) if dim is None else p.movedim(dim, 0)).flatten(0, 1)


class Convolution(Function):
    """Convolution whose second derivative is one more call of the backward kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, how: Any) -> Any:
        """Convolve.  # S C ..., O C/groups ..., O -> S O ..."""
        ctx.save_for_backward(x, w)
        ctx.how = stride, padding, dilation, groups = how
        return aten.convolution(x, w, b, stride, padding, dilation, False, [0], groups)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """The gradients of those inputs that need one."""
        return *ConvolutionBackward.apply(g, *ctx.saved_tensors, ctx.needs_input_grad[:3], ctx.how), None


class ConvolutionBackward(Function):
    """``∂<g, x ∗ w + b>/∂(x, w, b)``, linear in g, in x and in w: hence its derivatives are the same kernels."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, needed: Any, how: Any) -> Any:
        """The gradients of input, weights and bias; None where not needed."""
        ctx.save_for_backward(g, x, w)
        ctx.how = stride, padding, dilation, groups = how
        ctx.set_materialize_grads(False)
        return aten.convolution_backward(g, x, w, [len(w)], stride, padding, dilation, False, [0], groups, needed)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None) -> Any:
        """The gradients of ``<g, dx ∗ w + x ∗ dw + db>``."""
        g, x, w = ctx.saved_tensors
        terms = [] if dx is None else [Convolution.apply(dx, w, None, ctx.how)]
        terms += [] if dw is None else [Convolution.apply(x, dw, None, ctx.how)]
        terms += [] if db is None else [per_channel(db, g).expand_as(g)]
        by_x = by_w = None
        # x stands beside dw, and w beside dx
        needed = (dw is not None and ctx.needs_input_grad[1], dx is not None and ctx.needs_input_grad[2], False)
        if any(needed):
            beside_w, beside_x = x if dx is None else dx, w if dw is None else dw
            by_x, by_w, _ = ConvolutionBackward.apply(g, beside_w, beside_x, needed, ctx.how)
        return sum(terms[1:], terms[0]) if terms else None, by_x, by_w, None, None


class BatchNorm(Function):
    """``γ x̂ + β`` with ``x̂ = (x − mean x) r``, by the batch's statistics; r is one over its standard deviation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        """Normalise.  # S C ..., C, C -> S C ..."""
        y, mean, r = aten.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, r)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """The gradients of x, γ and β."""
        return *BatchNormBackward.apply(g, *ctx.saved_tensors, ctx.eps), None


class BatchNormBackward(Function):
    """The gradients ``γ r P g``, ``Σ g x̂`` and ``Σ g`` of a batch norm.

    P takes away the mean and the part along x̂, and is symmetric; hence with n values a channel ``∂x̂ = r P ∂x`` and
    ``∂r = −r²/n Σ x̂ ∂x``.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, r: Tensor, eps: float) -> Any:
        """The gradients of x, γ and β."""
        grads = aten.native_batch_norm_backward(g, x, weight, None, None, mean, r, True, eps, [True, True, True])
        ctx.save_for_backward(g, x, weight, mean, r, grads[1])
        ctx.eps = eps
        return grads

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dweight: Tensor, dbias: Tensor) -> Any:
        """The gradients of ``<dx, γ r P g> + <dγ, Σ g x̂> + <dβ, Σ g>`` by g, x and γ."""
        g, x, weight, mean, r, g_along_x = ctx.saved_tensors
        ones = torch.ones_like(weight)
        rpd, dx_along_x, _ = BatchNormBackward.apply(dx, x, ones, mean, r, ctx.eps)
        rpg, _, _ = BatchNormBackward.apply(g, x, ones, mean, r, ctx.eps)
        by_weight = (rpd * g).transpose(0, 1).flatten(1).sum(1)
        normalised = (x - per_channel(mean, x)) * per_channel(r, x)
        by_g = torch.addcmul(per_channel(dbias, x), normalised, per_channel(dweight, x))
        by_g = by_g.addcmul(rpd, per_channel(weight, x))
        scale = -weight * r * len(r) / x.numel()  # −γ r / n
        by_x = normalised * per_channel(scale * by_weight, x)
        by_x = by_x.addcmul(rpd, per_channel(scale * g_along_x, x))
        by_x = by_x.addcmul(rpg, per_channel(dweight + scale * dx_along_x, x))
        return by_g, by_x, by_weight, None, None, None


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Values of channels, to be broadcast over ``x``.  # C -> C 1 1"""
    return values.view(-1, *(1 for _ in x.shape[2:]))
