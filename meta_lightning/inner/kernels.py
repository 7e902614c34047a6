"""Twice differentiable convolution, batch norm and pooling for all tasks of a ``vmap`` at once.

Tasks are folded into channels, ``S T*C …``, and stay so from layer to layer: a convolution with weights per task is a
grouped convolution, a batch norm with scale and shift per task has more channels. torch's own vmap rules permute the
maps of every pooling, its second derivatives loop over the groups of a convolution, and those of a batch norm take some
twenty kernels. ``benchmarks/results/speed.md`` has the gain of each.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import _add_batch_dim, _unwrap_batched, is_batchedtensor, peek_interpreter_stack
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter
from torch.autograd import Function
from torch.nn import functional as F

from meta_lightning.inner.exact import EXACT, Exact

aten = torch.ops.aten


class TasksAsChannels(Exact):
    """Calls ``EXACT`` and, directly under the vmap over tasks, ``REPLACEMENTS`` in place of torch's functions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the replacement, or the function itself."""
        around = peek_interpreter_stack() if func in REPLACEMENTS else None
        replacement = EXACT.get(func, func) if around is None or around.level() > 1 else REPLACEMENTS[func]
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
    # padding by name, a single image, or weights shared by all tasks: torch's own
    if isinstance(padding, str) or input.ndim == dims + 1 or not is_batchedtensor(weight):
        return getattr(torch, f"conv{dims}d")(input, weight, bias, stride, padding, dilation, groups)
    if torch.is_autocast_enabled(input.device.type):  # here: the backward of a Function runs without autocast
        input, weight, bias = autocast(input), autocast(weight), None if bias is None else autocast(bias)
    how = [[n] * dims if isinstance(n, int) else list(n) for n in (stride, padding, dilation)]

    flat = input.device.type == "cpu" and dims == 1  # as in two dimensions, for the sake of channels last
    if flat:
        how = [[1, *how[0]], [0, *how[1]], [1, *how[2]]]

    def of_tasks(tasks: int, x: Tensor, w: Tensor, b: Tensor | None = None) -> Any:
        x, w = (x.unsqueeze(2), w.unsqueeze(2)) if flat else (x, w)
        # grouped kernels are faster: on a CPU up to ten times, on a GPU by a tenth, where an image has several channels
        if x.ndim == 4 and (x.device.type == "cpu" or (x.device.type == "cuda" and w.shape[1] > 1)):
            x = x.contiguous(memory_format=torch.channels_last)
        y = Convolution.apply(x, w, b, (*how, tasks * groups))
        return y.squeeze(2) if flat else y

    return of_all_tasks(of_tasks, input, weight, bias)


def autocast(tensor: Tensor) -> Tensor:
    """As autocast casts the inputs of a convolution."""
    double = tensor.dtype == torch.float64
    return tensor if double else tensor.to(torch.get_autocast_dtype(tensor.device.type))


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
    if not training or running_mean is not None or input.numel() == channels:  # the last is an error in torch
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    weight = input.new_ones(channels) if weight is None else weight
    bias = input.new_zeros(channels) if bias is None else bias
    return of_all_tasks(lambda tasks, *folded: BatchNorm.apply(*folded, eps), input, weight, bias)


def pooling(pool: Callable[..., Any]) -> Callable[..., Any]:
    """A pooling function of torch for all tasks."""

    def of_tasks(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if input.ndim == 3 or kwargs.get("return_indices"):  # a single image, or with indices: torch's own
            return pool(input, *args, **kwargs)
        return of_all_tasks(lambda tasks, x: pool(x, *args, **kwargs), input)

    return of_tasks


def requires_grad(x: Tensor) -> Any:
    """``Tensor.requires_grad``, which is False of every tensor under vmap."""
    return _unwrap_batched(x, 1)[0].requires_grad


def refused_hook(tensor: Tensor, hook: Any) -> Any:
    """``Tensor.register_hook``: under vmap backward would not call it."""
    raise RuntimeError("a hook on a tensor is not called under vmap")


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    Tensor.register_hook: refused_hook,
    Tensor.requires_grad.__get__: requires_grad,  # type: ignore[attr-defined]
    torch.conv1d: convolution,
    torch.conv2d: convolution,
    torch.conv3d: convolution,
    F.batch_norm: batch_norm,
    F.max_pool2d: pooling(F.max_pool2d),
    F.avg_pool2d: pooling(F.avg_pool2d),
    F.adaptive_avg_pool2d: pooling(F.adaptive_avg_pool2d),
}


def of_all_tasks(function: Callable[..., Tensor], x: Tensor, *params: Tensor | None) -> Tensor:
    """Call a function of ``S C …`` and of parameters per channel once for all tasks of the surrounding vmap."""
    # as a Function with a vmap method would, at a tenth of the overhead
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
    """Concatenate the tasks' weights or biases.  # T O ..., tasks at ``dim`` -> T*O ..."""
    return (p.expand(tasks, *p.shape) if dim is None else p.movedim(dim, 0)).flatten(0, 1)


class Convolution(Function):
    """Convolution whose second derivative is one call of the backward kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, how: Any) -> Any:
        """Convolve.  # S C ..., O C/groups ..., O -> S O ..."""
        ctx.save_for_backward(x, w)
        ctx.how = stride, padding, dilation, groups = how
        return aten.convolution(x, w, b, stride, padding, dilation, False, [0], groups)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Gradients of the inputs that need one."""
        return *ConvolutionBackward.apply(g, *ctx.saved_tensors, ctx.needs_input_grad[:3], ctx.how), None


class ConvolutionBackward(Function):
    """``∂<g, x ∗ w + b>/∂(x, w, b)``, linear in g, x and w, so its derivatives use the same kernels."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, needed: Any, how: Any) -> Any:
        """Gradients of input, weight and bias; None where not needed."""
        ctx.save_for_backward(g, x, w)
        ctx.how = stride, padding, dilation, groups = how
        ctx.set_materialize_grads(False)
        return aten.convolution_backward(g, x, w, [len(w)], stride, padding, dilation, False, [0], groups, needed)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None) -> Any:
        """Gradients of ``<g, dx ∗ w + x ∗ dw + db>``."""
        g, x, w = ctx.saved_tensors
        terms = [] if dx is None else [Convolution.apply(dx, w, None, ctx.how)]
        terms += [] if dw is None else [Convolution.apply(x, dw, None, ctx.how)]
        terms += [] if db is None else [per_channel(db, g).expand_as(g)]
        by_x = by_w = None
        # x is paired with dw, and w with dx
        needed = (dw is not None and ctx.needs_input_grad[1], dx is not None and ctx.needs_input_grad[2], False)
        if any(needed):
            beside_w, beside_x = x if dx is None else dx, w if dw is None else dw
            by_x, by_w, _ = ConvolutionBackward.apply(g, beside_w, beside_x, needed, ctx.how)
        return sum(terms[1:], terms[0]) if terms else None, by_x, by_w, None, None


class BatchNorm(Function):
    """``γ x̂ + β`` with ``x̂ = (x − mean x) r`` by batch statistics, r being the inverse standard deviation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        """Normalise.  # S C ..., C, C -> S C ..."""
        y, mean, r = aten.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, r)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Gradients of x, γ and β."""
        return *BatchNormBackward.apply(g, *ctx.saved_tensors, ctx.eps), None


class BatchNormBackward(Function):
    """The gradients ``γ r P g``, ``Σ g x̂`` and ``Σ g`` of a batch norm.

    P removes the mean and the component along x̂ and is symmetric; with n values per channel ``∂x̂ = r P ∂x`` and
    ``∂r = −r²/n Σ x̂ ∂x``.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, r: Tensor, eps: float) -> Any:
        """Gradients of x, γ and β."""
        grads = aten.native_batch_norm_backward(g, x, weight, None, None, mean, r, True, eps, [True, True, True])
        ctx.save_for_backward(g, x, weight, mean, r, grads[1])
        ctx.eps = eps
        return grads

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dweight: Tensor, dbias: Tensor) -> Any:
        """Gradients of ``<dx, γ r P g> + <dγ, Σ g x̂> + <dβ, Σ g>`` with respect to g, x and γ."""
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
    """Reshape values per channel to broadcast over ``x``.  # C -> C 1 1"""
    return values.view(-1, *(1 for _ in x.shape[2:]))
